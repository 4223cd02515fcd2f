"""Rows to tokens: requests in, completions out, whatever runs them, for any number of threads at a time.

The rooms above know the names below, and nothing of batches, caches or processors. What a task's rows are, and what is
made of their tokens, is `wrappers`' and `masked`'s; how rows will run was decided in `planning`.
"""

from lmkit.engine.engine import Engine
from lmkit.engine.failures import CLOSED
from lmkit.engine.passes.masks import Asking, Draw, Found, MaskScorer, Query, drawn, parallel
from lmkit.engine.passes.scores import Reading, Scored, Scorer
from lmkit.engine.request import Caller, Outcome, Request, Update

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
    "drawn",
    "parallel",
]
