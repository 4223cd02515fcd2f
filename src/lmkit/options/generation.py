"""Typed options to a row's checked ones, which all three wrappers share, and to a transformers `GenerationConfig`.

A mode of decoding is a frozen dataclass of its own, so that a contradiction cannot be written: a
`Greedy` has no temperature, a `Beam` no `top_p`. Plain keywords select the mode: `temperature=0.7` samples,
`num_beams=4` searches, nothing is greedy.
"""

# Annotations are not postponed here: those of the options are read.
import copy
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeAlias, TypedDict, get_args

from lmkit.errors import OptionError, shown
from lmkit.options.option import LARGEST, Option, checked, choice, declared, is_a, is_strings, is_whole, number, whole
from lmkit.options.per_row import Many, PerRow
from lmkit.structured.outputs import ACCEPTED, Output, is_output, output_of

if TYPE_CHECKING:
    from transformers import GenerationConfig

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
        _check(self)
        if self.temperature == 0:
            raise OptionError("Sample(temperature=0) draws nothing: write Greedy(), or pass temperature=0 alone.")


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
        """Refuse fewer than two beams, and values outside their range."""
        _check(self)
        if self.num_beams < 2:  # noqa: PLR2004 - one beam is a greedy search
            raise OptionError(
                f"Beam(num_beams={self.num_beams}) searches nothing: write Greedy(), or at least 2 beams."
            )


Mode: TypeAlias = Greedy | Sample | Beam
Side: TypeAlias = Literal["left", "right"]
Biases: TypeAlias = Mapping[int, float] | Mapping[str, float] | Mapping[int | str, float]
"""Numbers that are added to the scores of tokens, which are ids or texts of one token."""

Processor: TypeAlias = Callable[[Any, Any], Any]
"""A `LogitsProcessor` of transformers, or any callable: a row's token ids and scores to other scores."""


def _token_ids(value: object) -> bool:
    return isinstance(value, Sequence) and all(is_whole(0)(one) and one < 2**31 for one in value)


def _tools(value: object) -> bool:
    return isinstance(value, Sequence) and all(callable(one) or isinstance(one, Mapping) for one in value)


def _thinking(value: object) -> bool:
    return isinstance(value, bool) or is_whole(0)(value)


def _words(value: object) -> bool:
    items = [value] if isinstance(value, str) else value
    return isinstance(items, Sequence) and all((isinstance(one, str) or _token_ids(one)) and one for one in items)


def _biases(value: object) -> bool:
    if not isinstance(value, Mapping):
        return False
    tokens = all((isinstance(one, str) and one) or is_whole(0)(one) for one in value)
    return tokens and all(map(number(-LARGEST, "").test, value.values()))


def _callables(value: object) -> bool:
    return isinstance(value, Sequence) and all(map(callable, value))


def _check(mode: Sample | Beam) -> None:
    """Check a mode's values as its keywords are checked; None is accepted where it is the default."""
    for one in fields(mode):
        value = getattr(mode, one.name)
        if value is not None or one.default is not None:
            declared(GenerationOptions)[one.name].check(one.name, value)


class ModeOptions(TypedDict, total=False):
    """The options of every call that chooses tokens, by which keywords select the mode."""

    mode: Annotated[
        PerRow[Mode], Option("Greedy(), Sample(…) or Beam(…)", "The mode, instead of keywords", is_a(Mode), "Greedy()")
    ]
    sample: Annotated[PerRow[bool], choice((True, False), "Draw tokens, as the checkpoint recommends")]
    temperature: Annotated[
        PerRow[float],
        number(0, "Draw from scores divided by this: below 1 sharpens, above 1 flattens; 0 is greedy", "1 if sampling"),
    ]
    top_p: Annotated[
        PerRow[float], number(0, "Draw from the likeliest tokens whose shares add up to this", "1", high=1, above=True)
    ]
    min_p: Annotated[
        PerRow[float], number(0, "Draw from tokens at least this fraction as likely as the likeliest", high=1)
    ]
    seed: Annotated[PerRow[int], whole(0, "Where draws begin: the same seed, the same text", "a fresh one")]
    num_beams: Annotated[PerRow[int], whole(1, "Search, with this many beginnings kept at every step", "1", high=1_000)]
    progress: Annotated[bool, choice((True, False), "Draw a bar", "in a terminal or notebook, if slow", call=True)]


class GenerationOptions(ModeOptions, total=False):
    """The options of every call that generates; each takes one value, or a list with one per row.

    `output`, which is one more, stands in the signatures of calls, since it decides of which type a result's value is.

    The [options page](options.md#all-of-them) says what each takes and does, and what it is when left out.
    """

    top_k: Annotated[PerRow[int], whole(0, "Draw from this many of the likeliest", "all", note=", where 0 keeps all")]
    length_penalty: Annotated[
        PerRow[float], number(-50, "Above 0, a beam search favours longer texts", "the checkpoint's, else 1", high=50)
    ]
    early_stopping: Annotated[
        PerRow[bool | Literal["never"]],
        choice((True, False, "never"), "When a beam search ends; see `Beam`", "the checkpoint's, else False"),
    ]
    max_new_tokens: Annotated[
        PerRow[int], whole(1, "The most tokens to generate, or what the context leaves", str(DEFAULT_MAX_NEW_TOKENS))
    ]
    min_new_tokens: Annotated[PerRow[int], whole(0, "No end before as many tokens", "the checkpoint's")]
    num_return_sequences: Annotated[
        PerRow[int], whole(1, "Completions per row, drawn or of a beam search", "1", high=10_000)
    ]
    repetition_penalty: Annotated[
        PerRow[float],
        number(0, "Make what was there less likely", "the checkpoint's", above=True, note=", where 1 is no penalty"),
    ]
    no_repeat_ngram_size: Annotated[
        PerRow[int], whole(0, "No sequence of as many tokens twice", "the checkpoint's", note=", where 0 is off")
    ]
    frequency_penalty: Annotated[
        PerRow[float], number(-2, "Take this from a token's score for each time the answer has it", "0", high=2)
    ]
    presence_penalty: Annotated[
        PerRow[float], number(-2, "Take this from the scores of tokens that the answer has", "0", high=2)
    ]
    logit_bias: Annotated[
        PerRow[Biases],
        Option("a dict from token ids, or texts of one token, to numbers", "Add this to scores of tokens", _biases),
    ]
    bad_words: Annotated[
        str | Many[str | Sequence[int]],
        Option("a text or a list, of texts or lists of token ids", "Words never to write", _words, many=True),
    ]
    suppress_tokens: Annotated[
        Many[int], Option("a list of token ids", "Tokens never to choose", _token_ids, "the checkpoint's", many=True)
    ]
    suppress_unknown: Annotated[
        PerRow[bool], choice((True, False), "Never choose the token of what the vocabulary lacks", "False")
    ]
    stop: Annotated[
        str | Many[str], Option("a string or a list of strings, none empty", "End before this", is_strings, many=True)
    ]
    stop_token_ids: Annotated[
        Many[int],
        Option("a list of token ids", "End at one of these, beside the checkpoint's own", _token_ids, many=True),
    ]
    skip_special_tokens: Annotated[PerRow[bool], choice((True, False), "Leave special tokens out of the text", "True")]
    logprobs: Annotated[PerRow[int], whole(0, "Record log-probabilities: of each token, and of this many likeliest")]
    processors: Annotated[
        Many[Processor],
        Option("a list of callables", "Let these change scores last, before a token is chosen", _callables, many=True),
    ]
    truncate: Annotated[PerRow[Side], choice(get_args(Side), "Cut a text that is too long there, instead of an error")]


class GeneratorOptions(GenerationOptions, total=False):
    """The options of every call of a `Generator`: those of generation, and some of its own."""

    lookup: Annotated[
        PerRow[bool], choice((True, False), "Guess at next tokens from the text so far, and verify several", "False")
    ]
    template: Annotated[
        PerRow[Mapping[str, Any]],
        Option("a dict, such as {'enable_thinking': False}", "What the chat template is given", is_a(Mapping)),
    ]
    tools: Annotated[
        Many[Any],
        Option("a list of functions, or of definitions in JSON", "What a chat's answer may call", _tools, many=True),
    ]
    tool_choice: Annotated[
        PerRow[str],
        Option("'auto', 'required' or a tool's name", "Whether a chat's answer is a call", is_a(str), "'auto'"),
    ]
    thinking: Annotated[
        PerRow[bool | int],
        Option("True, False or a number of tokens", "Whether to reason before a chat's answer, or how long", _thinking),
    ]
    continue_final_message: Annotated[
        PerRow[bool],
        choice((True, False), "Go on with a chat's last message, the assistant's, and return what is new", "False"),
    ]


class OutputOptions(TypedDict, total=False):
    """The option that stands in the signatures of calls."""

    output: Annotated[Any, Option(ACCEPTED, "Write nothing but such an answer, and give its value", is_output)]


class GeneratorCall(GeneratorOptions, OutputOptions, total=False):
    """All that a call of a `Generator` takes."""


@dataclass(frozen=True, slots=True)
class RowOptions:
    """The options of one row, checked and complete.

    None means what the checkpoint's own generation config says, or nothing where that says nothing of it.
    """

    mode: Mode = Greedy()
    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS
    min_new_tokens: int | None = None
    num_return_sequences: int = 1
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Biases | None = None
    bad_words: tuple[str | Sequence[int], ...] = ()
    suppress_tokens: tuple[int, ...] | None = None
    suppress_unknown: bool = False
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    skip_special_tokens: bool = True
    seed: int | None = None
    logprobs: int | None = None
    lookup: bool = False
    processors: tuple[Processor, ...] = ()
    truncate: Side | None = None
    output: Output[Any] | None = None

    @classmethod
    def of(cls, given: Mapping[str, object], recommended: "GenerationConfig | None" = None) -> Self:
        """Check the options of one row and choose its mode.

        Args:
            given: Options of `GeneratorCall` by name, one value each (see `split`). None is not given.
            recommended: The checkpoint's own generation config, for `sample=True`.

        Raises:
            OptionError: A value that is not accepted, or two options that contradict each other.
        """
        options = declared(GeneratorCall)
        known = checked(given, options)
        plain = {one.name: known[one.name] for one in fields(cls) if one.name in known}
        lists = [name for name in plain if options[name].many]
        plain |= {name: (plain[name],) if isinstance(plain[name], str) else tuple(plain[name]) for name in lists}
        plain["mode"] = _mode(known, recommended)
        plain["output"] = output_of(known["output"]) if "output" in known else None
        return cls(**plain)

    def __post_init__(self) -> None:
        """Refuse options that contradict each other."""
        copies, mode = self.num_return_sequences, self.mode
        if copies > 1 and isinstance(mode, Greedy):
            raise OptionError(
                f"num_return_sequences={copies} with greedy decoding would give {copies} equal texts: "
                "add sample=True or a temperature to draw them, or num_beams to search them."
            )
        if isinstance(mode, Beam):
            if copies > mode.num_beams:
                raise OptionError(f"num_return_sequences={copies} is more than num_beams={mode.num_beams} can give.")
            if self.output is not None:
                raise OptionError("output and num_beams contradict: a search keeps to no grammar. Draw several.")
            if self.logprobs is not None:
                raise OptionError("logprobs and num_beams contradict: a beam has one score, `Completion.score`.")
        if self.output is not None and (self.stop or self.stop_token_ids):
            name = "stop" if self.stop else "stop_token_ids"
            raise OptionError(f"output and {name} contradict: an answer ends where it is whole, not before.")
        if self.output is not None and not self.skip_special_tokens:
            raise OptionError("output and skip_special_tokens=False contradict: a value has no special tokens.")
        if (self.min_new_tokens or 0) > self.max_new_tokens:
            raise OptionError(
                f"min_new_tokens={shown(self.min_new_tokens)} is more than max_new_tokens={self.max_new_tokens}."
            )

    def with_seed(self) -> Self:
        """Draw a fresh seed for a row that samples and has none; the global random state is not used."""
        if not isinstance(self.mode, Sample) or self.seed is not None:
            return self
        return replace(self, seed=secrets.randbits(48))


def build_config(
    options: RowOptions,
    checkpoint: "GenerationConfig",
    *,
    prefix_tokens: int,
    max_new_tokens: int,
    forced_bos_token_id: int | None = None,
    ends: Sequence[int] = (),
    biases: Mapping[int, float] | None = None,
    forbidden: Sequence[list[int]] = (),
) -> "GenerationConfig":
    """Make the `GenerationConfig` of one row; `checkpoint` is copied, never changed.

    What the checkpoint asks for beside its mode (penalties, forced or suppressed tokens, minimum
    lengths, end tokens) stays, and an explicit option wins over it. The mode is the options' alone.

    Args:
        options: The row's options.
        checkpoint: The checkpoint's own generation config.
        prefix_tokens: How many tokens the decoder starts from (the prompt; 1 for encoder-decoders).
        max_new_tokens: The row's budget, after what the context leaves.
        forced_bos_token_id: The token a translation must begin with, for families that want one.
        ends: Tokens that end this row beside the checkpoint's own.
        biases: What is added to the scores of which tokens, beside the checkpoint's own.
        forbidden: Sequences of tokens that are never completed, beside the checkpoint's own.
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
        # Not transformers' own, which leaves them alone: see `engine.processors`.
        "frequency_penalty": float(options.frequency_penalty),
        "presence_penalty": float(options.presence_penalty),
    }
    asked = {
        "length_penalty": beam and beam.length_penalty and float(beam.length_penalty),
        "early_stopping": beam and beam.early_stopping,
        "repetition_penalty": options.repetition_penalty and float(options.repetition_penalty),
        "no_repeat_ngram_size": options.no_repeat_ngram_size,
        "suppress_tokens": None if options.suppress_tokens is None else list(options.suppress_tokens),
        "min_new_tokens": options.min_new_tokens,
        "min_length": None if options.min_new_tokens is None else prefix_tokens + options.min_new_tokens,
        "forced_bos_token_id": forced_bos_token_id,
        "sequence_bias": _biased(config.sequence_bias, biases) if biases else None,
        "bad_words_ids": [*(config.bad_words_ids or ()), *forbidden] if forbidden else None,
    }
    changes |= {name: value for name, value in asked.items() if value is not None}
    for name, value in changes.items():
        setattr(config, name, value)
    if more := (*options.stop_token_ids, *ends):
        own = config.eos_token_id
        before = own if isinstance(own, list) else [] if own is None else [own]
        config.eos_token_id = list(dict.fromkeys([*before, *more]))
    return config


def _biased(own: Any, biases: Mapping[int, float]) -> list[list[Any]]:
    """Join the biases of a checkpoint, of which transformers takes two forms, with those of tokens, which win."""
    pairs = own.items() if isinstance(own, Mapping) else own or ()
    joined = {tuple(ids): bias for ids, bias in pairs} | {(one,): bias for one, bias in biases.items()}
    return [[list(ids), bias] for ids, bias in joined.items()]


REPLACED = (
    *("assistant_early_exit", "constraints", "diversity_penalty", "dola_layers", "force_words_ids", "max_time"),
    *("num_beam_groups", "penalty_alpha", "prompt_lookup_num_tokens", "stop_strings"),
)
"""What a checkpoint's generation config may ask for that would send generate() another way: ways of decoding that
lmkit has no mode for, a clock, and stop strings, which lmkit watches for itself."""


def _mode(given: Mapping[str, Any], recommended: "GenerationConfig | None") -> Mode:
    """Choose the mode that the keywords select; two that contradict are an error that names both."""
    sampling = {name: given[name] for name in _SAMPLING if name in given}
    beams = {name: given[name] for name in _BEAM if name in given}
    drawing = [name for name in sampling if not (name == "temperature" and given[name] == 0)]
    searching = [name for name in beams if not (name == "num_beams" and given[name] == 1)]
    sample = given.get("sample")
    if mode := given.get("mode"):
        _contradict("mode", [*sampling, *beams, *given.keys() & {"sample"}])
        return mode  # type: ignore[no-any-return]
    if searching:
        _contradict("num_beams", [*drawing, *(["sample"] if sample else [])])
        if given.get("num_beams", 1) == 1:
            raise OptionError(f"{searching[0]} needs num_beams of at least 2.")
        return Beam(**beams)
    if given.get("temperature") == 0:
        _contradict("temperature=0", ["sample=True"] if sample else [])
        return Greedy()
    if sample is False:
        _contradict("sample=False", drawing)
    if sample:
        advised = [(name, getattr(recommended, name, None)) for name in _SAMPLING]
        sampling = {name: value for name, value in advised if value is not None} | sampling
    elif not drawing:
        return Greedy()
    return Sample(**{name: value for name, value in sampling.items() if (name, value) != ("top_k", 0)})


def _contradict(first: str, others: list[str]) -> None:
    if others:
        raise OptionError(f"{first} and {others[0]} contradict each other: pass one of them.")


_SAMPLING = tuple(field.name for field in fields(Sample))
_BEAM = tuple(field.name for field in fields(Beam))
