"""What `score` and `rank` return."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lmkit.results.base import Result
from lmkit.results.pictures import Bars, Block, Facts, Span, Text


@dataclass(frozen=True, slots=True, repr=False)
class Score(Result):
    """How likely the model finds a text, or a continuation of one.

    Attributes:
        text: What was scored.
        tokens: The text of each scored token, in order.
        token_ids: Their places in the vocabulary.
        token_logprobs: Natural logarithm of the model's probability of each.
        greedy: Whether each is the likeliest in its place, so that greedy decoding would write them; None of a
            masked model's score.
        unknown: Which of the tokens, as indices, stand for what the vocabulary lacks. Their log-probabilities are those
            of the unknown token, whatever the text has in their place, so they compare with nothing.
    """

    text: str
    tokens: tuple[str, ...] = ()
    token_ids: tuple[int, ...] = ()
    token_logprobs: tuple[float, ...] = ()
    greedy: bool | None = None
    unknown: tuple[int, ...] = ()

    @property
    def logprob(self) -> float:
        """The sum of `token_logprobs`."""
        return math.fsum(self.token_logprobs)

    @property
    def perplexity(self) -> float:
        """The exponential of the mean of `-token_logprobs`; infinite where that overflows."""
        try:
            return math.exp(-self.logprob / (len(self.token_logprobs) or 1))
        except OverflowError:
            return math.inf

    def __str__(self) -> str:
        """Return the text."""
        return self.text

    def _told(self) -> dict[str, object]:
        return {"logprob": round(self.logprob, 4), "perplexity": round(self.perplexity, 4)}

    def _picture(self) -> list[Block]:
        pairs = zip(self.tokens, map(math.exp, self.token_logprobs), strict=True)
        spans = tuple(Span(token, 1 - share, f"{share:.4f}") for token, share in pairs)
        return [Text((spans,)), Facts(self._told())]


@dataclass(frozen=True, slots=True)
class Choice(Result):
    """One of the texts that were ranked.

    Attributes:
        text: The text as given.
        index: Its place among the choices as given.
        logprob: What it was ranked by: its log-probability, normalized as `rank` was told.
        probability: Its share among the choices, the softmax of their `logprob`s.
        score: Its log-probability by tokens, before it was normalized.
    """

    text: str
    index: int
    logprob: float
    probability: float
    score: Score

    @property
    def tokens(self) -> tuple[str, ...]:
        """The text of each scored token."""
        return self.score.tokens

    @property
    def unknown(self) -> tuple[int, ...]:
        """Which of them stand for what the vocabulary lacks, as indices: see `Score`."""
        return self.score.unknown

    def __str__(self) -> str:
        """Return the text."""
        return self.text


@dataclass(frozen=True, slots=True, repr=False)
class Ranking(Result):
    """Texts in order of what the model finds likely.

    Attributes:
        choices: The likeliest first; equal ones as they were given.
        normalize: How log-probabilities were made comparable.
    """

    choices: tuple[Choice, ...]
    normalize: str = "none"

    def __str__(self) -> str:
        """Return the likeliest text."""
        return self.choices[0].text

    def _told(self) -> dict[str, object]:
        return {"probability": round(self.choices[0].probability, 4), "choices": len(self.choices)}

    def _picture(self) -> list[Block]:
        return [Bars("", tuple((one.text, one.probability, f"{one.probability:.3f}") for one in self.choices))]
