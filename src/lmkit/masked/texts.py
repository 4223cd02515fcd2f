"""Texts with masks: to what is filled in, and back to texts."""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from lmkit.errors import OptionError, shown
from lmkit.masked.fill import Blanks, Fill, Target, Way
from lmkit.results import Candidate, MaskSlot, Unmasking
from lmkit.text.codec import WORD_STARTS, Codec, Typed, alike
from lmkit.text.windows import fit, window

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_SHOWN = 60
"""How many characters of a target a message repeats."""


@dataclass(frozen=True, slots=True)
class MaskedText:
    """A text, or a pair of them, on the way to the model.

    Attributes:
        texts: As given.
        spans: Where the masks are: in which of the texts, and there from where to where in characters.
        blanks: What is filled in.
        seen: Per mask the part of its text, in characters, that the model sees to fill it.
    """

    texts: tuple[str, ...]
    spans: tuple[tuple[int, int, int], ...]
    blanks: Blanks
    seen: tuple[tuple[int, int], ...]


class MaskedTexts:
    """Reads texts with masks, and writes them filled in, for one tokenizer."""

    def __init__(self, codec: Codec, limit: int | None, name: str, types: int | None = None) -> None:
        """Serve the model `name`, which takes `limit` tokens, and has so many `types` of them if it has any."""
        tokenizer = codec.tokenizer
        if tokenizer.mask_token is None:
            raise OptionError(f"the tokenizer of {name!r} has no mask token, so there is nothing to fill in.")
        self._codec = codec
        self._limit = limit
        self._types = types or math.inf
        self._written = str(tokenizer.mask_token)
        self._mask: int = tokenizer.mask_token_id
        self.pattern = re.compile("|".join(map(re.escape, sorted({self._written, "[MASK]", "<mask>"}))))
        self._words: dict[int, tuple[str, bool]] = {}

    def job(self, *texts: str, targets: Sequence[str] | None, row: int, **how: Any) -> MaskedText:
        """Find the masks of a text, or of a pair of texts.

        Args:
            *texts: As given.
            targets: The words to consider.
            row: The text's number, for messages.
            **how: What `Blanks` is told of the search.

        Raises:
            OptionError: There is no mask, or a target that the vocabulary cannot express, or the model knows no pairs.
            InputTooLongError: A pair has more tokens than the model takes.
        """
        spans = tuple((n, *match.span()) for n, text in enumerate(texts) for match in self.pattern.finditer(text))
        if not spans:
            raise OptionError(
                f"row {row} has no mask: write [MASK] or <mask> where a word is to be filled in. Given: "
                f"{' and '.join(map(repr, texts))}."
            )
        written = [self.pattern.sub(lambda _: self._written, text) for text in texts]
        tokens = tuple(self._codec.typed(*written))
        cuts = [-1, *(place for place, (token_id, _) in enumerate(tokens) if token_id == self._mask), len(tokens)]
        parts = tuple(tokens[start + 1 : end] for start, end in pairwise(cuts))
        types = tuple(tokens[place][1] for place in cuts[1:-1])
        named = None if targets is None else self._named(texts, targets)
        if len(texts) > 1:
            self._check_pair(tokens, named or (), row)
        blanks = Blanks(parts, types, self._mask, self._limit, self._codec.around, named, **how)
        return MaskedText(texts, spans, blanks, self._seen(texts, written[0], spans, cuts))

    def _check_pair(self, tokens: Sequence[Typed], named: Sequence[Sequence[Target]], row: int) -> None:
        if not self._codec.pairs:
            raise OptionError(
                f"row {row} has a text_pair, and this checkpoint's tokenizer puts no special token between two texts: "
                "leave text_pair out, or write both into one text."
            )
        if (most := max(kind or 0 for _, kind in tokens)) >= self._types:
            raise OptionError(
                f"row {row} has a text_pair, whose tokens the tokenizer gives the type {most}, and the model has the "
                f"types below {self._types} only: leave text_pair out, or write both into one text."
            )
        more = sum(max(len(word.token_ids) for word in words) - 1 for words in named)
        advice = "a pair is not read in parts; shorten its texts, or leave text_pair out"
        fit([self._mask] * (len(tokens) + more), self._limit, row=row, advice=advice)

    def result(self, job: MaskedText, guesses: Sequence[Sequence[Fill]], ways: Sequence[Way]) -> Unmasking:
        """Write what was found."""
        alone = [{id(one): self._candidate(job, (one,)) for one in found} for found in guesses]
        slots = tuple(
            MaskSlot(start, end, tuple(found.values()), *seen, in_pair=number > 0)
            for (number, start, end), found, seen in zip(job.spans, alone, job.seen, strict=True)
        )
        known = alone[0] if len(alone) == 1 else {}
        candidates = tuple(known.get(id(way[0])) or self._candidate(job, way) for way in ways)
        return Unmasking(job.texts[0], slots, candidates, job.blanks.seed, *job.texts[1:])

    def _named(self, texts: Sequence[str], words: Sequence[str]) -> tuple[tuple[Target, ...], ...]:
        """Return per mask the words to consider, as they stand there."""
        encode = cache(self._codec.encode)
        each = [
            (between, mask, [_in_place(word, between[mask]) for word in words])
            for between in map(self.pattern.split, texts)
            for mask in range(len(between) - 1)
        ]
        return tuple(
            tuple(Target(word, self._tokens_of(word, between, mask, encode)) for word in placed)
            for between, mask, placed in each
        )

    def _tokens_of(
        self, word: str, between: Sequence[str], mask: int, encode: Callable[[str], list[int]]
    ) -> tuple[int, ...]:
        """Return the tokens that a word has at a mask of the whole text, the same word at the other masks.

        Where it shares a token with the text before or behind it, they are those that it has without that.
        """
        before, after = word.join(between[: mask + 1]), word.join(between[mask + 1 :])
        texts = before.rstrip(), before + self._written, before + word, before + word + after, after
        first, last = self._codec.around
        bare, read, upto, whole, rest = (encode(text)[: -last or None] for text in texts)
        found, end = upto, len(whole) - len(rest[first:])
        if alike(upto, whole) < len(upto) and whole[end:] == rest[first:]:
            found = whole[:end]  # a tokenizer may write the end of a text in another way than its middle
        start = alike(read[:-1], found)
        encoded = [tuple(found[start:] if start >= len(bare) else ()), tuple(self._codec.encode(word, special=False))]
        # None of these is a word.
        special = {self._codec.tokenizer.unk_token_id, *self._codec.tokenizer.all_special_ids}
        known = [token_ids for token_ids in encoded if token_ids and special.isdisjoint(token_ids)]
        if not known:
            pieces = self._codec.tokenizer.convert_ids_to_tokens(list(encoded[1]))
            raise OptionError(
                f"the target {shown(word.strip(), _SHOWN)} cannot be written with this checkpoint's vocabulary: it "
                f"would be {shown(pieces, _SHOWN)}, and unknown or special tokens are no words. Choose another word."
            )
        if self._limit is not None and len(known[0]) > (room := self._limit - sum(self._codec.around)):
            raise OptionError(
                f"the target {shown(word.strip(), _SHOWN)} has {len(known[0])} tokens, and the model takes {room}: "
                "choose a shorter one."
            )
        return known[0]

    def _seen(
        self, texts: Sequence[str], written: str, spans: Sequence[tuple[int, int, int]], cuts: Sequence[int]
    ) -> tuple[tuple[int, int], ...]:
        """Say for each mask which part of its text the model sees around it; of a pair all.

        Args:
            texts: As given.
            written: The first as the model is given it, masks in its own way.
            spans: Where the masks are in `texts`.
            cuts: Where they are in tokens, between -1 and the number of tokens.
        """
        length, (before, after) = cuts[-1], self._codec.around
        if self._limit is None or length <= self._limit:
            return tuple((0, len(texts[number])) for number, _, _ in spans)
        start_of, end_of = self._places(written)
        seen = []
        for place in cuts[1:-1]:
            first, last = window(length, place, place + 1, self._limit, (before, after))
            start = 0 if first == before else self._as_given(start_of(first), spans)
            end = len(texts[0]) if last == length - after else self._as_given(end_of(last - 1), spans)
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

    def _as_given(self, character: int, spans: Sequence[tuple[int, int, int]]) -> int:
        """Turn a place in a text whose masks are written in the model's way into a place in the text as given."""
        longer = 0
        for _, start, end in spans:
            if character <= start + longer:
                break
            if character < start + longer + len(self._written):
                return end
            longer += len(self._written) - (end - start)
        return character - longer

    def _candidate(self, job: MaskedText, way: Way) -> Candidate:
        """Write fills into the texts as given, which otherwise stay as they are."""
        filled, ends = [""] * len(job.texts), [0] * len(job.texts)
        words: list[str] = []
        tokens: list[str] = []
        first: dict[int, int] = {}
        fills = sorted(way, key=lambda one: one.mask)
        for one in fills:
            shown = [self._word(token_id) for token_id in one.token_ids]
            number, start, end = job.spans[one.mask]
            text = filled[number] + job.texts[number][ends[number] : start]
            if job.blanks.targets is not None and one.target is not None:
                placed = job.blanks.targets[one.mask][one.target].word
            else:
                text, placed = self._before(text, one.token_ids[0]), shown[0][0]
            filled[number], ends[number], word = text + placed, end, placed.strip()
            first[one.mask] = len(tokens)
            tokens += [word] if len(shown) == 1 else [token for token, _ in shown]
            words.append(word)
        text, *pair = (done + given[end:] for done, given, end in zip(filled, job.texts, ends, strict=True))
        return Candidate(
            text,
            tuple(words),
            tuple(tokens),
            tuple(token_id for one in fills for token_id in one.token_ids),
            tuple(logprob for one in fills for logprob in one.logprobs),
            tuple(first[one.mask] + piece for one in way for piece in one.order),
            *pair,
        )

    def _before(self, text: str, token_id: int) -> str:
        """Return the text before a token, with a space at its end or without, as the token has it."""
        word, continues = self._word(token_id)
        if continues:
            return text.rstrip(" ")
        if not text or text[-1].isspace():
            return text
        if self._marks_words:
            return f"{text} "
        before, both = (self._codec.encode(some, special=False) for some in (text[-1], text[-1] + word))
        apart = not (text[-1].isalnum() and word[:1].isalnum()) or both == [*before, token_id]
        return text if apart else f"{text} "

    def _word(self, token_id: int) -> tuple[str, bool]:
        """Return a token's text, and whether it continues the word before it."""
        if token_id not in self._words:
            raw = str(self._codec.tokenizer.convert_ids_to_tokens(token_id))
            piece = raw.startswith("##")
            word = raw[2:] if piece else self._codec.token(token_id).strip()
            self._words[token_id] = word, piece or (self._marks_words and not raw.startswith(WORD_STARTS))
        return self._words[token_id]

    @cached_property
    def _marks_words(self) -> bool:
        """Whether the tokenizer marks the pieces that begin a word, as byte-level and sentencepiece ones do."""
        pieces = self._codec.tokenizer.convert_ids_to_tokens(self._codec.encode("a a", special=False))
        return any(str(piece).startswith(WORD_STARTS) for piece in pieces)


def _in_place(word: str, before: str) -> str:
    """Return a word as it stands behind `before`: a space at its beginning counts behind a letter or a digit alone."""
    return f"{' ' if word[0].isspace() and before[-1:].isalnum() else ''}{word.strip()}"
