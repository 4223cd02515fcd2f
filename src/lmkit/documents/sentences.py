"""Where sentences end, by the rules of the text's language."""

from __future__ import annotations

import itertools
from functools import cache

import regex

from lmkit.errors import MissingExtraError

_SEVERAL = regex.compile(r"[\p{Sentence_Terminal}…;].*?\w", regex.DOTALL)
"""A mark that can end a sentence (Unicode's property; the Greek question mark too), and something behind it."""


def sentence_ends(text: str, language: str | None) -> list[int]:
    """Return where the sentences of a text end, white space behind them included; the last one is `len(text)`.

    Boundaries are those of Wikimedia's `sentencex`, which knows the abbreviations and marks of some 300 languages.
    A text without a mark that could end a sentence before its end is one sentence, and needs no package.

    Args:
        text: A text without line breaks.
        language: A code such as `de`, `deu_Latn` or `de_DE`; an unknown one, or None, has the rules of English.

    Raises:
        MissingExtraError: `sentencex` is not installed.
    """
    if _SEVERAL.search(text) is None:
        return [len(text)]
    try:
        import sentencex

        code = _short(language)
    except ImportError as error:
        raise MissingExtraError(
            "this text has to be split into sentences, which needs the package sentencex: "
            'pip install "lmkit[translate]", or pass the sentences as a list with split="none", or split="paragraph", '
            "which leaves lines whole that fit, of which a model may leave sentences out."
        ) from error
    found: list[str] = sentencex.segment(code, text)  # pyright: ignore[reportAttributeAccessIssue]  # it has no stubs
    # A splitter that lost a character would shift all that follows: then it is one sentence rather than a wrong one.
    return list(itertools.accumulate(map(len, found))) if "".join(found) == text else [len(text)]


@cache
def _short(language: str | None) -> str:
    """Return the code that sentencex knows a language by: of two letters, where the language has one."""
    from langcodes import Language
    from langcodes.tag_parser import LanguageTagError

    try:
        return Language.get((language or "en").replace("_", "-")).prefer_macrolanguage().language or "en"
    except LanguageTagError:
        return "en"
