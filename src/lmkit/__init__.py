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
    from lmkit.checkpoint.tasks import TaskWord
    from lmkit.errors import (
        EngineError,
        InputTooLongError,
        JobError,
        LanguageError,
        LmkitError,
        MissingExtraError,
        ModelNotFoundError,
        OptionError,
        OutputError,
        PlacementError,
        PrecisionError,
        UnknownOptionError,
        UnknownTaskError,
        VersionError,
        WeightsError,
    )
    from lmkit.loading import LoadOptions, load, plan, run_job
    from lmkit.options.generation import Beam, GenerationOptions, GeneratorOptions, Greedy, Mode, Sample
    from lmkit.options.tasks import TranslationOptions, UnmaskOptions
    from lmkit.planning.keyvalues import KeyValueBytes
    from lmkit.planning.layout import ModulePlan
    from lmkit.planning.placement import Devices, Placement
    from lmkit.planning.plan import LoadPlan
    from lmkit.planning.precision import Precision, PrecisionWord
    from lmkit.replies.tools import call_tools
    from lmkit.results import (
        Candidate,
        Choice,
        Completion,
        EngineStats,
        FinishReason,
        Generation,
        JobReport,
        MaskSlot,
        Ranking,
        Results,
        Score,
        Segment,
        TextChunk,
        Timing,
        TokenLogprob,
        ToolCall,
        Translation,
        Unmasking,
    )
    from lmkit.structured.outputs import Grammar, JSONSchema, OneOf, Output, Regex, schema_prompt
    from lmkit.wrappers.generator import Chat, Generator, Message
    from lmkit.wrappers.translator import Translator
    from lmkit.wrappers.unmasker import Unmasker

    __version__: str

_MODULES = {
    "checkpoint.tasks": "TaskWord",
    "errors": (
        "EngineError InputTooLongError JobError LanguageError LmkitError MissingExtraError ModelNotFoundError "
        "OptionError OutputError PlacementError PrecisionError UnknownOptionError UnknownTaskError VersionError "
        "WeightsError"
    ),
    "loading": "LoadOptions load plan run_job",
    "options.generation": "Beam GenerationOptions GeneratorOptions Greedy Mode Sample",
    "options.tasks": "TranslationOptions UnmaskOptions",
    "planning.keyvalues": "KeyValueBytes",
    "planning.layout": "ModulePlan",
    "planning.placement": "Devices Placement",
    "planning.plan": "LoadPlan",
    "planning.precision": "Precision PrecisionWord",
    "replies.tools": "call_tools",
    "results": (
        "Candidate Choice Completion EngineStats FinishReason Generation JobReport MaskSlot Ranking Results "
        "Score Segment TextChunk Timing TokenLogprob ToolCall Translation Unmasking"
    ),
    "structured.outputs": "Grammar JSONSchema OneOf Output Regex schema_prompt",
    "wrappers.generator": "Chat Generator Message",
    "wrappers.translator": "Translator",
    "wrappers.unmasker": "Unmasker",
}
__path__.append(f"{__path__[0]}/_former")  # where pickles of 0.1 find what has moved
_HOMES = {name: module for module, names in _MODULES.items() for name in names.split()}

__all__ = [
    "Beam", "Candidate", "Chat", "Choice", "Completion", "Devices", "EngineError", "EngineStats", "FinishReason",
    "Generation", "GenerationOptions", "Generator", "GeneratorOptions", "Grammar", "Greedy", "InputTooLongError",
    "JSONSchema", "JobError", "JobReport", "KeyValueBytes", "LanguageError", "LmkitError", "LoadOptions",
    "LoadPlan", "MaskSlot", "Message", "MissingExtraError", "Mode", "ModelNotFoundError", "ModulePlan", "OneOf",
    "OptionError", "Output", "OutputError", "Placement", "PlacementError", "Precision", "PrecisionError",
    "PrecisionWord", "Ranking", "Regex", "Results", "Sample", "Score", "Segment", "TaskWord", "TextChunk", "Timing",
    "TokenLogprob", "ToolCall", "Translation", "TranslationOptions", "Translator", "UnknownOptionError",
    "UnknownTaskError", "UnmaskOptions", "Unmasker", "Unmasking", "VersionError", "WeightsError", "call_tools",
    "load", "plan", "run_job", "schema_prompt",
]  # fmt: skip


def __getattr__(name: str) -> object:
    """Import a public name when it is first used (PEP 562)."""
    if name == "__version__":
        from importlib.metadata import version

        return version("lmkit")
    if name not in _HOMES:
        raise AttributeError(f"module 'lmkit' has no attribute {name!r}")
    from lmkit._quiet import without_warnings  # tqdm's, of a notebook without widgets

    home = without_warnings(lambda: importlib.import_module(f"lmkit.{_HOMES[name]}"))
    globals()[name] = getattr(home, name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
