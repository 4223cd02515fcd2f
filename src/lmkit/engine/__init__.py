"""The engine: requests in, completions out, whatever runs them.

The wrappers know the names below, and nothing of batches, caches or processors.
"""

from lmkit.engine.batches import CLOSED
from lmkit.engine.engine import Engine
from lmkit.engine.masks import Asking, Draw, Found, MaskScorer, Query, drawn, parallel
from lmkit.engine.request import Outcome, Request, Update
from lmkit.engine.scores import Reading, Scored, Scorer

__all__ = [
    "CLOSED",
    "Asking",
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
