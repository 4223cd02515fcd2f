"""Keys and values that grow in place, against plain concatenation."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.functional import pad

from lmkit.engine.cache import GrowingLayer, KeyValues

hf: Any = transformers
HEADS, SIZE, VALUE_SIZE = 2, 3, 5
WINDOW = 6
OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["update", "update", "keep", "absorb", "pad", "drop", "crop"]), st.integers(0, 10**6)),
    min_size=1,
    max_size=25,
)
quickly = settings(deadline=None, max_examples=40, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@dataclass
class Plain:
    """All keys and values ever, by concatenation. *Shape:* `(rows, heads, columns, size)` each."""

    keys: torch.Tensor
    values: torch.Tensor

    def each(self, change: Any) -> None:
        """Do the same to both."""
        self.keys, self.values = change(self.keys), change(self.values)


def states(rows: int, columns: int, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw keys and values, of sizes of their own."""
    draws = torch.Generator().manual_seed(number)
    return (
        torch.randn(rows, HEADS, columns, SIZE, generator=draws),
        torch.randn(rows, HEADS, columns, VALUE_SIZE, generator=draws),
    )


def leaving(rows: int, number: int) -> tuple[list[int], list[int], int]:
    """Choose rows that end: which places are free, which rows move into them, and how many stay."""
    draws = torch.Generator().manual_seed(number)
    stays = (torch.rand(rows, generator=draws) < 0.5).tolist()
    stays[number % rows] = True
    kept = sum(stays)
    holes = [place for place in range(kept) if not stays[place]]
    movers = [place for place in range(kept, rows) if stays[place]]
    return holes, movers, kept


def moved(part: torch.Tensor, holes: list[int], movers: list[int], rows: int) -> torch.Tensor:
    """Return what remains of a tensor after rows left."""
    places = list(range(rows))
    for hole, mover in zip(holes, movers, strict=True):
        places[hole] = mover
    return part[places]


class Both:
    """A cache of lmkit's and its plain counterpart, which go through the same operations.

    One layer is plain, and one has a sliding window, as Gemma 2 has them.
    """

    def __init__(self, rows: int, columns: int, number: int, *, sliding: bool) -> None:
        """Begin with some columns of each row."""
        kinds = ["sliding_attention", "full_attention"] if sliding else ["full_attention"] * 2
        config = hf.Gemma2Config(
            num_hidden_layers=2, layer_types=kinds, sliding_window=WINDOW, head_dim=SIZE, num_attention_heads=HEADS
        )
        self.sliding = sliding
        self.mine = KeyValues(config)
        self.mine.expect(4)
        self.plain = [Plain(*states(rows, 0, 0)) for _ in self.mine.layers]
        self.update(columns, number)

    @property
    def shape(self) -> tuple[int, int]:
        """How many rows and columns there are."""
        return self.plain[0].keys.shape[0], self.plain[0].keys.shape[2]

    def update(self, columns: int, number: int) -> None:
        """Append columns; what comes back is all of the plain part, or what the window shows of it."""
        for layer, plain in enumerate(self.plain):
            keys, values = states(self.shape[0] if layer == 0 else len(plain.keys), columns, number + layer)
            found = self.mine.cache.update(keys, values, layer)
            plain.keys = torch.cat([plain.keys, keys], 2)
            plain.values = torch.cat([plain.values, values], 2)
            shown = WINDOW - 1 + columns if self.sliding and layer == 0 else plain.keys.shape[2]
            assert torch.equal(found[0], plain.keys[:, :, -shown:])
            assert torch.equal(found[1], plain.values[:, :, -shown:])

    def keep(self, number: int) -> None:
        """Let rows go."""
        holes, movers, rows = leaving(self.shape[0], number)
        self.mine.keep(holes, movers, rows)
        for plain in self.plain:
            plain.each(lambda part: moved(part, holes, movers, rows))

    def pad(self, columns: int) -> None:
        """Add zeros on the left."""
        self.mine.pad(columns)
        for plain in self.plain:
            plain.each(lambda part: pad(part, (0, 0, columns, 0)))

    def drop(self, columns: int) -> None:
        """Forget columns on the left."""
        self.mine.drop(columns)
        for plain in self.plain:
            plain.each(lambda part: part[:, :, columns:])

    def crop(self, columns: int) -> None:
        """Forget columns on the right."""
        self.mine.crop(columns)
        for plain in self.plain:
            plain.each(lambda part: part[:, :, : part.shape[2] - columns])

    def absorb(self, number: int) -> None:
        """Take in the rows of another cache, at most as wide."""
        width = self.shape[1]
        other = Both(1 + number % 4, 1 + number % width, number, sliding=self.sliding)
        self.mine.absorb(other.mine)
        for plain, others in zip(self.plain, other.plain, strict=True):
            gap = width - others.keys.shape[2]
            plain.keys = torch.cat([plain.keys, pad(others.keys, (0, 0, gap, 0))])
            plain.values = torch.cat([plain.values, pad(others.values, (0, 0, gap, 0))])

    def do(self, name: str, number: int) -> None:
        """Do an operation, with what `number` chooses of it, if it is possible now."""
        width = self.shape[1]
        if name == "update":
            self.update(1 + number % 9 if number % 3 else 1, number)
        elif name in ("keep", "absorb"):
            getattr(self, name)(number)
        elif name == "pad":
            self.pad(number % 80 if number % 5 == 0 else 1)
        elif not (name == "crop" and self.sliding):
            getattr(self, name)(number % width)

    def check(self) -> None:
        """Compare what is live."""
        for number, (layer, plain) in enumerate(zip(self.mine.layers, self.plain, strict=True)):
            shown = WINDOW - 1 if self.sliding and number == 0 else plain.keys.shape[2]
            assert torch.equal(layer.keys[:, :, -shown:], plain.keys[:, :, -shown:])
            assert torch.equal(layer.values[:, :, -shown:], plain.values[:, :, -shown:])
            assert layer.get_seq_length() == plain.keys.shape[2]


@pytest.mark.parametrize("sliding", [False, True])
@quickly
@given(rows=st.integers(1, 6), columns=st.integers(1, 12), operations=OPERATIONS)
def test_growing_in_place_is_concatenation(
    rows: int, columns: int, operations: list[tuple[str, int]], *, sliding: bool
) -> None:
    """Whatever joins, leaves, is padded, dropped or cropped: keys and values are those of plain concatenation."""
    both = Both(rows, columns, 1, sliding=sliding)
    assert both.mine.plain is not sliding
    both.check()
    for name, number in operations:
        both.do(name, number)
        both.check()
    both.update(1, 7)
    both.check()


def test_padding_is_zeros_where_rows_have_been() -> None:
    """A row that joins in the place of one that left has zeros on its left, though NaN lay there."""
    layer = GrowingLayer()
    keys, values = states(4, 5, 0)
    layer.update(keys.fill_(torch.nan), values.fill_(torch.nan))
    layer.update(*states(4, 1, 1))
    layer.drop(5)
    layer.keep([], [], 2)
    layer.pad(3)
    other = GrowingLayer()
    other.update(*states(2, 2, 2))
    layer.absorb(other)
    assert torch.isfinite(layer.keys).all()
    assert torch.isfinite(layer.values).all()
    assert not layer.keys[2:, :, :2].any()


def test_columns_that_were_dropped_are_zeros() -> None:
    """Who reads all columns, with weight 0 where a row has none, finds zeros where columns were, though NaN lay there.

    So does a compiled step, and 0 times NaN is NaN.
    """
    layer = GrowingLayer()
    keys, values = states(3, 5, 0)
    layer.update(keys.fill_(torch.nan), values.fill_(torch.nan))
    layer.update(*states(3, 2, 1))
    layer.drop(5)
    for whole, kept in zip(layer.opened(), states(3, 2, 1), strict=True):
        assert torch.equal(whole[:, :, layer.start : layer.start + 2], kept)
        assert not whole[:, :, : layer.start].any()
        assert not whole[:, :, layer.start + 2 :].any()


def test_growing_copies_rarely_and_reserves_no_more_than_is_needed() -> None:
    """A thousand steps move the buffers a handful of times, and never reserve beyond what the rows can need."""
    layer = GrowingLayer()
    layer.room = 1000
    places = set()
    for step in range(1000):
        layer.update(*states(1, 1, step))
        places.add(layer._buffers[0].data_ptr())
        layer.room -= 1
    assert layer.width == 1000
    assert len(places) < 8
    assert layer.nbytes <= 1004 * HEADS * (SIZE + VALUE_SIZE) * 4


def test_rows_that_left_give_their_memory_back() -> None:
    """Once few of many rows are left, the buffers shrink to them."""
    layer = GrowingLayer()
    layer.update(*states(32, 100, 0))
    before = layer.nbytes
    layer.keep([], [], 4)
    assert layer.nbytes <= before / 4
    assert torch.equal(layer.keys, states(32, 100, 0)[0][:4])


def test_prefixes_are_taken_out_and_put_back() -> None:
    """What `taken` copies of a row, `begin` puts where the row begins in an empty cache, with zeros beside it."""
    both = Both(3, 7, 0, sliding=False)
    first, second = both.mine.taken(0, 7), both.mine.taken(2, 4)
    both.update(1, 5)  # a copy does not follow what happens to its row
    fresh = KeyValues(hf.LlamaConfig(num_hidden_layers=2))
    fresh.begin([first, None, second], [5, 0, 3], [0, 3, 2], 9, 4)
    for layer, plain in zip(fresh.layers, both.plain, strict=True):
        assert (layer.width, layer.columns >= 9) == (5, True)
        for mine, whole in ((layer.keys, plain.keys), (layer.values, plain.values)):
            assert torch.equal(mine[0], whole[0, :, :5])
            assert not mine[1].any()
            assert not mine[2, :, :2].any()
            assert torch.equal(mine[2, :, 2:], whole[2, :, 3:6])


def test_places_of_rows_to_come_are_reserved_once() -> None:
    """A layer that knows how many rows follow reserves for them once, and the one it takes rows from holds nothing."""
    layer, other, last = GrowingLayer(), GrowingLayer(), GrowingLayer()
    layer.update(*states(1, 9, 0))
    other.update(*states(5, 12, 1))
    last.update(*states(4, 14, 2))
    layer.pad(3)
    layer.absorb(other, coming=4)
    assert (len(layer.keys), len(layer._buffers[0]), other.nbytes, other.rows) == (6, 10, 0, 0)
    layer.pad(2)
    assert len(layer._buffers[0]) == 10
    layer.absorb(last)
    assert (len(layer.keys), len(layer._buffers[0])) == (10, 10)
    assert torch.equal(layer.keys[1:6, :, 2:], states(5, 12, 1)[0])
    assert torch.equal(layer.values[6:], states(4, 14, 2)[1])


def test_a_row_joins_where_there_is_no_room_for_those_to_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """Places for rows that are not here yet are let go of where memory is short: what is here has its own."""
    layer, other = GrowingLayer(), GrowingLayer()
    layer.update(*states(1, 9, 0))
    other.update(*states(5, 9, 1))
    plain = GrowingLayer._reserve

    def short(self: GrowingLayer, like: Any, rows: int, columns: int, left: int = 0) -> None:
        if rows > 6:
            raise RuntimeError("can't allocate memory")
        plain(self, like, rows, columns, left)

    monkeypatch.setattr(GrowingLayer, "_reserve", short)
    layer.absorb(other, coming=50)
    assert len(layer._buffers[0]) == 6
    assert torch.equal(layer.keys, torch.cat([states(1, 9, 0)[0], states(5, 9, 1)[0]]))
