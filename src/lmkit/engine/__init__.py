"""Rows to tokens: requests in, completions out, whatever runs them, for any number of threads at a time.

The rooms above know the names below, and nothing of batches, caches or processors. What a task's rows are, and what is
made of their tokens, is `wrappers`' and `masked`'s; how rows will run was decided in `planning`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from lmkit.engine.failures import CLOSED
from lmkit.engine.questions import Asking, Draw, Found, Query, answered, parallel
from lmkit.engine.request import Caller, Outcome, Reading, Request, Scored, Update

if TYPE_CHECKING:
    from lmkit.engine.engine import Engine
    from lmkit.engine.passes.masks import MaskScorer, drawn
    from lmkit.engine.passes.scores import Scorer

_COMPUTING = {"Engine": "engine", "MaskScorer": "passes.masks", "Scorer": "passes.scores", "drawn": "passes.masks"}

__all__ = [
    "CLOSED",
    "Asking",
    "Caller",
    "Draw",
    "Engine",
    "Found",
    "MaskScorer",
    "Outcome",
    "Query",
    "Reading",
    "Request",
    "Scored",
    "Scorer",
    "Update",
    "answered",
    "drawn",
    "parallel",
]


def __getattr__(name: str) -> object:
    """Import what computes with torch when it is first used (PEP 562)."""
    if name not in _COMPUTING:
        raise AttributeError(f"module 'lmkit.engine' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"lmkit.engine.{_COMPUTING[name]}"), name)
    return value
