"""A row of a `Translator`: a text in pieces, their answers back to one text, and what a preset asks for."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, replace
from itertools import chain, repeat
from typing import TYPE_CHECKING, Any

from lmkit.documents import Piece, Span, Split, joined, patterns, restored
from lmkit.documents.joined import gap
from lmkit.errors import OptionError, listed
from lmkit.results import Completion, FinishReason, SegmentNote, Timing, Translation
from lmkit.wrappers.writer import Job

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lmkit.engine import Outcome
    from lmkit.options.generation import RowOptions

logger = logging.getLogger("lmkit")

PIECE_TOKENS = 512
"""How long a piece of a document is at the most for a model without a bound of its own: what T5 was trained on."""

GROWTH = 1.5
"""How many times as many tokens as its source a translation may need: sentences are packed so that it has room."""


@dataclass(frozen=True, slots=True)
class TranslationJob(Job):
    """A text on its way to the engine, in pieces.

    Attributes:
        source: The text as given.
        languages: Its language, and the one it is translated to, as the checkpoint's codes.
        pieces: Its parts, one for each request.
        start: Where the document begins in it, behind a tag.
        script: What the target is written in; None where nothing is translated.
        unknown: The token of what the vocabulary lacks.
        keep: What finds the parts that stay as they are.
        kept: Those parts.
        copies: How many completions there will be.
        seed: What reproduces the row, if it is sampled.
    """

    source: str = ""
    languages: tuple[str | None, str | None] = (None, None)
    pieces: tuple[Piece, ...] = ()
    start: int = 0
    script: str | None = None
    unknown: int | None = None
    keep: tuple[Any, ...] = ()
    kept: tuple[Span, ...] = ()
    copies: int = 1
    seed: int | None = None

    @property
    def grows(self) -> bool:
        """Whether the text is shown as it grows."""
        return not self.keep  # a placeholder may have to be put right once the whole piece is there

    def shown(self, number: int, text: str) -> str:
        """Return the text of a part that has ended, with what was to be kept."""
        return self.restored(number, text)[0]

    def behind(self, number: int, text: str) -> str:
        """Return what stands behind a piece's translation, with a space where the target's script writes one."""
        if self.script is None or number + 1 == len(self.pieces):
            return self.between[number + 1]
        left, right = self.pieces[number : number + 2]
        return gap(self.source, left, right, self.script, self.shown(number, text))

    def restored(self, number: int, text: str) -> tuple[str, tuple[SegmentNote, ...]]:
        """Put right the placeholders of a piece's translation, and say what was done."""
        if not self.keep:
            return text, ()
        piece = self.pieces[number]
        spans = [(a - piece.start, b - piece.start) for a, b in self.kept if piece.start <= a and b <= piece.end]
        return restored(self.source[piece.start : piece.end], spans, text, self.keep)


def handling(options: dict[str, Any]) -> tuple[Split | None, tuple[Any, ...]]:
    """Take `split` and `keep` out of a row's options.

    Raises:
        OptionError: A pattern is none, or `split` contradicts `truncate`.
    """
    split, keep = options.pop("split", None), options.pop("keep", None)
    if split not in (None, "none") and options.get("truncate") is not None:
        raise OptionError(
            f"split={split!r} and truncate={options['truncate']!r} contradict each other: a text is split, or cut."
        )
    return split, patterns(keep)


def together(most: int, budget: int | None) -> int:
    """Return how many tokens of source a piece of several sentences may have, if its answer may have `budget`."""
    return most if budget is None else max(min(most, int(budget / GROWTH)), 1)


def of_piece(options: RowOptions, number: int, tokens: int) -> RowOptions:
    """Return the options of a piece.

    The first has the row's seed, so that a text of one piece draws what it draws unsplit; the others derive theirs.

    Args:
        options: The row's.
        number: The piece's number.
        tokens: How many tokens it has, if its answer may take twice as many; 0 leaves `max_new_tokens` as it is.
    """
    seed = options.seed
    if seed is not None and number:
        seed = int.from_bytes(hashlib.sha256(f"{seed}/{number}".encode()).digest()[:6], "big")
    return replace(options, seed=seed, max_new_tokens=max(options.max_new_tokens, 2 * tokens))


def translation(job: TranslationJob, outcomes: Sequence[Outcome], timing: Timing) -> Translation:
    """Describe a row whose pieces have all ended."""
    ways = [[outcome.completions[copy] for outcome in outcomes] for copy in range(job.copies)]
    outputs = [[_output(job, number, part) for number, part in enumerate(parts)] for parts in ways]
    gaps = [(job.between[0], *(job.behind(number, part.text) for number, part in enumerate(parts))) for parts in ways]
    documents = [joined(job.source, job.pieces, *told) for told in zip(outputs, repeat(job.start), gaps)]
    return Translation(
        prompt=job.text,
        completions=tuple(_whole(parts, text) for parts, (text, _) in zip(ways, documents, strict=True)),
        prompt_tokens=sum(len(request.input_ids) for request in job.requests),
        seed=job.seed,
        truncated=job.truncated,
        timing=timing,
        source=job.source,
        source_language=job.languages[0],
        target_language=job.languages[1],
        segments=documents[0][1],
    )


def _output(job: TranslationJob, number: int, part: Completion) -> tuple[str, tuple[SegmentNote, ...]]:
    text, notes = job.restored(number, part.text)
    told: dict[SegmentNote, bool] = {
        "unwritten": job.unknown in part.token_ids,
        "length": part.finish_reason == "length",
        "empty": not text.strip(),
    }
    return text, (*notes, *(note for note, true in told.items() if true))


def _whole(parts: Sequence[Completion], text: str) -> Completion:
    """Describe a document by its pieces: the gravest reason to end, and the mean score of a token's share."""
    tokens = sum(part.generated_tokens for part in parts)
    scores = [part.score * part.generated_tokens for part in parts if part.score is not None]
    logprobs = [part.logprobs for part in parts if part.logprobs is not None]
    ended = next((part for reason in _GRAVE for part in parts if part.finish_reason == reason), None)
    return Completion(
        text=text,
        content=text,
        token_ids=tuple(chain.from_iterable(part.token_ids for part in parts)),
        score=parts[0].score if len(parts) == 1 else sum(scores) / tokens if scores and tokens else None,
        finish_reason="eos" if ended is None else ended.finish_reason,
        stop_reason=None if ended is None else ended.stop_reason,
        logprobs=tuple(chain.from_iterable(logprobs)) if logprobs else None,
        generated_tokens=tokens,
    )


_GRAVE: tuple[FinishReason, ...] = ("cancelled", "length", "stop")


_SAMPLING = ("temperature", "top_p", "top_k")
_BEAMS = ("length_penalty", "early_stopping")
_HONOURED = {*_SAMPLING, *_BEAMS}.union(
    "prefix max_length min_length num_beams do_sample repetition_penalty no_repeat_ngram_size".split()
)


def from_preset(preset: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Read the options that a preset asks for; what the caller gives for the mode or the length wins.

    A preset's `max_length` and `min_length` count the decoder's start token.
    """
    wanted = {name: value for name, value in preset.items() if value is not None}
    options = {name: wanted[name] for name in ("repetition_penalty", "no_repeat_ngram_size") if wanted.get(name)}
    if wanted.get("max_length") and "max_new_tokens" not in given:
        options["max_new_tokens"] = max(int(wanted["max_length"]) - 1, 1)
    if wanted.get("min_length") and not {"max_new_tokens", "min_new_tokens"} & given.keys():
        options["min_new_tokens"] = max(int(wanted["min_length"]) - 1, 0)
    if {"mode", "sample", "min_p", *_SAMPLING} & given.keys():
        return options
    beams = given.get("num_beams", wanted.get("num_beams", 1))
    if isinstance(beams, int) and beams > 1:
        options |= {"num_beams": beams} | {name: wanted[name] for name in _BEAMS if name in wanted}
    elif wanted.get("do_sample") and "num_beams" not in given:
        options |= {"sample": True} | {name: wanted[name] for name in _SAMPLING if name in wanted}
    return options


def warn_of(preset: Mapping[str, Any], warned: set[str]) -> None:
    """Log what a preset asks for that lmkit has no option for, once; values that change nothing are left out."""
    left = {name: value for name, value in preset.items() if name not in _HONOURED and value not in (None, 0, 1)}
    if preset.get("do_sample") and (preset.get("num_beams") or 1) > 1:
        left["do_sample"] = True  # beams that draw
    if left and (named := listed(f"{name}={value!r}" for name, value in left.items())) not in warned:
        warned.add(named)
        logger.warning("the checkpoint's preset also asks for %s, which lmkit cannot do: it is left out.", named)
