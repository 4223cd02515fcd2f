"""Texts to tokens that are scored, and what a model finds of them to scores and rankings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice, takewhile
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar, get_args

from lmkit.encoding import fit
from lmkit.engine import CLOSED, Reading, Scored, Scorer
from lmkit.errors import EngineError, LmkitError, OptionError, listed, nearest
from lmkit.results import Choice, Ranking, Score
from lmkit.wrapper import rows_of, text_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lmkit.encoding import Codec

__all__ = [
    "Item",
    "Normalize",
    "Scores",
    "alone",
    "answered",
    "check_normalize",
    "choices_of",
    "continued",
    "made",
    "pairs",
    "ranking",
    "target",
    "whole",
]

T = TypeVar("T")
Normalize: TypeAlias = Literal["none", "tokens", "bytes", "prior"]
"""How log-probabilities of choices are made comparable.

`"none"` leaves them as they are. `"tokens"` divides by the number of tokens, `"bytes"` by that of UTF-8 bytes, which
does not depend on the tokenizer. `"prior"` subtracts the choice's log-probability without the prompt, so that what is
likely anywhere gains nothing by it: pointwise mutual information (Holtzman et al., "Surface Form Competition", 2021).
"""


@dataclass(frozen=True, slots=True)
class Item:
    """A text to score, and the row of the call that it is for."""

    text: str
    reading: Reading
    row: int


class Scores:
    """Scores and ranks with one model, whatever its task."""

    def __init__(self, model: Any, codec: Codec) -> None:
        """Serve `model`."""
        self._codec = codec
        self._scorer: Scorer | None = Scorer(model, codec.tokenizer.pad_token_id or 0)

    def close(self) -> None:
        """Refuse further work, and let go of the model."""
        if self._scorer is not None:
            self._scorer.close()
        self._scorer = None

    def score(self, items: Sequence[Item]) -> list[Score]:
        """Score texts together; an error of one is raised after the others ended, and carries their scores."""
        return whole(self._scored(items))

    def rank(
        self, choices: Sequence[Sequence[Item]], normalize: Normalize, priors: Sequence[Sequence[Item]] = ()
    ) -> list[Ranking]:
        """Rank the choices of each row; what they share is read once.

        Args:
            choices: The choices of each row.
            normalize: See `Normalize`.
            priors: For `"prior"`: the same choices behind what says nothing.
        """
        found = iter(self._scored([item for row in (*choices, *priors) for item in row]))
        scores, without = ([list(islice(found, len(row))) for row in rows] for rows in (choices, priors))
        rankings: list[Ranking | EngineError] = []
        for number, (row, own) in enumerate(zip(choices, scores, strict=True)):
            before = without[number] if without else []
            failed = next((score for score in (*own, *before) if isinstance(score, EngineError)), None)
            rankings.append(failed or ranking([item.text for item in row], own, normalize, before))  # type: ignore[arg-type]
        return whole(rankings)

    def _scored(self, items: Sequence[Item]) -> list[Score | EngineError]:
        if (scorer := self._scorer) is None:
            raise EngineError(CLOSED)
        readings = list(dict.fromkeys(item.reading for item in items))
        scored = dict(zip(readings, scorer.score(readings), strict=True))
        ids = {token_id for item in items for token_id in item.reading.token_ids[item.reading.start :]}
        texts = {token_id: self._codec.token(token_id) for token_id in ids}
        return [_score(item, scored[item.reading], texts) for item in items]


def _score(item: Item, scored: Scored | EngineError, texts: Mapping[int, str]) -> Score | EngineError:
    if isinstance(scored, EngineError):
        named = EngineError(f"row {item.row}: {scored}") if scored.__cause__ is not None else scored
        named.__cause__ = scored.__cause__
        return named
    token_ids = item.reading.token_ids[item.reading.start :]
    return Score(item.text, tuple(texts[n] for n in token_ids), token_ids, scored.logprobs, scored.greedy)


def whole(results: Sequence[T | LmkitError]) -> list[T]:
    """Return results, or raise the first error among them, with the results of the other rows."""
    failed = next((result for result in results if isinstance(result, LmkitError)), None)
    if failed is not None:
        failed.results = [None if isinstance(result, LmkitError) else result for result in results]
        raise failed
    return [result for result in results if not isinstance(result, LmkitError)]


def made(
    text: str, token_ids: Sequence[int], start: int, *, row: int, limit: int | None, source: Sequence[int] | None = None
) -> Item:
    """Make the item of a text, from all that the decoder reads and the first token that is scored.

    Raises:
        OptionError: There is nothing to score.
        InputTooLongError: There are more than `limit` tokens.
    """
    if start >= len(token_ids):
        msg = (
            f"row {row}, {text!r}, has no token to score: pass more text, or score('', text) to score the first token "
            "too, behind the one that texts begin with."
        )
        raise OptionError(msg)
    fit(token_ids, limit, row=row, advice="shorten it, or score parts of it, cut where you want them")
    return Item(text, Reading(tuple(token_ids), start, None if source is None else tuple(source)), row)


def alone(codec: Codec, text: str) -> tuple[list[int], int]:
    """Return the tokens of a text, and the first that is scored: behind the tokenizer's BOS, else behind the first."""
    return _encoded(codec, text), max(codec.around[0], 1)


def continued(codec: Codec, prompt: str, texts: Iterable[str]) -> list[tuple[list[int], int]]:
    """Return the tokens of a prompt and each of its continuations, and the first that is the continuation's.

    Both are encoded as one text, as a model has learned them; what the prompt's own tokens have in common with that is
    the prompt's. So a token with characters of both is the continuation's.
    """
    before = _encoded(codec, prompt)
    return [_divided(before, _encoded(codec, prompt + text)) for text in texts]


def answered(codec: Codec, prompt: list[int], texts: Iterable[str]) -> list[tuple[list[int], int]]:
    """Do as `continued` does for the tokens of a chat.

    Its text would not bring back its tokens: control tokens inside messages are plain text. So only its end is encoded
    together with the answer, from its last special token on, which is the template's.
    """
    special = set(codec.tokenizer.all_special_ids)
    cut = max((place for place, token_id in enumerate(prompt) if token_id in special), default=0)
    before, last = prompt[:cut], prompt[cut:]
    end: str = codec.tokenizer.decode(last)
    if codec.encode(end, special=False) != last:
        return [([*prompt, *codec.encode(text, special=False)], len(prompt)) for text in texts]
    divided = [_divided(last, codec.encode(end + text, special=False)) for text in texts]
    return [(before + token_ids, cut + start) for token_ids, start in divided]


def target(codec: Codec, text: str, start: int, forced: int | None, *, coded: bool) -> tuple[list[int], int]:
    """Return the tokens that a decoder reads of an answer, and the first that is scored; the end token is the last.

    What a decoder is told stands before the answer and is not scored: its start token, a language or another token that
    every answer is forced to begin with, or those that the tokenizer begins texts with.

    Args:
        codec: The tokenizer.
        text: The answer.
        start: The token that answers begin with.
        forced: The token that answers are forced to begin with.
        coded: Whether languages are tokens, which the tokenizer puts around a text as it is set; they are left out.
    """
    if coded:
        before, body = [], [*codec.encode(text, special=False), codec.tokenizer.eos_token_id]
    else:
        whole, (first, last) = codec.encode_target(text), codec.around
        before, body = whole[:first], whole[first:] if last else [*whole[first:], codec.tokenizer.eos_token_id]
    if forced is not None:
        before = [] if forced == start else [forced]  # some checkpoints of mBART start with the language at once
    return [start, *before, *body], 1 + len(before)


def _encoded(codec: Codec, text: str) -> list[int]:
    """Encode a text without the special tokens that the tokenizer puts behind it."""
    token_ids = codec.encode(text)
    return token_ids[: len(token_ids) - codec.around[1]]


def _divided(prompt: list[int], whole: list[int]) -> tuple[list[int], int]:
    return whole, sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt, whole, strict=False)))


def pairs(rows: list[Any], texts: Any, *, single: bool) -> tuple[list[tuple[Any, Any]], bool]:
    """Put rows and the texts behind them together; a single one of either is for all of the other.

    Returns:
        The pairs, and whether they are a single one.

    Raises:
        OptionError: They are not as many.
    """
    others, one = rows_of(texts)
    if not (single or one) and len(rows) != len(others):
        msg = (
            f"there are {len(rows)} rows and {len(others)} texts to score: pass one for each, or a single one for all."
        )
        raise OptionError(msg)
    return list(zip(rows * len(others) if single else rows, others * len(rows) if one else others, strict=True)), (
        single and one
    )


def choices_of(choices: Any, rows: int, *, single: bool) -> list[list[str]]:
    """Return the choices of each row; a list of texts is for all rows.

    Raises:
        OptionError: They are no texts, or none, or not as many lists as rows.
    """
    lists = [] if single or isinstance(choices, str) or not isinstance(choices, Iterable) else list(choices)
    if not lists or all(isinstance(choice, str) for choice in lists):
        return [_texts(lists or choices, 0)] * rows if rows else []
    if len(lists) != rows:
        msg = f"there are {len(lists)} lists of choices for {rows} rows: pass one list per row, or one for all rows."
        raise OptionError(msg)
    return [_texts(texts, row) for row, texts in enumerate(lists)]


def _texts(choices: Any, row: int) -> list[str]:
    given = [] if isinstance(choices, (str, bytes, Mapping)) or not isinstance(choices, Iterable) else list(choices)
    if not given:
        msg = f"row {row} has the choices {choices!r}: pass a list of texts, at least one."
        raise OptionError(msg)
    return [text_of(choice, row, "a text to choose") for choice in given]


def check_normalize(normalize: object, words: Sequence[str] = get_args(Normalize)) -> None:
    """Raise an `OptionError` for a word that `normalize=` does not take."""
    if normalize not in words:
        hint = nearest(normalize, words) if isinstance(normalize, str) else ""
        msg = f"normalize={normalize!r} is not accepted.{hint} Accepted: {listed(words)}."
        raise OptionError(msg)


def ranking(
    texts: Sequence[str], scores: Sequence[Score], normalize: Normalize, priors: Sequence[Score] | None = None
) -> Ranking:
    """Put choices in order of their normalized log-probabilities, equal ones as they were given.

    Args:
        texts: The choices as given.
        scores: Their scores behind the prompt.
        normalize: See `Normalize`.
        priors: Their scores without the prompt, for `"prior"`.
    """
    check_normalize(normalize)
    values = [score.logprob for score in scores]
    if normalize == "tokens":
        values = [value / len(score.tokens) for value, score in zip(values, scores, strict=True)]
    elif normalize == "bytes":
        values = [value / max(len(text.encode()), 1) for value, text in zip(values, texts, strict=True)]
    elif normalize == "prior":
        values = [value - prior.logprob for value, prior in zip(values, priors or (), strict=True)]
    shares = softmax(values)
    choices = [Choice(*row) for row in zip(texts, range(len(texts)), values, shares, scores, strict=True)]
    return Ranking(tuple(sorted(choices, key=lambda choice: -choice.logprob)), normalize)


def softmax(values: Sequence[float]) -> list[float]:
    """Return shares in proportion to the exponentials of `values`; equal ones where all are minus infinity."""
    most = max(values)
    weights = [1.0 if value == most else math.exp(value - most) for value in values]
    return [weight / math.fsum(weights) for weight in weights]
