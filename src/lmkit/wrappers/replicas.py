"""Replicas: a model in a process per device, and one object with the usual verbs.

What is around a model stays in the parent: options are checked, texts encoded and results made there. What travels are
requests, and what the engine says of them.
"""

from __future__ import annotations

import functools
import json
import weakref
from dataclasses import dataclass, field, fields
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from lmkit.engine import CLOSED, Caller, Found, Outcome, Query, Reading, Request, Scored, Update, answered
from lmkit.errors import EngineError
from lmkit.results import EngineStats
from lmkit.wrappers.base import Loaded
from lmkit.wrappers.replica_pool import Pool, written
from lmkit.wrappers.replica_worker import Held

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from lmkit._interrupts import Flag
    from lmkit.engine import Asking
    from lmkit.structured.grammars import Grammars
    from lmkit.text.codec import Codec


@dataclass(frozen=True, slots=True)
class LoadedReplicas(Loaded):
    """What stands for a model that is in other processes.

    Attributes:
        pool: The processes.
    """

    pool: Pool = field(kw_only=True)

    def engine(self, codec: Codec, start: int | None) -> Any:
        """Return what has rows written."""
        del start
        return _Writing(self.pool, codec)

    def grammars(self, codec: Codec, start: int | None) -> Any:
        """Return what answers are held to, in words that travel."""
        return _Grammars(Loaded.grammars(self, codec, start))

    def scorer(self, codec: Codec) -> Any:
        """Return what has texts scored."""
        del codec
        return _Scoring(self.pool)

    def mask_scorer(self) -> Any:
        """Return what has masks filled."""
        return _Masks(self.pool)


def model_of(facts: dict[str, Any], config: Any) -> Any:
    """Return what a wrapper reads of a model, without a weight."""
    from transformers import GenerationConfig

    own = facts["config"]
    rows = None if facts["rows"] is None else SimpleNamespace(weight=range(facts["rows"]))
    return SimpleNamespace(
        config=config,
        generation_config=None if own is None else GenerationConfig.from_dict(own),
        name_or_path=facts["files"],
        get_input_embeddings=lambda: rows,
        get_output_embeddings=lambda: SimpleNamespace(out_features=facts["outputs"]),
    )


class _Remote:
    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def stats(self) -> EngineStats:
        found = self._pool.stats()
        return EngineStats(*(sum(getattr(one, each.name) for one in found) for each in fields(EngineStats)))

    def close(self) -> None:
        self._pool.close()

    def _all(
        self, kind: str, items: Sequence[Any], cancelled: Flag | None, ended: Callable[[object], None]
    ) -> list[Any]:
        """Return the answers to all items in order, errors among them."""
        found: list[Any] = [EngineError(CLOSED)] * len(items)  # of those that a cancelled call leaves
        for update in self._pool.run(kind, items, Caller() if cancelled is None else Caller(cancelled=cancelled)):
            if update is not None:
                found[update.index] = update.error or update.outcome
                ended(update)
        return found


class _Writing(_Remote):
    def __init__(self, pool: Pool, codec: Codec) -> None:
        super().__init__(pool)
        self._codec = codec

    def run(self, requests: Iterable[Request | None], caller: Caller) -> Iterator[Update[Outcome] | None]:
        return self._pool.run("write", requests, caller, self._codec)


class _Scoring(_Remote):
    def score(
        self, readings: Sequence[Reading], cancelled: Flag, ended: Callable[[object], None]
    ) -> list[Scored | EngineError]:
        return self._all("score", readings, cancelled, ended)


class _Masks(_Remote):
    def run(self, askings: Iterable[Asking[Any]], cancelled: Flag | None = None) -> list[Any]:
        return answered(askings, functools.partial(self._told, cancelled))

    def _told(self, cancelled: Flag | None, queries: Sequence[Query]) -> list[Found | EngineError]:
        return self._all("ask", queries, cancelled, lambda _update: None)


class _Grammars:
    def __init__(self, own: Grammars) -> None:
        self._own = own

    def of(self, output: Any, before: str = "", forced: int | None = None) -> Held:
        self._own.of(output, before, forced)  # which refuses what no grammar can hold
        return Held(json.dumps(output.form()), output.spaced, (before, forced))


class Replicated:
    """What a wrapper of replicas has in the place of what belongs to one model."""

    _loaded: LoadedReplicas | None
    _opened: Any
    _plan: Any

    def __init__(self, loaded: LoadedReplicas) -> None:
        """Take over processes that have loaded; they end with this object."""
        super().__init__(loaded)  # type: ignore[call-arg]  # that of a wrapper
        weakref.finalize(self, loaded.pool.close)

    @property
    def model(self) -> Any:
        """Nothing.

        Raises:
            EngineError: Always.
        """
        raise EngineError(f"{self._plan.name} is in other processes, so there is no model to look at here: see plan.")

    device = modules = model

    @property
    def memory_bytes(self) -> int:
        """How many bytes the weights and buffers of all processes took when they were loaded."""
        return sum(one["bytes"] for one in self._opened.pool.facts)

    def __repr__(self) -> str:
        """Show the class, the name, the precision and the devices."""
        kind = type(self).__mro__[2].__name__
        told = "closed" if self._loaded is None else f"{self._plan.precision.name}, {self._plan.reasons['replicas']}"
        return f"<lmkit.{kind} {self._plan.name!r}, {told}>"

    def _options(self, given: Any) -> Any:
        chosen = super()._options(given)  # type: ignore[misc]  # that of a writer
        written(chosen.processors)
        return chosen
