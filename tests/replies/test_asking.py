# ruff: noqa: E501, ISC004 - answers are read whole

import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from transformers.utils import get_json_schema

import chat_templates
import checkpoints
import lmkit
from chat_templates import TEMPLATES
from lmkit.replies.asking import Budget, _thinks, asked, form_of
from lmkit.replies.formats import Format, known
from lmkit.replies.scanner import Scanner
from lmkit.structured.grammars import Grammars
from lmkit.testing import FakeGenerator
from lmkit.text.codec import Codec

QUESTION = [{"role": "user", "content": "Is it warm in Ulm?"}]
CALL = '{"name": "weather", "arguments": {"city": "Ulm", "days": 2}}'
ANSWER = f"<think>\nI should look.\n</think>\n\nLet me see.\n<tool_call>\n{CALL}\n</tool_call>"


def weather(city: str, days: int = 1) -> dict[str, Any]:
    """Say how the weather is.

    Args:
        city: Where.
        days: For how many days.
    """
    return {"city": city, "degrees": [7] * days}


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a Qwen 3 whose chat template knows tools and reasoning, and whose markers are added tokens."""

    def edit(model: Any, tokenizer: Any) -> None:
        tokenizer.chat_template = TEMPLATES["thinking"]
        tokenizer.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])
        model.resize_token_embeddings(len(tokenizer))
        model.config.max_position_embeddings = tokenizer.model_max_length = 4096

    return checkpoints.fresh("qwen3", checkpoints.changed("qwen3", tmp_path_factory.mktemp("chat") / "qwen3", edit))


@contextmanager
def writing(generator: Any, text: str) -> Iterator[int]:
    """Let the model of one row write a text and its end; yield how many tokens that is."""
    tokenizer = generator.tokenizer
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.convert_tokens_to_ids("<|im_end|>")]
    step = itertools.count()

    def write(_step: int, logits: torch.Tensor) -> None:
        logits.fill_(-50.0)
        logits[..., ids[min(next(step), len(ids) - 1)]] = 50.0

    checkpoints.forget(generator)
    with checkpoints.on_logits(generator.model, write):
        yield len(ids)


def answered(generator: Any, text: str, messages: Any = QUESTION, **options: Any) -> Any:
    """Return what becomes of an answer, called and streamed."""
    with writing(generator, text) as length:
        result = generator(messages, **{"max_new_tokens": length, **options})
    with writing(generator, text) as length:
        chunks = list(generator.stream(messages, **{"max_new_tokens": length, **options}))
    assert "".join(chunk.text for chunk in chunks) == result.text
    assert chunks[-1].result.completions == result.completions
    assert all((chunk.finish_reason is None) == (chunk is not chunks[-1]) for chunk in chunks)
    return result, chunks


def test_an_answer_has_its_parts(generator: Any) -> None:
    """A chat's answer is parted into reasoning, content and calls; its text is what it was; streams tell them apart."""
    result, chunks = answered(generator, ANSWER, tools=[weather])
    assert (result.text, result.finish_reason) == (ANSWER, "eos")
    assert (result.reasoning, result.content) == ("I should look.", "Let me see.")
    (call,) = result.tool_calls
    assert (call.name, call.arguments, call.error) == ("weather", {"city": "Ulm", "days": 2}, None)
    kinds = [kind for kind, _ in itertools.groupby(chunk.kind for chunk in chunks)]
    assert kinds == ["reasoning", "content", "tool_call"]
    assert len([chunk for chunk in chunks if chunk.kind == "reasoning"]) > 3
    assert "".join(chunk.text for chunk in chunks if chunk.kind == "tool_call") == call.text


def test_two_turns(generator: Any) -> None:
    """The answer's message and those of its calls, appended, are rendered as plain transformers renders them."""
    result, _ = answered(generator, ANSWER, tools=[weather])
    messages = [*QUESTION, result.message, *lmkit.call_tools(result, [weather])]
    second, _ = answered(generator, "<think>\n\n</think>\n\nIt is.", messages, tools=[weather])
    assert (second.content, second.reasoning, second.tool_calls) == ("It is.", "", ())
    expected = generator.tokenizer.apply_chat_template(
        [
            *QUESTION,
            {
                "role": "assistant", "content": "Let me see.", "reasoning_content": "I should look.",
                "tool_calls": [{"type": "function", "function": json.loads(CALL)}],
            },
            {"role": "tool", "name": "weather", "content": '{"city": "Ulm", "degrees": [7, 7]}'},
        ],
        tools=[weather], add_generation_prompt=True, tokenize=False,
    )  # fmt: skip
    assert second.prompt == expected
    assert CALL in expected


def test_what_is_wrong_with_a_call_is_flagged(generator: Any) -> None:
    """Arguments are checked against the tools that were given, in template= as well; without tools they are not."""
    text = ANSWER.replace('"days": 2', '"hours": 2')
    for options in ({"tools": [weather]}, {"template": {"tools": [weather]}}):
        (call,) = answered(generator, text, **options)[0].tool_calls
        assert "'hours', which is none of 'city', 'days'" in call.error
        assert call.arguments == {"city": "Ulm", "hours": 2}
    assert answered(generator, text)[0].tool_calls[0].error is None


def test_a_cut_answer_has_what_there_is(generator: Any) -> None:
    """Whatever the budget of tokens, nothing raises and the parts are those of the text so far."""
    with writing(generator, ANSWER) as length:
        pass
    for budget in range(1, length):
        result, _ = answered(generator, ANSWER, max_new_tokens=budget)
        assert result.finish_reason == "length"
        assert ANSWER.startswith(result.text)
        assert all(call.error for call in result.tool_calls) or result.text == ANSWER
        assert "I should look.".startswith(result.reasoning)
        assert "Let me see.".startswith(result.content)


def test_texts_are_not_parted(generator: Any) -> None:
    """Of a prompt that is no chat all is content, markers included."""
    result, chunks = answered(generator, ANSWER, "She")
    assert result.content == result.text
    assert (result.reasoning, result.tool_calls) == ("", ())
    assert {chunk.kind for chunk in chunks} == {"content"}
    for name, value in (("tools", [weather]), ("thinking", True), ("tool_choice", "auto")):
        with pytest.raises(lmkit.OptionError, match=f"row 0 is a text, and {name}= belongs to chats"):
            generator("She", **{name: value})


def test_special_tokens_are_markers(tmp_path: Path) -> None:
    """Markers that are special tokens are read though they are not in the text; other special tokens are no content."""

    def edit(model: Any, tokenizer: Any) -> None:
        tokenizer.chat_template = TEMPLATES["thinking"].replace("<tool_call>", "[TOOL_CALLS]").replace("think>", "x>")
        tokenizer.add_tokens(["[TOOL_CALLS]"], special_tokens=True)
        model.resize_token_embeddings(len(tokenizer))

    generator = checkpoints.fresh("qwen3", checkpoints.changed("qwen3", tmp_path / "qwen3", edit))
    body = f"[{CALL}]"
    for options in ({}, {"num_beams": 2}):
        result, chunks = answered(generator, f"Well.<|im_start|>[TOOL_CALLS]{body}", **options)
        assert (result.text, result.content) == (f"Well.{body}", "Well.")
        assert result.tool_calls[0].arguments == {"city": "Ulm", "days": 2}
        assert [(chunk.kind, chunk.text) for chunk in chunks if chunk.text][-1][0] == "tool_call"
    shown, _ = answered(generator, f"Well.[TOOL_CALLS]{body}", skip_special_tokens=False)
    assert (shown.text, shown.content) == (f"Well.[TOOL_CALLS]{body}", "Well.")
    stopped, _ = answered(generator, f"Well.[TOOL_CALLS]{body}", stop="arguments")
    assert (stopped.content, stopped.tool_calls[0].text) == ("Well.", '[TOOL_CALLS][{"name": "weather", "')


def test_several_completions_are_parted_each(generator: Any) -> None:
    """Of several completions each has its parts."""
    with writing(generator, "<think>hm</think>"):
        result = generator(QUESTION, num_return_sequences=2, temperature=1.0, seed=1, max_new_tokens=1)
    assert [one.reasoning for one in result.completions] == [
        one.text.partition("<think>")[2] for one in result.completions
    ]
    assert len(result.completions) == 2


def test_thoughts_that_the_last_message_has_begun_go_on(generator: Any) -> None:
    """Where a chat is continued in the middle of its reasoning, what comes is reasoning."""
    chat = [*QUESTION, {"role": "assistant", "content": "<think>\nI"}]
    result, _ = answered(generator, " know.</think>Yes.", chat, continue_final_message=True)
    assert (result.reasoning, result.content) == ("know.", "Yes.")


# What may be asked


def test_what_contradicts_is_refused(generator: Any, tmp_path: Path) -> None:
    """Tools twice, a choice that is none, a template without tools or thinking: each is an OptionError that says so."""
    for options, told in [
        ({"tools": [weather], "template": {"tools": [weather]}}, "contradict each other"),
        ({"tool_choice": "required"}, "'required' or the name of a tool in tools=, which has none"),
        ({"tools": [weather], "tool_choice": "wether"}, "which has 'weather'"),
        ({"thinking": True, "template": {"enable_thinking": False}}, "contradict each other"),
        ({"thinking": -1}, "thinking takes True, False or a number of tokens"),
        ({"tools": "weather"}, "tools takes a list of functions"),
    ]:
        with pytest.raises(lmkit.OptionError, match=told):
            generator(QUESTION, **options)

    def edit(_model: Any, tokenizer: Any) -> None:
        tokenizer.chat_template = TEMPLATES["chatml"] + "{% if tools and false %}{% endif %}"

    plain = checkpoints.fresh("qwen3", checkpoints.changed("qwen3", tmp_path / "qwen3", edit))
    with pytest.raises(lmkit.OptionError, match="writes no tools, such as 'weather'"):
        plain(QUESTION, tools=[weather])
    with pytest.raises(lmkit.OptionError, match="no choice of thinking"):
        plain(QUESTION, thinking=False)


def test_the_template_is_told_whether_to_think(generator: Any) -> None:
    """`thinking=` is what the template calls it; the prompt is that of plain transformers."""
    for thinking in (True, False):
        with writing(generator, "Yes."):
            result = generator(QUESTION, thinking=thinking, max_new_tokens=3)
        expected = generator.tokenizer.apply_chat_template(
            QUESTION, add_generation_prompt=True, tokenize=False, enable_thinking=thinking
        )
        assert result.prompt == expected


@pytest.mark.parametrize("lookup", [False, True])
def test_a_budget_ends_the_reasoning(generator: Any, *, lookup: bool) -> None:
    """After as many tokens the closing marker is forced, once; reasoning that ended before is left alone."""
    tokenizer = generator.tokenizer
    close = tokenizer.convert_tokens_to_ids("</think>")
    text = "<think>" + "I wonder and wonder. " * 20
    for budget in (1, 5, 9):
        with writing(generator, text):
            result = generator(QUESTION, thinking=budget, max_new_tokens=30, lookup=lookup)
        assert result.token_ids.index(close) == budget
        assert result.token_ids.count(close) == 1
        assert "<think>" + result.reasoning == tokenizer.decode(result.token_ids[:budget]).strip()
        assert result.content == tokenizer.decode(result.token_ids[budget + 1 :]).strip()
    short, _ = answered(generator, "<think>So.</think>" + "Yes. " * 9, thinking=8)
    assert (short.reasoning, short.token_ids.count(close)) == ("So.", 1)
    plain, _ = answered(generator, "Yes. " * 9, thinking=4)
    assert close not in plain.token_ids


def test_a_budget_may_differ_by_row(generator: Any) -> None:
    """Rows of a batch have budgets of their own."""
    close = generator.tokenizer.convert_tokens_to_ids("</think>")
    think = generator.tokenizer.convert_tokens_to_ids("<think>")

    def write(_step: int, logits: torch.Tensor) -> None:
        logits.fill_(-50.0)
        logits[..., think] = 50.0

    checkpoints.forget(generator)
    with checkpoints.on_logits(generator.model, write):
        results = generator([QUESTION] * 3, thinking=[2, None, 5], max_new_tokens=8)
    assert [[place for place, one in enumerate(r.token_ids) if one == close] for r in results] == [[2], [], [5]]


def test_a_marker_of_several_tokens_is_forced_whole() -> None:
    """Where the closing marker is no token of its own, all of its tokens are forced, one at each step."""
    tokenizer = checkpoints.reference("gpt2")[1]
    codec = Codec(tokenizer)
    closing = codec.encode("</think>", special=False)
    assert len(closing) > 1
    budget = Budget(codec, partial(Scanner, known("<think>"), "<think>", None), closing, 2, 3)
    ids = [0, 0, *codec.encode("I wonder and wonder", special=False)[:3]]
    assert torch.equal(budget(torch.tensor([ids[:4]]), torch.zeros(1, 9999)), torch.zeros(1, 9999))
    for token_id in closing:
        scores = budget(torch.tensor([ids]), torch.zeros(1, len(tokenizer)))
        assert scores.argmax().item() == token_id
        assert scores.isfinite().sum() == 1
        ids.append(token_id)
    assert torch.equal(budget(torch.tensor([ids]), torch.ones(1, 5)), torch.ones(1, 5))


def test_a_fake_calls_tools_too(generator: Any) -> None:
    """A fake's answer to a chat has the parts that a model's has, called and streamed, by Hermes' markers."""
    fake = FakeGenerator({QUESTION[0]["content"]: ANSWER})
    schema = get_json_schema(weather)
    found, expected = fake(QUESTION, tools=[schema]), answered(generator, ANSWER, tools=[schema])[0]
    assert (found.message, found.tool_calls) == (expected.message, expected.tool_calls)
    chunks = list(fake.stream(QUESTION, tools=[schema]))
    assert [kind for kind, _ in itertools.groupby(chunk.kind for chunk in chunks)] == [
        "reasoning",
        "content",
        "tool_call",
    ]
    assert lmkit.call_tools(found, [weather])[0]["content"] == '{"city": "Ulm", "degrees": [7, 7]}'


# Grammars


def fits(codec: Codec, form: Format, choice: str, text: str, *, thinking: bool = False) -> bool:
    """Say whether a text, all of it and nothing but it, fits what a choice of tools holds an answer to."""
    special = {name: number for number, name in codec.names.items()}
    grammar = form.grammar(TOOLS, choice, special)
    grammars = Grammars(codec, [codec.tokenizer.eos_token_id], encodes=False)
    one = grammars.of(lmkit.Grammar(grammar), form.before(special, thinking=thinking))()
    ids = codec.encode(text, special=False)
    if one.fitting(ids) != ids:
        return False
    one.read(ids)
    return one.complete


CITY = {
    "type": "object", "properties": {"city": {"type": "string"}, "at": {"$ref": "#/$defs/At"}}, "required": ["city"],
    "$defs": {"At": {"type": "object", "properties": {"hour": {"type": "integer"}}}},
}  # fmt: skip
TOOLS = {"weather": CITY, "time": None}
GRAMMARS = {
    "<tool_call> <think>": ("<tool_call>\n{}\n</tool_call>", "arguments"),
    "[TOOL_CALLS]": ("[TOOL_CALLS][{}]", "arguments"),
    "<|python_tag|>": ("{}", "parameters"),
    "<|tool_call|>": ("<|tool_call|>[{}]", "arguments"),
}


@pytest.mark.parametrize("template", GRAMMARS)
def test_a_call_can_be_held_to_a_grammar(template: str) -> None:
    """The grammar takes a call of the right names and types, after reasoning too, and nothing else."""
    codec, form, (shape, word) = Codec(chat_templates.byte_level()), known(template), GRAMMARS[template]

    def call(name: str, arguments: Any) -> str:
        return shape.format(json.dumps({"name": name, word: arguments}))

    for opened in ("", "<think>", "<think>\n") if form.thoughts else ("",):
        thinking = bool(opened)
        assert _thinks(Scanner(form, opened, None)) == thinking
        before = "I wonder.\n</think>\n\n" if thinking else ""
        for text, one, named in [
            (call("weather", {"city": "Ulm"}), True, True), (call("time", {}), True, False),
            (call("weather", {"city": 7}), False, False), (call("whether", {"city": "Ulm"}), False, False),
            (call("weather", {"city": "Ulm", "x": 1}), False, False),
            (call("weather", {"city": "Ulm", "at": {"hour": 3}}), True, True),
            (call("weather", {"city": "Ulm", "at": {"minute": 3}}), False, False),
            (call("time", {}).replace('": ', '":\n'), True, False),
            (call("time", {}).replace('": ', '":' + "\n" * 20), False, False), ("Well, " + call("time", {}), False, False),
        ]:  # fmt: skip
            assert fits(codec, form, "required", before + text, thinking=thinking) == one
            assert fits(codec, form, "weather", before + text, thinking=thinking) == named
        if form.thoughts and not thinking:
            assert fits(codec, form, "required", "<think>hm</think>\n\n" + call("time", {}))


@pytest.mark.parametrize(
    "template, text",
    [
        ("[TOOL_CALLS] [ARGS]", '[TOOL_CALLS]weather[ARGS]{"city": "Ulm"}'),
        ("<｜tool▁calls▁begin｜>", '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{"city": "Ulm"}'
         "<｜tool▁call▁end｜><｜tool▁calls▁end｜>"),
        ("<｜tool▁calls▁begin｜> ```json", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
         '{"city": "Ulm"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>'),
        ("<|channel|>", '<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city": "Ulm"}<|call|>'),
    ],
)  # fmt: skip
def test_a_named_call_can_be_held_to_a_grammar(template: str, text: str) -> None:
    """Formats whose name stands before the arguments have grammars as well, and what they write is read as a call."""
    codec, form = Codec(chat_templates.byte_level()), known(template)
    assert fits(codec, form, "weather", text)
    assert fits(codec, form, "required", text)
    assert not fits(codec, form, "weather", text.replace("weather", "time"))
    assert not fits(codec, form, "required", text.replace("city", "town"))
    one = Scanner(form, "", TOOLS)
    one.feed(text)
    one.finish()
    assert [(call.name, call.arguments, call.error) for call in one.calls] == [("weather", {"city": "Ulm"}, None)]


def test_calls_that_are_no_json_cannot_be_held() -> None:
    """A format whose arguments are no JSON, or none that is known, is an OptionError."""
    for template in ("<tool_call> <function=", "<|tool_call_start|>", "nothing"):
        with pytest.raises(lmkit.OptionError, match="needs a checkpoint whose calls are JSON"):
            known(template).grammar(TOOLS, "required", {})


@pytest.mark.parametrize("thinking", [True, False, 4])
def test_a_choice_of_tools_makes_a_call(generator: Any, thinking: Any) -> None:
    """A model with random weights writes a call of the tool that is asked for, behind its reasoning if it reasons."""
    for seed in range(3):
        result = generator(
            QUESTION,
            tools=[flip],
            tool_choice="required",
            thinking=thinking,
            temperature=1.0,
            seed=seed,
            max_new_tokens=400,
        )
        (call,) = result.tool_calls
        assert (call.name, call.error, result.content, result.finish_reason) == ("flip", None, "", "eos")
        assert call.arguments["side"] in ("heads", "tails")
    with pytest.raises(lmkit.OptionError, match="tool_choice and output contradict"):
        generator(QUESTION, tools=[flip], tool_choice="flip", output=int)


def test_a_value_comes_behind_the_reasoning(generator: Any) -> None:
    """`output=` holds for what comes behind the reasoning, and the value is made of the content."""
    with writing(generator, "<think>7 or 8?</think>\n12") as length:
        result = generator(QUESTION, output=lmkit.OneOf("12", "7"), max_new_tokens=length)
    assert (result.value, result.reasoning, result.content) == ("12", "7 or 8?", "12")


def flip(side: Literal["heads", "tails"]) -> str:
    """Flip a coin.

    Args:
        side: Which one.
    """
    return side


def test_the_names_of_reasoning_are_the_templates(generator: Any) -> None:
    """A message has its reasoning by the name that the chat template reads."""
    codec = Codec(generator.tokenizer)
    assert asked(generator._chats, codec, {}).reasoning_name == "reasoning_content"
    other = {"chat_template": "{% for m in messages %}{{ m.content }}{{ m.thinking }}{% endfor %}"}
    assert asked(generator._chats, codec, {"template": other}).reasoning_name == "thinking"


def test_a_response_template_that_is_none_is_not_asked(generator: Any) -> None:
    """A checkpoint's response template is used where it is one; else what its chat template lets expect."""
    tokenizer = generator.tokenizer
    own = {"start_anchor": "<|im_start|>assistant\n", "fields": {"thinking": {"open": "<a>", "close": "</a>"}}}
    for template, anchored in ((own, True), ({"fields": 3}, False), ("text", False)):
        tokenizer.response_template = template
        try:
            assert (form_of(Codec(tokenizer), tokenizer.chat_template).anchor is not None) == anchored
            if anchored:
                assert answered(generator, "<a>hm</a>Yes.")[0].reasoning == "hm"
        finally:
            tokenizer.response_template = None
