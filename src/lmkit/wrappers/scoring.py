"""Texts to tokens that are scored, and what a model finds of them to scores and rankings."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar, get_args

from lmkit.engine import CLOSED, Reading, Scored
from lmkit.errors import EngineError, LmkitError, OptionError, shown
from lmkit.options.option import check_word
from lmkit.results import Choice, Ranking, Results, Score
from lmkit.text.codec import alike
from lmkit.text.windows import fit
from lmkit.wrappers.asynchronous import cancelled
from lmkit.wrappers.base import OnError, rows_of, text_of
from lmkit.wrappers.progress import bar

if TYPE_CHECKING:
    from lmkit.engine import Scorer
    from lmkit.text.codec import Codec

T = TypeVar("T")
ResultT = TypeVar("ResultT")
Length: TypeAlias = Literal["none", "tokens", "bytes"]
"""What texts of different lengths are compared by."""
Normalize: TypeAlias = Literal[Length, "prior"]
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

    def __init__(self, scorer: Scorer, codec: Codec) -> None:
        """Score with `scorer`, whose tokens are `codec`'s."""
        self._codec = codec
        self._scorer: Scorer | None = scorer

    def close(self) -> None:
        """Refuse further work, and let go of the model."""
        if self._scorer is not None:
            self._scorer.close()
        self._scorer = None

    def run(self, items: Sequence[Item], ended: Callable[[object], None]) -> list[Score | EngineError]:
        """Score texts together; what several have in common is read once, and one that fails is its error."""
        if (scorer := self._scorer) is None:
            raise EngineError(CLOSED)
        readings = list(dict.fromkeys(item.reading for item in items))
        scored = dict(zip(readings, scorer.score(readings, cancelled(), ended), strict=True))
        for again in range(len(items) - len(readings)):
            ended(again)
        return [_score(item, scored[item.reading], self._codec) for item in items]


def _score(item: Item, scored: Scored | EngineError, codec: Codec) -> Score | EngineError:
    if isinstance(scored, EngineError):
        named = EngineError(f"row {item.row}: {scored}") if scored.__cause__ is not None else scored
        named.__cause__ = scored.__cause__
        return named
    read, start = item.reading.token_ids, item.reading.start
    begun = next((place for place, token_id in enumerate(read) if token_id not in codec.special), len(read))
    tokens = tuple(codec.shown(token_id, first=place <= begun) for place, token_id in enumerate(read[start:], start))
    return Score(item.text, tokens, read[start:], scored.logprobs, scored.greedy, codec.unknown_in(read[start:]))


def prepared(make: Callable[..., T], rows: Iterable[tuple[Any, ...]], on_error: OnError) -> list[T | LmkitError]:
    """Make what is scored of each row; one that cannot be scored raises its error before any is, or is its error.

    Raises:
        OptionError: `on_error` is another word.
    """
    check_word("on_error", on_error, get_args(OnError))
    found: list[T | LmkitError] = []
    for number, row in enumerate(rows):
        try:
            found.append(make(*row, number))
        except LmkitError as error:
            if on_error == "raise":
                raise
            found.append(error)
    return found


def scored(
    rows: Sequence[Sequence[T] | LmkitError],
    run: Callable[[list[T], Callable[[object], None]], Sequence[Score | LmkitError]],
    make: Callable[[Sequence[T], list[Score]], ResultT],
    *,
    on_error: OnError,
    progress: bool | None,
) -> list[Any]:
    """Score the texts of all rows together, and make a result of each row's; it fails with the first of them.

    The first error is raised after all rows ended, and carries their results, or errors are returned in their places.
    """
    texts = [one for row in rows if not isinstance(row, LmkitError) for one in row]
    with bar(progress, len(texts), unit="texts") as ended:
        found = iter(run(texts, ended))

    def result(row: Sequence[T]) -> ResultT | LmkitError:
        own = list(islice(found, len(row)))
        failed = next((one for one in own if isinstance(one, LmkitError)), None)
        return failed or make(row, [one for one in own if isinstance(one, Score)])

    results = Results(row if isinstance(row, LmkitError) else result(row) for row in rows)
    return results if on_error == "return" else whole(results)


def first_score(_row: Sequence[Any], scores: list[Score]) -> Score:
    """Return the score of a row that is one text."""
    return scores[0]


def ranked(normalize: Normalize) -> Callable[[Sequence[Any], list[Score]], Ranking]:
    """Return what ranks the texts of a row, which for `"prior"` come again without the prompt."""

    def make(row: Sequence[Any], scores: list[Score]) -> Ranking:
        count = len(row) // 2 if normalize == "prior" else len(row)
        return ranking([one.text for one in row[:count]], scores[:count], normalize, scores[count:])

    return make


def whole(results: Sequence[T | LmkitError]) -> list[T]:
    """Return results, or raise the first error among them, with the results of the other rows."""
    failed = next((result for result in results if isinstance(result, LmkitError)), None)
    if failed is not None:
        failed.results = [None if isinstance(result, LmkitError) else result for result in results]
        raise failed
    return Results(result for result in results if not isinstance(result, LmkitError))


def made(
    text: str, token_ids: Sequence[int], start: int, *, row: int, limit: int | None, source: Sequence[int] | None = None
) -> Item:
    """Make the item of a text, from all that the decoder reads and the first token that is scored.

    Raises:
        OptionError: There is nothing to score.
        InputTooLongError: There are more than `limit` tokens.
    """
    if start >= len(token_ids):
        raise OptionError(
            f"row {row}, {text!r}, has no token to score: pass more text, or score('', text) to score the first token "
            "too, behind the one that texts begin with."
        )
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
    wholes = (_encoded(codec, prompt + text) for text in texts)
    return [(whole, alike(before, whole)) for whole in wholes]


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
    wholes = (codec.encode(end + text, special=False) for text in texts)
    return [(before + whole, cut + alike(last, whole)) for whole in wholes]


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


def pairs(rows: list[Any], texts: Any, *, single: bool) -> tuple[list[tuple[Any, Any]], bool]:
    """Put rows and the texts behind them together; a single one of either is for all of the other.

    Returns:
        The pairs, and whether they are a single one.

    Raises:
        OptionError: They are not as many.
    """
    others, one = rows_of(texts)
    if not (single or one) and len(rows) != len(others):
        raise OptionError(
            f"there are {len(rows)} rows and {len(others)} texts to score: pass one for each, or a single one for all."
        )
    both = zip(rows * len(others) if single else rows, others * len(rows) if one else others, strict=True)
    return list(both), single and one


def choices_of(choices: Any, rows: int, *, single: bool) -> list[Any]:
    """Return the choices of each row, as given; a list of texts is for all rows.

    Raises:
        OptionError: There are not as many lists as rows.
    """
    lists = [] if single or isinstance(choices, str) or not isinstance(choices, Iterable) else list(choices)
    if not lists or all(isinstance(choice, str) for choice in lists):
        return [lists or choices] * rows
    if len(lists) != rows:
        raise OptionError(
            f"there are {len(lists)} lists of choices for {rows} rows: pass one list per row, or one for all rows."
        )
    return lists


def texts_of(choices: Any, row: int) -> list[str]:
    """Return the choices of a row.

    Raises:
        OptionError: They are no texts, or none.
    """
    given, single = rows_of(choices)
    if single or not given:
        raise OptionError(f"row {row} has the choices {shown(choices)}: pass a list of texts, at least one.")
    return [text_of(choice, row, "a text to choose") for choice in given]


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
