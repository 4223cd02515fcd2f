"""Scores made comparable: texts in order of what a model finds likely."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

from lmkit.errors import OptionError, listed, nearest
from lmkit.results import Choice, Ranking

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lmkit.results import Score

__all__ = ["Normalize", "check_normalize", "ranking"]

Normalize: TypeAlias = Literal["none", "tokens", "bytes", "prior"]
"""How log-probabilities of choices are made comparable.

`"none"` leaves them as they are. `"tokens"` divides by the number of tokens, `"bytes"` by that of UTF-8 bytes, which does
not depend on the tokenizer. `"prior"` subtracts the choice's log-probability without the prompt, so that what is likely
anywhere gains nothing by it: pointwise mutual information (Holtzman et al., "Surface Form Competition", 2021).
"""


def check_normalize(normalize: object) -> None:
    """Raise an `OptionError` for a word that `normalize=` does not take."""
    if normalize not in (words := get_args(Normalize)):
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
