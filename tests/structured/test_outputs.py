import dataclasses
import datetime as dt
import enum
import json
import sys
import uuid
from decimal import Decimal
from typing import Annotated, Any, Literal, NamedTuple, NewType

import pydantic
import pytest
import typing_extensions

import lmkit
from lmkit.structured.outputs import Typed, is_output, output_of, read_json


class Color(enum.Enum):
    """An enumeration."""

    RED = "red"
    BLUE = "blue"


@dataclasses.dataclass
class Person:
    """A dataclass with a default, a bound and another type inside."""

    name: str
    age: Annotated[int, pydantic.Field(ge=0, le=150)]
    favourite: Color | None = None


class Point(NamedTuple):
    """A named tuple."""

    x: int
    y: float


class Book(pydantic.BaseModel):
    """A model with a list of models."""

    title: str
    authors: list[Person] = []


class Open(pydantic.BaseModel):
    """A model that says of itself that it takes other keys."""

    model_config = pydantic.ConfigDict(extra="allow")
    a: int


class Where(typing_extensions.TypedDict):
    """A typed dict."""

    city: str


class Cat(pydantic.BaseModel):
    """One of a union that a field tells apart."""

    kind: Literal["cat"]
    lives: int


class Dog(pydantic.BaseModel):
    """The other."""

    kind: Literal["dog"]
    bark: str


Pet = Annotated[Cat | Dog, pydantic.Field(discriminator="kind")]

Age = NewType("Age", int)
Names = typing_extensions.TypeAliasType("Names", list[str])

VALUES: list[tuple[Any, str, object]] = [
    (int, "3", 3),
    (bool, "true", True),
    (str, '"a\\u0041"', "aA"),
    (Person, '{"name": "Bo", "age": 3}', Person("Bo", 3)),
    (Person, '{"name": "Bo", "age": 3, "favourite": "red"}', Person("Bo", 3, Color.RED)),
    (Book, '{"title": "t", "authors": [{"name": "n", "age": 1}]}', Book(title="t", authors=[Person("n", 1)])),
    (Point, "[1, 2.5]", Point(1, 2.5)),
    (Where, '{"city": "Rom"}', {"city": "Rom"}),
    (Color, '"blue"', Color.BLUE),
    (Literal["a", 1] | None, "1", 1),
    (int | None, "null", None),
    (list[int], "[1, 2]", [1, 2]),
    (set[int], "[1, 2, 2]", {1, 2}),
    (tuple[int, str], '[1, "a"]', (1, "a")),
    (dict[str, int], '{"a": 1}', {"a": 1}),
    (Pet, '{"kind": "dog", "bark": "wau"}', Dog(kind="dog", bark="wau")),
    (dt.date, '"2026-02-28"', dt.date(2026, 2, 28)),
    (uuid.UUID, '"12345678-1234-5678-1234-567812345678"', uuid.UUID("12345678-1234-5678-1234-567812345678")),
    (Decimal, '"1.50"', Decimal("1.50")),
    (bytes, '"ab"', b"ab"),
    (Age, "3", 3),
    (Names, '["a"]', ["a"]),
    (Any, '{"a": [1]}', {"a": [1]}),
]


@pytest.mark.parametrize("kind, text, value", VALUES)
def test_a_type_makes_an_object_of_json(kind: Any, text: str, value: object) -> None:
    """The value is what pydantic makes of the text."""
    assert is_output(kind)
    assert output_of(kind).read(text) == value


@pytest.mark.parametrize(
    "kind, text",
    [
        (int, "1.5"), (int, '"a"'), (int, "1" * 5000), (Person, '{"name": "Bo"}'), (Person, '{"name": "", "age": -1}'),
        (float, "1e999"), (float, "NaN"), (float, "-Infinity"), (dict[str, int], '{"a": 1, "a": 2}'),
        (str, r'"\ud800"'),
        (list[Any], "[" * 100_000), (int, ""), (int, "3 4"), (Color, '"green"'), (dict[int, int], '{"a": 1}'),
    ],
)  # fmt: skip
def test_what_is_no_such_json_has_no_value(kind: Any, text: str) -> None:
    """What does not validate, and what Python's JSON reads beside the standard, is refused."""
    with pytest.raises(ValueError, match=r"\w"):
        output_of(kind).read(text)


def test_objects_of_a_type_have_no_other_keys() -> None:
    """The schemas of pydantic leave other keys open; who asks for them keeps them, and so does data in a schema."""
    schema = Typed(Book).schema
    assert schema["additionalProperties"] is False
    assert schema["$defs"]["Person"]["additionalProperties"] is False
    assert Typed(Open).schema["additionalProperties"] is True
    assert Typed(dict[str, int]).schema["additionalProperties"] == {"type": "integer"}
    literal = Annotated[int, pydantic.Field(json_schema_extra={"examples": [{"properties": {}}]})]
    assert Typed(literal).schema["examples"] == [{"properties": {}}]


def test_a_type_without_a_hash_is_taken() -> None:
    """Types are known again by their hash where they have one."""
    kind = Annotated[int, pydantic.Field(ge=1), ["no hash"]]
    assert output_of(kind).read("1") == 1
    assert output_of(Person) is output_of(Person)


@pytest.mark.parametrize("given", [5, {"type": "object"}, "int", [int], None, ("a", "b")])
def test_what_is_no_output_is_told_apart(given: object) -> None:
    """A dict is no schema, and a text no choice, unless it is said."""
    assert not is_output(given)
    with pytest.raises(lmkit.OptionError, match="it takes a type, OneOf or JSONSchema"):
        lmkit.schema_prompt(given)


def test_types_that_pydantic_refuses_are_option_errors() -> None:
    """What pydantic says of a type is told, and which type it is."""

    class Plain:
        """A class that pydantic knows nothing of."""

    with pytest.raises(lmkit.OptionError, match=r"is no type that pydantic makes JSON of: Unable.*Plain"):
        output_of(Plain)
    with pytest.raises(lmkit.OptionError, match=r"is no type that pydantic makes JSON of: .*"):
        output_of(dict[str, type(len)])  # type: ignore[misc]


def test_texts_to_choose_from() -> None:
    """The value is the text, without what stands before it; nothing, an empty text and a number are refused."""
    one = lmkit.OneOf("yes", " no")
    assert [one.read(text) for text in ("yes", " yes", "\nyes", " no", "\n  no")] == ["yes", "yes", "yes", " no", " no"]
    for text in ("maybe", "no", "yes ", "   yes"):
        with pytest.raises(ValueError, match="it is none of 'yes', ' no'"):
            one.read(text)
    for choices in ((), ("",), ("a", 5)):
        with pytest.raises(lmkit.OptionError, match="pass texts, at least one and none empty"):
            lmkit.OneOf(*choices)  # type: ignore[arg-type]


@pytest.mark.parametrize("schema", ["{", "5", "true", {1, 2}, {"a": float("nan")}, {"a": object()}])
def test_what_is_no_schema_is_an_option_error(schema: Any) -> None:
    """A schema is a dict of JSON, or its text."""
    with pytest.raises(lmkit.OptionError, match="JSONSchema"):
        lmkit.JSONSchema(schema)


def test_a_schema_in_words() -> None:
    """The prompt has the schema as JSON, or the texts."""
    told = lmkit.schema_prompt(Person)
    assert json.loads(told.partition("schema: ")[2]) == Typed(Person).schema
    assert lmkit.schema_prompt(lmkit.OneOf("a", 'b"')) == 'Answer with one of: "a", "b\\"".'
    assert json.loads(lmkit.schema_prompt(lmkit.JSONSchema({"type": "integer"})).partition("schema: ")[2])


def test_json_is_read_as_the_standard_has_it() -> None:
    """Plain JSON comes out as Python's own reader gives it."""
    text = '{"a": [1, 2.5, "\\u00e9\\ud83d\\ude00", null, true], "b": -1e-3}'
    assert read_json(text) == json.loads(text)


@pytest.mark.parametrize("package", ["llguidance", "pydantic"])
@pytest.mark.parametrize("output", [Person, lmkit.JSONSchema({"type": "integer"}), lmkit.Regex("a")])
def test_the_extra_is_named_where_it_is_missing(output: Any, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says what to install."""
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(lmkit.MissingExtraError, match=r"pip install 'lmkit\[structured\]'"):
        Typed(output).form() if output is Person else output.form()


@dataclasses.dataclass
class First:
    """One of two that look alike."""

    x: int


@dataclasses.dataclass
class Second:
    """The other."""

    x: int


def test_unions_that_are_equal_are_not_the_same() -> None:
    """Which of two classes an object is of depends on their order in the union."""
    assert [type(output_of(kind).read('{"x": 1}')) for kind in (First | Second, Second | First)] == [First, Second]


class Feature(pydantic.BaseModel):
    """Fields with the names of keywords."""

    properties: dict[str, int]
    default: Person


def test_fields_may_have_the_names_of_keywords() -> None:
    """They are fields: nothing is put among them, and their types are closed as others."""
    schema = Typed(Feature).schema
    assert schema["properties"].keys() == {"properties", "default"}
    assert schema["$defs"]["Person"]["additionalProperties"] is False


@pytest.mark.parametrize("pattern", ["(", "(?=a)b"])
def test_patterns_that_pydantic_refuses_are_option_errors(pattern: str) -> None:
    """Of a type, too."""
    with pytest.raises(lmkit.OptionError, match="is no type that pydantic makes JSON of"):
        output_of(Annotated[str, pydantic.Field(pattern=pattern)])
