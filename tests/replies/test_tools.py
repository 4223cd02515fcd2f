import json
from datetime import date
from typing import Any, Literal

import pytest
from pydantic import BaseModel
from transformers.utils import get_json_schema

import lmkit
from lmkit.replies.tools import cast, checked, definition, misfit, schemas
from lmkit.results import Completion, ToolCall


class Place(BaseModel):
    """A place on a map."""

    city: str
    zoom: int = 3


class Trip(BaseModel):
    """From a place to another."""

    start: Place
    end: Place


def weather(city: str, unit: Literal["celsius", "fahrenheit"] = "celsius") -> dict[str, Any]:
    """Say how the weather is.

    Args:
        city: Where.
        unit: Of the temperature.
    """
    return {"city": city, "degrees": 7, "unit": unit}


def distance(trip: Trip, day: date) -> str:
    """Say how long a trip is.

    Args:
        trip: From where to where.
        day: When.
    """
    return f"{trip.start.city}-{trip.end.city} on {day:%d/%m/%Y}"


def broken() -> str:
    """Break."""
    raise RuntimeError("no network")


def called(*calls: ToolCall) -> Completion:
    """Make a result with these calls."""
    return Completion("", (), None, "eos", None, None, 0, tool_calls=calls)


def test_functions_are_described_as_transformers_does() -> None:
    """A function of plain types is what transformers makes of it, and a definition is left as it is."""
    assert definition(weather) == get_json_schema(weather)
    assert definition(get_json_schema(weather)) == get_json_schema(weather)
    assert schemas([definition(weather)])["weather"]["required"] == ["city"]


def test_types_of_pydantics_are_described_too() -> None:
    """Models as arguments, which transformers refuses, are described by pydantic, with what they share."""
    from jsonschema import Draft202012Validator

    described = definition(distance)["function"]
    assert described["description"] == "Say how long a trip is."
    schema = described["parameters"]
    assert schema["properties"]["day"] == {"description": "When.", "type": "string", "format": "date"}
    assert schema["required"] == ["trip", "day"]
    Draft202012Validator.check_schema(schema)
    good = {"trip": {"start": {"city": "Ulm"}, "end": {"city": "Bonn"}}, "day": "2026-01-02"}
    bad = {"trip": {"start": {"city": 3}, "end": {"city": "Bonn"}}, "day": "2026-01-02"}
    for arguments in (good, bad):
        valid = Draft202012Validator(schema).is_valid(arguments)
        assert valid == (checked("distance", arguments, {"distance": schema})[2] is None)
        assert valid == (arguments is good)


def undocumented(city: str) -> str:
    """Say something, and nothing of its argument."""
    return city


@pytest.mark.parametrize("tool", [undocumented, lambda x: x, {"type": "function"}, {"function": {"name": 3}}])
def test_what_cannot_be_described_says_why(tool: Any) -> None:
    """A function without annotations or descriptions, or a definition without a name, is an OptionError."""
    with pytest.raises(lmkit.OptionError, match=r"cannot be described: .*[^.]\. Annotate|has no name"):
        definition(tool)


SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "n": {"type": "integer"}, "x": {"type": "number"}, "s": {"type": "string"}, "b": {"type": "boolean"},
        "l": {"type": "array", "items": {"type": "integer"}}, "o": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
        "e": {"type": "string", "enum": ["u", "v"]}, "d": {"type": "object"}, "m": {"type": ["integer", "string"]},
        "k": {"type": "integer", "nullable": True},
    },
    "additionalProperties": False,
}  # fmt: skip
VALUES = [7, 7.0, 7.5, "7", "u", True, None, [1, 2], [1, "2"], {"a": 1}, {}, [], float("inf")]


@pytest.mark.parametrize("name", SCHEMA["properties"])
def test_types_are_checked_as_jsonschema_does(name: str) -> None:
    """Each value is flagged where the package jsonschema refuses it; `nullable` is transformers' word for None."""
    from jsonschema import Draft202012Validator

    for value in VALUES:
        expected = Draft202012Validator(SCHEMA).is_valid({name: value}) or (name == "k" and value is None)
        assert (misfit({name: value}, SCHEMA, SCHEMA, "it") is None) == expected, value


def test_names_are_checked() -> None:
    """Unknown tools, arguments that lack and arguments that are too many are flagged, and what was said stays."""
    tools = schemas([definition(weather)])
    for name, arguments, told in [
        ("wether", {"city": "Ulm"}, r"no tool 'wether'\. Did you mean 'weather'"),
        ("weather", {}, "lacks 'city'"),
        ("weather", {"city": "Ulm", "day": 1}, "'day', which is none of 'city', 'unit'"),
        ("weather", {"city": ["Ulm"]}, "'city' is .*, not of type string"),
        ("weather", {"city": "Ulm", "unit": "kelvin"}, "not one of 'celsius', 'fahrenheit'"),
        ("weather", ["Ulm"], "not an object"),
    ]:
        found = checked(name, arguments, tools)
        assert found[:2] == (name, arguments if isinstance(arguments, dict) else None)
        with pytest.raises(AssertionError, match=told):
            raise AssertionError(found[2])
    assert checked("weather", {"city": "Ulm"}, tools)[2] is None
    assert checked("anything", {"x": 1}, None)[2] is None


@pytest.mark.parametrize(
    "name, text, value",
    [
        ("n", "7", 7), ("n", " 7\n", 7), ("n", "seven", "seven"), ("x", "7.5", 7.5), ("x", "7", 7), ("s", "7", "7"),
        ("b", "True", True), ("b", "false", False), ("l", "[1, 2]", [1, 2]), ("l", '["a"]', '["a"]'),
        ("o", "None", None),
        ("o", "null", None), ("o", "7", 7), ("e", "u", "u"), ("d", '{"a": "7"}', {"a": "7"}), ("m", "7", "7"),
        ("k", "null", None), ("n", "[" * 9999, "[" * 9999),
    ],
)  # fmt: skip
def test_texts_are_cast_by_their_type(name: str, text: str, value: Any) -> None:
    """A text becomes the value that the definition asks for, if it is one; where a text will do it stays."""
    found = cast(text, SCHEMA["properties"][name], SCHEMA)
    assert (found, type(found)) == (value, type(value))


def test_calls_are_run_and_answered() -> None:
    """Each call has its message, in order, in the form templates read; a text is as it is, other values are JSON."""
    first, second = ToolCall("weather", {"city": "Ülm"}, "…"), ToolCall("broken", {}, "…")
    third = ToolCall("distance", {"trip": {"start": {"city": "A"}, "end": {"city": "B"}}, "day": "2026-01-02"}, "…")
    result = called(first, second, third)
    messages = lmkit.call_tools(result, [weather, broken, distance])
    assert [message["content"] for message in messages] == [
        json.dumps(weather("Ülm"), ensure_ascii=False),
        "Error: RuntimeError: no network",
        "A-B on 02/01/2026",
    ]
    assert [message["name"] for message in messages] == ["weather", "broken", "distance"]
    asked = [call["id"] for call in result.message["tool_calls"]]
    assert [message["tool_call_id"] for message in messages] == asked
    assert {message["role"] for message in messages} == {"tool"}
    assert lmkit.call_tools(called(), [weather]) == []


def test_nothing_runs_that_is_flagged() -> None:
    """A call with an error, one that cannot be read, and one of an unknown tool are answered and not run."""
    ran: list[Any] = []
    calls = [ToolCall("f", {"x": 1}, "…", "'x' is too much"), ToolCall("", None, "…"), ToolCall("g", {}, "…")]
    messages = lmkit.call_tools(called(*calls), {"f": ran.append})
    assert [message["content"] for message in messages] == [
        "Error: 'x' is too much",
        "Error: the call has no arguments",
        "Error: there is no tool 'g'. There are: 'f'.",
    ]
    assert ran == []


def test_what_json_lacks_is_told_as_it_can_be() -> None:
    """Models, dates, sets and other objects in what a function returns are JSON or text."""
    place = Place(city="Ulm")
    returned = {"a": place, "b": date(2026, 1, 2), "c": {1}, "d": (1, 2)}
    (message,) = lmkit.call_tools(called(ToolCall("f", {}, "…")), {"f": lambda: returned})
    assert json.loads(message["content"]) == {
        "a": {"city": "Ulm", "zoom": 3}, "b": "2026-01-02", "c": [1], "d": [1, 2],
    }  # fmt: skip


def test_what_would_have_to_be_awaited_is_refused() -> None:
    """An asynchronous function is an OptionError, before anything runs."""

    async def later() -> None: ...

    with pytest.raises(lmkit.OptionError, match="later is asynchronous"):
        lmkit.call_tools(called(ToolCall("later", {}, "…")), [later])
