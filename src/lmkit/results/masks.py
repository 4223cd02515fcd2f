"""What a call that fills masks returns."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lmkit.results.base import Result
from lmkit.results.pictures import Bars, Block, as_it_is


@dataclass(frozen=True, slots=True)
class Candidate(Result):
    """A way of filling the masks: all of them, or one.

    Attributes:
        text: The whole text, filled; of a pair the first.
        fills: What each mask was filled with: the text of its token, or the target as given.
        tokens: The text of each filled-in token, in order of the text; more than `fills` where targets have several.
        token_ids: Their places in the vocabulary.
        token_logprobs: Natural logarithm of the model's probability of each, given the text and the tokens filled in
            before it.
        order: In which order the tokens were filled in, as indices into `tokens`.
        text_pair: The second text of a pair, filled.
    """

    text: str
    fills: tuple[str, ...]
    tokens: tuple[str, ...]
    token_ids: tuple[int, ...]
    token_logprobs: tuple[float, ...]
    order: tuple[int, ...] = ()
    text_pair: str | None = None

    def __str__(self) -> str:
        """Return the filled text; both of a pair, each on a line of its own."""
        return self.text if self.text_pair is None else f"{self.text}\n{self.text_pair}"

    @property
    def token(self) -> str:
        """What the first mask was filled with."""
        return self.fills[0]

    @property
    def token_id(self) -> int:
        """Where the first mask's (first) token is in the vocabulary."""
        return self.token_ids[0]

    @property
    def logprob(self) -> float:
        """The sum of `token_logprobs`: by the chain rule, the logarithm of the tokens' joint probability."""
        return math.fsum(self.token_logprobs)

    @property
    def logprob_per_token(self) -> float:
        """The mean of `token_logprobs`, which does not favour fills of few tokens."""
        return self.logprob / len(self.token_logprobs)

    @property
    def score(self) -> float:
        """The tokens' probability (joint, by the chain rule, where there are several)."""
        return math.exp(self.logprob)


@dataclass(frozen=True, slots=True)
class MaskSlot(Result):
    """One mask of the text and the independent guesses for it.

    Attributes:
        start: Where the mask begins in its text as given, in characters.
        end: Where it ends, exclusive.
        candidates: Guesses for this mask alone, the others left masked; best first, or in the
            order of `targets`.
        seen_start: Where the part of the text begins that the model saw to fill it, in characters: 0, unless the text
            is longer than the model takes.
        seen_end: Where that part ends, exclusive.
        in_pair: Whether the mask's text, which all these places are in, is `text_pair`.
    """

    start: int
    end: int
    candidates: tuple[Candidate, ...]
    seen_start: int
    seen_end: int
    in_pair: bool = False


@dataclass(frozen=True, slots=True, repr=False)
class Unmasking(Result):
    """What a text's masks were filled with.

    Attributes:
        text: The text as given; of a pair the first.
        masks: Its masks, or both texts', each with independent guesses.
        candidates: Ways of filling the whole text, best first; draws in the order in which they were drawn.
        seed: What reproduces the draws, if the ways were drawn.
        text_pair: The second text of a pair, as given.
    """

    text: str
    masks: tuple[MaskSlot, ...]
    candidates: tuple[Candidate, ...]
    seed: int | None = None
    text_pair: str | None = None

    def __str__(self) -> str:
        """Return the text filled in the best way; both of a pair, each on a line of its own."""
        return str(self.candidates[0])

    def _told(self) -> dict[str, object]:
        return {"score": round(self.candidates[0].score, 4)}

    def _picture(self) -> list[Block]:
        pair = [] if self.text_pair is None else [as_it_is(self.text_pair)]
        slots = [
            Bars(f"mask {n}", tuple((one.fills[0], one.score, f"{one.score:.3f}") for one in slot.candidates))
            for n, slot in enumerate(self.masks, start=1)
        ]
        ways = Bars("ways", tuple((str(way), way.score, f"{way.score:.3f}") for way in self.candidates))
        return [as_it_is(self.text), *pair, *slots, *([ways] if len(slots) > 1 else [])]
