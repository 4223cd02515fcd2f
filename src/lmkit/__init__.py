"""Load any text language model by name, and run it well.

```python
import lmkit

generator = lmkit.load("causal", "HuggingFaceTB/SmolLM2-135M-Instruct")
generator("Level up!", max_new_tokens=50).text
```

Importing this package imports neither torch nor transformers: each name is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmkit.errors import (
        EngineError,
        InputTooLongError,
        LanguageError,
        LmkitError,
        MissingExtraError,
        ModelNotFoundError,
        OptionError,
        PlacementError,
        PrecisionError,
        UnknownOptionError,
        UnknownTaskError,
        WeightsError,
    )
    from lmkit.fitting import ModulePlan
    from lmkit.generation import Beam, GenerationOptions, Greedy, Mode, Sample
    from lmkit.generator import Chat, Generator, GeneratorOptions, Message
    from lmkit.keyvalues import KeyValueBytes
    from lmkit.loading import LoadOptions, load, plan
    from lmkit.placement import Placement
    from lmkit.plans import LoadPlan
    from lmkit.precision import Precision
    from lmkit.results import (
        Candidate,
        Choice,
        Completion,
        EngineStats,
        Generation,
        MaskSlot,
        Ranking,
        Score,
        Segment,
        TextChunk,
        Timing,
        TokenLogprob,
        Translation,
        Unmasking,
    )
    from lmkit.translator import TranslationOptions, Translator
    from lmkit.unmasker import Unmasker, UnmaskOptions

    __version__: str

_MODULES = {
    "errors": (
        "EngineError InputTooLongError LanguageError LmkitError MissingExtraError ModelNotFoundError OptionError "
        "PlacementError PrecisionError UnknownOptionError UnknownTaskError WeightsError"
    ),
    "fitting": "ModulePlan",
    "generation": "Beam GenerationOptions Greedy Mode Sample",
    "generator": "Chat Generator GeneratorOptions Message",
    "loading": "LoadOptions load plan",
    "placement": "Placement",
    "plans": "LoadPlan",
    "precision": "Precision",
    "results": (
        "Candidate Choice Completion EngineStats Generation MaskSlot Ranking Score Segment TextChunk Timing "
        "TokenLogprob Translation Unmasking"
    ),
    "keyvalues": "KeyValueBytes",
    "translator": "TranslationOptions Translator",
    "unmasker": "UnmaskOptions Unmasker",
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names.split()}

__all__ = [
    "Beam",
    "Candidate",
    "Chat",
    "Choice",
    "Completion",
    "EngineError",
    "EngineStats",
    "Generation",
    "GenerationOptions",
    "Generator",
    "GeneratorOptions",
    "Greedy",
    "InputTooLongError",
    "KeyValueBytes",
    "LanguageError",
    "LmkitError",
    "LoadOptions",
    "LoadPlan",
    "MaskSlot",
    "Message",
    "MissingExtraError",
    "Mode",
    "ModelNotFoundError",
    "ModulePlan",
    "OptionError",
    "Placement",
    "PlacementError",
    "Precision",
    "PrecisionError",
    "Ranking",
    "Sample",
    "Score",
    "Segment",
    "TextChunk",
    "Timing",
    "TokenLogprob",
    "Translation",
    "TranslationOptions",
    "Translator",
    "UnknownOptionError",
    "UnknownTaskError",
    "UnmaskOptions",
    "Unmasker",
    "Unmasking",
    "WeightsError",
    "load",
    "plan",
]


def __getattr__(name: str) -> object:
    """Import a public name when it is first used (PEP 562)."""
    if name == "__version__":
        from importlib.metadata import version

        return version("lmkit")
    if name not in _HOMES:
        msg = f"module 'lmkit' has no attribute {name!r}"
        raise AttributeError(msg)
    value = getattr(importlib.import_module(f"lmkit.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
