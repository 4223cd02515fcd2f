"""The rows that run, and the forward passes they take: what the caller that leads does for all of them."""

from __future__ import annotations

import functools
import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from lmkit._interrupts import locked
from lmkit._tracebacks import without_frames
from lmkit.engine.beam_search import Search
from lmkit.engine.body_and_head import Reader
from lmkit.engine.choice import Chooser
from lmkit.engine.computing import one_token
from lmkit.engine.decoders.beam import BeamDecoder, probe
from lmkit.engine.decoders.causal import CausalDecoder
from lmkit.engine.decoders.fallback import FallbackDecoder, SearchDecoder
from lmkit.engine.decoders.seq2seq import Seq2SeqDecoder
from lmkit.engine.decoders.unpadding import TRIAL, unpads
from lmkit.engine.failures import CLOSED, DEAD, dead, no_memory, out_of_memory, step_failed
from lmkit.engine.inputs import filler
from lmkit.engine.prefixes import FEWEST, SAVED, SHORTEST, PrefixStore, shared
from lmkit.engine.row import Row
from lmkit.engine.scheduler import Scheduler
from lmkit.engine.speculative import guess
from lmkit.errors import EngineError
from lmkit.kernels import attention, rotary
from lmkit.planning.machine import give_back
from lmkit.planning.running import pads
from lmkit.results import EngineStats

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch

    from lmkit.engine.cache import Prefix
    from lmkit.engine.compiled import CompiledDecoderStep, CompiledStep
    from lmkit.engine.computing import Lane
    from lmkit.engine.decoders.base import Decoder
    from lmkit.engine.request import Request
    from lmkit.engine.ticket import Ticket
    from lmkit.planning.plan import LoadPlan
    from lmkit.text.codec import Codec

logger = logging.getLogger("lmkit")

STEPS_PER_SEARCH = 64
"""How many steps other rows make between two groups of beam searches by generate(), which they have to wait for."""

AHEAD_ON, MOST_AHEAD = ("cuda",), 8
"""Where greedy rows run ahead of the host, and for how many steps at the most: then new rows may join them."""

MOST_KEPT_ROWS = 8
"""Of a call with more rows, a batch, only what its rows share is kept: such texts are seldom continued."""


class Batches:
    """Rows of all callers on one model. One thread at a time may step it; `add` and `remove` want the lock.

    Attributes:
        closed: Whether no more work is to be done.
        ended: Why that is.
    """

    def __init__(
        self,
        model: Any,
        codec: Codec,
        plan: LoadPlan,
        start: int | None,
        lock: Any,
        *,
        lane: Lane,
        compiled: CompiledStep | CompiledDecoderStep | None = None,
    ) -> None:
        """Serve `model`; see `Engine`. `lock` guards tickets, and `lane` is where passes run."""
        self._model: Any = model
        self._codec = codec
        self._start = start
        self._compiled: Any = compiled
        self._chooser: Chooser | Any = Chooser(model, codec, start)
        config = model.generation_config
        self._pad = filler(model, config.pad_token_id, getattr(model.config, "pad_token_id", None))
        self._drives = plan.engine == "lmkit"
        self._joins = self._drives and start is None
        self._searches = self._drives and start is not None
        self._pads = pads(model)
        self._scaling = rotary.scaling(model)
        # generate() looks at a batch's width to see whether it has to be read anew.
        self._any_length = self._pads and not self._scaling.anew
        self._prefixes = PrefixStore(plan.prefix_cache_bytes)
        self._scheduler = Scheduler(model, plan.key_values)
        self._lock = lock
        self._lane = lane
        self._tickets: list[Ticket] = []
        self._room = False  # whether rows that wait may have room that they had not before
        self._reader: Reader | None = None
        self._unpads: bool | None = None  # not known
        self._unsaved = 0  # tokens that could have been saved
        self._filling: Decoder | None = None
        self._running: list[Decoder] = []
        self._steps = 0
        self._counts = dict.fromkeys(("forwards", "prompt_tokens", "reused_tokens", "generated_tokens"), 0)
        self.closed = False
        self.ended = CLOSED

    def add(self, ticket: Ticket, requests: Sequence[Request]) -> None:
        """Let the rows of requests wait, behind those that a caller has given before."""
        rows: list[Row] = []
        for place, request in enumerate(requests, ticket.added):
            if request.config.num_beams == 1:
                rows += [Row(request, ticket, place, copy, self._codec) for copy in range(request.copies)]
            else:
                rows.append(Search(request, ticket, place, self._codec))
        ticket.add(rows)
        if ticket not in self._tickets:
            self._tickets.append(ticket)
        self._room = True

    def remove(self, ticket: Ticket) -> None:
        """Let go of what a caller's rows wait for; those in batches leave at the next `sweep`."""
        ticket.forget()
        if ticket in self._tickets:
            self._tickets.remove(ticket)
        if not self._tickets:
            self._scheduler.reset()

    def close(self) -> None:
        """Do no more work: the next `sweep` ends all rows."""
        self.closed = True
        for ticket in list(self._tickets):
            ticket.cancelled.set()  # a beam search of generate() looks at nothing else

    def stats(self) -> EngineStats:
        """Say what the engine holds and has done."""
        decoders = self._decoders()
        return EngineStats(
            running=sum(len(decoder.rows) for decoder in decoders),
            waiting=sum(len(ticket.waiting) for ticket in list(self._tickets)),
            cache_bytes=sum(decoder.nbytes for decoder in decoders),
            prefix_bytes=self._prefixes.nbytes,
            **self._counts,
        )

    def advance(self) -> None:
        """Make a step: some columns of new rows' prompts, then a token for each running row."""
        self.sweep()
        if self._filling is None:
            self._admit()
        if (decoder := self._filling) is not None:
            busy = bool(self._running)
            with self._trying(decoder):
                self._fill(decoder, self._scheduler.columns(len(decoder.rows), busy=busy))
            if decoder is not self._filling:
                return  # first tokens are told before the next step is made
        for decoder in list(self._running):
            self._read_anew(decoder)
            if decoder.rows:
                with self._trying(decoder):
                    self._step(decoder)
        self._steps += 1
        self._room = self._room or self._steps % STEPS_PER_SEARCH == 0

    def sweep(self) -> None:
        """Take out rows whose caller left, cancelled them or closed the engine."""
        gone = self._gone()
        for decoder in self._decoders():
            lost = [row for row in decoder.rows if row.ticket.cancelled.is_set()]
            for row in lost:
                row.cancel()
            if lost:
                self._compact(decoder)
            self._tell(lost)
        for ticket in gone:
            begun = [row for row in ticket.waiting if row.token_ids]
            for row in begun:
                row.cancel()
            self._tell(begun)
            self._forget(ticket)
        if self.closed:
            self._prefixes.clear()
            self._model = self._chooser = self._compiled = self._reader = None  # all hold the model

    @locked
    def _gone(self) -> list[Ticket]:
        """Find the tickets whose rows are to end."""
        gone = [ticket for ticket in self._tickets if self.closed or ticket.cancelled.is_set()]
        for ticket in gone:
            if self.closed:
                ticket.error = EngineError(self.ended)
            ticket.cancelled.set()
        self._tickets = [other for other in self._tickets if not other.left]
        return gone

    @locked
    def _forget(self, ticket: Ticket) -> None:
        ticket.forget()
        ticket.ready.notify()

    @locked
    def _tell(self, rows: Sequence[Row]) -> None:
        """Pass on what is new of rows; a closed engine's callers get its error instead."""
        for row in rows:
            if (row.done or row.streams) and not row.ticket.left and row.ticket.error is None:
                row.ticket.look(row)
                if row.ticket.news:
                    row.ticket.ready.notify()

    def _decoders(self) -> list[Decoder]:
        return [*self._running, *([self._filling] if self._filling else [])]

    def _compact(self, decoder: Decoder) -> None:
        """Take the rows that ended out of a batch, and an empty batch out of the engine."""
        if decoder is self._filling:
            self._begin_again(decoder)  # its prompts are half read: the others start over
            return
        for row in decoder.rows:
            row.ticket.running -= row.done
        if all(row.done for row in decoder.rows):
            self._discard(decoder)
        else:
            decoder.keep()
        self._room = True

    def begin_again(self) -> None:
        """Drop all that was computed: after an interruption none of it can be trusted, only what was chosen."""
        self._running, self._filling, self._room = [], None, True
        self._wait_again()

    @locked
    def _wait_again(self) -> None:
        for ticket in self._tickets:
            ticket.begin_again()
            ticket.ready.notify()

    def _discard(self, decoder: Decoder) -> None:
        decoder.rows.clear()
        if decoder is self._filling:
            self._filling = None
        elif decoder in self._running:
            self._running.remove(decoder)

    def _begin_again(self, decoder: Decoder) -> None:
        """Drop what a batch has computed; its rows wait again, with the tokens they have."""
        rows = list(decoder.rows)
        self._discard(decoder)
        self._tell([row for row in rows if row.done])
        for row in rows:
            row.settle()
        self._leave(rows)

    @locked
    def _leave(self, rows: Sequence[Row]) -> None:
        """Take note that rows are in no batch any more."""
        for row in rows:
            row.ticket.running -= 1
            if not row.done:
                row.ticket.waiting.append(row)
        self._room = True

    @contextmanager
    def _trying(self, decoder: Decoder) -> Iterator[None]:
        """Run a batch's forward pass: if it fails, its rows are tried again in halves, and one alone fails alone."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - whatever it is, it is told to the rows it concerns
            without_frames(error)
            if dead(error, self._chooser.device):
                self.ended = DEAD.format(error=error)
                self.close()
                return
            memory = out_of_memory(error)
            if memory:
                self._prefixes.clear()
                give_back()
            elif decoder is self._filling and self._unpads:
                self._unpads, self._unsaved = None, 0  # somebody may have changed the model: it is tried anew
            rows = [row for row in decoder.rows if not row.done]
            if len(rows) > 1:
                logger.info("a step with %d rows failed, trying again with half of them: %s", len(rows), error)
                self._scheduler.failed(len(rows), memory=memory)
                self._begin_again(decoder)
                return
            self._scheduler.failed(1, memory=memory)
            for row in rows:
                row.error = self._no_memory(row, error) if memory else step_failed(error)
            self._begin_again(decoder)
        else:
            self._counts["forwards"] += 1

    def _no_memory(self, row: Row, error: Exception) -> EngineError:
        return no_memory(row.length + row.remaining, self._scheduler.bytes_for(row), error)

    def _admit(self) -> None:
        """Begin a batch of waiting rows, if there is room for enough of them."""
        if not self._room:
            return
        rows = self._sharing(self._picked())
        self._room = bool(rows)
        if not rows:
            return
        self._begin(self._decoder(rows))

    @locked
    def _picked(self) -> list[Row]:
        return self._scheduler.pick(
            self._tickets, self._decoders(), joins=self._joins, alike=self._alike, ready=self._ready
        )

    @locked
    def _begin(self, decoder: Decoder) -> None:
        """Let a batch's rows wait no longer."""
        begun = set(decoder.rows)
        for ticket in {row.ticket for row in begun}:
            ticket.waiting = [row for row in ticket.waiting if row not in begun]
        self._filling = decoder
        for row in decoder.rows:
            row.ticket.running += 1
            row.start_clock()

    def _decoder(self, rows: list[Row]) -> Decoder:
        decoder: Decoder
        if self._is_whole(rows[0]):
            decoder = SearchDecoder(self._model, cast("list[Search]", rows), self._pad)
        elif not self._drives:
            decoder = FallbackDecoder(self._model, rows, self._pad, self._start)
        elif self._start is None:
            known = [self._known(row) for row in rows]
            decoder = CausalDecoder(
                self._model,
                rows,
                self._pad,
                known,
                scaling=self._scaling,
                compiled=self._compiled,
                unpads=self._without_padding,
            )
        elif rows[0].width > 1:
            searches = cast("list[Search]", rows)
            decoder = BeamDecoder(self._model, searches, self._pad, self._start, self._compiled, reader=self._reading)
        else:
            decoder = Seq2SeqDecoder(self._model, rows, self._pad, self._start, self._compiled)
        self._counts["reused_tokens"] += decoder.reused
        self._counts["prompt_tokens"] += sum(row.length for row in rows) - decoder.reused
        return decoder

    def _known(self, row: Row, least: int = SHORTEST) -> tuple[Prefix | None, int]:
        """Return the kept keys and values of a row's first tokens, and how many those are, at the least."""
        return self._prefixes.find(row.input_ids, self._scaling.kept(row.length), row.behind or least)

    def _without_padding(self, saved: int) -> bool:
        """Say whether to read prompts without padding, which saves so many tokens; to find out runs the model once."""
        self._unsaved += saved
        if self._unpads is None and self._unsaved >= TRIAL:
            try:
                self._unpads = unpads(self._model, self._pad)
            except Exception as error:  # noqa: BLE001 - memory is short: it is tried another time
                logger.info("prompts are read with padding for now: %s", error)
                give_back()
                self._unsaved = 0
        return bool(self._unpads) and attention.is_on(self._model)

    def _reading(self) -> Reader:
        """Return what reads without the head; to make it runs the model, so it is asked for in a forward pass."""
        self._reader = self._reader or Reader(self._model, probe(self._model))
        return self._reader

    def _is_whole(self, row: Row) -> bool:
        """Say whether a row is a beam search that generate() runs, from its first token to its last."""
        return row.width > 1 and not self._searches

    def _ready(self, row: Row) -> bool:
        """Say whether a row may begin now."""
        return not (self._is_whole(row) and self._running and self._steps % STEPS_PER_SEARCH)

    def _alike(self, row: Row) -> object:
        """Return what rows must have in common to share a batch."""
        if self._is_whole(row):
            search = cast("Search", row)
            return search.ticket, search.settings, None if self._any_length else len(search.input_ids)
        if self._start is not None:
            return len(row.token_ids), row.width, row.candidates
        return None if self._any_length or (self._pads and self._drives) else row.length

    def _sharing(self, rows: list[Row]) -> list[Row]:
        """Leave out rows that begin like another of them: once that one is read they begin behind it."""
        if not self._prefixes.limit or len(rows) <= 1 or rows[0].width > 1:
            return rows
        groups: dict[tuple[int, ...], list[Row]] = {}
        for row in rows:
            groups.setdefault(row.input_ids[:FEWEST], []).append(row)
        waiting: set[Row] = set()
        for first, *others in groups.values():
            held = {row: count for row in (first, *others) if (count := self._known(row, FEWEST)[1])}
            if sum(held.values()) >= SAVED:  # by rows that were read before
                for row, count in held.items():
                    row.behind = count
            common = {row: count for row in others if (count := self._common(first, row)) >= FEWEST}
            if sum(count - self._known(row)[1] for row, count in common.items()) >= SAVED:
                first.shared = True
                waiting |= common.keys()
                for row, count in common.items():
                    row.behind = count
        return [row for row in rows if row not in waiting]

    def _common(self, first: Row, second: Row) -> int:
        """Return how many tokens a row can take over from another, if those are more than it knows already."""
        common = shared(np.asarray(first.input_ids), np.asarray(second.input_ids[:-1]))
        sides = {self._scaling.kept(row.length) for row in (first, second)}
        fits = self._scheduler.bytes_of(len(first.input_ids)) <= self._prefixes.limit
        return common if fits and len(sides) == 1 and None not in sides and common > self._known(second)[1] else 0

    def _fill(self, decoder: Decoder, columns: int) -> None:
        """Read some of a batch's prompts; when all are read, its rows run, in the batch that runs if they can."""
        logits = decoder.fill(columns)
        if logits is None:
            return
        first = self._running[0] if self._running else None
        self._filling = None
        self._running.append(decoder)
        for place, row in enumerate(decoder.rows):
            if row.shared:
                self._store(decoder, place)
        self._choose(decoder, logits)
        if first is not None and decoder in self._running:
            try:
                joined = first.join(decoder, self._scheduler.coming(self._tickets, self._running))
            except Exception:
                self._begin_again(first)  # some of its layers may have taken rows in, and others not
                raise
            if joined:
                self._running.remove(decoder)

    def _step(self, decoder: Decoder) -> None:
        if isinstance(decoder, CausalDecoder) and (steps := self._ahead(decoder)) > 1:
            self._steps_ahead(decoder, steps)
            return
        row = decoder.rows[0]
        guesses = guess(row) if row.request.lookup and len(decoder.rows) == 1 else []
        guesses = row.fitting(guesses[: self._scaling.room(row.length)])
        logits = decoder.verify(guesses) if guesses else None
        if logits is None:
            self._choose(decoder, one_token(self._chooser.device, decoder.step))
            return
        taken = 0
        for scores, expected in zip(logits, [*guesses, None], strict=True):
            decoder.choose(self._chooser, scores[None])
            taken += 1
            if row.done or row.token_ids[-1] != expected:
                break
        decoder.crop(len(logits) - taken)
        self._look(decoder, taken)

    def _ahead(self, decoder: CausalDecoder) -> int:
        """Return how many steps of a batch can be made in one go, while no rows join and nobody is told anything."""
        rows = decoder.rows
        if self._chooser.device.type not in AHEAD_ON or decoder.waits or self._filling is not None:
            return 1
        asked = any(row.streams for row in rows) or any(ticket.waiting for ticket in self._tickets)
        guessed = len(rows) == 1 and rows[0].request.lookup
        if asked or guessed or not all(map(self._chooser.greedy, rows)):
            return 1
        return min(MOST_AHEAD, *(row.remaining for row in rows))

    def _steps_ahead(self, decoder: CausalDecoder, steps: int) -> None:
        """Make several steps, each of which is asked for before the host has the tokens of the one before.

        A row that turns out to have ended has then read its last token too, which nobody sees.
        """
        token_ids, give = None, None
        try:
            for _ in range(steps):
                logits = one_token(self._chooser.device, functools.partial(decoder.step, token_ids))
                likeliest, following = self._chooser.likeliest(logits)
                self._counts["forwards"] += 1
                if give is not None:
                    self._counts["generated_tokens"] += give(decoder.rows)
                token_ids, give = likeliest[:, None], following
                over = any(row.done or row.ticket.cancelled.is_set() for row in decoder.rows)
                if over or self._lane.halted:
                    break
        finally:  # a pass that fails takes no tokens away that are on their way
            if give is not None:
                self._counts["generated_tokens"] += give(decoder.rows)
        self._counts["forwards"] -= 1  # one is counted as that of any step
        self._look(decoder, 0)

    def _read_anew(self, decoder: Decoder) -> None:
        """Take rows out of a batch whose keys and values do not hold any more; they wait, with the tokens they have."""
        if not (rows := decoder.outgrown):
            return
        for row in rows:
            row.anew = True
        decoder.keep()
        if not decoder.rows:
            self._discard(decoder)
        for row in rows:
            row.anew = False
        self._leave(rows)

    def _choose(self, decoder: Decoder, logits: torch.Tensor) -> None:
        self._look(decoder, decoder.choose(self._chooser, logits))

    def _look(self, decoder: Decoder, tokens: int) -> None:
        """Tell the callers what is new, and let rows go that ended."""
        self._counts["generated_tokens"] += tokens
        for place, row in enumerate(decoder.rows):
            kept = row.done and row.error is None and row.ticket.added <= MOST_KEPT_ROWS
            if kept and self._prefixes.limit:
                self._store(decoder, place)
        self._tell(decoder.rows)
        if any(row.done for row in decoder.rows):
            self._compact(decoder)

    def _store(self, decoder: Decoder, place: int) -> None:
        """Keep what a row has read; its newest token was not read."""
        token_ids = decoder.read(place)
        side = self._scaling.kept(len(token_ids))
        few = len(token_ids) < (FEWEST if decoder.rows[place].shared else SHORTEST)
        if few or side is None or self._prefixes.holds(token_ids, side):
            return
        if self._scheduler.bytes_of(len(token_ids)) <= self._prefixes.limit:
            self._prefixes.put(token_ids, decoder.take(place), side)
