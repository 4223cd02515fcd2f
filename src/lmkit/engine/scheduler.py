"""Which rows run together: by a budget of tokens, fair between callers, ordered by what they need."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lmkit.engine.inputs import input_device
from lmkit.planning.machine import memory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch

    from lmkit.engine.decoders.base import Decoder
    from lmkit.engine.row import Row
    from lmkit.engine.ticket import Ticket
    from lmkit.planning.keyvalues import KeyValueBytes

SHARE_OF_FREE_MEMORY = 0.5
"""How much of the memory that is free when a batch begins its keys and values may take."""

BATCH_TOKENS = {"cpu": 16_384}
"""Beyond this many tokens of keys and values a step gains nothing any more: on a CPU the products are then bound by
arithmetic (docs/performance.md)."""

BATCH_TOKENS_ELSEWHERE = 262_144

PROMPT_TOKENS = 2048
"""How many tokens of prompts one forward pass reads; more would only take more memory."""

PROMPT_TOKENS_BESIDE = 512
"""The same while other rows are running: they wait for it."""

SHORTEST_SHARE = 0.5
"""Where rows cannot join, a batch takes none in that are shorter than this share of its longest: an encoder reads the
padding of its sources, and every step attends to it. Smaller batches than `LEAST_ROWS` are not made for that: 64
sentences of 12 to 80 tokens took 1.15 s together on 2 cores, and 1.3 s in three batches."""

LEAST_ROWS = 64

REFILL = 8
"""A full batch waits until one in so many of its rows have ended before it takes in others together."""


class Scheduler:
    """Chooses rows from the callers' tickets."""

    def __init__(self, model: Any, key_values: KeyValueBytes | None) -> None:
        """Serve `model`, whose devices set the budget; `key_values` is what the plan says that rows take of it."""
        self._device = input_device(model)
        self._shares = _shares(model)
        self._encodes = bool(model.config.is_encoder_decoder)
        self._key_values = key_values
        self._most_rows: int | None = None  # after a step failed
        self._memory = False

    def columns(self, rows: int, *, busy: bool) -> int:
        """Say how many columns of a batch's prompts to read at once."""
        return max((PROMPT_TOKENS_BESIDE if busy else PROMPT_TOKENS) // rows, 1)

    def bytes_of(self, tokens: int, source_tokens: int = 0) -> int:
        """Return the keys and values of a row, as the plan has them; 0 where it could not tell."""
        return 0 if self._key_values is None else self._key_values.of(tokens, source_tokens)

    def bytes_for(self, row: Row) -> int:
        """Return the keys and values of a row at its longest."""
        source = len(row.request.input_ids)
        return self.bytes_of(_answer(row), source) if self._encodes else self.bytes_of(source + _answer(row))

    def failed(self, rows: int, *, memory: bool) -> None:
        """Take note that a forward pass of so many rows failed: half as many from now on.

        One that failed alone was the reason, and the others may run together again; except when memory is short, which
        it stays until all are done.
        """
        self._memory = self._memory or memory
        if rows > 1:
            self._most_rows = rows // 2
        elif not self._memory:
            self._most_rows = None

    def reset(self) -> None:
        """Forget failures: all rows are done."""
        self._most_rows, self._memory = None, False

    def pick(
        self,
        tickets: Sequence[Ticket],
        decoders: Sequence[Decoder],
        *,
        joins: bool,
        alike: Callable[[Row], object],
        ready: Callable[[Row], bool] = lambda _row: True,
    ) -> list[Row]:
        """Choose the rows to begin now; they stay in their tickets.

        Args:
            tickets: Where rows wait.
            decoders: The batches that run.
            joins: Whether new rows join the batch that runs.
            alike: Rows of a batch must have this in common.
            ready: Whether a row may begin now.
        """
        running = [row for decoder in decoders for row in decoder.rows]
        # Rows that cannot join a batch begin another one beside it, once few of their caller's rows are left in it.
        tickets = [
            ticket for ticket in tickets if ticket.waiting and (joins or ticket.running * REFILL <= len(ticket.waiting))
        ]
        if not tickets:
            return []
        most, room = self._budget(decoders)
        tokens = max(map(_tokens, running), default=0)
        key_values = max(map(self.bytes_for, running), default=0)
        picked: list[Row] = []
        for row in _fair(tickets, joins=joins):
            if not ready(row) or (picked and alike(row) != alike(picked[0])):
                continue
            if not joins and len(picked) >= LEAST_ROWS and _short(row, picked[0]):
                break
            rows = len(running) + len(picked) + 1
            tokens, key_values = max(tokens, _tokens(row)), max(key_values, self.bytes_for(row))
            full = rows * tokens > most or rows * key_values > room
            if (running or picked) and (full or (self._most_rows and rows > self._most_rows)):
                # It is full: to take in a few rows at a time would read their prompts one by one.
                return picked if len(picked) * REFILL >= len(running) or not joins else []
            picked.append(row)
            if joins and sum(row.length - row.behind for row in picked) > PROMPT_TOKENS:
                break
        return picked

    def coming(self, tickets: Sequence[Ticket], decoders: Sequence[Decoder]) -> int:
        """Return how many of the rows that wait will find room beside those that run, if they are no longer."""
        rows = [row for decoder in decoders for row in decoder.rows]
        most, room = self._budget(decoders)
        fits = [most // max(map(_tokens, rows)), self._most_rows or most]
        if key_values := max(map(self.bytes_for, rows)):
            fits.append(int(room // key_values))
        asked = [ticket for ticket in tickets if not ticket.left and not ticket.cancelled.is_set()]
        waiting = sum(row.width == 1 for ticket in asked for row in ticket.waiting)  # others join no batch
        return max(min(waiting, min(fits) - len(rows)), 0)

    def _budget(self, decoders: Sequence[Decoder]) -> tuple[int, float]:
        """Return how many tokens a batch may have, and how many bytes of keys and values."""
        free = min(_free(device) / share for device, share in self._shares.items())
        room = free * SHARE_OF_FREE_MEMORY + sum(decoder.nbytes for decoder in decoders)
        return BATCH_TOKENS.get(self._device.type, BATCH_TOKENS_ELSEWHERE), room


def _answer(row: Row) -> int:
    return row.width * (row.request.config.max_new_tokens or 1)


def _tokens(row: Row) -> int:
    return len(row.request.input_ids) + _answer(row)


def _short(row: Row, longest: Row) -> bool:
    return len(row.request.input_ids) < SHORTEST_SHARE * len(longest.request.input_ids)


def _fair(tickets: Sequence[Ticket], *, joins: bool) -> Iterator[Row]:
    """Go through waiting rows by turns between callers.

    Of a call whose rows are all here those that need least come first: they would ride along in a batch that is as
    wide as the longest row, and attend to its padding. Of 256 rows with 4 to 192 tokens to write, that made 490 tokens
    a second of 430. Where rows follow, the longest begin at once, or results in their order would wait for them.
    """
    queues = {
        ticket: iter(reversed(ticket.waiting) if ticket.lazy or not joins else ticket.waiting) for ticket in tickets
    }
    served = {ticket: ticket.running for ticket in tickets}
    while served:
        least = min(served, key=served.__getitem__)
        row = next(queues[least], None)
        if row is None:
            del served[least]
        else:
            served[least] += 1
            yield row


def _shares(model: Any) -> dict[torch.device, float]:
    """Return what part of a model's layers keeps its keys and values on each device."""
    import torch

    main = input_device(model)
    places = getattr(model, "hf_device_map", None) or {}
    layers = [place for name, place in places.items() if name.rpartition(".")[2].isdigit()]
    # What is offloaded computes where the inputs are.
    devices = [main if place in ("cpu", "disk") else torch.device(place) for place in layers] or [main]
    return {device: devices.count(device) / len(devices) for device in devices}


def _free(device: torch.device) -> int:
    return memory(device)[0]
