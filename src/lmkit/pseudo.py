"""Pseudo-log-likelihood: how likely a masked model finds each token of a text, the others given."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

from lmkit.encoding import seen
from lmkit.engine import Query
from lmkit.errors import OptionError, listed, nearest
from lmkit.results import Score

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lmkit.encoding import Codec
    from lmkit.engine import Asking

__all__ = ["Hidden", "Metric", "check_metric", "hidden", "pseudo"]

Metric: TypeAlias = Literal["original", "within_word_l2r"]
"""What is masked while a token is scored: the token alone, or the later tokens of its word as well."""

AT_A_TIME = 128
"""How many tokens of a text are asked about in one round."""


@dataclass(frozen=True, slots=True)
class Hidden:
    """A text whose tokens are scored one by one.

    Attributes:
        text: As given.
        token_ids: What the model reads, special tokens included.
        places: Per scored token the places that are masked, its own first.
    """

    text: str
    token_ids: tuple[int, ...]
    places: tuple[tuple[int, ...], ...]


def check_metric(metric: object) -> None:
    """Raise an `OptionError` for a word that `metric=` does not take."""
    if metric not in (words := get_args(Metric)):
        hint = nearest(metric, words) if isinstance(metric, str) else ""
        msg = f"metric={metric!r} is not accepted.{hint} Accepted: {listed(words)}."
        raise OptionError(msg)


def hidden(codec: Codec, text: str, metric: Metric, name: str) -> Hidden:
    """Say which tokens of a text are scored, and what is masked for each: special tokens are neither.

    Messages call the text by `name`.

    Raises:
        OptionError: There is no token to score.
    """
    token_ids = codec.encode(text)
    tokenizer, (before, after) = codec.tokenizer, codec.around
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    scored = [n for n in range(before, len(token_ids) - after) if token_ids[n] not in special]
    if not scored:
        msg = f"{name}, {text!r}, has no token to score: pass a text."
        raise OptionError(msg)
    places: list[tuple[int, ...]] = [(place,) for place in scored]
    if metric == "within_word_l2r":
        words = list(_words(codec, text, token_ids))
        together = [list(places) for _, places in groupby(scored, key=words.__getitem__)]
        places = [tuple(word[n:]) for word in together for n in range(len(word))]
    return Hidden(text, tuple(token_ids), tuple(places))


def pseudo(codec: Codec, given: Hidden, limit: int | None) -> Asking[Score]:
    """Score each token of a text with a mask in its place; of a text that is too long, with what fits around it."""
    logprobs: list[float] = []
    for start in range(0, len(given.places), AT_A_TIME):
        queries = [_query(codec, given, places, limit) for places in given.places[start : start + AT_A_TIME]]
        logprobs += [one[0][1] for one in (yield queries)]
    token_ids = tuple(given.token_ids[places[0]] for places in given.places)
    return Score(given.text, tuple(map(codec.token, token_ids)), token_ids, tuple(logprobs))


def _query(codec: Codec, given: Hidden, places: tuple[int, ...], limit: int | None) -> Query:
    row = list(given.token_ids)
    for place in places:
        row[place] = codec.tokenizer.mask_token_id
    read, place = seen(row, places[0], places[0] + 1, limit, codec.around)
    return Query(read, place, (given.token_ids[places[0]],))


def _words(codec: Codec, text: str, token_ids: list[int]) -> Iterator[int]:
    """Number the words that tokens belong to: as the tokenizer says, or by the marks of its pieces."""
    located = codec.located(text)
    given = None if located is None else located[2]
    tokenizer = codec.tokenizer
    pieces = [str(piece) for piece in tokenizer.convert_ids_to_tokens(token_ids)]
    marked = any(piece.startswith(_STARTS) for piece in pieces)
    ends = ("</w>", str(tokenizer.unk_token)) if any(piece.endswith("</w>") for piece in pieces) else None
    word = 0
    for place, piece in enumerate(pieces):
        if given is not None:
            begins = given[place] != given[place - 1] or piece.startswith(_STARTS)
        elif ends is not None:
            begins = pieces[place - 1].endswith(ends)
        else:
            begins = piece.startswith(_STARTS) if marked else not piece.startswith("##")
        word += begins
        yield word


_STARTS = ("Ġ", "▁")
"""How byte-level and sentencepiece tokenizers mark the pieces that begin a word."""
