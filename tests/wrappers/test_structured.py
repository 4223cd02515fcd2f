"""`output=` of every verb: the tokens of plain `generate` with what a grammar allows worked out by hand, and values."""

import asyncio
import dataclasses
import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

import pydantic
import pytest
import torch

import checkpoints
import lmkit
from checkpoints import texts, wrapper

NAMES = ["gpt2", "qwen3", "gpt_neox", "bloom", "llama", "mistral", "gemma2", "mamba", "phi3"]
CHOICES = ("yes", "no, not at all", "never")
ONE = lmkit.OneOf(*CHOICES)


@dataclasses.dataclass
class Thing:
    """Something short: a random model would write long texts."""

    kind: Literal["cat", "dog"]
    legs: Annotated[int, pydantic.Field(ge=0, le=9)]
    tags: Annotated[list[Literal["x", "y"]], pydantic.Field(max_length=2)]


def check_by_hand(name: str, prompt: str, found: Sequence[int], choices: Iterable[str] = CHOICES) -> None:
    """Check each token of an answer by plain forward passes: it continues a choice, and is the likeliest that does.

    Where a text can go on in one way only, any tokens that spell it do.
    """
    model, tokenizer = checkpoints.reference(name)
    spaces = ["".join(some) for n in range(3) for some in itertools.product([" ", "\n", "\r\n"], repeat=n)]
    whole = {space + choice for space in spaces for choice in choices}
    pieces = {n: piece(tokenizer, n) for n in range(len(tokenizer)) if n not in tokenizer.added_tokens_decoder}
    ids = checkpoints.inputs(name, [prompt])[0]
    text = ""
    for number, token_id in enumerate(found):
        rest = {one[len(text) :] for one in whole if one.startswith(text)}
        allowed = [n for n, one in pieces.items() if one and any(to_come.startswith(one) for to_come in rest)]
        assert token_id in allowed, (text, pieces[token_id])
        if len({to_come[:1] for to_come in rest}) > 1:
            with torch.no_grad():
                scores = model(torch.cat([ids, torch.tensor([found[:number]], dtype=torch.long)], 1)).logits[0, -1]
            assert scores[token_id] >= scores[allowed].max() - 1e-4, (text, pieces[token_id])
        text += pieces[token_id]
    assert text in whole


def piece(tokenizer: Any, token_id: int) -> str:
    """Return the text that a token writes; nothing for half a character."""
    name = str(tokenizer.convert_ids_to_tokens(token_id))
    if name.startswith("<0x"):
        return chr(int(name[3:5], 16)) if int(name[3:5], 16) < 128 else ""
    text = name.replace("▁", " ") if "▁" in name else str(tokenizer.decode([token_id]))
    return "" if "\N{REPLACEMENT CHARACTER}" in text else text


@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_the_likeliest_that_are_allowed(name: str) -> None:
    """Greedy rows, alone and in a padded batch, beside rows without an output, whose tokens are those of `generate`."""
    prompts = texts(name)
    outputs = [ONE if n % 2 else None for n in range(len(prompts))]
    for n, result in enumerate(wrapper(name)(prompts, output=outputs, max_new_tokens=30)):
        if n % 2:
            check_by_hand(name, prompts[n], result.token_ids)
            assert wrapper(name)(prompts[n], output=ONE, max_new_tokens=30).token_ids == result.token_ids
            assert result.value in CHOICES
            assert result.finish_reason == "eos"
        else:
            assert list(result.token_ids) == checkpoints.generated(name, [prompts[n]], max_new_tokens=30)[0]


def verbs(generator: Any, prompt: Any, **options: Any) -> dict[str, list[Any]]:
    """Return the results of a prompt by every verb."""

    async def streamed() -> list[Any]:
        return [chunk async for chunk in generator.astream([prompt], **options)]

    return {
        "call": [generator(prompt, **options)],
        "list": generator([prompt, prompt], **options),
        "map": list(generator.map([prompt, prompt], **options)),
        "stream": [list(generator.stream(prompt, **options))[-1].result],
        "acall": [asyncio.run(generator.acall(prompt, **options))],
        "astream": [asyncio.run(streamed())[-1].result],
        **({"chat": [generator.chat(prompt, **options)]} if not isinstance(prompt, str) else {}),
    }


@pytest.mark.parametrize("prompt", ["She", [{"role": "user", "content": "She"}]], ids=["text", "chat"])
def test_every_verb_gives_objects(prompt: Any) -> None:
    """A random model writes objects by every verb, and all verbs the same."""
    found = verbs(wrapper("qwen3"), prompt, output=Thing, max_new_tokens=120)
    values = {verb: [result.value for result in results] for verb, results in found.items()}
    assert all(isinstance(value, Thing) for some in values.values() for value in some), values
    assert len({repr(value) for some in values.values() for value in some}) == 1


def test_a_stream_has_the_value_with_its_last_chunk() -> None:
    """The chunks before have none, and say so."""
    *chunks, last = wrapper("gpt2").stream("She", output=Thing, max_new_tokens=120)
    assert "".join(chunk.text for chunk in [*chunks, last]) == last.result.text
    assert last.value == last.result.value
    with pytest.raises(lmkit.OutputError, match="the value comes with its last chunk"):
        chunks[0].value  # noqa: B018 - it raises


@pytest.mark.parametrize("rows", [["She"], ["She", "He"]])
def test_a_stream_shows_what_there_is_so_far(rows: list[str]) -> None:
    """Each chunk has the data of its row's text so far, and the last one's is that of the value."""
    seen = list(wrapper("gpt2").stream(rows, output=Thing, partial=True, max_new_tokens=120))
    for row in range(len(rows)):
        parts = [chunk.partial for chunk in seen if chunk.index == row]
        assert parts[-1] == dataclasses.asdict(seen[-1].value) or len(rows) > 1
        assert parts[-1].keys() == {"kind", "legs", "tags"}
        grown = [len(part or {}) for part in parts]
        assert grown == sorted(grown)
        assert grown[0] < 3
    with pytest.raises(lmkit.OptionError, match="partial=True shows what output= asks for"):
        wrapper("gpt2").stream("She", partial=True)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_drawn_rows_are_whole_and_their_own(name: str) -> None:
    """Completions drawn with a seed are all of the kind, and those of a single call, whoever runs beside them."""
    options: dict[str, Any] = {"output": ONE, "temperature": 1.5, "num_return_sequences": 4, "max_new_tokens": 30}
    alone = [wrapper(name)(prompt, seed=n, **options) for n, prompt in enumerate(texts(name)[:3])]
    together = wrapper(name)(texts(name)[:3], seed=[0, 1, 2], **options)
    for one, other in zip(alone, together, strict=True):
        values = [completion.value for completion in one.completions]
        assert set(values) <= set(CHOICES)
        assert values == [completion.value for completion in other.completions]
    assert len({c.value for result in alone for c in result.completions}) > 1


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_guesses_are_checked(name: str) -> None:
    """With `lookup=True` a row has the same tokens, in fewer passes where the prompt has the answer."""
    prompt = "no, not at all no, not at all n"
    expected = wrapper(name)(prompt, output=ONE, max_new_tokens=30)
    before = wrapper(name).stats.forwards
    assert wrapper(name)(prompt, output=ONE, max_new_tokens=30, lookup=True).token_ids == expected.token_ids
    assert wrapper(name).stats.forwards - before <= len(expected.token_ids)


def test_a_row_ends_where_nothing_else_fits() -> None:
    """No pass is made for the end token, and none is in the answer."""
    before = wrapper("gpt2").stats.forwards
    result = wrapper("gpt2")("She", output=ONE, max_new_tokens=30)
    assert result.generated_tokens == len(result.token_ids) == wrapper("gpt2").stats.forwards - before


def test_rows_begin_again_with_their_matcher() -> None:
    """A step that fails for want of memory takes nothing from the rows of a batch."""
    generator = wrapper("gpt2")
    prompts = texts("gpt2")[:4]
    expected = [result.token_ids for result in generator(prompts, output=Thing, max_new_tokens=100)]

    def fail(step: int, _inputs: Any) -> None:
        if step in (5, 9):
            raise torch.OutOfMemoryError("CUDA out of memory.")

    with checkpoints.before_forwards(generator.model, fail):
        found = generator(prompts, output=Thing, max_new_tokens=100)
    assert [result.token_ids for result in found] == expected
    assert all(isinstance(result.value, Thing) for result in found)


def test_a_text_that_was_cut_has_no_value() -> None:
    """Of a batch, only that row; its text is there, and so is the reason."""
    cut, whole = wrapper("gpt2")(["She", "He"], output=Thing, max_new_tokens=[3, 120])
    assert isinstance(whole.value, Thing)
    assert cut.text
    with pytest.raises(lmkit.OutputError, match=r"it was cut, with finish_reason='length'. Its text: ") as caught:
        cut.value  # noqa: B018 - it raises
    assert caught.value.text == cut.text
    assert cut.to_dict()["value"] is None
    assert cut.value_error == caught.value.reason
    assert whole.to_dict()["value"] == dataclasses.asdict(whole.value)


def test_what_does_not_validate_has_no_value() -> None:
    """What a grammar cannot hold, pydantic looks at: the reason is its."""
    kind = Annotated[Literal["cat"], pydantic.AfterValidator(lambda _: (_ for _ in ()).throw(ValueError("never")))]
    result = wrapper("gpt2")("She", output=kind, max_new_tokens=20)
    assert result.text.strip() == '"cat"'
    with pytest.raises(lmkit.OutputError, match=r"it is not what output= asked for .*never"):
        result.value  # noqa: B018 - it raises


def test_processors_and_penalties_act_among_what_is_allowed() -> None:
    """What is likeliest may be forbidden, and the answer is still whole; log-probabilities are the model's own."""
    generator = wrapper("gpt2")
    first = generator("She", output=ONE, max_new_tokens=30, logprobs=0)
    other = generator(
        "She", output=ONE, max_new_tokens=30, suppress_tokens=[first.token_ids[0]], repetition_penalty=1.5
    )
    assert other.value in CHOICES
    assert other.token_ids[0] != first.token_ids[0]
    ids, mask = checkpoints.inputs("gpt2", ["She"])
    with torch.no_grad():
        scores = checkpoints.reference("gpt2")[0](ids, attention_mask=mask).logits[0, -1].log_softmax(-1)
    assert first.logprobs[0].logprob == pytest.approx(float(scores[first.token_ids[0]]), abs=1e-4)


def test_no_token_left_fails_its_row_alone() -> None:
    """Options that forbid all that the grammar allows are told as such."""
    generator = wrapper("gpt2")
    every = list(range(len(generator.tokenizer)))
    with pytest.raises(lmkit.EngineError, match="row 0: the options leave no token") as caught:
        generator(["She", "He"], output=ONE, suppress_tokens=[every, [5]], max_new_tokens=30)
    assert caught.value.results[1].value in CHOICES


@pytest.mark.parametrize(
    "options, told",
    [
        ({"num_beams": 2}, "output and num_beams contradict"),
        ({"stop": "x"}, "output and stop contradict"),
        ({"stop_token_ids": [5]}, "output and stop_token_ids contradict"),
        ({"skip_special_tokens": False}, "output and skip_special_tokens=False contradict"),
        ({"output": {"type": "object"}}, "output={'type': 'object'} is not accepted: output takes a type"),
        ({"output": [Thing, None, None]}, "output has 3 values for 1 rows"),
        ({"output": lmkit.JSONSchema({"not": {}})}, 'cannot be held to: Unimplemented keys: ."not".'),
    ],
)
def test_what_contradicts_is_refused(options: dict[str, Any], told: str) -> None:
    """Before anything runs."""
    with pytest.raises(lmkit.OptionError, match=told):
        wrapper("gpt2")(["She"], **({"output": Thing} | options))


def test_types_that_look_like_lists_are_one_output() -> None:
    """An enumeration can be gone through, and `list[int]` asked for items: both are one value for all rows."""
    import enum

    kind = enum.Enum("kind", {"A": "a", "B": "b", "C": "c"})
    assert {type(result.value) for result in wrapper("gpt2")(["She", "He"], output=kind, max_new_tokens=20)} == {kind}
    short = Annotated[list[Literal[1, 2]], pydantic.Field(max_length=2)]
    results = wrapper("gpt2")(["She", "He"], output=[short, list[Literal[1]]], max_new_tokens=40)
    assert isinstance(results[0].value, list)


@pytest.mark.parametrize("name", ["bart", "t5", "m2m100", "mbart50", "nllb", "marian"])
def test_encoder_decoders_too(name: str) -> None:
    """An encoder-decoder's answer is one of some texts, behind the token that its config puts first."""
    words = words_of(name)
    result = wrapper(name)(texts(name)[0], output=lmkit.OneOf(*words), max_new_tokens=30, **checkpoints.languages(name))
    assert result.value in words
    assert result.finish_reason == "eos"
    drawn = wrapper(name)(
        texts(name)[:3],
        output=lmkit.OneOf(*words),
        temperature=2,
        seed=1,
        max_new_tokens=30,
        **checkpoints.languages(name),
    )
    assert {one.value for one in drawn} <= set(words)
    with pytest.raises(lmkit.OptionError, match="split='sentence' and output contradict"):
        wrapper(name)("She", output=lmkit.OneOf(*words), split="sentence", **checkpoints.languages(name))


def words_of(name: str) -> Sequence[str]:
    """Return some words that a family's tiny vocabulary has the letters of."""
    tokenizer = wrapper(name).tokenizer
    found = [word for text in texts(name) for word in text.split() if word.isalpha() and word.isascii()]
    return [word for word in dict.fromkeys(found) if tokenizer.unk_token_id not in tokenizer(word)["input_ids"]][:4]


def test_a_vocabulary_that_cannot_write_it_says_so() -> None:
    """T5 has no braces: no object can be asked of it."""
    with pytest.raises(lmkit.OptionError, match="no token of this checkpoint's vocabulary can begin such an answer"):
        wrapper("t5")("She", output=dict[str, int])


def test_a_wrapper_with_grammars_is_pickled() -> None:
    """What holds a grammar is not pickled with it, but made again."""
    import pickle

    generator = wrapper("gpt2")
    expected = generator("She", output=ONE, max_new_tokens=30)
    assert pickle.loads(pickle.dumps(expected)) == expected  # noqa: S301 - its own
    again = pickle.loads(pickle.dumps(generator))  # noqa: S301 - its own
    assert again("She", output=ONE, max_new_tokens=30).value == expected.value


def test_names_of_control_tokens_are_texts() -> None:
    """Where a text has to be that of a control token, it is spelled: the token would end the answer, or vanish."""
    generator = wrapper("gpt2")
    end = generator.tokenizer.eos_token
    for output in (lmkit.OneOf(f"a{end}b"), lmkit.Regex(f"x{re.escape(end)}y"), Literal[end]):  # type: ignore[valid-type]
        result = generator("She", output=output, max_new_tokens=60)
        assert end in result.value
        assert generator.tokenizer.eos_token_id not in result.token_ids


def test_an_end_that_the_grammar_does_not_allow_cuts() -> None:
    """A processor may put one there: then there is no value, of a pattern neither."""
    generator = wrapper("gpt2")
    end = generator.tokenizer.eos_token_id

    def stop(_token_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(scores, -torch.inf)
        forced[:, end] = 0
        return forced

    result = generator("She", output=lmkit.Regex("[ab]{8}"), processors=[stop], max_new_tokens=20)
    assert result.value_error == "it was cut, with finish_reason='stop'"


def test_a_blank_text_has_no_answer() -> None:
    """The model is not asked, so there is no value."""
    assert (
        wrapper("t5")("  \n", output=lmkit.Regex("a+")).value_error == "the text is blank, so the model was not asked"
    )


def test_what_a_callers_type_raises_is_of_its_row() -> None:
    """The other rows have their values."""

    @dataclasses.dataclass
    class Picky:
        """Raises whatever is given."""

        a: bool

        def __post_init__(self) -> None:
            raise KeyError(self.a)

    good, bad = wrapper("gpt2")(["She", "He"], output=[bool, Picky], max_new_tokens=30)
    assert isinstance(good.value, bool)
    assert bad.value_error is not None
    assert "KeyError" in bad.value_error or "it is not what output= asked for" in bad.value_error
    assert isinstance(hash(wrapper("gpt2")("She", output=list[Literal[1]], max_new_tokens=30)), int)
