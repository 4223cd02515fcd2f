"""The options of a `Translator` and of an `Unmasker`: what a task has beside those of all that chooses tokens."""

# Annotations are not postponed here: those of the options are read.
from typing import Annotated, Any, Literal, TypeAlias, TypedDict, get_args

from lmkit.documents import READY, Split
from lmkit.errors import listed
from lmkit.options.generation import GenerationOptions, ModeOptions, OutputOptions
from lmkit.options.option import Option, choice, is_a, is_strings, whole
from lmkit.options.per_row import Many, PerRow

Order: TypeAlias = Literal["left_to_right", "most_certain", "independent"]
"""In which order masks are filled: as they stand, or first the one where the model gives some token the highest
probability, which depends on what was filled in before; or all at once, none knowing the others, in a single pass."""


_any = is_a(object)  # the checkpoint's languages check it, and say which they are


class PairOptions(TypedDict, total=False):
    """What says which languages a translation is between, or what else is done."""

    source: Annotated[
        PerRow[str], Option("a code, a name or 'detect'", "The language of the text", _any, "the checkpoint's only one")
    ]
    target: Annotated[
        PerRow[str], Option("a code or a name", "The language to translate to", _any, "the checkpoint's only one")
    ]
    preset: Annotated[
        PerRow[str], Option("a name from Translator.presets", "What else to do, of what lmkit info lists", _any)
    ]


class TranslationOptions(GenerationOptions, PairOptions, total=False):
    """The options of every call of a `Translator`: those of generation, and some of its own.

    The [options page](options.md#of-a-translator) says what each takes and does, and what it is when left out.
    """

    split: Annotated[
        PerRow[Split], choice(get_args(Split), "What is translated by itself", "sentence between languages, else none")
    ]
    keep: Annotated[
        str | Many[str],
        Option(
            f"regular expressions (of the package regex), or names among {listed(READY)}, as strings; of a compiled "
            "pattern pass pattern.pattern, with flags such as (?i) in it",
            "What comes out as it went in, such as urls or {…}",
            is_strings,
            many=True,
        ),
    ]


class TranslationCall(TranslationOptions, OutputOptions, total=False):
    """All that a call of a `Translator` takes."""


def _words(value: Any) -> bool:
    return is_strings(value) and not isinstance(value, str) and bool(value) and all(map(str.strip, value))


class UnmaskOptions(ModeOptions, total=False):
    """The options of every call that fills masks; each takes one value, or a list with one per row.

    The page on filling masks says what each takes and does, and what it is when left out.
    """

    top_k: Annotated[PerRow[int], whole(1, "How many candidates to give", "5, or as many as there are targets")]
    targets: Annotated[
        Many[str], Option("a list of words, at least one, none empty", "The only words to consider", _words, many=True)
    ]
    text_pair: Annotated[
        PerRow[str],
        Option("a text, with or without masks", "The second text of a pair, read behind the first", is_a(str)),
    ]
    order: Annotated[PerRow[Order], choice(get_args(Order), "Which mask is filled first", "left_to_right")]
    normalize: Annotated[
        PerRow[Literal["none", "tokens"]], choice(("none", "tokens"), "Compare ways as they are, or per token", "none")
    ]
