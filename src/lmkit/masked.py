"""Texts with masks: to what is filled in, and back to texts."""

from __future__ import annotations

import re
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from lmkit.encoding import window
from lmkit.errors import OptionError
from lmkit.filling import Blanks, Fill, Target, Way
from lmkit.results import Candidate, MaskSlot, Unmasking

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lmkit.encoding import Codec

__all__ = ["Job", "MaskedTexts"]

_WORD_STARTS = ("Ġ", "▁")
"""How byte-level and sentencepiece tokenizers mark the pieces that begin a word."""

_SHOWN = 60
"""How many characters of a target a message repeats."""


@dataclass(frozen=True, slots=True)
class Job:
    """A text on its way to the model.

    Attributes:
        text: As given.
        spans: Where its masks are, in characters.
        blanks: What is filled in.
        seen: Per mask the part of the text, in characters, that the model sees to fill it.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    blanks: Blanks
    seen: tuple[tuple[int, int], ...]


class MaskedTexts:
    """Reads texts with masks, and writes them filled in, for one tokenizer."""

    def __init__(self, codec: Codec, limit: int | None, name: str) -> None:
        """Serve the model `name`, which takes `limit` tokens."""
        tokenizer = codec.tokenizer
        if tokenizer.mask_token is None:
            msg = f"the tokenizer of {name!r} has no mask token, so there is nothing to fill in."
            raise OptionError(msg)
        self._codec = codec
        self._limit = limit
        self._written = str(tokenizer.mask_token)
        self._mask: int = tokenizer.mask_token_id
        self._unknown = tokenizer.unk_token_id
        self.pattern = re.compile("|".join(map(re.escape, sorted({self._written, "[MASK]", "<mask>"}))))
        self._words: dict[int, tuple[str, bool]] = {}

    def job(self, text: str, targets: Sequence[str] | None, row: int, **how: Any) -> Job:
        """Find the masks of a text.

        Args:
            text: As given.
            targets: The words to consider.
            row: The text's number, for messages.
            **how: What `Blanks` is told of the search.

        Raises:
            OptionError: There is no mask, or a target that the vocabulary cannot express.
        """
        spans = tuple(match.span() for match in self.pattern.finditer(text))
        if not spans:
            msg = f"row {row} has no mask: write [MASK] or <mask> where a word is to be filled in. Given: {text!r}."
            raise OptionError(msg)
        written = self.pattern.sub(lambda _: self._written, text)
        token_ids = tuple(self._codec.encode(written))
        cuts = [-1, *(place for place, token_id in enumerate(token_ids) if token_id == self._mask), len(token_ids)]
        parts = tuple(token_ids[start + 1 : end] for start, end in pairwise(cuts))
        named = None if targets is None else tuple(self._targets(targets, text[:start]) for start, _ in spans)
        blanks = Blanks(parts, self._mask, self._limit, self._codec.around, named, **how)
        return Job(text, spans, blanks, self._seen(text, written, spans, cuts))

    def result(self, job: Job, guesses: Sequence[Sequence[Fill]], ways: Sequence[Way]) -> Unmasking:
        """Write what was found."""
        alone = [{id(one): self._candidate(job, (one,)) for one in found} for found in guesses]
        slots = tuple(
            MaskSlot(*span, tuple(found.values()), *seen)
            for span, found, seen in zip(job.spans, alone, job.seen, strict=True)
        )
        known = alone[0] if len(alone) == 1 else {}
        candidates = tuple(known.get(id(way[0])) or self._candidate(job, way) for way in ways)
        return Unmasking(job.text, slots, candidates, job.blanks.seed)

    def _targets(self, targets: Sequence[str], left: str) -> tuple[Target, ...]:
        """Return the tokens of each target, as it would stand behind the text `left`."""
        spaced = left.endswith((" ", "\t", "\n"))
        return tuple(Target(word, self._tokens_of(word, spaced=spaced)) for word in targets)

    def _tokens_of(self, word: str, *, spaced: bool) -> tuple[int, ...]:
        """Return the tokens of a word: the one that it is, if there is one with or without a space before it."""
        ways = [f" {word}", word] if spaced else [word]
        encoded = [tuple(self._codec.encode(way, special=False)) for way in ways]
        special = {self._unknown, *self._codec.tokenizer.all_special_ids}  # none of these is a word
        known = [token_ids for token_ids in encoded if token_ids and special.isdisjoint(token_ids)]
        if not known:
            pieces = self._codec.tokenizer.convert_ids_to_tokens(list(encoded[0]))
            msg = (
                f"the target {_shown(word)} cannot be written with this checkpoint's vocabulary: it would be "
                f"{_shown(pieces)}, and unknown or special tokens are no words. Choose another word."
            )
            raise OptionError(msg)
        best = next((token_ids for token_ids in known if len(token_ids) == 1), known[0])
        if self._limit is not None and len(best) > (room := self._limit - sum(self._codec.around)):
            msg = f"the target {_shown(word)} has {len(best)} tokens, and the model takes {room}: choose a shorter one."
            raise OptionError(msg)
        return best

    def _seen(
        self, text: str, written: str, spans: Sequence[tuple[int, int]], cuts: Sequence[int]
    ) -> tuple[tuple[int, int], ...]:
        """Say for each mask which part of the text the model sees around it.

        Args:
            text: As given.
            written: As the model is given it, masks in its own way.
            spans: Where the masks are in `text`.
            cuts: Where they are in tokens, between -1 and the number of tokens.
        """
        length, (before, after) = cuts[-1], self._codec.around
        if self._limit is None or length <= self._limit:
            return ((0, len(text)),) * len(spans)
        start_of, end_of = self._places(written)
        seen = []
        for place in cuts[1:-1]:
            first, last = window(length, place, place + 1, self._limit, (before, after))
            start = 0 if first == before else self._as_given(start_of(first), spans)
            end = len(text) if last == length - after else self._as_given(end_of(last - 1), spans)
            seen.append((start, end))
        return tuple(seen)

    def _places(self, written: str) -> tuple[Callable[[int], int], Callable[[int], int]]:
        """Return what says of a token where in a text it begins and where it ends, in characters."""
        if (located := self._codec.located(written)) is not None:
            offsets = located[1]
            return (lambda token: offsets[token][0]), (lambda token: offsets[token][1])

        def start_of(token: int) -> int:
            # The longest beginning of the text with as many tokens as there are before this one.
            def count(end: int) -> int:
                return len(self._codec.encode(written[:end], special=False))

            return bisect_right(range(len(written) + 1), token - self._codec.around[0], key=count) - 1

        return start_of, lambda token: start_of(token + 1)

    def _as_given(self, character: int, spans: Sequence[tuple[int, int]]) -> int:
        """Turn a place in a text whose masks are written in the model's way into a place in the text as given."""
        longer = 0
        for start, end in spans:
            if character <= start + longer:
                break
            if character < start + longer + len(self._written):
                return end
            longer += len(self._written) - (end - start)
        return character - longer

    def _candidate(self, job: Job, way: Way) -> Candidate:
        """Write fills into the text as given, which otherwise stays as it is."""
        text, end = "", 0
        words: list[str] = []
        tokens: list[str] = []
        first: dict[int, int] = {}
        fills = sorted(way, key=lambda one: one.mask)
        for one in fills:
            shown = [self._word(token_id) for token_id in one.token_ids]
            word, glued = shown[0]
            if job.blanks.targets is not None and one.target is not None:
                word = job.blanks.targets[one.mask][one.target].word.strip()
            start, after = job.spans[one.mask]
            text += job.text[end:start]
            if glued:
                text = text.rstrip(" ")
            elif text[-1:].isalnum() and word[:1].isalnum():
                text += " "  # the token begins a word, and the text before it does not end with a space
            text, end = text + word, after
            first[one.mask] = len(tokens)
            tokens += [word] if len(shown) == 1 else [token for token, _ in shown]
            words.append(word)
        return Candidate(
            text + job.text[end:],
            tuple(words),
            tuple(tokens),
            tuple(token_id for one in fills for token_id in one.token_ids),
            tuple(logprob for one in fills for logprob in one.logprobs),
            tuple(first[one.mask] + piece for one in way for piece in one.order),
        )

    def _word(self, token_id: int) -> tuple[str, bool]:
        """Return a token's text, and whether it continues the word before it."""
        if (known := self._words.get(token_id)) is None:
            raw = str(self._codec.tokenizer.convert_ids_to_tokens(token_id))
            if raw.startswith("##"):
                known = raw[2:], True
            else:
                glued = self._marks_words and not raw.startswith(_WORD_STARTS) and raw.isalnum()
                known = self._codec.token(token_id).strip(), glued
            self._words[token_id] = known
        return known

    @cached_property
    def _marks_words(self) -> bool:
        """Whether the tokenizer marks the pieces that begin a word, as byte-level and sentencepiece ones do."""
        pieces = self._codec.tokenizer.convert_ids_to_tokens(self._codec.encode("a a", special=False))
        return any(str(piece).startswith(_WORD_STARTS) for piece in pieces)


def _shown(given: object) -> str:
    return written if len(written := repr(given)) <= _SHOWN else written[:_SHOWN] + "…"
