"""How a peer's script talks to the benchmark: one JSON object per line, in on stdin, out on stdout.

Runs in the peer's own environment, so it needs nothing but Python.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

Job = dict[str, Any]
Answer = Callable[[Job], dict[str, Any]]


def serve(start: Callable[[Job], tuple[Answer, dict[str, Any]]]) -> None:
    """Start the peer as the first line says, then answer one line at a time until stdin ends.

    Args:
        start: Takes the settings; returns what answers a job, and facts such as the version.
    """
    # Libraries print to stdout: they get stderr in its place, and the answers a way of their own.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        begun = time.perf_counter()
        answer, facts = start(json.loads(sys.stdin.readline()))
        print(json.dumps({**facts, "seconds_to_start": time.perf_counter() - begun}), file=answers, flush=True)
        for line in sys.stdin:
            print(json.dumps(answer(json.loads(line))), file=answers, flush=True)
