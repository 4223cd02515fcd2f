"""Documents: a text to pieces that fit a model, what must stay the same in them, and pieces back to a text.

No model here: a tokenizer comes in as a function that counts, translations as strings. What is asked of the model for
each piece is in `wrappers.translation`.
"""

from lmkit.documents.joined import between, joined
from lmkit.documents.keeping import READY, kept, patterns, restored
from lmkit.documents.pieces import Piece, Size, Span, Split, pieces

__all__ = ["READY", "Piece", "Size", "Span", "Split", "between", "joined", "kept", "patterns", "pieces", "restored"]
