"""Drives chromium over the pipe of its debugging protocol: no other package is needed."""

import base64
import fcntl
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Self

CHROMIUM = shutil.which("chromium")
OPTIONS = "--headless --no-sandbox --disable-gpu --disable-background-networking --hide-scrollbars".split()
OFFLINE = "--host-resolver-rules=MAP * ~NOTFOUND"


class Browser:
    """One page of a headless chromium, which reaches no network."""

    def __init__(self) -> None:
        """Start it; it reads what it is told from its descriptor 3, and answers on 4."""
        told, self._telling = os.pipe()
        self._answers, answering = os.pipe()
        given = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (told, answering)]  # away from 3 and 4
        self._folder = tempfile.TemporaryDirectory()
        command = ["bash", "-c", f'exec "$@" 3<&{given[0]} 4>&{given[1]}', "bash", str(CHROMIUM), *OPTIONS, OFFLINE]
        command += [f"--user-data-dir={self._folder.name}", "--remote-debugging-pipe"]
        self._process = subprocess.Popen(command, pass_fds=given, stderr=subprocess.DEVNULL)
        for end in (told, answering, *given):
            os.close(end)
        self._read, self._number, self._session = b"", 0, {}
        target = self._do("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self._do("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        self._do("Page.enable")

    def __enter__(self) -> Self:
        """Use it for a block."""
        return self

    def __exit__(self, *_: object) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
        os.close(self._telling)
        os.close(self._answers)
        self._folder.cleanup()

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._read:
            if not (more := os.read(self._answers, 1 << 20)):
                raise EOFError("chromium has ended")
            self._read += more
        line, _, self._read = self._read.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        return message

    def _do(self, method: str, **given: Any) -> Any:
        self._number += 1
        message = {"id": self._number, "method": method, "params": given, **self._session}
        os.write(self._telling, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            pass
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def open(self, page: Path, width: int, height: int = 800) -> None:
        """Show a file in a window of a size."""
        self._do("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self._do("Page.navigate", url=page.as_uri())
        while self._next().get("method") != "Page.loadEventFired":
            pass

    def run(self, script: str) -> Any:
        """Return what an expression gives in the page."""
        answer = self._do("Runtime.evaluate", expression=script, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"])
        return answer["result"].get("value")

    def point(self, element: str, *, press: bool = False) -> None:
        """Move the mouse to the middle of what an expression gives, scrolled into sight; press it there."""
        box = f"(one => (one.scrollIntoView({{block: 'center'}}), one.getClientRects()[0]))({element})"
        x, y = self.run(f"(box => [box.x + box.width / 2, box.y + box.height / 2])({box})")
        for kind in ["mouseMoved", *(["mousePressed", "mouseReleased"] if press else [])]:
            self._do("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=int(press))

    def photograph(self, file: Path) -> None:
        """Write a picture of the whole page."""
        whole = self._do("Page.getLayoutMetrics")["cssContentSize"]
        clip = {**whole, "scale": 1}
        photo = self._do("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)["data"]
        file.write_bytes(base64.b64decode(photo))
