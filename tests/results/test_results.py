import dataclasses
import json
import math
import pickle
from typing import Any

import pytest

import lmkit
from checkpoints import wrapper
from html_page import Page
from lmkit import results

TIMING = results.Timing(2.0, 0.5, 1.5)
LOGPROB = results.TokenLogprob("a", 1, -0.5, (results.TokenLogprob("b", 2, -math.inf),))
CALL = results.ToolCall("f", {"a": [1]}, "f(a=[1])")
COMPLETION = results.Completion(
    "a <b>", (1, 2), None, "stop", "x", (LOGPROB,), 3, content="a", reasoning="b", tool_calls=(CALL,)
)
GENERATION = results.Generation("<script>alert(1)</script>", (COMPLETION,), 4, 7, False, TIMING)  # noqa: FBT003
TRANSLATION = results.Translation(
    *(getattr(GENERATION, field.name) for field in dataclasses.fields(GENERATION)),
    source="<i>", source_language="en", target_language=None,
    segments=(results.Segment(0, 3, 0, 5),),
)  # fmt: skip
CANDIDATE = results.Candidate("a & b", ("a",), ("a",), (1,), (-1.5,), (0,))
UNMASKING = results.Unmasking("[MASK] <b>", (results.MaskSlot(0, 6, (CANDIDATE,), 0, 10),), (CANDIDATE,))
CHUNK = results.TextChunk("<p>", 1, "eos")
ALL = [TIMING, LOGPROB, CALL, COMPLETION, GENERATION, TRANSLATION, CANDIDATE, UNMASKING, CHUNK]
NAMES = [type(result).__name__ for result in ALL]


@pytest.mark.parametrize("result", ALL, ids=NAMES)
def test_results_are_frozen_slotted_and_comparable(result: Any) -> None:
    """A result cannot be changed or grow attributes, can be hashed, and equals its copy."""
    name = dataclasses.fields(result)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(result, name, None)
    with pytest.raises((AttributeError, TypeError)):
        object.__setattr__(result, "other", 1)
    assert dataclasses.replace(result) == result
    assert hash(dataclasses.replace(result)) == hash(result)


@pytest.mark.parametrize("result", ALL, ids=NAMES)
def test_results_survive_pickling(result: Any) -> None:
    """A pickled result comes back equal, nested ones too."""
    assert pickle.loads(pickle.dumps(result)) == result  # noqa: S301 - written in the line itself


@pytest.mark.parametrize("result", ALL, ids=NAMES)
def test_to_dict_is_plain_json(result: Any) -> None:
    """`to_dict` has every field in types that strict JSON can write and read back unchanged."""
    plain = result.to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert {field.name for field in dataclasses.fields(result) if field.name[0] != "_"} <= set(plain)


def test_a_message_is_what_templates_read() -> None:
    """The message has the answer's parts by the names of chat templates; what cannot be read as a call is content."""
    message = GENERATION.message
    assert message["tool_calls"] == [
        {"type": "function", "id": CALL.id, "function": {"name": "f", "arguments": {"a": [1]}}}
    ]
    assert {name: message[name] for name in message if name != "tool_calls"} == {
        "role": "assistant", "content": "a", "reasoning_content": "b",
    }  # fmt: skip
    assert len(CALL.id) == 9
    assert CALL.id.isalnum()
    broken = results.ToolCall("", None, "f(a=", "cut")
    plain = dataclasses.replace(COMPLETION, reasoning="", tool_calls=(broken,))
    assert plain.message == {"role": "assistant", "content": "a\nf(a="}


def test_to_dict_has_what_can_be_read() -> None:
    """`to_dict` holds the properties as well, lists for tuples, and None for what JSON cannot write."""
    plain = GENERATION.to_dict()
    assert (plain["text"], plain["finish_reason"], plain["stop_reason"]) == ("a <b>", "stop", "x")
    assert plain["token_ids"] == [1, 2]
    assert plain["completions"][0]["logprobs"][0]["top"][0]["logprob"] is None
    assert plain["timing"] == {"seconds": 2.0, "seconds_to_first_token": 0.5, "tokens_per_second": 1.5}
    assert UNMASKING.to_dict()["candidates"][0]["token"] == "a"
    assert UNMASKING.to_dict()["masks"][0]["start"] == 0
    segment = {"source_start": 0, "source_end": 3, "start": 0, "end": 5, "notes": []}
    assert TRANSLATION.to_dict()["segments"] == [segment]


@pytest.mark.parametrize("result", ALL, ids=NAMES)
def test_the_notebook_picture_escapes_everything(result: Any) -> None:
    """No character of a text reaches the page as markup."""
    dangerous = '<script>alert("&")</script>'
    text = {
        field.name: dangerous
        for field in dataclasses.fields(result)
        if isinstance(getattr(result, field.name), str) and field.name != "finish_reason"
    }
    page = Page(dataclasses.replace(result, **text)._repr_html_())
    assert page.open == []
    assert set(page.tags) <= {"div", "span", "details", "summary", "ul", "li", "style"}
    assert {name for attributes in page.attributes for name in attributes} <= {
        "style", "title", "id", "dir", "data-n",
    }  # fmt: skip
    if text:
        assert any(dangerous in shown for shown in page.texts)


def test_generated_text_is_escaped() -> None:
    """A model's own text is escaped in the picture of a generation, a translation and an unmasking."""
    assert "a &lt;b&gt;" in GENERATION._repr_html_()
    assert "&lt;script&gt;" in GENERATION._repr_html_()
    assert "a &lt;b&gt;" in TRANSLATION._repr_html_()
    assert "[MASK] &lt;b&gt;" in UNMASKING._repr_html_()
    assert "a &amp; b" in dataclasses.replace(UNMASKING, masks=UNMASKING.masks * 2)._repr_html_()


@pytest.mark.parametrize(
    "result, text",
    [
        (COMPLETION, "a <b>"),
        (GENERATION, "a <b>"),
        (TRANSLATION, "a <b>"),
        (CHUNK, "<p>"),
        (CANDIDATE, "a & b"),
        (UNMASKING, "a & b"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_str_is_the_text(result: Any, text: str) -> None:
    """`str` of a result is what a person wants to read."""
    assert str(result) == text


def test_a_generation_reads_like_its_first_completion() -> None:
    """The first completion's fields are the generation's own."""
    shown = {field.name for field in dataclasses.fields(COMPLETION) if field.name[0] != "_"}
    for name in shown - {"score", "reasoning_name"}:
        assert getattr(GENERATION, name) == getattr(COMPLETION, name)


def test_the_picture_shows_every_completion() -> None:
    """Several completions are each a row of the picture, with why and how fast it ended."""
    second = dataclasses.replace(COMPLETION, text="another")
    page = dataclasses.replace(GENERATION, completions=(COMPLETION, second))._repr_html_()
    assert all(words in page for words in ("a &lt;b&gt;", "another", "finish_reason", "stop_reason"))
    assert all(words in page for words in ("4 read, 3 generated", "1.5 tokens/s"))
    assert "en → ?" in TRANSLATION._repr_html_()


@pytest.mark.parametrize(
    "name, text, options",
    [
        ("llama", "She", {"logprobs": 2, "temperature": 1.0, "seed": 1, "max_new_tokens": 4}),
        ("gpt2", "She", {"num_beams": 2, "num_return_sequences": 2, "max_new_tokens": 4}),
        ("t5", "Birds fly.", {"source": "en", "target": "de", "max_new_tokens": 4}),
        ("bert", "Birds [MASK] [MASK].", {}),
    ],
)
def test_results_of_real_calls_are_json_and_pickles(name: str, text: str, options: Any) -> None:
    """What calls return goes through strict JSON and through pickle."""
    result = wrapper(name)(text, **options)
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False)) == result.to_dict()
    assert pickle.loads(pickle.dumps(result)) == result  # noqa: S301 - written in the line itself
    assert result._repr_html_().startswith("<div ")


def test_the_result_classes_are_public() -> None:
    """Every class that a call can return is a name of `lmkit`."""
    for result in ALL:
        assert getattr(lmkit, type(result).__name__) is type(result)
