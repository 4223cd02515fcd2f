"""What the grammars allow, by a tokenizer with a token for each byte, against jsonschema."""

# ruff: noqa: E501 - a schema and its texts stand on one line

import collections
import functools
import json
import random
import re
import tarfile
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

import chat_templates
import lmkit
from lmkit.kernels.logits import forbidding
from lmkit.structured.grammars import Grammars, Matcher, masks
from lmkit.structured.outputs import JSONSchema, Output, read_json
from lmkit.text.codec import Codec

SUITE = Path(__file__).parents[2] / ".nox" / "suite"

Good = list[Any]
STRING, INTEGER = {"type": "string"}, {"type": "integer"}


def an_object(properties: dict[str, Any], required: list[str] | None = None, **more: Any) -> dict[str, Any]:
    """Make the schema of an object without other keys."""
    needed = list(properties) if required is None else required
    return {"type": "object", "properties": properties, "required": needed, "additionalProperties": False, **more}


NESTED: dict[str, Any] = functools.reduce(lambda inner, _: an_object({"a": inner}), range(20), INTEGER)
TREE = {"type": "object", "properties": {"v": INTEGER, "c": {"type": "array", "items": {"$ref": "#/$defs/t"}}}}
MANY = {f"p{n}": INTEGER for n in range(60)}

SCHEMAS: dict[str, tuple[dict[str, Any], Good, Good]] = {
    "enum of mixed types": ({"enum": ["a", 1, None, {"b": [True]}]}, ["a", 1, None, {"b": [True]}], ["b", 2, {}, {"b": []}]),
    "const object": ({"const": {"a": 1, "b": "x"}}, [{"a": 1, "b": "x"}], [{"a": 1}, {"a": 2, "b": "x"}]),
    "optional, last missing": (an_object({"a": INTEGER, "b": INTEGER, "c": INTEGER}, ["a"]), [{"a": 1}, {"a": 1, "c": 2}], [{}, {"b": 1}]),
    "odd names": (an_object({'naïve "key"': INTEGER, "日本": STRING}), [{'naïve "key"': 1, "日本": "é"}], [{"naive": 1}, {}]),
    "bounded integer": ({"type": "integer", "minimum": -3, "maximum": 150}, [-3, 0, 150], [-4, 151, 1.5, "1"]),
    "bounded number": ({"type": "number", "exclusiveMinimum": 0, "maximum": 1.5}, [0.1, 1, 1.5], [0, -1, 1.6]),
    "multiples": (an_object({"a": {"type": "integer", "multipleOf": 5}, "b": {"type": "number", "multipleOf": 0.01}}), [{"a": 15, "b": 0.25}], [{"a": 7, "b": 1}]),
    "length in characters": ({"type": "string", "minLength": 2, "maxLength": 3}, ["éé", "😀😀😀"], ["é", "😀😀😀😀"]),
    "pattern": ({"type": "string", "pattern": r"^[A-Z]{2}\d{4}$"}, ["AB1234"], ["AB123", "ab1234", "xAB1234"]),
    "unanchored pattern": ({"type": "string", "pattern": "[0-9]{3}"}, ["a123b", "000"], ["12", "a1b2c3"]),
    "pattern and length": ({"type": "string", "pattern": "^a+$", "maxLength": 3}, ["a", "aaa"], ["aaaa", ""]),
    "pattern of marks": ({"type": "string", "pattern": r'^"\\[a-z]"$'}, ['"\\a"'], ['"a"']),
    "formats": (
        an_object({"a": {"type": "string", "format": "date-time"}, "b": {"type": "string", "format": "date"}, "c": {"type": "string", "format": "uuid"}, "d": {"type": "string", "format": "ipv4"}, "e": {"type": "string", "format": "email"}}),
        [{"a": "2026-11-29T12:00:00Z", "b": "2024-02-29", "c": "12345678-1234-5678-1234-567812345678", "d": "127.0.0.1", "e": "a@b.de"}],
        [{"a": "2026-11-29T12:00:00Z", "b": "2026-02-31", "c": "12345678-1234-5678-1234-567812345678", "d": "127.0.0.1", "e": "a@b.de"}, {"a": "x"}],
    ),
    "array of objects": ({"type": "array", "items": an_object({"a": INTEGER}), "minItems": 1, "maxItems": 3}, [[{"a": 1}]], [[], [{"a": 1}] * 4, [1]]),
    "tuple": ({"type": "array", "prefixItems": [INTEGER, STRING], "items": False, "minItems": 2}, [[1, "a"]], [["a", 1], [1, "a", 2], [1]]),
    "map": ({"type": "object", "additionalProperties": INTEGER, "minProperties": 1, "maxProperties": 2}, [{"a": 1}, {"a": 1, "b": 2}], [{}, {"a": "b"}, {"a": 1, "b": 1, "c": 1}]),
    "pattern properties": ({"type": "object", "patternProperties": {"^a": INTEGER, "^b": STRING}, "additionalProperties": False}, [{"a1": 1, "b": "x"}], [{"a1": "x"}, {"c": 1}]),
    "anyOf": ({"anyOf": [{"type": "string", "maxLength": 2}, INTEGER, {"type": "null"}]}, ["ab", 1, None], ["abc", 1.5, []]),
    "discriminated union": ({"oneOf": [an_object({"k": {"const": k}, "v": v}) for k, v in (("a", INTEGER), ("b", STRING), ("c", {"type": "boolean"}))]}, [{"k": "a", "v": 1}, {"k": "b", "v": "x"}], [{"k": "a", "v": "x"}, {"k": "d", "v": 1}]),
    "allOf": ({"allOf": [{"type": "object", "properties": {"a": INTEGER}, "required": ["a"]}, {"properties": {"b": STRING}, "required": ["b"]}]}, [{"a": 1, "b": "x"}], [{"a": 1}, {"a": "x", "b": "x"}]),
    "reference beside a keyword": ({"$defs": {"s": STRING}, "$ref": "#/$defs/s", "maxLength": 2}, ["ab"], ["abc", 1]),
    "tree": ({"$defs": {"t": TREE}, "$ref": "#/$defs/t"}, [{"v": 1, "c": [{"v": 2}]}], [{"v": "x"}, {"c": [1]}]),
    "linked list": (an_object({"v": INTEGER, "n": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}), [{"v": 1, "n": {"v": 2, "n": None}}], [{"v": 1}, {"v": 1, "n": 2}]),
    "anchor and escaped pointer": ({"$defs": {"a/b~c": {"$anchor": "here", "type": "integer"}}, "type": "array", "prefixItems": [{"$ref": "#here"}, {"$ref": "#/$defs/a~1b~0c"}], "minItems": 2, "items": False}, [[1, 2]], [["a", 1], [1]]),
    "required without properties": ({"type": "object", "required": ["a"]}, [{"a": 1}, {"a": None, "b": []}], [{}, {"b": 1}]),
    "items without a schema": ({"type": "array", "minItems": 2}, [[1, "a"], [None, {}]], [[1], {}]),
    "anything": ({}, [1, "a", None, [{}], {"a": [1.5]}], []),
    "many values": ({"enum": [f"value {n}" for n in range(500)]}, ["value 0", "value 499"], ["value 500", "value"]),
    "many properties": (an_object(MANY, [f"p{n}" for n in range(30)]), [dict.fromkeys(MANY, 1)], [{"p59": 1}]),
    "nested": (NESTED, [functools.reduce(lambda inner, _: {"a": inner}, range(20), 1)], [{"a": 1}]),
}  # fmt: skip

REFUSED = {
    "uniqueItems": {"type": "array", "uniqueItems": True},
    "contains": {"type": "array", "contains": INTEGER},
    "not": {"not": STRING},
    "if": {"if": STRING, "then": {"maxLength": 2}},
    "dependentRequired": {"dependentRequired": {"a": ["b"]}},
    "propertyNames": {"propertyNames": {"maxLength": 2}},
    "oneOf": {"oneOf": [INTEGER, {"type": "number"}]},
    "look-around": {"type": "string", "pattern": "(?=a)b"},
    "phone": {"type": "string", "format": "phone"},
    "nowhere": {"$ref": "http://localhost/nowhere"},
    "minimum": {"type": "integer", "minimum": 3, "maximum": 1},
    "empty": {"enum": []},
}
"""Schemas that a grammar cannot hold, or nothing can, by the word that the error has."""


@functools.cache
def grammars() -> tuple[Codec, Grammars]:
    """Make the grammars of a tokenizer with bytes."""
    tokenizer = chat_templates.byte_level()
    codec = Codec(tokenizer)
    return codec, Grammars(codec, [tokenizer.eos_token_id], encodes=False)


def accepts(output: Output[Any], text: str) -> bool:
    """Say whether a text is an answer, token by token."""
    codec, known = grammars()
    matcher = known.of(output)()
    matcher.read([*codec.encode(text, special=False), codec.tokenizer.eos_token_id])
    return not matcher.error


def allowed(matcher: Matcher, width: int) -> list[int]:
    """Return the tokens that may come next, by the mask that scores get."""
    mask = forbidding(masks([matcher]), width)[0]
    assert set(mask.tolist()) <= {0.0, float("-inf")}
    return (mask == 0).nonzero()[:, 0].tolist()


def walk(output: Output[Any], seed: int, most: int = 600) -> str | None:
    """Write an answer of tokens drawn among those that are allowed; None if it is not whole after `most`."""
    codec, known = grammars()
    end, draw = codec.tokenizer.eos_token_id, random.Random(seed)  # noqa: S311 - a walk
    closing = {codec.encode(mark, special=False)[0] for mark in '"}],0123456789'}
    matcher, token_ids = known.of(output)(), list[int]()
    for _ in range(most):
        found = allowed(matcher, len(codec.tokenizer))
        assert found, "an empty mask"
        assert not (codec.special - {end}) & set(found)
        nearer = [token_id for token_id in found if token_id in closing or token_id == end]
        token_id = draw.choice(nearer if nearer and draw.random() < 0.4 else found)
        if token_id == end:
            break
        token_ids.append(token_id)
        matcher.read(token_ids)
        assert not matcher.error
        if matcher.complete:
            break
    else:
        return None
    return codec.decode(token_ids)


@pytest.mark.parametrize("name", SCHEMAS)
def test_whatever_the_masks_allow_is_valid(name: str) -> None:
    """Random tokens among those allowed end in JSON that jsonschema accepts; nearly all of them end."""
    schema = SCHEMAS[name][0]
    validator = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
    ended = 0
    for seed in range(8):
        text = walk(JSONSchema(schema), seed, 1500 if name == "many properties" else 600)
        if text is not None:
            ended += 1
            try:
                validator.validate(read_json(text))
            except ValueError as error:
                assert re.search("key twice|beyond all numbers", str(error))  # noqa: PT017 - the two things that no grammar holds
    assert ended >= 4


@pytest.mark.parametrize("name", SCHEMAS)
def test_good_texts_are_accepted_and_bad_ones_refused(name: str) -> None:
    """In the layouts in which models write JSON, a schema's good values are answers and its bad ones are none."""
    schema, good, bad = SCHEMAS[name]
    for value in good:
        jsonschema.validate(value, schema)
        for layout in ({}, {"indent": 2}, {"indent": "\t"}, {"separators": (",", ":")}):
            assert accepts(JSONSchema(schema), json.dumps(value, ensure_ascii=False, **layout)), value
    for value in bad:
        assert not accepts(JSONSchema(schema), json.dumps(value, ensure_ascii=False)), value


@pytest.mark.parametrize("word", REFUSED)
def test_what_a_grammar_cannot_hold_is_named(word: str) -> None:
    """A schema's keyword is never loosened in silence: the error has it."""
    with pytest.raises(lmkit.OptionError, match=rf"cannot be held to: .*{word}.*Leave it out, or pass a Python type"):
        grammars()[1].of(JSONSchema(REFUSED[word]))


def test_a_types_keywords_are_loosened_and_looked_at_afterwards() -> None:
    """A set is written as a list, and bytes as a text, which pydantic makes the value of."""
    from lmkit.structured.outputs import output_of

    assert accepts(output_of(set[int]), "[1, 1]")
    assert output_of(set[int]).read("[1, 1]") == {1}
    assert accepts(output_of(bytes), '"a"')


def test_white_space_has_an_end() -> None:
    """A model that writes nothing but spaces or lines comes to no end otherwise."""
    for space in (" " * 41, "\n" * 20, "\n" + " " * 41, "\t"):
        assert not accepts(JSONSchema(an_object({"a": INTEGER})), '{"a":' + space + "1}")
    assert accepts(JSONSchema(an_object({"a": INTEGER})), '{"a":\n' + " " * 40 + "1}")


@pytest.mark.parametrize(
    "output, good, bad",
    [
        (lmkit.OneOf("yes", "no", 'é"\\'), ["yes", " no", "\nyes", 'é"\\'], ["maybe", "y", "   yes", "yes "]),
        (lmkit.Regex(r"\d{3}-[ab]+"), ["123-a", "123-abab"], [" 123-a", "12-a", "123-c"]),
        (lmkit.Regex(r" \d{2}"), [" 12"], ["12"]),
        (lmkit.OneOf(" ", "\n"), [" ", "\n"], ["x"]),
        (lmkit.Regex("(?i)ja"), ["ja", "JA"], ["nein"]),
        (lmkit.Grammar('start: "(" start ")" | "x"'), ["x", "((x))"], ["(x", ")x("]),
    ],
)
def test_texts_patterns_and_grammars(output: Output[Any], good: list[str], bad: list[str]) -> None:
    """Answers are whole texts of them."""
    assert all(accepts(output, text) for text in good)
    assert not any(accepts(output, text) for text in bad)


@pytest.mark.parametrize(
    "output, told",
    [
        (lmkit.Regex(r"(a)\1"), "backreferences are not supported"),
        (lmkit.Regex("("), "unclosed group"),
        (lmkit.Grammar("start: nowhere"), 'unknown name: "nowhere"'),
        (lmkit.Grammar(""), "cannot be held to"),
        (lmkit.Regex(b"a"), "cannot be held to"),  # type: ignore[arg-type]
        (lmkit.Regex("\ud800"), "cannot be held to"),
        (lmkit.JSONSchema({"const": "\ud800"}), "cannot be held to"),
    ],
)
def test_broken_patterns_and_grammars_are_option_errors(output: Output[Any], told: str) -> None:
    """What is wrong is told in llguidance's words."""
    with pytest.raises(lmkit.OptionError, match=told):
        grammars()[1].of(output)


def test_a_matcher_is_that_of_its_row() -> None:
    """Rows of one grammar do not know of each other, and one begins again by reading its tokens anew."""
    codec, known = grammars()
    begin = known.of(lmkit.OneOf("aa", "ab"))
    first, second = begin(), begin()
    token_ids = codec.encode("a", special=False)
    first.read(token_ids)
    assert allowed(first, 400) != allowed(second, 400)
    second.read(token_ids)
    assert allowed(first, 400) == allowed(second, 400)
    b = codec.encode("b", special=False)
    assert first.fitting([*b, *b]) == b
    first.read([*token_ids, *b])
    assert first.complete
    assert not second.complete


def test_masks_are_as_wide_as_the_scores() -> None:
    """A head that is padded has tokens which are none; one that is narrower has no scores of the last tokens."""
    bits = torch.tensor([[0b101, 0xFF]], dtype=torch.uint8)
    assert (forbidding(bits, 20)[0] == 0).nonzero()[:, 0].tolist() == [0, 2, *range(8, 16)]
    assert (forbidding(bits, 10)[0] == 0).nonzero()[:, 0].tolist() == [0, 2, 8, 9]


def judged() -> collections.Counter[str]:
    """Count what becomes of the official tests: right, refused with a reason, or wrong in one of two ways."""
    (archive,) = SUITE.glob("jsonschema-*.tar.gz")
    found = collections.Counter[str]()
    with tarfile.open(archive) as files:
        for member in files.getmembers():
            if "/tests/draft2020-12/" not in member.name or "/optional/" in member.name or not member.isfile():
                continue
            opened = files.extractfile(member)
            assert opened is not None
            for group in json.load(opened):
                name = member.name.rpartition("/")[2]
                for kind, count in _judged(name, group).items():
                    found[kind] += count
    return found


def _judged(name: str, group: dict[str, Any]) -> collections.Counter[str]:
    try:
        output = JSONSchema(group["schema"])
        grammars()[1].of(output)
    except lmkit.OptionError:
        return collections.Counter(refused=len(group["tests"]))
    found = collections.Counter[str]()
    for test in group["tests"]:
        taken = accepts(output, json.dumps(test["data"], ensure_ascii=False))
        told = "right" if taken == test["valid"] else "accepted invalid" if taken else f"refused valid: {name}"
        found[told] += 1
    return found


@pytest.mark.skipif(
    not [*SUITE.glob("jsonschema-*.tar.gz")], reason="nox -s env could not bring the JSON-Schema-Test-Suite"
)
def test_the_official_suite() -> None:
    """Nothing invalid is accepted; what is valid and refused is the order of keys, 1.0 as an integer, or a format."""
    found = judged()
    assert found["accepted invalid"] == 0
    assert found["right"] > 500
    valid = {told.partition(": ")[2]: count for told, count in found.items() if told.startswith("refused valid")}
    assert valid.keys() <= {"allOf.json", "const.json", "enum.json", "format.json", "type.json"}, valid
    print(dict(found))  # noqa: T201 - the figures of the page
