"""What all results share."""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Mapping
from enum import Enum
from functools import cache
from types import NoneType
from typing import Any, Self, get_args, get_origin, get_type_hints

from lmkit.errors import OptionError, OutputError, listed


class Result:
    """What all results share: `to_dict`, `from_dict` and the notebook's picture."""

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

    def _repr_html_(self) -> str:
        """Draw the result as a table for a notebook, every cell escaped."""
        rows = "".join(
            f"<tr><th>{html.escape(name)}</th><td><pre>{html.escape(_cell(value))}</pre></td></tr>"
            for name, value in self._shown().items()
        )
        return f"<table>{rows}</table>"

    def _shown(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _names(self)}


def _set_state(self: Any, state: list[Any]) -> None:
    """Set the fields to a pickle's values, and later ones to their defaults."""
    fields = dataclasses.fields(self)
    for field, value in zip(fields, [*state, *(later.default for later in fields[len(state) :])], strict=True):
        object.__setattr__(self, field.name, value)


def plain(value: object) -> Any:
    """Turn dataclasses and tuples into dicts and lists, and floats JSON cannot write into None."""
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
    return value if isinstance(value, str) else repr(value)
