"""What an answer must be, as callers say it, and the value of a text: one of several, a pattern, a schema, a type."""

from __future__ import annotations

import json
import math
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Generic, NewType, TypeAlias, get_origin

from typing_extensions import TypeAliasType, TypeVar

from lmkit.errors import MissingExtraError, OptionError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pydantic import TypeAdapter

ValueT_co = TypeVar("ValueT_co", covariant=True, default=Any)
ValueT = TypeVar("ValueT", default=Any)

SPACE = r"( |\r?\n[ \t]{0,40})"
"""The white space that JSON may have between its parts: models write a space or a new line with an indentation, and
small ones do worse without; where any is allowed some write nothing else until they run out of tokens."""

SPACES = r"( |\r?\n){0,2}"
"""What may stand before an answer, where anything may."""

ACCEPTED = "a type, such as int, list[str], a dataclass or a pydantic model, or lmkit.OneOf, Regex, JSONSchema, Grammar"


class Output(ABC, Generic[ValueT_co]):
    """What an answer must be; see its subclasses.

    Attributes:
        spaced: Whether a space or a line end may stand before the answer.
    """

    spaced = False

    @abstractmethod
    def form(self) -> dict[str, Any]:
        """Return a grammar of all such texts, as llguidance takes one among several."""

    @abstractmethod
    def read(self, text: str) -> ValueT_co:
        """Return the value of a whole answer.

        Raises:
            ValueError: It is no such answer.
        """


Kind: TypeAlias = type[ValueT] | Output[ValueT] | None
"""What `output=` takes, as far as type checkers know the value from it; unions and `Literal`s they do not."""


@dataclass(frozen=True)
class OneOf(Output[str]):
    """One of some texts, such as `OneOf("yes", "no")`; the value is the text.

    Raises:
        OptionError: There are none, or one is empty or no text.
    """

    choices: tuple[str, ...]
    spaced = True

    def __init__(self, *choices: str) -> None:
        """Take the texts."""
        given: tuple[object, ...] = choices
        if not given or not all(isinstance(one, str) and one for one in given):
            raise OptionError(f"OneOf{choices!r} is not accepted: pass texts, at least one and none empty.")
        object.__setattr__(self, "choices", choices)

    def form(self) -> dict[str, Any]:  # noqa: D102 - as the base says; so below
        return {"lark_grammar": "start: " + " | ".join(map(json.dumps, self.choices))}

    def read(self, text: str) -> str:  # noqa: D102
        found = re.fullmatch(f"{SPACES}(?P<choice>{'|'.join(map(re.escape, self.choices))})", text)
        if found is None:
            raise ValueError(f"it is none of {', '.join(map(repr, self.choices))}")
        return text if text in self.choices else found["choice"]


@dataclass(frozen=True)
class Regex(Output[str]):
    r"""A text that a pattern matches as a whole, such as `Regex(r"[A-Z]{2}\d{4}")`; the value is the text.

    The syntax is that of Rust's regular expressions, which have no look-around and no back references.
    """

    pattern: str

    def form(self) -> dict[str, Any]:  # noqa: D102
        return _first(library().LLMatcher.grammar_from_regex(self.pattern))

    def read(self, text: str) -> str:  # noqa: D102 - the grammar held
        return text


@dataclass(frozen=True)
class Grammar(Output[str]):
    """A text of a context-free grammar in llguidance's dialect of Lark, with a rule `start`; the value is the text."""

    lark: str

    def form(self) -> dict[str, Any]:  # noqa: D102
        return {"lark_grammar": self.lark}

    def read(self, text: str) -> str:  # noqa: D102 - the grammar held
        return text


@dataclass(frozen=True)
class JSONSchema(Output[Any]):
    """JSON that a schema allows (draft 2020-12), as a dict or as text; the value is plain Python data.

    What a grammar cannot hold is an error that names the keyword, such as `uniqueItems`.

    Raises:
        OptionError: It is no schema.
    """

    schema: Mapping[str, Any] | str
    spaced = True

    def __post_init__(self) -> None:
        """Refuse what is no schema."""
        try:
            known = json.loads(self._text)
        except (TypeError, ValueError, RecursionError) as error:
            raise OptionError(f"JSONSchema takes a dict or its JSON, and this is none: {error!s:.200}") from error
        if not isinstance(known, dict):
            raise OptionError(f"JSONSchema({self.schema!r:.60}) is not accepted: pass a dict or its JSON.")

    @property
    def _text(self) -> str:
        return self.schema if isinstance(self.schema, str) else json.dumps(self.schema, allow_nan=False)

    def __hash__(self) -> int:
        """Hash by the schema's text."""
        return hash(self._text)

    def form(self) -> dict[str, Any]:  # noqa: D102
        return schema_form(self._text)

    def read(self, text: str) -> Any:  # noqa: D102
        return read_json(text)


class Typed(Output[Any]):
    """JSON of a Python type, which pydantic makes an object of.

    Keywords that a grammar cannot hold are left to pydantic, which looks at every answer.
    """

    spaced = True

    def __init__(self, kind: Any) -> None:
        """Take a type.

        Raises:
            OptionError: It is none that pydantic makes JSON of.
        """
        library()
        from pydantic import TypeAdapter

        self._kind = kind
        try:
            self._adapter: TypeAdapter[Any] = TypeAdapter(kind)
            self.schema = closed_schema(self._adapter.json_schema())
        except Exception as error:
            told = str(error).partition("\n")[0]
            raise OptionError(f"output={kind!r:.80} is no type that pydantic makes JSON of: {told}") from error

    def __repr__(self) -> str:
        """Show the type."""
        return repr(self._kind)

    def form(self) -> dict[str, Any]:  # noqa: D102
        return schema_form(json.dumps(self.schema), lenient=True)

    def read(self, text: str) -> Any:  # noqa: D102
        read_json(text)  # refuses what pydantic would let pass: a key twice, numbers beyond all
        return self._adapter.validate_json(text)


def output_of(given: Any) -> Output[Any]:
    """Return what an answer must be by what the caller said: an output, or a type."""
    if isinstance(given, Output):
        return given
    try:
        return _typed(given, repr(given))  # A | B and B | A are equal, and not the same to pydantic
    except TypeError:  # it has no hash
        return Typed(given)


@lru_cache(maxsize=64)
def _typed(kind: Any, _written: str) -> Typed:
    return Typed(kind)


def is_output(value: object) -> bool:
    """Test for an output or a type, as far as can be seen without pydantic."""
    named = isinstance(value, (Output, type, TypeAliasType, NewType))
    return named or get_origin(value) is not None


def schema_prompt(output: Any) -> str:
    r"""Describe an output in words for a prompt, where a model is to know what it is asked for.

    ```python
    generator(f"Who wrote Emma? {lmkit.schema_prompt(Book)}\n", output=Book).value
    ```

    Args:
        output: A type or another output, as `output=` takes it.

    Raises:
        OptionError: It is none, or a pattern or grammar, which are no words.
    """
    asked = output_of(output) if is_output(output) else None
    if isinstance(asked, OneOf):
        return "Answer with one of: " + ", ".join(map(json.dumps, asked.choices)) + "."
    if isinstance(asked, (Typed, JSONSchema)):
        schema = asked.schema if isinstance(asked.schema, str) else json.dumps(asked.schema, ensure_ascii=False)
        return f"Answer in JSON, by this schema: {schema}"
    raise OptionError(f"schema_prompt({output!r:.60}) is not accepted: it takes a type, OneOf or JSONSchema.")


def read_json(text: str) -> Any:
    """Read JSON as the standard has it.

    Raises:
        ValueError: It is none; or it has a key twice, a number beyond all of float's, or half of a character.
    """
    try:
        value = json.loads(text, parse_constant=_no_number, parse_float=_finite, object_pairs_hook=_once)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    json.dumps(value, ensure_ascii=False).encode()
    return value


def begun_json(text: str) -> Any:
    """Return the data of JSON that is not all there; None where there is none so far."""
    from pydantic_core import from_json

    try:
        return from_json(text, allow_partial="trailing-strings")
    except ValueError:
        return None


def _no_number(word: str) -> float:
    raise ValueError(f"{word} is no number of JSON's")


def _finite(digits: str) -> float:
    if not math.isfinite(value := float(digits)):
        raise ValueError(f"{digits} is beyond all numbers")
    return value


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("it has a key twice")
    return found


def schema_form(schema: str, *, lenient: bool = False) -> dict[str, Any]:
    """Return the grammar of a JSON schema; `lenient` leaves out keywords that it cannot hold."""
    options = {"whitespace_pattern": SPACE, "lenient": lenient}
    return _first(library().LLMatcher.grammar_from_json_schema(schema, overrides=options))


def _first(grammars: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(grammars)["grammars"][0]
    return found


def closed_schema(schema: Any) -> Any:
    """Forbid the keys that a type does not have, where it says nothing of them."""
    if isinstance(schema, list):
        return [closed_schema(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(key, one) for key, one in schema.items()}
    return {"additionalProperties": False, **closed} if isinstance(schema.get("properties"), dict) else closed


def _closed(key: str, one: Any) -> Any:
    if key in ("properties", "patternProperties", "$defs") and isinstance(one, dict):
        return {name: closed_schema(schema) for name, schema in one.items()}
    return one if key in ("const", "default", "enum", "examples") else closed_schema(one)


def library() -> Any:
    """Import what the extra brings."""
    try:
        import llguidance
        import pydantic  # noqa: F401 - a part of the extra
    except ImportError as error:
        raise MissingExtraError(
            "output= needs packages that are not installed: pip install 'lmkit[structured]' (llguidance and pydantic)."
        ) from error
    return llguidance
