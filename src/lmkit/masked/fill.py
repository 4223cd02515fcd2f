"""Masks filled jointly: ways of filling a text, searched or drawn by the chain rule."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import chain
from random import Random
from typing import TYPE_CHECKING, TypeAlias

from lmkit.engine import Asking, Draw, Found, Query, parallel
from lmkit.text.windows import seen

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from lmkit.options.generation import Sample
    from lmkit.options.tasks import Order
    from lmkit.text.codec import Typed


@dataclass(frozen=True, slots=True)
class Target:
    """A word to consider, and its tokens."""

    word: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Blanks:
    """A text with masks, and how to fill them.

    Attributes:
        parts: The tokens before, between and behind the masks, each with its type.
        types: Per mask its type, which all that is filled in has.
        mask: The token that stands for what is to be filled in.
        limit: How many tokens the model takes; None is no limit.
        around: How many special tokens it sees at each end, whatever part it sees.
        targets: Per mask, the words to consider; None considers the vocabulary.
        top_k: How many ways to find.
        width: How many ways are followed from mask to mask.
        order: In which order.
        per_token: Whether ways are compared by their mean log-probability per token.
        sample: How to draw the ways, in place of searching them.
        seed: What the draws depend on.
    """

    parts: tuple[tuple[Typed, ...], ...]
    types: tuple[int | None, ...]
    mask: int
    limit: int | None
    around: tuple[int, int]
    targets: tuple[tuple[Target, ...], ...] | None
    top_k: int
    width: int
    order: Order
    per_token: bool
    sample: Sample | None
    seed: int | None

    @property
    def token_ids(self) -> list[int]:
        """All tokens that the model may be given."""
        words = [word.token_ids for words in self.targets or () for word in words]
        return [self.mask, *(token_id for part in self.parts for token_id, _ in part), *chain(*words)]


@dataclass(frozen=True, slots=True)
class Fill:
    """What a mask is filled with.

    Attributes:
        mask: Which mask.
        token_ids: Its tokens.
        logprobs: Their log-probabilities, each given the tokens that were filled in before.
        order: In which order these were filled in.
        target: Which of the targets it is, if there are targets.
    """

    mask: int
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    order: tuple[int, ...] = (0,)
    target: int | None = None


Way: TypeAlias = tuple[Fill, ...]
"""Fills of different masks, in the order in which they were filled in."""


def fill(blanks: Blanks) -> Asking[tuple[list[list[Fill]], list[Way]]]:
    """Find what each mask alone, and all of them jointly, may be filled with.

    Returns:
        Per mask the guesses with the others left masked, best first or in the order of the targets; and ways of filling
        them all, best first or in the order in which they were drawn.
    """
    alone = range(len(blanks.parts) - 1)
    guesses = yield from parallel(_fills(blanks, (), mask, _count(blanks)) for mask in alone)
    if blanks.sample is not None:
        ways = yield from parallel(_draw(blanks, blanks.sample, number) for number in range(blanks.top_k))
    else:
        ways = yield from _search(blanks, guesses)
    return [found if blanks.targets else found[: blanks.top_k] for found in guesses], ways


def _search(blanks: Blanks, guesses: Sequence[list[Fill]]) -> Asking[list[Way]]:
    """Follow the `width` best ways from mask to mask."""
    if blanks.order == "independent":
        whole: list[Way] = [()]
        for some in guesses:
            # The best mean per token may come of a way with a worse one so far: the best of each length are kept.
            lengths: dict[int, list[Way]] = {}
            for way in ((*way, one) for way in whole for one in some):
                lengths.setdefault(sum(len(one.token_ids) for one in way), []).append(way)
            whole = [way for ways in lengths.values() for way in _best(blanks, ways)[: blanks.top_k]]
        return _best(blanks, whole)[: blanks.top_k]
    first = (yield from _next(blanks, ()))[0] if len(guesses) > 1 else 0
    ways: list[Way] = [(one,) for one in guesses[first]]
    for _ in guesses[1:]:
        longer = yield from parallel(_extended(blanks, way) for way in _best(blanks, ways)[: blanks.width])
        ways = [way for some in longer for way in some]
    return _best(blanks, ways)[: blanks.top_k]


def _best(blanks: Blanks, ways: Iterable[Way]) -> list[Way]:
    def worth(way: Way) -> float:
        logprobs = [logprob for one in way for logprob in one.logprobs]
        return math.fsum(logprobs) / (len(logprobs) if blanks.per_token else 1)

    return sorted(ways, key=worth, reverse=True)


def _count(blanks: Blanks) -> int:
    return max(blanks.top_k, blanks.width)


def _extended(blanks: Blanks, way: Way) -> Asking[list[Way]]:
    mask, found = yield from _next(blanks, way)
    fills = _plain(mask, found) if found else (yield from _fills(blanks, way, mask, _count(blanks)))
    return [(*way, one) for one in fills]


def _draw(blanks: Blanks, mode: Sample, number: int) -> Asking[Way]:
    """Draw a way; its numbers depend on the seed and on which of the ways it is alone."""
    stream = Random(f"{blanks.seed}:{number}")  # noqa: S311 - draws, not secrets
    way: Way = ()
    while len(way) < len(blanks.parts) - 1:
        mask, _ = yield from _next(blanks, way)
        draw = Draw(mode, stream.random())
        if blanks.targets is None:
            (found,) = yield [_query(blanks, way, mask, draw)]
            way = (*way, *_plain(mask, found))
        else:
            import torch

            from lmkit.engine import drawn

            fills = yield from _fills(blanks, way, mask, 0)
            way = (*way, fills[drawn(torch.tensor([math.fsum(one.logprobs) for one in fills]), draw)])
    return way


def _next(blanks: Blanks, way: Way) -> Asking[tuple[int, Found | None]]:
    """Choose the mask to fill next, and tell what was found there, if it was asked for."""
    done = {one.mask for one in way}
    left = [mask for mask in range(len(blanks.parts) - 1) if mask not in done]
    if blanks.order != "most_certain":
        return left[0], None
    found = yield [_query(blanks, way, mask, _count(blanks)) for mask in left]
    mask, best = max(zip(left, found, strict=True), key=lambda one: one[1][0][1])
    return mask, None if blanks.targets else best


def _fills(blanks: Blanks, way: Way, mask: int, count: int) -> Asking[list[Fill]]:
    """Find what a mask may be filled with, given the way so far: the `count` likeliest tokens, or the targets."""
    if blanks.targets is None:
        (likeliest,) = yield [_query(blanks, way, mask, count)]
        return _plain(mask, likeliest)
    words = list(enumerate(blanks.targets[mask]))
    single = [(number, word) for number, word in words if len(word.token_ids) == 1]
    longer = (_chain(blanks, way, mask, number, word) for number, word in words if len(word.token_ids) > 1)
    found = yield from parallel([_singles(blanks, way, mask, single), *longer])
    return sorted((one for some in found for one in some), key=lambda one: one.target or 0)


def _plain(mask: int, found: Found) -> list[Fill]:
    return [Fill(mask, (token_id,), (logprob,)) for token_id, logprob in found]


def _singles(blanks: Blanks, way: Way, mask: int, words: Sequence[tuple[int, Target]]) -> Asking[list[Fill]]:
    """Score targets of one token, all at once."""
    if not words:
        return []
    (found,) = yield [_query(blanks, way, mask, tuple(word.token_ids[0] for _, word in words))]
    return [replace(one, target=number) for one, (number, _) in zip(_plain(mask, found), words, strict=True)]


def _chain(blanks: Blanks, way: Way, mask: int, number: int, word: Target) -> Asking[list[Fill]]:
    """Score a target of several tokens: its mask becomes as many masks, which are filled in one after the other."""
    pieces = [blanks.mask] * len(word.token_ids)
    logprobs: dict[int, float] = {}
    while len(logprobs) < len(pieces):
        row, place = laid_out(blanks, way, mask, pieces)
        left = [piece for piece in range(len(pieces)) if piece not in logprobs]
        asked = left if blanks.order == "most_certain" else left[:1]
        wants = [(piece, want) for piece in asked for want in ((word.token_ids[piece],), 1)]
        found = [one[0][1] for one in (yield [Query(row, place + piece, want) for piece, want in wants])]
        surest = max(range(len(asked)), key=lambda n: found[2 * n + 1])
        logprobs[asked[surest]], pieces[asked[surest]] = found[2 * surest], word.token_ids[asked[surest]]
    return [Fill(mask, word.token_ids, tuple(logprobs[n] for n in range(len(pieces))), tuple(logprobs), number)]


def _query(blanks: Blanks, way: Way, mask: int, want: int | tuple[int, ...] | Draw) -> Query:
    """Ask about a mask of a text that is filled so far."""
    return Query(*laid_out(blanks, way, mask, (blanks.mask,)), want)


def laid_out(blanks: Blanks, way: Way, mask: int, pieces: Sequence[int]) -> tuple[tuple[Typed, ...], int]:
    """Write the tokens of a text that is filled so far, as much as fits around one of its masks.

    Args:
        blanks: The text.
        way: What is filled in.
        mask: The mask to be read.
        pieces: What stands in its place.

    Returns:
        The row that the model reads, and the place of the mask's first piece in it.
    """
    known = () if blanks.order == "independent" else way
    filled = {one.mask: one.token_ids for one in known} | {mask: tuple(pieces)}
    row = list(blanks.parts[0])
    place = 0
    for number, part in enumerate(blanks.parts[1:]):
        if number == mask:
            place = len(row)
        row += [(token_id, blanks.types[number]) for token_id in filled.get(number, (blanks.mask,))]
        row += part
    return seen(row, place, place + len(pieces), blanks.limit, blanks.around)
