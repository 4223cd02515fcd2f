"""What all results share."""

from __future__ import annotations

import base64
import dataclasses
import math
from collections.abc import Mapping
from enum import Enum
from functools import cache
from types import NoneType
from typing import Any, Self, TypeVar, get_args, get_origin, get_type_hints

from lmkit.errors import OptionError, OutputError, listed
from lmkit.results.pictures import Block, Facts, shortened, show, table, to_html


class Result:
    """What all results share: `to_dict`, `from_dict` and how it is shown."""

    __slots__ = ()

    def __init_subclass__(cls) -> None:
        """Open pickles of versions with fewer fields; where this is not set, a dataclass with slots sets its own."""
        super().__init_subclass__()
        if "__setstate__" not in vars(cls):
            cls.__setstate__ = _set_state  # type: ignore[attr-defined]

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain JSON types; a float that JSON cannot write becomes None."""
        found: dict[str, Any] = plain(self)
        return found

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Make a result again of what `to_dict` returned, also after it was written to JSON.

        What can be computed is computed again, and a field that is missing has its default. A float that JSON could not
        write, which is None, comes back as NaN. A dict with all fields of a subclass, as a `Translation`'s in the place
        of a `Generation`, becomes one.

        Raises:
            OptionError: A key is no field, or a field without a default is missing.
        """
        if not isinstance(data, Mapping):
            raise OptionError(f"{cls.__name__}.from_dict takes what to_dict returned, not {data!r}.")
        # The newest first: a dataclass with slots leaves the class behind that it was made of.
        for kind in reversed(cls.__subclasses__()):
            if data.keys() >= {*_names(kind)}:
                return kind.from_dict(data)
        fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]  # it is one
        needed = {name for name, field in fields.items() if field.default is field.default_factory}
        unknown, missing = data.keys() - fields.keys() - {*_derived(cls)}, needed - data.keys()
        for wrong, told in ((unknown, "does not know"), (missing, "also needs")):
            if wrong:
                raise OptionError(
                    f"{cls.__name__}.from_dict {told} {listed(sorted(wrong))}. Its fields are: {listed(fields)}."
                )
        hints = _hints(cls)  # type: ignore[arg-type]  # a class can be hashed
        given = {name: name.lstrip("_") for name in fields}  # what a property shows is kept behind it
        return cls(**{name: _typed(hints[name], data[key]) for name, key in given.items() if key in data})

    def __repr__(self) -> str:
        """Say what it is in a line: its text, and what of `_told` there is."""
        facts = "".join(f", {name}={value!r}" for name, value in self._told().items())
        return f"{type(self).__name__}({shortened(str(self), SHOWN)!r}{facts})"

    def _repr_html_(self) -> str:
        """Draw the result for a notebook, every text escaped."""
        return to_html(self._picture())

    def show(self) -> None:
        """Show the result: in a notebook as it draws itself there, else in the terminal."""
        show(self, self._picture())

    def _picture(self) -> list[Block]:
        return [Facts({name: _cell(getattr(self, name)) for name in _names(self)})]

    def _told(self) -> dict[str, object]:
        """Return what stands beside the text where one line has to do."""
        return {}


ResultT = TypeVar("ResultT")


class Results(list[ResultT]):
    """What a call with several rows returns: a list that shows itself as a table, with a row for each."""

    def __getitem__(self, index: Any) -> Any:
        """Return a result; of a slice, which shows itself as a table too, several."""
        found = super().__getitem__(index)
        return type(self)(found) if isinstance(index, slice) else found

    def __repr__(self) -> str:
        """Write a line for each row, or for some of many."""
        most = len(self) if len(self) <= SHOWN_ROWS else SHOWN_ROWS // 2
        rows = (_row(number, one) for number, one in enumerate(self[:most]))
        lines = [
            "  ".join([f"{number:>4}", repr(shortened(text, 60)), *(f"{name}={value!r}" for name, value in told)])
            for (_, number), (_, text), *told in rows
        ]
        more = [f"      … {len(self) - most:,} more"] if most < len(self) else []
        head = f"{len(self):,} result{'' if len(self) == 1 else 's'}"
        return "\n".join([head, *lines, *more]) if self else "[]"

    def _repr_html_(self) -> str:
        """Draw a table for a notebook, every text escaped."""
        rows = [_row(number, one) for number, one in enumerate(self[:DRAWN_ROWS])]
        more = [("text", f"… {len(self) - DRAWN_ROWS:,} more")]
        return table([*rows, more] if len(self) > DRAWN_ROWS else rows)


def _row(number: int, result: Any) -> list[tuple[str, Any]]:
    if not isinstance(result, Result):
        return [("row", number), ("text", f"{type(result).__name__}: {result}")]
    return [("row", number), ("text", str(result)), *result._told().items()]  # noqa: SLF001


SHOWN, SHOWN_ROWS, DRAWN_ROWS = 200, 20, 200
"""How many characters a line shows, and how many rows a list and its picture."""


def _set_state(self: Any, state: list[Any]) -> None:
    """Set the fields to a pickle's values, and later ones to their defaults."""
    fields = dataclasses.fields(self)
    for field, value in zip(fields, [*state, *(later.default for later in fields[len(state) :])], strict=True):
        object.__setattr__(self, field.name, value)


def plain(value: object) -> Any:
    """Turn dataclasses and tuples into dicts and lists, bytes into base64, and floats JSON cannot write into None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        more = _derived(type(value)) if isinstance(value, Result) else []
        return {name: plain(_asked(value, name)) for name in [*_names(value), *more]}
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if callable(dumped := getattr(value, "model_dump", None)):  # of pydantic
        return dumped(mode="json")
    value = value.value if isinstance(value, Enum) else value
    value = base64.b64encode(value).decode() if isinstance(value, bytes) else value
    return value if value is None or isinstance(value, (str, int)) else str(value)


def _asked(value: object, name: str) -> object:
    """Return an attribute; None for a value that there is none of."""
    try:
        return getattr(value, name)
    except OutputError:
        return None


_hints = cache(get_type_hints)


def _typed(hint: Any, value: Any) -> Any:
    """Turn what `plain` made of a value back into what a field's annotation says."""
    parts = get_args(hint)
    if get_origin(hint) is tuple and isinstance(value, (list, tuple)):
        each = parts[:1] * len(value) if parts[1:] == (...,) else parts
        return tuple(map(_typed, each, value))
    kind = get_origin(hint) or hint
    if isinstance(value, Mapping) and isinstance(kind, type) and issubclass(kind, Result):
        return kind.from_dict(value)
    if value is not None and NoneType in parts:
        return _typed(next(part for part in parts if part is not NoneType), value)
    return math.nan if value is None and hint is float else value


def _names(value: Any) -> list[str]:
    """Name the fields that are shown."""
    return [field.name for field in dataclasses.fields(value) if not field.name.startswith("_")]


def _derived(kind: type) -> list[str]:
    """Name the properties of a class of results, which its JSON carries as well."""
    return [name for name in dir(kind) if isinstance(getattr(kind, name), property)]


def _cell(value: object) -> str:
    return value if isinstance(value, str) else f"{value:.4g}" if isinstance(value, float) else repr(value)
