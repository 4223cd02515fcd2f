"""Typed options to a transformers `GenerationConfig`: the one builder that all three wrappers share.

A mode of decoding is a frozen dataclass of its own, so that a contradiction cannot be written: a
`Greedy` has no temperature, a `Beam` no seed. Plain keywords select the mode: `temperature=0.7` samples,
`num_beams=4` searches, nothing is greedy.
"""

from __future__ import annotations

import copy
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict

from lmkit.errors import OptionError
from lmkit.rows import LISTS, PerRow

if TYPE_CHECKING:
    from transformers import GenerationConfig

__all__ = ["Beam", "GenerationOptions", "Greedy", "Mode", "Options", "Sample"]

DEFAULT_MAX_NEW_TOKENS = 256
"""What `max_new_tokens` is when nobody says: the length of a long paragraph."""


@dataclass(frozen=True, slots=True)
class Greedy:
    """Take the most likely token at every step."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Draw each token from the model's distribution, reshaped.

    Attributes:
        temperature: Divides the scores; below 1 sharpens, above 1 flattens. Above 0.
        top_p: Keep the likeliest tokens whose probabilities add up to this (Holtzman et al., 2020).
        top_k: Keep this many of the likeliest tokens; None keeps all.
        min_p: Keep tokens at least this fraction as likely as the likeliest (Nguyen et al., 2024).
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        for name in ("temperature", "top_p", "top_k", "min_p"):
            _check(name, getattr(self, name))
        if self.temperature == 0:
            msg = "Sample(temperature=0) draws nothing: write Greedy(), or pass temperature=0 alone."
            raise OptionError(msg)


@dataclass(frozen=True, slots=True)
class Beam:
    """Keep the `num_beams` likeliest beginnings at every step; the best whole text wins.

    Attributes:
        num_beams: How many, at least 2.
        length_penalty: Exponent of the length by which a text's log-probability is divided; above 0
            favours longer texts. None is what the checkpoint asks for, else 1.
        early_stopping: Stop at `num_beams` finished texts (True), by a heuristic (False), or only when
            no better one is possible (`"never"`). None is what the checkpoint asks for, else False.
    """

    num_beams: int
    length_penalty: float | None = None
    early_stopping: bool | Literal["never"] | None = None

    def __post_init__(self) -> None:
        """Refuse fewer than two beams."""
        for name in ("num_beams", "length_penalty", "early_stopping"):
            _check(name, getattr(self, name))
        if self.num_beams < 2:  # noqa: PLR2004 - one beam is a greedy search
            msg = f"Beam(num_beams={self.num_beams}) searches nothing: write Greedy(), or at least 2 beams."
            raise OptionError(msg)


Mode: TypeAlias = Greedy | Sample | Beam


class GenerationOptions(TypedDict, total=False):
    """The options of every call that generates; each takes one value, or a list with one per row.

    `mode` is a `Greedy`, `Sample` or `Beam`; the keywords of those classes may be written directly
    instead. `sample=True` takes the sampling values the checkpoint's author recommends. `stop` is a
    string or a list of them; `suppress_tokens` a list of token ids; a list of lists has one per row. `lookup=True`
    guesses at next tokens from the row's own text while it runs alone, and verifies them: the same tokens, sooner
    where the answer repeats the prompt. `progress` is for a call or a `map` as a whole: whether to draw a bar; left
    out, there is one in a terminal or a notebook when it takes long.
    """

    mode: PerRow[Mode]
    sample: PerRow[bool]
    temperature: PerRow[float]
    top_p: PerRow[float]
    top_k: PerRow[int]
    min_p: PerRow[float]
    num_beams: PerRow[int]
    length_penalty: PerRow[float]
    early_stopping: PerRow[bool | Literal["never"]]
    max_new_tokens: PerRow[int]
    min_new_tokens: PerRow[int]
    num_return_sequences: PerRow[int]
    repetition_penalty: PerRow[float]
    no_repeat_ngram_size: PerRow[int]
    suppress_tokens: Sequence[int] | Sequence[Sequence[int]]
    stop: str | Sequence[str] | Sequence[Sequence[str]]
    seed: PerRow[int]
    logprobs: PerRow[int]
    lookup: PerRow[bool]
    progress: bool
    truncate: PerRow[Literal["left", "right"]]


@dataclass(frozen=True, slots=True)
class Options:
    """The options of one row, checked and complete.

    None means what the checkpoint's own generation config says. `max_new_tokens` None means
    `DEFAULT_MAX_NEW_TOKENS`, less where the context leaves less.
    """

    mode: Mode = Greedy()
    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS
    min_new_tokens: int | None = None
    num_return_sequences: int = 1
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    suppress_tokens: tuple[int, ...] | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = None
    logprobs: int | None = None
    lookup: bool = False
    truncate: Literal["left", "right"] | None = None

    @classmethod
    def of(cls, given: Mapping[str, object], recommended: GenerationConfig | None = None) -> Options:
        """Check the options of one row and choose its mode.

        Args:
            given: Options by name, one value each (see `split`). A value of None counts as not given.
            recommended: The checkpoint's own generation config, for `sample=True`.

        Raises:
            UnknownOptionError: A name that is no option; the nearest one is named.
            OptionError: A value that is not accepted, or two options that contradict each other.
        """
        known = {name: _unboxed(value) for name, value in given.items() if value is not None}
        for name, value in known.items():
            _check(name, value)
        plain = {name: value for name, value in known.items() if name in _OWN}
        if isinstance(plain.get("stop"), str):
            plain["stop"] = (plain["stop"],)
        for name in LISTS & plain.keys():
            plain[name] = tuple(plain[name])  # type: ignore[arg-type]
        plain["mode"] = _mode(known, recommended)
        return cls(**plain)  # type: ignore[arg-type]

    def __post_init__(self) -> None:
        """Refuse options that contradict each other."""
        copies, mode = self.num_return_sequences, self.mode
        if copies > 1 and isinstance(mode, Greedy):
            msg = (
                f"num_return_sequences={copies} with greedy decoding would give {copies} equal texts: "
                "add sample=True or a temperature to draw them, or num_beams to search them."
            )
            raise OptionError(msg)
        if isinstance(mode, Beam):
            if copies > mode.num_beams:
                msg = f"num_return_sequences={copies} is more than num_beams={mode.num_beams} can give."
                raise OptionError(msg)
            if self.logprobs is not None:
                msg = "logprobs and num_beams contradict: a beam has one score, `Completion.score`."
                raise OptionError(msg)
        if (self.min_new_tokens or 0) > self.max_new_tokens:
            msg = f"min_new_tokens={self.min_new_tokens} is more than max_new_tokens={self.max_new_tokens}."
            raise OptionError(msg)

    def with_seed(self) -> Options:
        """Draw a fresh seed for a row that samples and has none; the global random state is not used."""
        if not isinstance(self.mode, Sample) or self.seed is not None:
            return self
        return replace(self, seed=secrets.randbits(48))


def build_config(
    options: Options,
    checkpoint: GenerationConfig,
    *,
    prefix_tokens: int,
    max_new_tokens: int,
    forced_bos_token_id: int | None = None,
) -> GenerationConfig:
    """Make the `GenerationConfig` of one row; `checkpoint` is copied, never changed.

    What the checkpoint asks for beside its mode (penalties, forced or suppressed tokens, minimum
    lengths, end tokens) stays, and an explicit option wins over it. The mode is the options' alone.

    Args:
        options: The row's options.
        checkpoint: The checkpoint's own generation config.
        prefix_tokens: How many tokens the decoder starts from (the prompt; 1 for encoder-decoders).
        max_new_tokens: The row's budget, after what the context leaves.
        forced_bos_token_id: The token a translation must begin with, for families that want one.
    """
    config = copy.copy(checkpoint)  # attributes are replaced below, and no list in one is written to
    mode = options.mode
    sample = mode if isinstance(mode, Sample) else Sample()
    beam = mode if isinstance(mode, Beam) else None
    changes: dict[str, Any] = {
        "do_sample": isinstance(mode, Sample),
        "temperature": float(sample.temperature),
        "top_p": float(sample.top_p),
        "top_k": sample.top_k or 0,
        "min_p": sample.min_p,
        **dict.fromkeys(("typical_p", "epsilon_cutoff", "eta_cutoff", "top_h", *REPLACED)),
        "num_beams": beam.num_beams if beam else 1,
        "num_return_sequences": options.num_return_sequences if beam else 1,
        "max_new_tokens": max_new_tokens,
        "max_length": prefix_tokens + max_new_tokens,
    }
    if beam is not None and beam.length_penalty is not None:
        changes["length_penalty"] = float(beam.length_penalty)
    if beam is not None and beam.early_stopping is not None:
        changes["early_stopping"] = beam.early_stopping
    if options.repetition_penalty is not None:
        changes["repetition_penalty"] = float(options.repetition_penalty)
    if options.suppress_tokens is not None:
        changes["suppress_tokens"] = list(options.suppress_tokens)
    for name in ("min_new_tokens", "no_repeat_ngram_size"):
        if (value := getattr(options, name)) is not None:
            changes[name] = value
    if options.min_new_tokens is not None:
        changes["min_length"] = prefix_tokens + options.min_new_tokens
    if forced_bos_token_id is not None:
        changes["forced_bos_token_id"] = forced_bos_token_id
    for name, value in changes.items():
        setattr(config, name, value)
    return config


REPLACED = (
    "assistant_early_exit",
    "constraints",
    "diversity_penalty",
    "dola_layers",
    "force_words_ids",
    "max_time",
    "num_beam_groups",
    "penalty_alpha",
    "prompt_lookup_num_tokens",
    "stop_strings",
)
"""What a checkpoint's generation config may ask for that would send generate() another way: ways of decoding that
lmkit has no mode for, a clock, and stop strings, which lmkit watches for itself."""


def _mode(given: Mapping[str, Any], recommended: GenerationConfig | None) -> Mode:
    """Choose the mode that the keywords select; two that contradict are an error that names both."""
    sampling = {name: given[name] for name in _SAMPLING if name in given}
    beams = {name: given[name] for name in _BEAM if name in given}
    drawing = [name for name in sampling if not (name == "temperature" and given[name] == 0)]
    searching = [name for name in beams if not (name == "num_beams" and given[name] == 1)]
    if (mode := given.get("mode")) is not None:
        _contradict("mode", [*sampling, *beams, *(["sample"] if "sample" in given else [])])
        chosen: Mode = mode
        return chosen
    if searching:
        _contradict("num_beams", [*drawing, *(["sample"] if given.get("sample") else [])])
        if given.get("num_beams", 1) == 1:
            msg = f"{searching[0]} needs num_beams of at least 2."
            raise OptionError(msg)
        return Beam(**beams)
    if given.get("temperature") == 0:
        if given.get("sample"):
            _contradict("temperature=0", ["sample=True"])
        return Greedy()
    if given.get("sample") is False:
        _contradict("sample=False", drawing)
    if given.get("sample"):
        sampling = _recommended(recommended) | sampling
    elif not drawing:
        return Greedy()
    if sampling.get("top_k") == 0:
        del sampling["top_k"]
    return Sample(**sampling)


def _contradict(first: str, others: list[str]) -> None:
    if others:
        msg = f"{first} and {others[0]} contradict each other: pass one of them."
        raise OptionError(msg)


def _recommended(config: GenerationConfig | None) -> dict[str, Any]:
    """Read the sampling values a checkpoint's author recommends."""
    values = {name: getattr(config, name, None) for name in _SAMPLING}
    return {name: value for name, value in values.items() if value is not None}


def _unboxed(value: object) -> object:
    """Turn a number of numpy or torch into Python's own."""
    unbox = getattr(value, "item", None)
    return unbox() if callable(unbox) and getattr(value, "shape", None) == () else value


LARGEST = 1e6
"""Beyond this, no option that is a number means anything, and powers of it overflow."""


def _number(low: float, high: float = LARGEST, *, above: bool = False) -> Callable[[object], bool]:
    def accepts(value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        return (low < value if above else low <= value) and value <= high

    return accepts


def _integer(low: int) -> Callable[[object], bool]:
    def accepts(value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= low

    return accepts


def _strings(value: object) -> bool:
    items = [value] if isinstance(value, str) else value
    return isinstance(items, Sequence) and all(isinstance(item, str) and item for item in items)


def _token_ids(value: object) -> bool:
    return isinstance(value, Sequence) and all(_integer(0)(item) for item in value)


_RULES: dict[str, tuple[str, Callable[[object], bool]]] = {
    "mode": (
        "Greedy(), Sample(…) or Beam(…)",
        lambda value: isinstance(value, (Greedy, Sample, Beam)),
    ),
    "sample": ("True or False", lambda value: isinstance(value, bool)),
    "temperature": ("a number of at least 0", _number(0)),
    "top_p": ("a number above 0 and at most 1", _number(0, 1, above=True)),
    "top_k": (
        "a whole number of at least 0, where 0 keeps all",
        lambda v: v is None or _integer(0)(v),
    ),
    "min_p": ("a number from 0 to 1", lambda value: value is None or _number(0, 1)(value)),
    "num_beams": ("a whole number of at least 1", _integer(1)),
    "length_penalty": ("a number", lambda v: v is None or _number(-LARGEST, LARGEST)(v)),
    "early_stopping": ("True, False or 'never'", lambda v: v is None or isinstance(v, bool) or v == "never"),
    "max_new_tokens": ("a whole number of at least 1", _integer(1)),
    "min_new_tokens": ("a whole number of at least 0", _integer(0)),
    "num_return_sequences": ("a whole number of at least 1", _integer(1)),
    "repetition_penalty": ("a number above 0, where 1 is no penalty", _number(0, above=True)),
    "no_repeat_ngram_size": ("a whole number of at least 0, where 0 is off", _integer(0)),
    "suppress_tokens": ("a list of token ids", _token_ids),
    "stop": ("a string or a list of strings, none empty", _strings),
    "seed": ("a whole number of at least 0", _integer(0)),
    "logprobs": ("a whole number of at least 0", _integer(0)),
    "lookup": ("True or False", lambda value: isinstance(value, bool)),
    "truncate": ("'left' or 'right'", lambda value: value in ("left", "right")),
}
"""What each option accepts, in words and as a test."""

GENERATION_OPTIONS = frozenset(_RULES)
"""The names of all options that generation takes."""

_SAMPLING = tuple(field.name for field in fields(Sample))
_BEAM = tuple(field.name for field in fields(Beam))
_OWN = frozenset(field.name for field in fields(Options))


def _check(name: str, value: object) -> None:
    accepted, test = _RULES[name]
    if not test(value):
        msg = f"{name}={value!r} is not accepted: {name} takes {accepted}."
        raise OptionError(msg)
