import asyncio
import inspect
import math
import pickle
import subprocess
import sys
from typing import Any

import pytest

import lmkit
from checkpoints import wrapper
from lmkit.testing import Call, FakeGenerator, FakeTranslator, FakeUnmasker

WITHOUT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "transformers", "numpy", "tokenizers", "safetensors", "accelerate"}:
            raise ImportError(f"{name} is not there")

sys.meta_path.insert(0, Absent())
import lmkit
assert "lmkit.testing" not in sys.modules
from lmkit.testing import FakeGenerator, FakeTranslator, FakeUnmasker
chat = [{"role": "user", "content": "Hello"}]
generator = FakeGenerator({"Hello": "Good day."})
assert isinstance(generator, lmkit.Generator)
print(generator.chat(chat, temperature=1).text, *generator.stream("Hello", seed=1))
print(generator.rank("Hello", ["a", "Good day."]))
print(FakeTranslator({"Hello.": "Hallo."})("Hello.", source="en", target="de"))
print(FakeUnmasker({"[MASK] day.": "Good"})("[MASK] day.", top_k=1))
"""


def greeting() -> FakeGenerator:
    """Return a fake with an answer, with several, and with one that fails."""
    return FakeGenerator({"Hello": "Good day to you.", "Bye": ["See you.", "Bye bye."], "out": MemoryError("full")})


def test_fakes_need_neither_torch_nor_transformers() -> None:
    """All three answer in an interpreter in which the heavy libraries cannot be imported."""
    run = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=False)
    told = ["Good day. Good  day. ", "Good day.", "Hallo.", "Good day."]
    assert (run.stderr, run.stdout.split("\n")) == ("", [*told, ""])


def test_a_fake_is_what_users_annotate() -> None:
    """`isinstance` holds, and the verbs are those of the real class, not others of the same name."""
    for fake, real in (
        (FakeGenerator({}), lmkit.Generator),
        (FakeTranslator({}), lmkit.Translator),
        (FakeUnmasker({}), lmkit.Unmasker),
    ):
        assert isinstance(fake, real)
        for verb in "__call__ map stream acall astream score ascore rank arank close".split():
            assert inspect.getattr_static(type(fake), verb) is inspect.getattr_static(real, verb)


def test_answers_come_from_a_table() -> None:
    """A text, a list of texts and a chat are answered, white space around the prompt aside."""
    generator = greeting()
    assert generator("Hello").text == "Good day to you."
    assert [str(one) for one in generator([" Hello\n", "Bye"])] == ["Good day to you.", "See you."]
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Bye"}]
    assert generator.chat([chat, chat])[1].text == generator(chat).text == "See you."
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]}]
    assert generator.chat(parts).text == "Good day to you."


def test_answers_come_from_a_function_of_prompt_and_options() -> None:
    """A function is told each row's own options, and what it returns is the answer."""
    generator = FakeGenerator(lambda prompt, options: f"{prompt} {options.get('temperature')}")
    assert [one.text for one in generator(["a", "b"], temperature=[0.5, None])] == ["a 0.5", "b None"]


def test_calls_are_noted() -> None:
    """`calls` has what each row was asked, as given, with its own options."""
    generator = greeting()
    chat = [{"role": "user", "content": "Bye"}]
    generator(["Hello", "Bye"], stop=[["x"], None], seed=3, temperature=1.0)
    generator.chat(chat)
    assert generator.calls == [
        Call("Hello", {"stop": ["x"], "seed": 3, "temperature": 1.0}),
        Call("Bye", {"seed": 3, "temperature": 1.0}),
        (chat, {}),
    ]


def test_a_prompt_that_the_table_lacks_is_an_error_that_says_so() -> None:
    """Nothing runs; the message has the prompt, the nearest one and all that there are."""
    with pytest.raises(lmkit.OptionError) as caught:
        greeting()(["Bye", "Helo"])
    assert str(caught.value) == (
        "row 1: the fake has no answer to 'Helo'. Did you mean 'Hello'? Its table has: 'Hello', 'Bye', 'out'. Add the "
        "prompt to it, or pass a function."
    )
    with pytest.raises(lmkit.OptionError, match="the answer to 'a' is 5: give a text, several, or an exception"):
        FakeGenerator(lambda *_: 5)("a")  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize(
    "options",
    [
        {"temperatur": 1},
        {"max_tokens": 3},
        {"temperature": "hot"},
        {"max_new_tokens": 0},
        {"temperature": [1, 2, 3]},
        {"num_beams": 2, "top_p": 0.5},
        {"num_return_sequences": 2},
        {"min_new_tokens": 9, "max_new_tokens": 3},
        {"template": {"a": 1}},
    ],
    ids=str,
)
def test_options_are_checked_as_the_real_ones_do(options: Any) -> None:
    """Each wrong option raises what a loaded model raises, word for word."""
    with pytest.raises(lmkit.LmkitError) as real:
        wrapper("llama")(["Hello", "Bye"], **options)
    with pytest.raises(type(real.value)) as fake:
        greeting()(["Hello", "Bye"], **options)
    assert str(fake.value) == str(real.value)


def test_only_the_assistants_message_is_continued_as_in_the_real_one() -> None:
    """Going on with a user's message raises what a loaded model raises."""
    chat = [{"role": "user", "content": "Hello"}]
    with pytest.raises(lmkit.OptionError) as real:
        wrapper("llama").chat(chat, continue_final_message=True)
    with pytest.raises(lmkit.OptionError) as fake:
        greeting().chat(chat, continue_final_message=True)
    assert str(fake.value) == str(real.value)


def test_a_budget_cuts_by_words_and_a_stop_string_cuts_before_itself() -> None:
    """`max_new_tokens` counts words; the reasons to end are told as those of a model."""
    generator = greeting()
    cut = generator("Hello", max_new_tokens=2)
    assert (cut.text, cut.finish_reason, cut.generated_tokens) == ("Good day", "length", 2)
    stopped = generator("Hello", stop=["to y", "nothing"])
    assert (stopped.text, stopped.finish_reason, stopped.stop_reason) == ("Good day ", "stop", "to y")
    whole = generator("Hello", logprobs=1)
    assert (whole.finish_reason, whole.stop_reason, whole.generated_tokens) == ("eos", None, 5)
    assert whole.logprobs is not None
    assert [one.token for one in whole.logprobs] == ["Good", " day", " to", " you.", "</s>"]


def test_several_answers_are_the_completions_in_turn() -> None:
    """Draws and beams take the answers one after the other, and begin again."""
    generator = greeting()
    for options in ({"temperature": 1.0}, {"num_beams": 3}):
        found = generator("Bye", num_return_sequences=3, **options).completions  # type: ignore[call-overload]
        assert [one.text for one in found] == ["See you.", "Bye bye.", "See you."]
    assert generator("Bye", temperature=1.0, seed=7).seed == 7


@pytest.mark.parametrize("options", [{}, {"max_new_tokens": 2}, {"stop": ["y to"]}], ids=str)
def test_a_streams_chunks_are_the_text(options: Any) -> None:
    """Joined they are the text that a call returns; the last of a row has its reason and its result."""
    generator = greeting()
    chunks = list(generator.stream(["Hello", "Bye"], **options))
    for row, prompt in enumerate(("Hello", "Bye")):
        own = [chunk for chunk in chunks if chunk.index == row]
        called = generator(prompt, **options)
        assert "".join(chunk.text for chunk in own) == called.text
        assert [chunk.finish_reason for chunk in own] == [None] * (len(own) - 1) + [called.finish_reason]
        assert own[-1].result is not None
        assert own[-1].result.completions == called.completions
        assert len(own) > 1


def test_asyncio_verbs_answer() -> None:
    """The asynchronous verbs return what the others do."""

    async def asked() -> list[Any]:
        generator = greeting()
        streamed = [chunk.text async for chunk in generator.astream("Hello")]
        scored = await generator.ascore("Hello", " Good day to you.")
        ranked = await generator.arank("Hello", ["No.", "Good day to you."])
        return [(await generator.acall("Hello")).text, "".join(streamed), scored.greedy, str(ranked)]

    assert asyncio.run(asked()) == ["Good day to you.", "Good day to you.", True, "Good day to you."]


def test_a_row_fails_as_the_real_ones_do() -> None:
    """An exception fails its row alone: the error has the results of the others, and its cause; map may return it."""
    generator = greeting()
    with pytest.raises(lmkit.EngineError, match="row 1: a step of the model failed: MemoryError: full") as caught:
        generator(["Hello", "out", "Bye"])
    assert [one and str(one) for one in caught.value.results] == ["Good day to you.", None, "See you."]
    assert isinstance(caught.value.__cause__, MemoryError)
    mapped = list(generator.map(iter(["Hello", "out", "lost", "Bye"]), on_error="return"))
    kinds = [type(one) for one in mapped]
    assert kinds == [lmkit.Generation, lmkit.EngineError, lmkit.OptionError, lmkit.Generation]
    with pytest.raises(lmkit.EngineError, match="row 0: full"):
        FakeGenerator({"a": lmkit.EngineError("full")})("a")
    with pytest.raises(lmkit.InputTooLongError, match="too long"):
        FakeGenerator({"a": lmkit.InputTooLongError("too long")})("a")


def test_map_is_lazy() -> None:
    """An endless iterable is read as its results are."""
    generator = FakeGenerator(lambda prompt, _: prompt * 2)
    found = generator.map(str(n) for n in iter(int, 1))
    assert [next(found).text for _ in range(300)] == ["00"] * 300
    assert len(generator.calls) < 3000


def test_scores_find_an_answer_likely() -> None:
    """A word of an answer has the probability 0.9, of any other text 0.1; so a ranking finds the table's answer."""
    generator = greeting()
    assert generator.score("Hello", " Good day to you.").token_logprobs == (math.log(0.9),) * 4
    assert generator.score(["Hello", "?"], " No.")[1].logprob == math.log(0.1)
    assert str(generator.rank("Hello", [" Well.", " Good day to you."], normalize="tokens")) == " Good day to you."
    translator = FakeTranslator({"Hello.": "Hallo."})
    assert str(translator.rank("Hello.", ["Nein.", "Hallo."], target="de")) == "Hallo."
    unmasker = FakeUnmasker({})
    assert unmasker.score("a b").logprob == 2 * math.log(0.1)
    assert str(unmasker.rank(["a b c", "a b"])) == "a b"


def test_a_translator_takes_languages_and_presets() -> None:
    """By default any language will do; those that are given have to be kept to, as of a checkpoint."""
    translator = FakeTranslator({"Hello.": "Hallo."})
    told = translator("Hello.", source="en", target="tlh")
    assert (told.text, told.source, told.source_language, told.target_language) == ("Hallo.", "Hello.", "en", "tlh")
    strict = FakeTranslator(lambda text, options: f"{text} {options}", languages=["en", "de"], presets=["short"])
    assert strict("Hello.", source="en", target="de").text == "Hello. {'source': 'en', 'target': 'de'}"
    assert strict("Hello.", preset="short").text == "Hello. {'preset': 'short'}"
    assert strict.presets == ("short",)
    with pytest.raises(lmkit.LanguageError, match="this checkpoint needs source=, one of: 'en', 'de'"):
        strict("Hello.", target="de")
    with pytest.raises(lmkit.OptionError, match="unknown preset 'shart'"):
        strict("Hello.", preset="shart")


def test_a_translator_splits_and_keeps_as_the_real_one() -> None:
    """Pieces are looked up one by one and joined, and placeholders that an answer changed are put right."""
    translator = FakeTranslator({"Hello {name}.": "Hallo {Name}.", "Bye.": "Tschüs."})
    found = translator("Hello {name}.  Bye.", source="en", target="de", split="sentence", keep="icu")
    assert found.text == "Hallo {name}.  Tschüs."
    assert [segment.notes for segment in found.segments if segment.notes] == [("repaired",), ("copied",)]
    assert "".join(chunk.text for chunk in translator.stream("Bye.", target="de")) == "Tschüs."


def test_an_unmasker_fills_with_candidates() -> None:
    """Words come best first with halved probabilities, as many as asked for, each in its place in the text."""
    unmasker = FakeUnmasker(
        {"I [MASK] you.": ["love", "see", "hear"], "<mask> and <mask>": [["cats", "birds"], ["dogs"]]}
    )
    found = unmasker("I [MASK] you.", top_k=2)
    assert [(one.text, round(one.score, 6)) for one in found.candidates] == [("I love you.", 0.5), ("I see you.", 0.25)]
    assert [one.token for one in found.masks[0].candidates] == ["love", "see"]
    pair = unmasker("<mask> and <mask>")
    assert [one.fills for one in pair.candidates] == [("cats", "dogs"), ("birds", "dogs")]
    assert [slot.candidates[0].token for slot in pair.masks] == ["cats", "dogs"]
    assert pair.candidates[0].text == "cats and dogs"
    named = unmasker("I [MASK] you.", targets=["fear", "see", "come from"])
    assert [one.token for one in named.candidates] == ["see", "fear", "come from"]
    assert [str(one) for one in unmasker.map(["I [MASK] you."])] == ["I love you."]
    assert [call.options for call in unmasker.calls] == [
        {"top_k": 2},
        {},
        {"targets": ["fear", "see", "come from"]},
        {},
    ]


def test_an_unmaskers_errors() -> None:
    """A text without a mask, too few lists of words, and a row that fails are errors that say so."""
    unmasker = FakeUnmasker({"[MASK] [MASK]": "one", "[MASK]": ValueError("broken"), "a": "b"})
    with pytest.raises(lmkit.OptionError, match="row 0 has no mask"):
        unmasker("a")
    with pytest.raises(lmkit.OptionError, match=r"row 0 has 2 masks, and its answer is \[\['one'\]\]"):
        unmasker("[MASK] [MASK]")
    with pytest.raises(lmkit.EngineError, match="a step of the model failed: ValueError: broken"):
        unmasker("[MASK]")


@pytest.mark.parametrize("kind", [FakeGenerator, FakeTranslator, FakeUnmasker])
def test_attributes_of_a_fake(kind: Any) -> None:
    """What a fake knows it says; what only a model has is an error that says that it is a fake."""
    fake = kind({"a": "b"})
    assert (fake.name, fake.plan.name, fake.precision, fake.plan.fits) == ("fake", "fake", "float32", True)
    assert fake.stats == lmkit.EngineStats(0, 0, 0, 0, 0, 0, 0, 0)
    assert "a fake has no weights" in str(fake.plan)
    assert fake.plan._repr_html_().startswith("<div")
    assert repr(fake) == f"<lmkit.testing.{kind.__name__}>"
    for name in ("model", "tokenizer", "device", "modules", "memory_bytes"):
        with pytest.raises(lmkit.EngineError, match=f"{kind.__name__} is a fake: it has no model"):
            getattr(fake, name)


@pytest.mark.parametrize("kind", [FakeGenerator, FakeTranslator, FakeUnmasker])
def test_closed_fakes_refuse(kind: Any) -> None:
    """Leaving the block closes: calls and mapped rows are refused as those of a closed model."""
    with kind({"[MASK]": "b"}) as fake:
        mapped = fake.map(["[MASK]"] * 3)
        assert next(mapped)
    assert repr(fake) == f"<lmkit.testing.{kind.__name__}, closed>"
    with pytest.raises(lmkit.EngineError, match="fake was closed and its memory given back"):
        fake("[MASK]")
    with pytest.raises(lmkit.EngineError, match="was closed"):
        fake.score("[MASK]", "b") if kind is not FakeUnmasker else fake.score("b")


def test_closing_ends_a_stream() -> None:
    """A stream that is under way when its fake is closed raises at its next word."""
    generator = greeting()
    stream = generator.stream("Hello")
    assert next(stream).text == "Good"
    generator.close()
    with pytest.raises(lmkit.EngineError, match="the model was closed"):
        next(stream)


def test_fakes_survive_pickling() -> None:
    """A pickled fake has the same table and the same languages, and was asked nothing yet."""
    generator = greeting()
    generator("Hello")
    copied = pickle.loads(pickle.dumps(generator))  # noqa: S301 - written in the line itself
    assert (copied("Hello").text, len(copied.calls)) == ("Good day to you.", 1)
    translator = FakeTranslator({"a": "b"}, languages=["en", "de"])
    copied = pickle.loads(pickle.dumps(translator))  # noqa: S301 - written in the line itself
    assert copied("a", source="en", target="de").target_language == "de"


def test_token_ids_are_prompts_too() -> None:
    """Ids that a fake has given are read back; an empty prompt is answered too."""
    generator = FakeGenerator({"one two": "three", "": "begun"})
    token_ids = generator._codec.encode("one two")
    assert generator(token_ids).text == "three"
    assert generator("").text == "begun"


def test_answers_are_data() -> None:
    """A fake's answer is read as a real one's: its value, or why it has none."""
    fake = FakeGenerator({"good": '{"a": 1}', "bad": "a"})
    good, bad = fake(["good", "bad"], output=dict[str, int])
    assert good.value == {"a": 1}
    assert bad.value_error is not None
    with pytest.raises(lmkit.OutputError, match="it is not what output= asked for"):
        assert bad.value
    again = lmkit.Generation.from_dict(good.to_dict())
    assert again == good
    assert again.value == {"a": 1}
