"""What a person's word for a language means among the codes of a checkpoint, by the names and rules of CLDR."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from lmkit.errors import LanguageError, MissingExtraError, listed

if TYPE_CHECKING:
    from langcodes import Language

__all__ = ["Names", "Resolver", "is_group", "standard"]

_TOKEN = re.compile(r"(?:__|>>|<2)(.+?)(?:__|<<|>)")
"""A code written as its token in M2M100 and PLBart (`__fr__`), Marian (`>>fra<<`) or MADLAD (`<2fr>`)."""
_MEANT = {"ns": "nso"}
"""Codes that mean something else to a family than to ISO 639: M2M100's Northern Sotho."""
_SAME = {"nb": "no", "pbt": "ps", "quy": "qu", "fuv": "ff"}
"""Languages that one asks for by a wider name: Norwegian is Bokmål to CLDR, which names no member for the others; they
are those that FLORES-200, and so NLLB, has of Pashto, Quechua and Fulah."""
_PROGRAMS = {"java": "Java", "python": "Python", "javascript": "JavaScript", "php": "PHP", "ruby": "Ruby", "go": "Go"}
"""PLBart's programming languages, as they are written."""
_NEAR = 5


class Names(Mapping[str, str]):
    """The languages of a checkpoint: its codes, in its order, and what each is called in English.

    Codes need no library; a name is looked up when it is read.

    Raises:
        MissingExtraError: A name is read, and the library that knows names is not installed.
    """

    def __init__(self, codes: Iterable[str]) -> None:
        self._codes = tuple(codes)
        self._names: dict[str, str] = {}

    @override
    def __getitem__(self, code: str) -> str:
        if code not in self._codes:
            raise KeyError(code)
        if not self._names:
            self._names = named(self._codes)
        return self._names[code]

    @override
    def __contains__(self, code: object) -> bool:
        return code in self._codes

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self._codes)

    @override
    def __len__(self) -> int:
        return len(self._codes)

    @override
    def __repr__(self) -> str:
        try:
            return f"{type(self).__name__}({dict(self)})"
        except MissingExtraError:
            return f"{type(self).__name__}({list(self)})"


class Resolver:
    """Words for languages, resolved among a checkpoint's codes.

    A code as the checkpoint writes it is always itself. Any other word is read as a BCP 47 tag, with ISO 639-3 codes
    and underscores too, or as a name in any language. It then means a code of the *same language*, which is CLDR's
    notion: overlong and withdrawn codes are replaced, and a macrolanguage is its usual member (`arb` is `ar`, `cmn`
    is `zh`, `nb` is `no`). A script, or a region that implies one, must be the code's; a language alone prefers its
    likely script. Of several codes, the nearest by CLDR's language distance is taken.
    Source: Unicode Technical Standard 35, sections Likely Subtags and Language Matching; `langcodes` implements both.
    """

    def __init__(self, codes: Iterable[str]) -> None:
        self._codes = tuple(codes)
        self._plain = {_folded(code): code for code in reversed(self._codes)}
        self._found: dict[str, str | None] = dict(zip(self._codes, self._codes, strict=True))
        self._tags: dict[str, Language] = {}

    def find(self, word: str) -> str | None:
        """Return the code that a word means here, None if there is none.

        Raises:
            MissingExtraError: The word is not a code, and the library that knows others is not installed.
        """
        if word not in self._found:
            token = _TOKEN.fullmatch(word.strip())
            exact = self._plain.get(_folded(token[1] if token else word))
            found = exact or self._nearest(_read(word))
            if len(self._found) > len(self._codes) + 10_000:  # words may come from outside
                return found
            self._found[word] = found
        return self._found[word]

    def _nearest(self, wanted: Language | None) -> str | None:
        from langcodes import tag_distance

        if wanted is None:
            return None
        same = [
            (tag_distance(wanted, tag), tag.language != wanted.language, place, code)
            for place, (code, tag) in enumerate(self._all().items())
            if _base(tag) == _base(wanted) and _writes(tag, wanted)
        ]
        return min(same)[-1] if same else None

    def _all(self) -> dict[str, Language]:
        if not self._tags:
            tags = {code: _tag(code) for code in self._codes if code not in _PROGRAMS}
            self._tags = {code: tag for code, tag in tags.items() if tag is not None}
        return self._tags

    def near(self, word: str) -> list[str]:
        """Return a few codes that the word may have meant: its relatives, then those that look like it."""
        first = re.split(r"[_-]", word)[0].lower()
        names: dict[str, str] = {}
        relatives: list[str] = []
        try:
            wanted = _read(word)
            names = {name.lower(): code for code, name in named(self._codes).items()}
        except MissingExtraError:
            wanted = None
        if wanted is not None:
            from langcodes import tag_distance

            tags = self._all()
            relatives = [code for code, tag in tags.items() if _macro(tag) == _macro(wanted)]
            relatives.sort(key=lambda code: tag_distance(wanted, tags[code]))
        begun = [code for code in self._codes if first and code.lower().startswith(first)]
        close = difflib.get_close_matches(word.lower(), {code.lower(): code for code in self._codes}, n=3)
        close_names = [names[name] for name in difflib.get_close_matches(word.lower(), names, n=3, cutoff=0.75)]
        looks = [code for code in self._codes if code.lower() in close] if not begun else []
        return list(dict.fromkeys([*relatives, *begun, *looks, *close_names]))[:_NEAR]


def named(codes: Iterable[str]) -> dict[str, str]:
    """Return the English name of each code; script and region are said where others share the name."""
    codes = tuple(codes)
    tags = {code: _tag(code, plain=True) for code in codes if code not in _PROGRAMS}
    short = {code: _name(tag) if (tag := tags.get(code)) else _PROGRAMS.get(code, code) for code in codes}
    shared = Counter(short.values())
    return {
        code: tag.simplify_script().display_name() if shared[name] > 1 and (tag := tags.get(code)) else name
        for code, name in short.items()
    }


def is_group(code: str) -> bool:
    """Say whether a code stands for several languages, as `roa` and `ROMANCE` in the names of Marian checkpoints."""
    tag = _tag(code)
    return tag is None or tag.language_name().endswith("languages")


def standard(which: str, word: str) -> str:
    """Return the standard tag of a language, for a checkpoint that does not say which ones it reads."""
    tag = _read(word)
    if tag is None:
        msg = f"{which}={word!r} is not the code or the name of a language, such as 'fr' or 'French'."
        raise LanguageError(msg)
    return str(tag)


def _name(tag: Language) -> str:
    from language_data.names import code_to_names

    regional = code_to_names(f"{tag.language}-{tag.territory}").get("en")  # Dari, Brazilian Portuguese
    return str(regional or tag.language_name()).partition(" (individual")[0]  # "Swahili (individual language)"


def _folded(code: str) -> str:
    return code.strip().replace("-", "_").casefold()


def _tag(code: str, *, plain: bool = False) -> Language | None:
    """Read a code; with `plain`, one that has a name of its own is not replaced by another (`prs`, Dari)."""
    _library()
    from langcodes import Language
    from langcodes.tag_parser import LanguageTagError

    text = re.sub(r"[_-](XX|ZZ)$", "", _MEANT.get(code, code.strip())).replace("_", "-")  # XX: any region
    try:
        tag = Language.get(text, normalize=not plain)
        if plain and not (tag.is_valid() and tag.has_name_data()):
            tag = Language.get(text)
    except LanguageTagError:
        return None
    return tag if tag.is_valid() and tag.language else None


@cache
def _library() -> Any:
    """Return the names of languages in all languages, as a trie.

    `langcodes.find` takes the longest name that a word begins with, so it reads "javascript" as Javanese.
    """
    try:
        from langcodes import Language  # noqa: F401 - both packages are needed, one each for tags and names
        from language_data.names import load_trie
        from language_data.util import data_filename
    except ImportError as error:
        msg = (
            "names of languages, and codes that are not the checkpoint's own, need packages that are not installed: "
            f'pip install "lmkit[translate]" ({error})'
        )
        raise MissingExtraError(msg) from error
    return load_trie(data_filename("trie/und/name_to_language.marisa"))


def _read(word: str) -> Language | None:
    """Read a code or a name, the code first."""
    return _tag(word) or _by_name(_library(), word)


def _by_name(names: Any, word: str) -> Language | None:
    """Read a name, with a script or a region in parentheses, as in "Serbian (Latin)"."""
    from langcodes import Language
    from language_data.names import normalize_name

    if (found := normalize_name(word)) in names:
        return Language.get(names[found][0].decode())
    parts = re.fullmatch(r"(.+?)\s*\((.+)\)\s*", word)
    if parts is None or (language := _by_name(names, parts[1])) is None:
        return None
    for kind in ("script", "territory"):
        try:
            return language.update(Language.find_name(kind, parts[2], "en"))
        except LookupError:
            continue
    return None


def _base(tag: Language) -> str | None:
    """Return what counts as the same language."""
    language = tag.prefer_macrolanguage().language
    return _SAME.get(language or "", language)


def _macro(tag: Language) -> str | None:
    """Return the ISO 639-3 macrolanguage, for who asked for a relative: Nynorsk for Bokmål."""
    from langcodes.data_dicts import MACROLANGUAGES

    return MACROLANGUAGES.get(tag.language or "", _base(tag))


def _writes(tag: Language, wanted: Language) -> bool:
    """Say whether a code's script is the one that was asked for, if one was."""
    return not (wanted.script or wanted.territory) or wanted.maximize().script == tag.maximize().script


def unknown(which: str, word: str, resolver: Resolver, codes: Iterable[str]) -> LanguageError:
    """Return the error for a language that the checkpoint does not speak: near matches first, then all."""
    near = [repr(code) for code in resolver.near(word)]
    guess = f" Did you mean {' or '.join([', '.join(near[:-1]), near[-1]] if near[1:] else near)}?" if near else ""
    return LanguageError(f"{which}={word!r} is not a language of this checkpoint.{guess} It speaks: {listed(codes)}.")
