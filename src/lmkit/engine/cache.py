"""Keys and values of a batch of rows: they grow in place, rows leave and join, unneeded columns are dropped.

Rows lie side by side and end in the same column; a shorter row has padding on its left, which the attention mask
hides. Padding is zeros, never stale memory: a masked weight of 0 times NaN is NaN.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from lmkit.kernels.unpadded import laid_out

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lmkit.kernels.unpadded import Layout

MANY_MOVE = 0.35
"""Where more than this part of the rows moves, all rows are written: torch writes to chosen rows on one core, slowly.
Of 256 rows of 31 columns, to write 150 takes 0.43 ms, and to write all 0.25."""

AHEAD = 64
"""How many columns a buffer reserves at the least beyond those it needs. Beyond twice as many, it grows by half:
all that is reserved is memory, and a compiled step reads it."""

MORE_PADDING = 16
"""How many columns on the left are reserved where rows join: the next ones may need a few, for which all is copied."""

Prefix: TypeAlias = "list[tuple[torch.Tensor, torch.Tensor]]"
"""Keys and values of one row in each layer. *Shape:* `(heads, tokens, size)` each."""


class GrowingLayer(DynamicLayer):  # type: ignore[no-untyped-call]  # transformers' own registration
    """A layer whose buffers reserve and grow, in place of a concatenation at every step.

    The live part is rows `0..rows` and columns `start..end`.

    Attributes:
        room: The most columns that the rows can still need, so that no more is reserved.
        margin: How many columns are kept free for `pad`; none where rows never get padding.
        layout: How the tokens of this pass lie, where it reads none of the padding between them.
    """

    margin = 1
    layout: Layout | None = None

    def __init__(self) -> None:
        """Begin with nothing reserved."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.rows = self.start = self.end = 0
        self.room = AHEAD
        self._buffers: tuple[torch.Tensor, ...] = ()

    @property
    def width(self) -> int:
        """How many columns are live."""
        return self.end - self.start

    @property
    def columns(self) -> int:
        """How many columns are reserved."""
        return self._buffers[0].shape[-2]

    @property
    def nbytes(self) -> int:
        """How many bytes are reserved."""
        return sum(buffer.nbytes for buffer in self._buffers)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append columns. *Shape:* `(rows, heads, columns, size)` each; returns all live columns.

        Of a pass without padding it is one row of tokens, and what lies beside their places stays as it is.
        """
        layout = self.layout
        rows, columns = (len(key_states), key_states.shape[-2]) if layout is None else layout.shape
        if not self._buffers:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            self.rows = rows
            self._reserve((key_states, value_states), self.rows, columns)
        elif self.end + columns > self.columns:
            self._reserve(self._buffers, self.rows, columns)
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            place = buffer[: self.rows, :, self.end : self.end + columns]
            place.copy_(states) if layout is None else layout.write(states, place)
        self.end += columns
        keys, values = self._live()
        return (keys if layout is None else laid_out(keys, layout)), values

    def get_seq_length(self) -> int:
        """Count the live columns."""
        return self.width

    def _live(self) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys, self.values = (buffer[: self.rows, :, self.start : self.end] for buffer in self._buffers)
        return self.keys, self.values

    def _reserve(self, like: Sequence[torch.Tensor], rows: int, columns: int, left: int = 0) -> None:
        """Move to new buffers for `rows` rows, with `columns` more columns, some more, and `left` ones before all."""
        start = self.margin + left
        end = start + self.width
        size = end + columns + min(max((end + columns) // 2, AHEAD), max(self.room, 1))
        fresh = tuple(part.new_zeros(rows, part.shape[1], size, part.shape[3]) for part in like)
        for old, new in zip(self._buffers, fresh, strict=False):
            new[: self.rows, :, start:end] = old[: self.rows, :, self.start : self.end]
        self.start, self.end, self._buffers = start, end, fresh

    def opened(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return all columns of the rows, one more than the live ones reserved, which now counts as live."""
        if self.end + 1 > self.columns:
            self._reserve(self._buffers, self.rows, 1)
        self.end += 1
        self._live()
        keys, values = (buffer[: self.rows] for buffer in self._buffers)
        return keys, values

    def pad(self, columns: int) -> None:
        """Add columns of padding on the left."""
        if columns > self.start:
            self._reserve(self._buffers, len(self._buffers[0]), 0, left=columns)  # the places of rows to come stay
        self.start -= columns
        for buffer in self._buffers:
            buffer[: self.rows, :, self.start : self.start + columns] = 0
        self._live()

    def drop(self, columns: int) -> None:
        """Forget columns on the left."""
        for buffer in self._buffers:
            buffer[:, :, self.start : self.start + columns] = 0  # a compiled step reads them too, with weight 0
        self.start += columns
        self._live()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last columns, given as a negative number like transformers does."""
        self.end -= abs(tokens_to_remove)
        self._live()

    def repeat(self, width: int) -> None:
        """Write each row `width` times, side by side."""
        self._buffers = tuple(buffer[: self.rows].repeat_interleave(width, 0) for buffer in self._buffers)
        self.rows *= width
        self._live()

    def keep(self, holes: Sequence[int], movers: Sequence[int], rows: int) -> None:
        """Go on with `rows` rows, after moving the rows `movers` into the places `holes`."""
        if holes:
            for part in self._live():
                part[holes] = part[movers]
        self.rows = rows
        if rows * 4 <= len(self._buffers[0]):
            self._reserve(self._buffers, rows, 0)
        self._live()

    def absorb(self, other: GrowingLayer, coming: int = 0) -> None:
        """Append the rows of a layer that is at most as wide, and which is empty then, with `coming` more to follow."""
        rows = self.rows + other.rows
        if rows > (places := len(self._buffers[0])):
            more = coming or max(min(2 * places - rows, rows // 4), 0)
            try:
                self._reserve(self._buffers, rows + more, 0, MORE_PADDING)
            except (RuntimeError, MemoryError):  # there is no room for rows that are not here yet
                self._reserve(self._buffers, rows, 0)
        gap = self.width - other.width
        for buffer, part in zip(self._buffers, other._live(), strict=True):
            buffer[self.rows : rows, :, self.start : self.start + gap] = 0
            buffer[self.rows : rows, :, self.start + gap : self.end] = part
        self.rows = rows
        self._live()
        other.rows, other._buffers, other.keys, other.values = 0, (), None, None  # else all is held twice


class WindowLayer(GrowingLayer):  # type: ignore[no-untyped-call]  # as above
    """A layer whose tokens see a window of columns: those that the next one will not see are let go.

    Attributes:
        sliding_window: How many columns a token sees, its own among them.
        cumulative_length: How many columns there were in all.
    """

    is_sliding = True

    def __init__(self, window: int) -> None:
        """Begin with nothing reserved."""
        super().__init__()
        self.sliding_window, self.cumulative_length = window, 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append columns; returns those that they see. *Shape:* as of plain layers."""
        self._trim()  # behind a compiled step
        self.cumulative_length += key_states.shape[-2]
        seen = super().update(key_states, value_states)
        self._trim()
        self._live()
        return seen

    def _trim(self) -> None:
        self.start = max(self.start, self.end - self.sliding_window + 1)
        if self.start > self.width + 2 * AHEAD:  # behind a long prompt
            self._reserve(self._buffers, self.rows, 1)

    def get_seq_length(self) -> int:
        """Count the columns that there were."""
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many columns so many tokens see, and how many lie before those."""
        seen = min(self.cumulative_length, self.sliding_window - 1)
        return seen + query_length, self.cumulative_length - seen

    def opened(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return all columns of the rows, as those of plain layers."""
        self._trim()
        self.cumulative_length += 1
        return super().opened()

    def pad(self, columns: int) -> None:
        """Add columns of padding on the left, as far as the window shows them."""
        self._trim()
        self.cumulative_length += columns
        super().pad(max(min(self.cumulative_length, self.sliding_window - 1) - self.width, 0))

    def drop(self, columns: int) -> None:
        """Forget columns on the left."""
        self.cumulative_length -= columns
        super().drop(max(self.width - self.cumulative_length, 0))

    def absorb(self, other: GrowingLayer, coming: int = 0) -> None:
        """Append the rows of a layer with the same window that had at most as many columns; see plain layers."""
        assert isinstance(other, WindowLayer)  # noqa: S101 - for the type checkers
        self._trim()
        other._trim()  # noqa: SLF001 - one of its own kind
        super().absorb(other, coming)


def _growing(layer: Any) -> Any:
    """Return a layer that grows in place in the place of one of transformers', where there is one of its kind."""
    if type(layer) is DynamicSlidingWindowLayer:
        return WindowLayer(layer.sliding_window)
    return GrowingLayer() if type(layer) is DynamicLayer else layer


class KeyValues:
    """The cache of a batch: layers of a config grow in place, those that a model makes stay transformers' own.

    Attributes:
        cache: What `forward` takes.
        plain: Whether all layers are plain, so that parts of a row can be taken out and put back.
    """

    def __init__(self, config: Any = None) -> None:
        """Make the layers that `config` asks for, or without one let the model make plain ones; none holds anything."""
        from transformers import DynamicCache

        self.cache: Any = DynamicCache(config=config)
        self.cache.layers = [_growing(layer) for layer in self.cache.layers]
        self.layers: list[Any] = self.cache.layers
        self.plain = all(type(layer) is GrowingLayer for layer in self.layers)

    @property
    def nbytes(self) -> int:
        """How many bytes the layers hold."""
        return sum(
            layer.nbytes if isinstance(layer, GrowingLayer) else layer.keys.nbytes + layer.values.nbytes
            for layer in self.filled
        )

    @property
    def filled(self) -> list[Any]:
        """The layers that hold something; those that share another's keys and values never do."""
        return [layer for layer in self.layers if layer.is_initialized]

    def expect(self, columns: int) -> None:
        """Say how many more columns the rows can need."""
        for layer in self.layers:
            layer.room = columns

    def lay_out(self, layout: Layout | None) -> None:
        """Say how the tokens of the next pass lie, for plain layers; None where it reads rows as they are."""
        for layer in self.layers:
            layer.layout = layout

    def begin(
        self, prefixes: Sequence[Prefix | None], lengths: Sequence[int], starts: Sequence[int], columns: int, rest: int
    ) -> None:
        """Put what is known of each row into an empty cache of plain layers.

        Args:
            prefixes: The keys and values of each row's first tokens.
            lengths: How many of those tokens are taken over.
            starts: In which column each row begins.
            columns: How many columns there will be, once all is read.
            rest: How many of them are still to be read, the last ones: they count from then on.
        """
        some = next(prefix for prefix in prefixes if prefix is not None)
        for number, layer in enumerate(self.layers):
            states = tuple(part.new_zeros(len(lengths), part.shape[0], columns, part.shape[2]) for part in some[number])
            for row, (prefix, length, start) in enumerate(zip(prefixes, lengths, starts, strict=True)):
                if prefix is not None:
                    for part, known in zip(states, prefix[number], strict=True):
                        part[row, :, start : start + length] = known[:, :length]
            layer.update(*states)
            layer.crop(-rest)

    def taken(self, row: int, tokens: int) -> Prefix:
        """Copy the last `tokens` columns of a row, from plain layers."""
        return [(layer.keys[row, :, -tokens:].clone(), layer.values[row, :, -tokens:].clone()) for layer in self.layers]

    def pad(self, columns: int) -> None:
        """Add columns of padding on the left."""
        for layer in self.filled:
            layer.pad(columns)

    def drop(self, columns: int) -> None:
        """Forget columns on the left."""
        for layer in self.filled:
            layer.drop(columns)

    def crop(self, columns: int) -> None:
        """Forget the last columns of plain layers."""
        for layer in self.layers:
            layer.crop(-columns)

    def repeat(self, width: int) -> None:
        """Write each row `width` times, side by side."""
        for layer in self.filled:
            if isinstance(layer, GrowingLayer):
                layer.repeat(width)
            else:
                layer.keys, layer.values = (part.repeat_interleave(width, 0) for part in (layer.keys, layer.values))

    def copy(self, places: Sequence[int], rows: Sequence[int]) -> None:
        """Copy rows into the places of others."""
        device = self.filled[0].keys.device
        into, out = (torch.tensor(numbers, device=device) for numbers in (places, rows))
        count = len(self.filled[0].keys)
        if len(places) > count * MANY_MOVE:
            out = torch.arange(count, device=device).index_copy_(0, into, out)
            into = torch.arange(count, device=device)
        for layer in self.filled:
            for part in (layer.keys, layer.values):
                moved = part.index_select(0, out.to(part.device))
                if len(moved) == count:
                    part.copy_(moved)
                else:
                    part.index_copy_(0, into.to(part.device), moved)

    def keep(self, holes: Sequence[int], movers: Sequence[int], rows: int) -> None:
        """Go on with `rows` rows, after moving the rows `movers` into the places `holes`."""
        for layer in self.filled:
            if isinstance(layer, GrowingLayer):
                layer.keep(holes, movers, rows)
            else:
                for part in (layer.keys, layer.values) if holes else ():
                    part[holes] = part[movers]
                layer.keys, layer.values = layer.keys[:rows], layer.values[:rows]

    def absorb(self, other: KeyValues, coming: int = 0) -> None:
        """Append the rows of a cache that is at most as wide, and which is empty then, with `coming` more to follow."""
        for mine, others in zip(self.filled, other.filled, strict=True):
            mine.absorb(others, coming)
