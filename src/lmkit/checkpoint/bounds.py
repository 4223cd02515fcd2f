"""What a config may claim, by what the headers of the weights hold: compared before anything of that size is built."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lmkit.errors import WeightsError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from lmkit.checkpoint.headers import TensorInfo

MOST_COUNTED, MOST_ENTRIES = 2**12, 2**16
"""What a config may count and list, whatever its weights hold; the most experts that are published are 2,048."""

_COUNTED = re.compile(r"(^|_)(n_layer|layers|blocks|depth|stages|levels|codebooks|experts|labels|langs)$")
"""How keys end that say how many things Python makes one by one."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """The largest model that the weights of a checkpoint could fill.

    Attributes:
        held: What the weights are, in words.
        tensors: How many tensors it may be made of, those that are tied to others included.
        elements: How many numbers.
    """

    held: str = "are pickles, which do not say what they hold"
    tensors: int = 2**16
    elements: int = 2**43

    @classmethod
    def of(cls, tensors: Mapping[str, TensorInfo] | None) -> Bounds:
        """Return what headers allow; plain bounds for pickles, which have none.

        Published models are made of up to 1.1 times the tensors of their files, and no weight takes less than one bit.
        Some more are allowed, so that of a small file the weights are named that it lacks.
        """
        if tensors is None:
            return cls()
        size = sum(tensor.nbytes for tensor in tensors.values())
        held = f"hold {len(tensors):,} tensors of {size:,} bytes"
        return cls(held, 4 * len(tensors) + 1000, max(8 * size, 2**24))

    def check_config(self, content: Mapping[str, Any], name: str) -> None:
        """Refuse a config that counts or lists more than the weights could fill, at any depth.

        Raises:
            WeightsError: It does; the message names the key, the number and the bound.
        """
        for key, value in _inside(content):
            if isinstance(value, (dict, list)):
                number, most, what = len(value), max(self.tensors, MOST_ENTRIES), "entries in "
            elif _COUNTED.search(key):
                number, most, what = value, min(self.tensors, MOST_COUNTED), ""
            else:
                continue
            if number > most:
                raise self._error(name, f"has {what}{key}: {number}; at most {most}")

    def check_built(self, tensors: int, elements: int, content: Mapping[str, Any], name: str) -> None:
        """Refuse a model that has more than the weights could fill, while it is built.

        Raises:
            WeightsError: It has; the message names what its config counts, and the bound.
        """
        if tensors > self.tensors or elements > self.elements:
            found = [(value, key) for key, value in _inside(content) if isinstance(value, int)]
            what, most = "numbers", self.elements
            if tensors > self.tensors:
                found = [one for one in found if _COUNTED.search(one[1])]
                what, most = "tensors", self.tensors
            said = ", ".join(f"{key}: {value}" for value, key in sorted(found, reverse=True)[:5])
            raise self._error(name, f"describes a model of more than {most} {what} ({said})")

    def _error(self, name: str, what: str) -> WeightsError:
        return WeightsError(
            f"the config of {name!r} {what}, for its weights {self.held}. It does not belong to them, or is broken: "
            "fetch both again."
        )


def _inside(content: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the numbers and the lists of a config, by key."""
    for key, value in content.items():
        if isinstance(value, (dict, list)):
            yield str(key), value
            for one in [value] if isinstance(value, dict) else value:
                if isinstance(one, dict):
                    yield from _inside(one)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield str(key), value
