"""The engine: requests in, completions out, whatever runs them.

The wrappers know the names below, and nothing of batches, caches or processors.
"""

from lmkit.engine.batches import CLOSED
from lmkit.engine.engine import Engine
from lmkit.engine.masks import MaskScorer
from lmkit.engine.request import Outcome, Request, Update
from lmkit.engine.scores import Reading, Scored, Scorer

__all__ = ["CLOSED", "Engine", "MaskScorer", "Outcome", "Reading", "Request", "Scored", "Scorer", "Update"]
