"""The rows that run, and the forward passes they take: what the caller that leads does for all of them."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from lmkit.engine import beams
from lmkit.engine.beamed import BeamDecoder, probe
from lmkit.engine.cache import KeyValues
from lmkit.engine.cached import CachedDecoder
from lmkit.engine.choice import Chooser
from lmkit.engine.decoders import Decoder, drives, pads
from lmkit.engine.encoded import EncodedDecoder
from lmkit.engine.failures import no_memory, out_of_memory, step_failed
from lmkit.engine.generated import search, together
from lmkit.engine.heads import Reader
from lmkit.engine.lookup import guess
from lmkit.engine.prefixes import SHORTEST, PrefixStore
from lmkit.engine.prepared import PreparedDecoder
from lmkit.engine.request import Update
from lmkit.engine.scheduler import Scheduler, bytes_per_token
from lmkit.errors import EngineError
from lmkit.results import EngineStats

if TYPE_CHECKING:
    import threading
    from collections.abc import Iterator, Sequence

    import torch

    from lmkit.encoding import Codec
    from lmkit.engine.beams import Search
    from lmkit.engine.compiled import CompiledStep
    from lmkit.engine.row import Row
    from lmkit.engine.ticket import Ticket

__all__ = ["CLOSED", "Batches"]

logger = logging.getLogger("lmkit")

STEPS_PER_SEARCH = 64
"""How many steps other rows make between two groups of beam searches, which they have to wait for."""

MOST_KEPT_ROWS = 8
"""Of a call with more rows, a batch, only what its rows share is kept: such texts are seldom continued."""


class Batches:
    """Rows of all callers on one model. One thread at a time may use it, but for `stats`.

    Attributes:
        tickets: Whose rows to run; guarded by the lock.
        room: Whether rows that wait may have room that they had not before.
        closed: Whether no more work is to be done.
        searches: Whether beam searches are rows like others; else generate() runs them.
        scheduler: What chooses among the rows that wait.
    """

    def __init__(
        self,
        model: Any,
        codec: Codec,
        start: int | None,
        prefix_bytes: int,
        lock: threading.Lock,
        *,
        compiled: CompiledStep | None = None,
    ) -> None:
        """Serve `model`; see `Engine`. `lock` guards tickets."""
        self._compiled = compiled
        self._model: Any = model
        self._codec = codec
        self._start = start
        self._chooser: Chooser | Any = Chooser(model, codec, start)
        config = model.generation_config
        self._pad = next(
            (i for i in (config.pad_token_id, getattr(model.config, "pad_token_id", None)) if i is not None), 0
        )
        self._drives = drives(model)
        self._joins = self._drives and start is None
        self.searches = self._drives and start is not None
        self._pads = pads(model)
        takes_apart = self._joins and KeyValues(model.config.get_text_config(decoder=True)).plain
        self._prefixes = PrefixStore(prefix_bytes if takes_apart else 0)
        self._lock = lock
        self._reader: Reader | None = None
        self._filling: Decoder | None = None
        self._running: list[Decoder] = []
        self._steps = 0
        self._counts = dict.fromkeys(("forwards", "prompt_tokens", "reused_tokens", "generated_tokens"), 0)
        self.scheduler = Scheduler(model)
        self.tickets: list[Ticket] = []
        self.room = False
        self.closed = False

    def stats(self) -> EngineStats:
        """Say what the engine holds and has done."""
        decoders = self._decoders()
        return EngineStats(
            running=sum(len(decoder.rows) for decoder in decoders),
            waiting=sum(len(ticket.waiting) + len(ticket.searches) for ticket in list(self.tickets)),
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
                self._fill(decoder, self.scheduler.columns(len(decoder.rows), busy=busy))
            if decoder is not self._filling:
                return  # first tokens are told before the next step is made
        for decoder in list(self._running):
            with self._trying(decoder):
                self._step(decoder)
        self._steps += 1
        if not (self._running or self._filling) or self._steps % STEPS_PER_SEARCH == 0:
            self._search()

    def sweep(self) -> None:
        """Take out rows whose caller left, cancelled them or closed the engine."""
        with self._lock:
            gone = [ticket for ticket in self.tickets if self.closed or ticket.cancelled.is_set()]
            for ticket in gone:
                if self.closed:
                    ticket.error = EngineError(CLOSED)
                ticket.cancelled.set()
                self.tickets = [other for other in self.tickets if not other.left]
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
            with self._lock:
                ticket.forget()
                ticket.ready.notify()
        if self.closed:
            self._prefixes.clear()
            self._model = self._chooser = self._compiled = self._reader = None  # all hold the model

    def _tell(self, rows: Sequence[Row]) -> None:
        """Pass on what is new of rows; a closed engine's callers get its error instead."""
        with self._lock:
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
        self.room = True

    def begin_again(self) -> None:
        """Drop all that was computed: after an interruption none of it can be trusted, only what was chosen."""
        for decoder in self._decoders():
            self._begin_again(decoder)

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
        with self._lock:
            for row in rows:
                row.ticket.running -= 1
                if not row.done:
                    row.ticket.waiting.append(row)
        self.room = True

    @contextmanager
    def _trying(self, decoder: Decoder) -> Iterator[None]:
        """Run a batch's forward pass: if it fails, its rows are tried again in halves, and one alone fails alone."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - whatever it is, it is told to the rows it concerns
            rows = [row for row in decoder.rows if not row.done]
            if len(rows) > 1:
                logger.info("a step with %d rows failed, trying again with half of them: %s", len(rows), error)
                self.scheduler.failed(len(rows), memory=out_of_memory(error))
                self._begin_again(decoder)
                return
            self.scheduler.failed(1, memory=out_of_memory(error))
            for row in rows:
                row.error = no_memory(row, self._model, error) if out_of_memory(error) else step_failed(error)
            self._begin_again(decoder)
        else:
            self._counts["forwards"] += 1

    def _admit(self) -> None:
        """Begin a batch of waiting rows, if there is room for enough of them."""
        if not self.room:
            return
        with self._lock:
            picked = self.scheduler.pick(self.tickets, self._decoders(), joins=self._joins, alike=self._alike)
        rows = self._sharing(picked)
        self.room = bool(rows)
        if not rows:
            return
        decoder = self._decoder(rows)
        begun = set(rows)
        with self._lock:
            # In one go, or an interruption would leave rows neither here nor there.
            for ticket in {row.ticket for row in rows}:
                ticket.waiting = [row for row in ticket.waiting if row not in begun]
            self._filling = decoder
        for row in rows:
            row.ticket.running += 1
            row.start_clock()

    def _decoder(self, rows: list[Row]) -> Decoder:
        reused = 0
        if self._joins:
            known = [self._prefixes.find(row.input_ids) if self._prefixes.limit else (None, 0) for row in rows]
            cached = CachedDecoder(self._model, rows, self._pad, known, self._compiled)
            decoder, reused = cast("Decoder", cached), cached.reused
        elif self._drives and self._start is not None:
            if rows[0].width > 1:
                searches = cast("list[Search]", rows)
                decoder = BeamDecoder(self._model, searches, self._pad, self._start, reader=self._reading)
            else:
                decoder = EncodedDecoder(self._model, rows, self._pad, self._start)
        else:
            decoder = PreparedDecoder(self._model, rows, self._pad, self._start)
        self._counts["reused_tokens"] += reused
        self._counts["prompt_tokens"] += sum(len(row.input_ids) for row in rows) - reused
        return decoder

    def _reading(self) -> Reader:
        """Return what reads without the head; to make it runs the model, so it is asked for in a forward pass."""
        self._reader = self._reader or Reader(self._model, probe(self._model))
        return self._reader

    def _alike(self, row: Row) -> object:
        """Return what rows must have in common to share a batch."""
        if self._start is not None:
            return len(row.token_ids), row.width, row.candidates
        return None if self._pads else len(row.input_ids)

    def _sharing(self, rows: list[Row]) -> list[Row]:
        """Leave out rows that begin like another of them: once that one is read they begin behind it."""
        if not self._prefixes.limit or len(rows) == 1:
            return rows
        first: dict[tuple[int, ...], Row] = {}
        kept = []
        for row in rows:
            begins = row.input_ids[:SHORTEST]
            other = first.setdefault(begins, row)
            if other is not row and len(begins) == SHORTEST and self._worth(other, row):
                other.shared = True
            else:
                kept.append(row)
        return kept

    def _worth(self, first: Row, second: Row) -> bool:
        """Say whether a row is to wait for what it shares with another."""
        pairs = zip(first.input_ids, second.input_ids[:-1], strict=False)
        common = next(
            (n for n, (a, b) in enumerate(pairs) if a != b), min(len(first.input_ids), len(second.input_ids) - 1)
        )
        known = self._prefixes.find(second.input_ids)[1]
        fits = len(first.input_ids) * bytes_per_token(self._model) <= self._prefixes.limit
        return fits and common >= known + SHORTEST

    def _fill(self, decoder: Decoder, columns: int) -> None:
        """Read some of a batch's prompts; when all are read, its rows run, in the batch that runs if they can."""
        logits = decoder.fill(columns)
        if logits is None:
            return
        first = self._running[0] if self._running else None
        self._filling = None
        self._running.append(decoder)
        if isinstance(decoder, CachedDecoder):
            for place, row in enumerate(decoder.rows):
                if row.shared:
                    self._store(decoder, place)
        self._choose(decoder, logits)
        if decoder in self._running and isinstance(first, CachedDecoder) and isinstance(decoder, CachedDecoder):
            try:
                first.absorb(decoder)
            except BaseException:
                self._begin_again(first)  # some of its layers may have taken rows in, and others not
                raise
            self._running.remove(decoder)

    def _step(self, decoder: Decoder) -> None:
        row = decoder.rows[0]
        if row.request.lookup and len(decoder.rows) == 1 and isinstance(decoder, CachedDecoder):
            guesses = guess(row) if decoder.plain else []
            if guesses:
                self._verify(decoder, row, guesses)
                return
        self._choose(decoder, decoder.step())

    def _verify(self, decoder: CachedDecoder, row: Row, guesses: list[int]) -> None:
        """Read a guess at the next tokens at once, and take those that the model would have chosen."""
        logits = decoder.verify(guesses)
        taken = 0
        for scores, expected in zip(logits, [*guesses, None], strict=True):
            self._chooser.choose([row], scores[None])
            taken += 1
            if row.done or row.token_ids[-1] != expected:
                break
        decoder.crop(len(logits) - taken)
        self._look(decoder, taken)

    def _choose(self, decoder: Decoder, logits: torch.Tensor) -> None:
        if isinstance(decoder, BeamDecoder):
            beams.choose(self._chooser, decoder.searches, logits, decoder.head)
        else:
            self._chooser.choose(decoder.rows, logits)
        self._look(decoder, len(decoder.rows))

    def _look(self, decoder: Decoder, tokens: int) -> None:
        """Tell the callers what is new, and let rows go that ended."""
        self._counts["generated_tokens"] += tokens
        for place, row in enumerate(decoder.rows):
            kept = row.done and row.error is None and row.ticket.added <= MOST_KEPT_ROWS
            if kept and self._prefixes.limit and isinstance(decoder, CachedDecoder):
                self._store(decoder, place)
        self._tell(decoder.rows)
        if any(row.done for row in decoder.rows):
            self._compact(decoder)

    def _store(self, decoder: CachedDecoder, place: int) -> None:
        """Keep what a row has read; its newest token was not read."""
        token_ids = decoder.rows[place].input_ids[: decoder.width - decoder.padding(place)]
        if len(token_ids) < SHORTEST or self._prefixes.holds(token_ids):
            return
        if len(token_ids) * bytes_per_token(self._model) <= self._prefixes.limit:
            taken = decoder.taken(place)
            if taken is not None:
                self._prefixes.put(token_ids, taken)

    def _search(self) -> None:
        """Run a group of beam searches that generate() does for us."""
        ticket = next((ticket for ticket in self.tickets if ticket.searches), None)
        if ticket is None:
            return
        places = together(ticket.searches, any_length=self._pads)
        chosen = [ticket.searches.pop(place) for place in places]
        try:
            outcomes: Sequence[Any] = search(self._model, chosen, self._pad, self._codec, ticket.cancelled)
            updates = [
                Update(place, text=outcome.completions[0].text, outcome=outcome)
                for place, outcome in zip(places, outcomes, strict=True)
            ]
        except Exception as error:  # noqa: BLE001 - it is told to the caller, once per row
            updates = [Update(place, error=step_failed(error)) for place in places]
        with self._lock:
            for update in updates if not self.closed else ():
                ticket.tell(update)
            ticket.ready.notify()


CLOSED = "the model was closed: load it again to go on."
