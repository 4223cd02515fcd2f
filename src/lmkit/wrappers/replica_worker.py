"""What runs in the process of a replica, and how it and its parent tell each other what is asked and answered."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import signal
import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import lmkit.errors
from lmkit._interrupts import Flag
from lmkit.engine import Caller, Outcome, Scored, Update
from lmkit.errors import EngineError, LmkitError
from lmkit.results import Completion, EngineStats, Timing, TokenLogprob
from lmkit.wrappers.letting_go import let_go

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from multiprocessing.connection import Connection

    from lmkit.text.codec import Codec

ANSWERS = {
    (kind.__module__, kind.__qualname__): kind
    for kind in (Update, Outcome, Scored, Completion, Timing, TokenLogprob, EngineStats)
}
"""All that a parent makes of what a replica sends, beside plain values: no name in it can run a checkpoint's code."""


class _Answers(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type:
        if (module, name) in ANSWERS:
            return ANSWERS[module, name]
        raise pickle.UnpicklingError(f"a replica has sent {module}.{name}, which is no result")


class _Asked(pickle.Pickler):
    codec: Codec | None

    def persistent_id(self, one: object) -> str | None:
        return "codec" if one is not None and one is self.codec else None  # a replica has its own


class _Asking(pickle.Unpickler):
    codec: Codec

    def persistent_load(self, _name: str) -> Codec:
        return self.codec


def asked(one: object, codec: Codec | None) -> bytes:
    """Write what a replica is asked; what refers to the tokenizer will refer to its own."""
    written = io.BytesIO()
    pickler = _Asked(written, protocol=pickle.HIGHEST_PROTOCOL)
    pickler.codec = codec
    pickler.dump(one)
    return written.getvalue()


def read(sent: bytes, codec: Codec) -> Any:
    """Read what a replica is asked, which its parent sends, with a tokenizer of its own."""
    reader = _Asking(io.BytesIO(sent))
    reader.codec = codec
    return reader.load()


def answer(sent: bytes) -> Any:
    """Read what a replica has sent.

    Raises:
        UnpicklingError: It names something that is no result.
    """
    return _Answers(io.BytesIO(sent)).load()


def told(error: BaseException) -> tuple[str, str, str | None]:
    """Write an error as plain text: its type, its message and that of its cause."""
    return type(error).__name__, str(error), None if error.__cause__ is None else str(error.__cause__)


def error_of(name: str, message: str, cause: str | None) -> LmkitError:
    """Make the error again; one that is not lmkit's is an `EngineError`."""
    kind: Any = getattr(lmkit.errors, name, None)
    known = isinstance(kind, type) and issubclass(kind, LmkitError)
    error: LmkitError = kind(message) if known else EngineError(f"a replica failed: {name}: {message}")
    error.__cause__ = None if cause is None else EngineError(cause)
    return error


@dataclass(frozen=True, slots=True)
class Held:
    """What an answer must be, in the place of a grammar, which no other process can have.

    Attributes:
        written: The grammar as llguidance takes it, as JSON.
        spaced: Whether a space may stand before the answer.
        arguments: What else `Grammars.of` takes.
    """

    written: str
    spaced: bool
    arguments: tuple[Any, ...]

    def form(self) -> Any:
        """Return the grammar."""
        return json.loads(self.written)


def work(pipe: Connection, load: Callable[[], Any], threads: int | None) -> None:
    """Load a model and answer what comes through the pipe, until its other end is gone.

    The first message says that the process has begun, the second what its parent has to know, or why nothing is loaded.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who presses Ctrl-C means the parent
    pipe.send_bytes(pickle.dumps(os.getpid()))
    model: Any = None
    try:
        if threads is not None:
            import torch

            torch.set_num_threads(threads)
        model = load()
        found: Any = _facts(model)
    except BaseException as error:  # noqa: BLE001 - whatever it is, the parent raises it
        found = told(error)
    pipe.send_bytes(pickle.dumps(found))
    if isinstance(found, dict):
        _Replica(model, pipe).serve()


def _facts(model: Any) -> dict[str, Any]:
    """Say of a loaded model what its parent checks options by."""
    config = getattr(model, "_checkpoint_config", None)
    return {
        "config": None if config is None else config.to_dict(),
        "rows": getattr(model, "_rows", None),
        "outputs": getattr(model.model.get_output_embeddings(), "out_features", None),
        "bytes": model.memory_bytes,
        "files": model.model.name_or_path,
    }


class _Replica:
    """Answers chunks of rows, each in a thread of its own: the engine runs all of them together."""

    def __init__(self, model: Any, pipe: Connection) -> None:
        self._model = model
        self._pipe = pipe
        self._sends = threading.Lock()
        self._flags: dict[int, Flag] = {}

    def serve(self) -> None:
        """Take what comes; with the parent's end this process ends, whatever it computes."""
        try:
            while True:
                number, kind, stream, rows = self._pipe.recv()
                if kind == "leave":
                    self._flags.get(number, Flag()).set()
                    continue
                self._flags[number] = Flag()
                caller = Caller(stream=stream, cancelled=self._flags[number])
                threading.Thread(target=self._chunk, args=(number, kind, rows, caller), daemon=True).start()
        except (EOFError, OSError):
            os._exit(0)

    def _chunk(self, number: int, kind: str, rows: Sequence[bytes], caller: Caller) -> None:
        """Answer a chunk, and tell that it has ended, or why it did before its rows."""
        failed = None
        try:
            codec = self._model._codec  # noqa: SLF001 - what stands for the model here; so below
            for update in getattr(self, f"_{kind}")([read(row, codec) for row in rows], caller):
                error = update.error and told(update.error)
                self._tell(number, replace(update, error=None), error)
        except Exception as error:  # noqa: BLE001 - its rows get it
            let_go(error)
            failed = told(error)
        del self._flags[number]
        self._tell(number, None, failed)

    def _tell(self, number: int, update: Update[Any] | None, error: tuple[str, str, str | None] | None) -> None:
        message = pickle.dumps((number, update, error))
        with self._sends, contextlib.suppress(OSError):  # the parent is gone, and this process soon
            self._pipe.send_bytes(message)

    def _write(self, requests: Sequence[Any], caller: Caller) -> Iterator[Update[Any]]:
        of = self._model._grammars.of  # noqa: SLF001
        ready = [
            replace(one, grammar=of(one.grammar, *one.grammar.arguments)) if one.grammar else one for one in requests
        ]
        yield from filter(None, self._model._opened_engine.run(ready, caller))  # noqa: SLF001

    def _score(self, readings: Sequence[Any], caller: Caller) -> Iterator[Update[Any]]:
        scorer = self._model._scores._scorer  # noqa: SLF001
        return _updates(scorer.score(readings, caller.cancelled, lambda _row: None))

    def _ask(self, queries: Sequence[Any], caller: Caller) -> Iterator[Update[Any]]:
        return _updates(self._model._scorer.score(queries, caller.cancelled))  # noqa: SLF001

    def _stats(self, _rows: Sequence[Any], _caller: Caller) -> Iterator[Update[Any]]:
        return _updates([self._model.stats])


def _updates(found: Sequence[Any]) -> Iterator[Update[Any]]:
    for number, one in enumerate(found):
        failed = one if isinstance(one, LmkitError) else None
        yield Update(number, outcome=None if failed else one, error=failed)
