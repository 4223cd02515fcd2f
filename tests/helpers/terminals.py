"""Commands in a real pseudo-terminal, as a person sees and drives them."""

import contextlib
import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Self


class Screen:
    """A process in a pseudo-terminal, and what its screen has shown so far; leaving the block kills it."""

    def __init__(self, *arguments: str, term: str = "dumb", columns: int = 80, program: str = "") -> None:
        """Start lmkit with arguments, or a program; a terminal that is `dumb` is sent no escape sequences."""
        self.master, terminal = pty.openpty()
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.shown = ""
        environment = {**os.environ, "TERM": term, "PYTHONUTF8": "1", "INPUTRC": os.devnull}
        command = [program] if program else [sys.executable, "-m", "lmkit"]
        self.process = subprocess.Popen(
            [*command, *arguments], stdin=terminal, stdout=terminal, stderr=terminal,
            env=environment, start_new_session=True,
        )  # fmt: skip
        os.close(terminal)

    def __enter__(self) -> Self:
        """Return the screen."""
        return self

    def __exit__(self, *_error: object) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        with contextlib.suppress(OSError):
            os.close(self.master)

    def wait_for(self, text: str = "", *, length: int = 0, seconds: float = 90) -> str:
        """Read until the screen shows the text and as many characters, and return what it shows."""
        end = time.monotonic() + seconds
        while text not in self.shown or len(self.shown) < length:
            assert time.monotonic() < end, f"not seen: {text!r} in {self.shown!r}"
            if select.select([self.master], [], [], 1)[0]:
                self.shown += os.read(self.master, 4096).decode("utf-8", "replace")
        return self.shown

    def press(self, keys: str, text: str = "") -> str:
        """Type, forget what was shown before, and wait for a text."""
        self.shown = ""
        os.write(self.master, keys.encode())
        return self.wait_for(text)

    def settle(self) -> None:
        """Wait until the process sleeps, as it does where it waits for keys.

        A signal that comes while it still answers a key may go to another of its threads (seen by strace): Python's
        readline, which looks for signals where its own `select` was interrupted, then answers the next one only.
        """
        asleep = 0
        while asleep < 5:
            state = Path(f"/proc/{self.process.pid}/stat").read_text("utf-8").rpartition(") ")[2][0]
            asleep = asleep + 1 if state == "S" else 0
            time.sleep(0.02)

    def interrupt(self, text: str = "") -> str:
        """Send what Ctrl-C sends, and wait for a text."""
        self.shown = ""
        self.process.send_signal(signal.SIGINT)
        return self.wait_for(text)

    def close(self) -> int:
        """Wait for the end and return the exit code."""
        with self:
            self._drain(60)
            return self.process.wait(1)

    def _drain(self, seconds: float) -> None:
        """Read until the process ends: one whose screen nobody reads waits for ever."""
        end = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < end:
            if select.select([self.master], [], [], 0.1)[0]:
                with contextlib.suppress(OSError):
                    self.shown += os.read(self.master, 4096).decode("utf-8", "replace")
