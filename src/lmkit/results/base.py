"""What all results share."""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Mapping
from enum import Enum
from typing import Any

from lmkit.errors import OutputError


class Result:
    """What all results share: `to_dict` and the notebook's picture."""

    __slots__ = ()

    def __init_subclass__(cls) -> None:
        """Open pickles of versions with fewer fields; where this is not set, a dataclass with slots sets its own."""
        super().__init_subclass__()
        if "__setstate__" not in vars(cls):
            cls.__setstate__ = _set_state  # type: ignore[attr-defined]

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain JSON types; a float that JSON cannot write becomes None."""
        plain: dict[str, Any] = _plain(self)
        return plain

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


def _plain(value: object) -> Any:
    """Turn dataclasses and tuples into dicts and lists, and floats JSON cannot write into None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {name: _plain(_asked(value, name)) for name in [*_names(value), *_derived(value)]}
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
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


def _names(value: Any) -> list[str]:
    """Name the fields that are shown."""
    return [field.name for field in dataclasses.fields(value) if not field.name.startswith("_")]


def _derived(value: object) -> list[str]:
    """Name the properties of a result, which its JSON carries as well."""
    return [name for name in dir(type(value)) if isinstance(getattr(type(value), name), property)]


def _cell(value: object) -> str:
    return value if isinstance(value, str) else repr(value)
