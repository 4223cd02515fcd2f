"""What the wrappers ask of the engine, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import GenerationConfig

    from lmkit.errors import EngineError
    from lmkit.results import Completion, Timing

__all__ = ["Outcome", "Request", "Update"]


@dataclass(frozen=True, slots=True)
class Request:
    """One row to run.

    Attributes:
        input_ids: Tokens the model reads: the prompt, or an encoder's source.
        config: The row's resolved generation config; its `max_new_tokens` is the row's budget.
        copies: How many completions to draw (a beam search takes its own number from `config`).
        stop: Strings that end the row; its text is cut before them.
        seed: Where the draws of a sampled row begin.
        logprobs: How many alternatives to record beside each token; None records nothing.
        lookup: Guess at next tokens from the row's own text while it runs alone.
    """

    input_ids: tuple[int, ...]
    config: GenerationConfig
    copies: int = 1
    stop: tuple[str, ...] = ()
    seed: int | None = None
    logprobs: int | None = None
    lookup: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """All completions of a request that ended."""

    completions: tuple[Completion, ...]
    timing: Timing


@dataclass(frozen=True, slots=True)
class Update:
    """News of one request: new text, or its end.

    Attributes:
        index: Which request of the run.
        text: New text of its first completion, if the run streams.
        outcome: Its completions, once all have ended.
        error: Why it failed, if it did; the other requests go on.
    """

    index: int
    text: str = ""
    outcome: Outcome | None = None
    error: EngineError | None = None
