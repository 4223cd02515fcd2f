"""What a person's word for a language means among the codes of a checkpoint, by the names and rules of CLDR."""

from __future__ import annotations

import contextlib
import difflib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

from lmkit.errors import LanguageError, MissingExtraError, listed

if TYPE_CHECKING:
    from langcodes import Language

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

    def __getitem__(self, code: str) -> str:
        if code not in self._codes:
            raise KeyError(code)
        if not self._names:
            self._names = named(self._codes)
        return self._names[code]

    def __contains__(self, code: object) -> bool:
        return code in self._codes

    def __iter__(self) -> Iterator[str]:
        return iter(self._codes)

    def __len__(self) -> int:
        return len(self._codes)

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

    def find(self, word: str) -> str | None:
        """Return the code that a word means here, None if there is none.

        Raises:
            MissingExtraError: The word is not a code, and the library that knows others is not installed.
        """
        if word not in self._found:
            plain = token[1] if (token := _TOKEN.fullmatch(word.strip())) else word
            exact = self._plain.get(_folded(plain))
            found = exact or self._named.get(_folded(plain)) or self._nearest(_read(plain))
            if len(self._found) > len(self._codes) + 10_000:  # words may come from outside
                return found
            self._found[word] = found
        return self._found[word]

    def _nearest(self, readings: list[Language]) -> str | None:
        """Return the code nearest to the first reading of a word that the checkpoint has."""
        from langcodes import tag_distance

        for wanted in readings:
            same = [
                (tag_distance(wanted, tag), tag.language != wanted.language, place, code)
                for place, (code, tag) in enumerate(self._tags.items())
                if _base(tag) == _base(wanted) and _writes(tag, wanted)
            ]
            if same:
                return min(same)[-1]
        return None

    @cached_property
    def _named(self) -> dict[str, str]:
        """The codes by the names that the checkpoint's list shows."""
        return {_folded(name): code for code, name in reversed(named(self._codes).items())}

    @cached_property
    def _tags(self) -> dict[str, Language]:
        return {code: tag for code in self._codes if code not in _PROGRAMS and (tag := _tag(code)) is not None}

    def near(self, word: str) -> list[str]:
        """Return a few codes that the word may have meant: its relatives, then those that look like it."""
        first, looks_like = re.split(r"[_-]", word)[0].lower(), difflib.get_close_matches
        relatives: list[str] = []
        names: dict[str, str] = {}
        with contextlib.suppress(MissingExtraError):
            relatives, names = self._relatives(_read(word) or _read(first)), self._named
        begun = [code for code in self._codes if first and code.lower().startswith(first)]
        close = [] if begun else looks_like(word, self._codes)
        by_name = [names[name] for name in looks_like(_folded(word), names, cutoff=0.75)]
        return list(dict.fromkeys([*relatives, *begun, *close, *by_name]))[:_NEAR]

    def _relatives(self, readings: list[Language]) -> list[str]:
        """Return the codes of the same ISO 639-3 macrolanguage, nearest first."""
        from langcodes import tag_distance

        macros = {_macro(wanted) for wanted in readings}
        found = [(tag_distance(readings[0], tag), code) for code, tag in self._tags.items() if _macro(tag) in macros]
        return [code for _, code in sorted(found)]


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


@cache
def script(code: str | None) -> str:
    """Return what a language is written in, as ISO 15924 calls it: `Zzzz` where nobody can tell."""
    with contextlib.suppress(MissingExtraError):
        if code is not None and code not in _PROGRAMS and not is_group(code) and (tag := _tag(code)):
            return tag.maximize().script or "Zzzz"
    return "Zzzz"


def is_group(code: str) -> bool:
    """Say whether a code stands for several languages, as `roa` and `ROMANCE` in the names of Marian checkpoints."""
    tag = _tag(code)
    return tag is None or tag.language_name().endswith("languages")


def standard(which: str, word: str) -> str:
    """Return the standard tag of a language, for a checkpoint that does not say which ones it reads."""
    if readings := _read(word):
        return str(readings[0])
    raise LanguageError(f"{which}={word!r} is not the code or the name of a language, such as 'fr' or 'French'.")


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
def _library() -> tuple[Any, ...]:
    """Return the names of languages as tries: those in all languages, and the English ones, which win no conflict.

    `langcodes.find` takes the longest name that a word begins with, so it reads "javascript" as Javanese.
    """
    try:
        import langcodes  # noqa: F401 - both packages are needed, one each for tags and names
        from language_data.names import load_trie
        from language_data.util import data_filename
    except ImportError as error:
        raise MissingExtraError(
            "names of languages, and codes that are not the checkpoint's own, need packages that are not installed: "
            f'pip install "lmkit[translate]" ({error})'
        ) from error
    return tuple(load_trie(data_filename(f"trie/{names}/name_to_language.marisa")) for names in ("und", "en"))


def _read(word: str) -> list[Language]:
    """Read a code or a name, the code first; a name may mean two languages."""
    tag = _tag(word)
    return [tag] if tag else _by_name(word)


def _by_name(word: str) -> list[Language]:
    """Read a name, with a script or a region in parentheses, as in "Serbian (Latin)"."""
    from langcodes import Language
    from language_data.names import normalize_name

    if not word.isprintable():  # a null byte makes the tries return what is none of their values
        return []
    name = normalize_name(word)
    if found := [Language.get(names[name][0].decode()) for names in _library() if name in names]:
        return found
    if (plain := _without_accents(name)).isascii() and (code := _plain_names().get(plain)):
        return [Language.get(code)]
    if parts := re.fullmatch(r"(.+?)\s*\((.+)\)\s*", word):
        for kind in ("script", "territory"):
            with contextlib.suppress(LookupError):
                part = Language.find_name(kind, parts[2], "en")
                return [language.update(part) for language in _by_name(parts[1])]
    return []


def _without_accents(name: str) -> str:
    return "".join(char for char in unicodedata.normalize("NFD", name) if not unicodedata.combining(char))


@cache
def _plain_names() -> dict[str, str]:
    """Return the codes of names that have accents, by the names without them, where those are one language's."""
    found: dict[str, set[str]] = {}
    for names in _library():
        for name in names:
            if not name.isascii() and (plain := _without_accents(name)).isascii():
                found.setdefault(plain, set()).add(names[name][0].decode())
    return {plain: next(iter(codes)) for plain, codes in found.items() if len(codes) == 1}


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


def unknown(which: str, word: str, resolver: Resolver, codes: Iterable[str], also: str = "") -> LanguageError:
    """Return the error for a language that the checkpoint does not speak: near matches first, then all, and `also`."""
    near = [repr(code) for code in resolver.near(word)]
    guess = f" Did you mean {' or '.join([', '.join(near[:-1]), near[-1]] if near[1:] else near)}?" if near else ""
    return LanguageError(
        f"{which}={word!r} is not a language of this checkpoint.{guess} It speaks: {listed(codes)}{also}."
    )
