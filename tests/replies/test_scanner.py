# ruff: noqa: E501, ISC004, S311 - answers are read whole, and draws are only draws

import itertools
import random
import re
from typing import Any

import pytest
import regex
from transformers.utils.chat_parsing import parse_response

from lmkit.replies import scanner as scanner_module
from lmkit.replies.asking import opening
from lmkit.replies.formats import Format, Region, declared, known
from lmkit.replies.scanner import Scanner

F = ("f", {"a": 7, "s": "x y"})
G = ("g", {})
TOOLS = {"f": {"properties": {"a": {"type": "integer"}, "s": {"type": "string"}}}, "g": {"properties": {}}}
JSON = '{"name": "f", "arguments": {"a": 7, "s": "x y"}}'
EMPTY = '{"name": "g", "arguments": {}}'

# What stands in a chat template; the prompt's end; an answer; its reasoning, calls and content.
Case = tuple[str, str, str, str, list[tuple[str, Any]], str]
CASES: dict[str, Case] = {
    "hermes": (
        "<tool_call> <think>", "", f"<think>\nhm\n</think>\n\nA\n<tool_call>\n{JSON}\n</tool_call>\n<tool_call>\n{EMPTY}\n"
        "</tool_call>B", "hm", [F, G], "A\n\nB",
    ),
    "hermes that thinks already": (
        "<tool_call> <think>", "<|im_start|>assistant\n<think>\n", f"hm</think><tool_call>{JSON}</tool_call>", "hm", [F], ""
    ),
    "hermes that has thought": (
        "<tool_call> <think>", "<|im_start|>assistant\n<think>\n\n</think>\n\n", f"A<tool_call>{JSON}</tool_call>", "", [F],
        "A",
    ),
    "smollm2": ("<tool_call>", "", f"<tool_call>[{JSON}, {EMPTY}]</tool_call>", "", [F, G], ""),
    "qwen3-coder": (
        "<tool_call><function=", "",
        "A <tool_call>\n<function=f>\n<parameter=a>\n7\n</parameter>\n<parameter=s>\nx y\n</parameter>\n</function>\n"
        "</tool_call> B<tool_call><function=g></function></tool_call>", "", [F, G], "A  B",
    ),
    "glm": (
        "<tool_call> <arg_key> </think>", "<think>",
        "hm</think>A<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>7</arg_value>\n<arg_key>s</arg_key>\n<arg_value>x y"
        "</arg_value>\n</tool_call>\n<tool_call>g</tool_call>", "hm", [F, G], "A",
    ),
    "llama": (
        "<|python_tag|>", "", '{"name": "f", "parameters": {"a": 7, "s": "x y"}}; {"name": "g", "parameters": {}}', "",
        [F, G], "",
    ),
    "llama with a tag": ("<|python_tag|>", "", 'A<|python_tag|>f.call(a=7, s="x y")<|eom_id|>', "", [F], "A"),
    "llama in python": ("<|python_tag|>", "", "[f(a=7, s='x y'), g()]", "", [F, G], ""),
    "mistral": ("[TOOL_CALLS]", "", f"A[TOOL_CALLS] [{JSON}, {EMPTY}]", "", [F, G], "A"),
    "mistral from 11 on": (
        "[TOOL_CALLS] [ARGS] [THINK]", "",
        '[THINK]hm[/THINK]A[TOOL_CALLS]f[ARGS]{"a": 7, "s": "x y"}[TOOL_CALLS]g[CALL_ID]123456789[ARGS]{}', "hm", [F, G],
        "A",
    ),
    "gemma 4": (
        "<|tool_call> <|channel>", "",
        '<|channel>thought\nhm<channel|>A<|tool_call>call:f{a:7,s:<|"|>x y<|"|>}<tool_call|><|tool_call>call:g{}<tool_call|>',
        "hm", [F, G], "A",
    ),
    "functiongemma": (
        "<start_function_call>", "", "<start_function_call>call:f{a:7,s:<escape>x y<escape>}<end_function_call>A", "", [F],
        "A",
    ),
    "granite 3": ("<|tool_call|>", "", f"<|tool_call|>[{JSON}, {EMPTY}]", "", [F, G], ""),
    "phi-4-mini": ("<|tool_call|>", "", f"A<|tool_call|>[{JSON}]<|/tool_call|>B", "", [F], "AB"),
    "deepseek 3": (
        "<｜tool▁calls▁begin｜> ```json <think>", "<｜Assistant｜><think>\n",
        "hm</think>A<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n"
        '{"a": 7, "s": "x y"}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>g\n```json\n{}\n```'
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>", "hm", [F, G], "A",
    ),
    "deepseek 3.1": (
        "<｜tool▁calls▁begin｜>", "",
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{"a": 7, "s": "x y"}<｜tool▁call▁end｜>'
        "<｜tool▁call▁begin｜>g<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>", "", [F, G], "",
    ),
    "gpt-oss": (
        "<|channel|>", "<|start|>assistant",
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>commentary<|message|>A<|end|><|start|>assistant"
        '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": 7, "s": "x y"}<|call|>', "hm", [F], "A",
    ),
    "gpt-oss that begins with a call": (
        "<|channel|>", "<|start|>assistant", " to=functions.g<|channel|>commentary json<|message|>{}", "", [G], "",
    ),
    "gpt-oss without a call": (
        "<|channel|>", "<|start|>assistant", "<|channel|>final<|message|>A", "", [], "A"
    ),
    "lfm2": (
        "<|tool_call_start|>", "", "A<|tool_call_start|>[f(a=7, s='x y'), g()]<|tool_call_end|>B", "", [F, G], "AB"
    ),
    "nothing known": ("{{ messages }}", "", f" <tool_call>{JSON}</tool_call>\n", "", [], f" <tool_call>{JSON}</tool_call>\n"),
}  # fmt: skip
CALLING = [name for name, case in CASES.items() if case[4]]
Read = tuple[str, str, tuple[Any, ...]]


def scanner(name: str, tools: Any = TOOLS) -> Scanner:
    """Begin to read an answer of a case's format."""
    form = known(CASES[name][0])
    return Scanner(form, opening(form, CASES[name][1], ""), tools)


def read(name: str, pieces: list[str], tools: Any = TOOLS) -> tuple[Read, list[tuple[str, str]]]:
    """Read an answer piece by piece; return what came of it, and what a stream shows."""
    one = scanner(name, tools)
    shown = [piece for text in pieces for piece in one.feed(text)] + one.finish()
    return (one.content, one.reasoning, tuple(one.calls)), shown


def letters(text: str) -> str:
    """Leave out white space, which is stripped around content and reasoning."""
    return re.sub(r"\s", "", text)


@pytest.mark.parametrize("name", CASES)
def test_each_format_is_read(name: str) -> None:
    """Reasoning, calls and content are what the model meant, and every call keeps what was written."""
    _, _, text, reasoning, calls, content = CASES[name]
    (found, thoughts, parsed), shown = read(name, [text])
    assert (thoughts, [(call.name, call.arguments) for call in parsed], found) == (reasoning, calls, content)
    assert [call.error for call in parsed] == [None] * len(calls)
    assert all(call.text in CASES[name][1] + text for call in parsed)
    assert "".join(piece for _, piece in shown) == text
    kinds = {kind for kind, piece in shown if piece}
    assert ("reasoning" in kinds, "tool_call" in kinds) == (bool(reasoning), bool(calls))


@pytest.mark.parametrize("name", CASES)
def test_a_stream_reads_as_the_whole(name: str) -> None:
    """Cut into characters or at random, an answer gives the same parts, and the same pieces when they are joined."""
    text, draws = CASES[name][2], random.Random(name)
    whole, shown = read(name, [text])
    for round_ in range(12):
        cuts = range(1, len(text)) if not round_ else sorted(draws.sample(range(1, len(text)), 5))
        pieces = [text[start:end] for start, end in itertools.pairwise([0, *cuts, len(text)])]
        found, streamed = read(name, pieces)
        assert found == whole
        assert joined(streamed) == joined(shown)


def joined(pieces: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Join neighbours of one kind."""
    groups = itertools.groupby(pieces, lambda piece: piece[0])
    return [(kind, "".join(text for _, text in group)) for kind, group in groups]


def nothing_is_lost(name: str, text: str) -> Read:
    """Check that every character is shown once, and is in one of the parts if it belongs to no marker."""
    (content, reasoning, calls), shown = read(name, [text])
    assert "".join(piece for _, piece in shown) == text
    kinds = {kind: "".join(t for k, t in shown if k == kind) for kind in ("content", "reasoning", "tool_call")}
    form = known(CASES[name][0])
    for region in form.regions:
        if region.kind == "content":
            kinds["content"] = region.opens.sub("", kinds["content"])
    for marker in (form.thoughts or ())[:2]:
        kinds["reasoning"] = kinds["reasoning"].replace(marker, "")
    assert letters(content) == letters(kinds["content"])
    assert letters(reasoning) == letters(kinds["reasoning"])
    assert letters(kinds["tool_call"]) in letters("".join(dict.fromkeys(call.text for call in calls)))
    assert all(call.error for call in calls if call.arguments is None)
    return content, reasoning, calls


@pytest.mark.parametrize("name", CASES)
def test_an_answer_may_be_cut_anywhere(name: str) -> None:
    """Wherever an answer is cut nothing raises and nothing is lost; what is not read as a call has an error."""
    _, _, text, _, calls, _ = CASES[name]
    for end in range(len(text)):
        cut = text[:end]
        (_, _, parsed) = found = nothing_is_lost(name, cut)
        assert read(name, [cut])[0] == found
        assert all((call.name, call.arguments) in calls for call in parsed if call.error is None)


@pytest.mark.parametrize("name", CALLING)
def test_what_is_no_call_keeps_its_text(name: str) -> None:
    """A call that is damaged is one with an error and its text, and what is around it is read as ever."""
    text, draws, errors = CASES[name][2], random.Random(name), list[str]()
    first = read(name, [text])[0][2][0].text
    for _ in range(150):
        at = text.rindex(first[-12:])
        place = draws.randrange(max(at - len(first), 0), at + 12)
        damaged = (
            text[:place]
            + draws.choice(["", "}", "{", '"', "\n", "<", "]", "\\", "é"])
            + text[place + draws.randint(0, 3) :]
        )
        found = nothing_is_lost(name, damaged)
        assert read(name, list(damaged))[0] == found
        errors += [call.error for call in found[2] if call.error is not None]
    assert len(errors) > 20


def test_reasoning_that_is_not_closed_is_reasoning() -> None:
    """A budget that ends in the middle of the reasoning leaves no content."""
    found, _ = read("hermes", ["<think>I wonder"])
    assert found == ("", "I wonder", ())
    assert read("hermes that thinks already", ["I wonder"])[0] == ("", "I wonder", ())


def test_markers_in_what_the_prompt_says_do_not_count() -> None:
    """Only the end of a prompt opens reasoning, not what a user says in it."""
    form = known("<think> <tool_call>")
    assert opening(form, "user: what is <think>?\nassistant:\n", "") == ""
    assert opening(form, "user: hi\nassistant:\n<think>\n", "") == "<think>\n"
    assert opening(form, "user: hi\nassistant: <thi", "") == "<thi"
    assert opening(form, "…<think>I know", "<think>I know") == "<think>I know"


def test_an_answer_in_json_is_no_call_without_tools() -> None:
    """Llama's calls have no marker: JSON that was asked for stays content where there are no tools."""
    text = '{"name": "Ada", "age": 36}'
    assert read("llama", [text], None)[0] == (text, "", ())
    assert read("llama", ["So: " + text])[0] == ("So: " + text, "", ())
    (content, _, calls), _ = read("llama", [text])
    assert (content, calls[0].text) == ("", text)
    assert calls[0].error is not None


def test_special_tokens_that_are_no_markers_are_no_content() -> None:
    """Names of special tokens are read as markers, and are neither shown nor content."""
    one = scanner("mistral")
    text = f" [{JSON}] B"
    pieces = one.feed("A", [(0, "<s>"), (1, "[TOOL_CALLS]")]) + one.feed(text[:-2]) + one.feed("", [(0, "</s>")])
    pieces += one.finish()
    assert "".join(piece for _, piece in pieces) == "A" + text[:-2]
    assert (one.content, pieces[0]) == ("A", ("content", "A"))
    assert one.calls[0].text.startswith("[TOOL_CALLS]")


def test_a_call_that_does_not_end_says_so() -> None:
    """A call whose marker does not come keeps its arguments where they can be read, and has an error."""
    (_, _, (call,)), _ = read("hermes", [f"<tool_call>{JSON}"])
    assert (call.name, call.arguments, call.error) == (*F, "the text ends before the call does")
    (_, _, (call,)), _ = read("hermes", [f"<tool_call>{JSON[:-9]}"])
    assert (call.arguments, call.error) == (None, "the text ends before the call does")


@pytest.mark.parametrize(
    "body", ["[" * 100_000, "9" * 10_000, '{"name": "f", "arguments": ' + "[" * 5_000, "f(" * 5_000]
)
@pytest.mark.parametrize("name", CALLING)
def test_hostile_calls_are_errors(name: str, body: str) -> None:
    """What would be too much for a parser is a call with an error like any other."""
    form = known(CASES[name][0])
    region = next(one for one in form.regions if one.kind == "tool_call" and not one.bare)
    opens = re.sub(r"\\(.)", r"\1", region.opens.pattern) if "(?:" not in region.opens.pattern else " to="
    (_, _, calls), shown = read(name, [opens, body])
    assert "".join(piece for _, piece in shown) == opens + body
    assert all(call.error for call in calls)


def test_a_checkpoints_pattern_may_take_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pattern that takes too long makes the rest content; nothing hangs."""
    monkeypatch.setattr(scanner_module, "SECONDS", 0.05)
    slow = Format((Region("reasoning", regex.compile(r"(a|aa)+(?<!a)b"), regex.compile("c")),))
    one = Scanner(slow, "", None)
    text = "a" * 60 + "!"
    pieces = one.feed(text) + one.feed("more") + one.finish()
    assert "".join(piece for _, piece in pieces) == text + "more" == one.content


# With a response template


def fallbacks() -> dict[str, Any]:
    """Return the response templates that transformers serves families with that have none."""
    from transformers.cli.serving.utils import _RESPONSE_TEMPLATE_FALLBACKS

    return {families[0]: template for families, template in _RESPONSE_TEMPLATE_FALLBACKS.items()}


ANSWERS = {
    "qwen2": (
        "<|im_start|>assistant\n",
        f"<think>\nhm\n</think>\n\nA\n<tool_call>\n{JSON}\n</tool_call>\n<tool_call>{EMPTY}</tool_call>",
    ),
    "qwen3_5": (
        "<|im_start|>assistant\n<think>\n",
        "hm\n</think>\n\nA\n\n" + CASES["qwen3-coder"][2][2:].partition(" B")[0],
    ),
    "gemma4": ("<|turn>model\n", CASES["gemma 4"][2] + "<turn|>"),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_a_response_template_is_read_as_transformers_reads_it(name: str) -> None:
    """Where a checkpoint brings a response template, the parts of an answer are those of transformers' own parser."""
    template, (prompt, text) = fallbacks()[name], ANSWERS[name]
    described = [
        {"type": "function", "function": {"name": n, "parameters": {"type": "object", **s}}} for n, s in TOOLS.items()
    ]
    expected = parse_response(text, template, prefix=prompt, tools=described)
    form = declared(template, "")
    for pieces in ([text], list(text)):
        one = Scanner(form, opening(form, prompt, ""), TOOLS)
        shown = [piece for part in pieces for piece in one.feed(part)] + one.finish()
        assert "".join(piece for _, piece in shown) == text
        assert (one.content, one.reasoning) == (expected["content"], expected["reasoning_content"])
        calls = [{"name": call.name, "arguments": call.arguments} for call in one.calls]
        assert calls == [call["function"] for call in expected["tool_calls"]]
        assert not any(call.error for call in one.calls)


def test_what_breaks_transformers_parser_does_not_break_this() -> None:
    """A cut call, and content on both sides of a call, which transformers' parser raises for and drops."""
    template = fallbacks()["qwen2"]
    text = f"A <tool_call>{JSON}</tool_call> B"
    assert parse_response(text, template, prefix="")["content"] == "B"
    one = Scanner(declared(template, ""), "", None)
    one.feed(text)
    one.finish()
    assert one.content == "A B"
    with pytest.raises(ValueError, match="JSON"):
        parse_response(text[:40], template, prefix="")
    one = Scanner(declared(template, ""), "", None)
    one.feed(text[:40])
    one.finish()
    assert (one.content, one.calls[0].text) == ("A", text[1:40])
    assert one.calls[0].error
