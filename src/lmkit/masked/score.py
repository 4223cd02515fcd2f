"""Pseudo-log-likelihood: how likely a masked model finds each token of a text, the others given."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Literal, TypeAlias

from lmkit.engine import Asking, Query
from lmkit.errors import OptionError
from lmkit.results import Score
from lmkit.text.codec import WORD_STARTS, Codec, Typed
from lmkit.text.windows import seen

Metric: TypeAlias = Literal["original", "within_word_l2r"]
"""What is masked while a token is scored: the token alone, or the later tokens of its word as well."""

AT_A_TIME = 128
"""How many tokens of a text are asked about in one round."""


@dataclass(frozen=True, slots=True)
class Hidden:
    """A text whose tokens are scored one by one.

    Attributes:
        text: As given.
        tokens: What the model reads, special tokens included, each with its type.
        places: Per scored token the places that are masked, its own first.
    """

    text: str
    tokens: tuple[Typed, ...]
    places: tuple[tuple[int, ...], ...]


def hidden(codec: Codec, text: str, metric: Metric, name: str) -> Hidden:
    """Say which tokens of a text are scored, and what is masked for each: special tokens are neither.

    Messages call the text by `name`.

    Raises:
        OptionError: There is no token to score.
    """
    typed = codec.typed(text)
    token_ids = [token_id for token_id, _ in typed]
    tokenizer, (before, after) = codec.tokenizer, codec.around
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    scored = [n for n in range(before, len(token_ids) - after) if token_ids[n] not in special]
    if not scored:
        raise OptionError(f"{name}, {text!r}, has no token to score: pass a text.")
    # In the original metric each token is a word of its own.
    words = _words(codec, text, token_ids) if metric == "within_word_l2r" else range(len(token_ids))
    together = [tuple(places) for _, places in groupby(scored, key=words.__getitem__)]
    places = tuple(word[n:] for word in together for n in range(len(word)))
    return Hidden(text, tuple(typed), places)


def pseudo(codec: Codec, given: Hidden, limit: int | None) -> Asking[Score]:
    """Score each token of a text with a mask in its place; of a text that is too long, with what fits around it."""
    logprobs: list[float] = []
    for start in range(0, len(given.places), AT_A_TIME):
        queries = [_query(codec, given, places, limit) for places in given.places[start : start + AT_A_TIME]]
        logprobs += [one[0][1] for one in (yield queries)]
    token_ids = tuple(given.tokens[places[0]][0] for places in given.places)
    tokens = tuple(map(codec.token, token_ids))
    return Score(given.text, tokens, token_ids, tuple(logprobs), unknown=codec.unknown_in(token_ids))


def _query(codec: Codec, given: Hidden, places: tuple[int, ...], limit: int | None) -> Query:
    row = list(given.tokens)
    for place in places:
        row[place] = codec.tokenizer.mask_token_id, row[place][1]
    read, place = seen(row, places[0], places[0] + 1, limit, codec.around)
    return Query(read, place, (given.tokens[places[0]][0],))


def _words(codec: Codec, text: str, token_ids: list[int]) -> list[int]:
    """Number the words that tokens belong to: as the tokenizer says, or by the marks of its pieces."""
    pieces = [str(piece) for piece in codec.tokenizer.convert_ids_to_tokens(token_ids)]
    marked = [piece.startswith(WORD_STARTS) for piece in pieces]
    if located := codec.located(text):
        words = located[2]
        begins = [marked[n] or words[n] != words[n - 1] for n in range(len(pieces))]
    elif any(piece.endswith("</w>") for piece in pieces):
        ends = ("</w>", str(codec.tokenizer.unk_token))
        begins = [pieces[n - 1].endswith(ends) for n in range(len(pieces))]
    else:
        begins = marked if any(marked) else [not piece.startswith("##") for piece in pieces]
    return list(accumulate(begins))
