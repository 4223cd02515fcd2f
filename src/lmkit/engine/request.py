"""What the wrappers ask of the engine, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from lmkit._interrupts import Flag

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from transformers import GenerationConfig

    from lmkit.errors import LmkitError
    from lmkit.results import Completion, Timing
    from lmkit.structured.grammars import Matcher

OutcomeT = TypeVar("OutcomeT")


@dataclass(frozen=True, slots=True)
class Request:
    """One row to run.

    Attributes:
        input_ids: Tokens the model reads: the prompt, or an encoder's source.
        config: The row's resolved generation config; its `max_new_tokens` is the row's budget.
        copies: How many completions to draw (a beam search takes its own number from `config`).
        stop: Strings that end the row; its text is cut before them.
        named: The names of special tokens that are in stop strings.
        stop_token_ids: Those of the tokens that end the row which the caller named.
        special: Whether the text has the names of special tokens.
        context: The last tokens before the row's own whose text it goes on with.
        seed: Where the draws of a sampled row begin.
        logprobs: How many alternatives to record beside each token; None records nothing.
        lookup: Guess at next tokens from the row's own text while it runs alone.
        processors: The caller's own, which see the row's tokens and scores last before a token is chosen.
        grammar: Begins what says which tokens the answer may have, if not all.
    """

    input_ids: tuple[int, ...]
    config: GenerationConfig
    copies: int = 1
    stop: tuple[str, ...] = ()
    named: Mapping[int, str] = field(default_factory=dict)
    stop_token_ids: tuple[int, ...] = ()
    special: bool = False
    context: tuple[int, ...] = ()
    seed: int | None = None
    logprobs: int | None = None
    lookup: bool = False
    processors: tuple[Callable[..., Any], ...] = ()
    grammar: Callable[[], Matcher] | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """All completions of a request that ended."""

    completions: tuple[Completion, ...]
    timing: Timing


@dataclass(frozen=True, slots=True)
class Caller:
    """How one who asks takes what there is to tell.

    Attributes:
        stream: Whether to tell new text at every step, not only the end.
        lazy: Read what is asked between steps. None among it says that there is more, but not now; when all before it
            have ended, None is told in turn.
        cancelled: Set it from another thread to end all rows at their next step, without further news of those that
            have not begun.
    """

    stream: bool = False
    lazy: bool = False
    cancelled: Flag = field(default_factory=Flag)


@dataclass(frozen=True, slots=True)
class Update(Generic[OutcomeT]):
    """News of one row: new text, or its end.

    Attributes:
        index: Which one of the run.
        text: New text of its first completion, if the run streams.
        outcome: What came of it, once all of it has ended.
        error: Why it failed, if it did; the others go on.
    """

    index: int
    text: str = ""
    outcome: OutcomeT | None = None
    error: LmkitError | None = None


@dataclass(frozen=True, slots=True)
class Reading:
    """Tokens of which the last ones are scored.

    Attributes:
        token_ids: What the decoder reads, but for the last one, which is only scored.
        start: The first token that is scored, at least 1.
        source: What the encoder reads, if there is one.
    """

    token_ids: tuple[int, ...]
    start: int
    source: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Scored:
    """What a model finds of the scored tokens of a reading.

    Attributes:
        logprobs: The natural logarithm of the probability of each.
        greedy: Whether each is the likeliest in its place.
    """

    logprobs: tuple[float, ...]
    greedy: bool
