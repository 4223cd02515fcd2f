"""The frozen dataclasses that every call returns.

The same shape whatever the input's: `str(result)` is the text, `to_dict()` plain JSON types, and in a
notebook a result draws itself with everything escaped, because model output is untrusted text. Nothing here computes:
what fills them is in `wrappers`, and a plan, which is one of them in kind, is `planning`'s.
"""

from lmkit.results.base import Results
from lmkit.results.masks import Candidate, MaskSlot, Unmasking
from lmkit.results.reports import JobReport
from lmkit.results.scores import Choice, Ranking, Score
from lmkit.results.texts import (
    ChunkKind,
    Completion,
    EngineStats,
    FinishReason,
    Generation,
    Segment,
    SegmentNote,
    TextChunk,
    Timing,
    TokenLogprob,
    ToolCall,
    Translation,
)

__all__ = [
    "Candidate", "Choice", "ChunkKind", "Completion", "EngineStats", "FinishReason", "Generation", "JobReport",
    "MaskSlot", "Ranking", "Results",
    "Score", "Segment", "SegmentNote", "TextChunk", "Timing", "TokenLogprob", "ToolCall", "Translation",
    "Unmasking",
]  # fmt: skip
