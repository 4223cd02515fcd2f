"""What each translation family calls a language, and how source and target reach its model."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from lmkit.errors import LanguageError, LmkitError, OptionError, listed, nearest, shown
from lmkit.languages.detect import DETECT, Detector
from lmkit.languages.names import Names, Resolver, is_group, standard, unknown

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence


Scheme: TypeAlias = Literal["codes", "tags", "pair", "prefixes", "none"]
"""How a family is told: a code token around the source and as the first target token (M2M100, NLLB, mBART, PLBart,
SeamlessM4T), a tag in the text (multilingual Marian, MADLAD), a prefix in words (T5), or not at all: it has one pair
and says which (Marian, FSMT), or it does not (BART, Pegasus)."""

Layout: TypeAlias = tuple[tuple["int | None", ...], tuple["int | None", ...]]


@dataclass(frozen=True, slots=True)
class Prepared:
    """How one text reaches the model.

    Attributes:
        text: What is encoded: the source, with a prefix or tag where the family wants one.
        before: Token ids put before the text's own; None leaves the special tokens to the tokenizer.
        after: Token ids put after them.
        forced_bos_token_id: The token the answer must begin with.
        source: The source language, as the checkpoint writes it.
        target: The target language, as the checkpoint writes it.
        preset: What else the preset asks for, such as `num_beams`.
        prefix: What stands before the source inside `text`: T5's words, Marian's or MADLAD's tag with its space.
        blank: The source was to be detected, and there is no letter or digit to translate: only to be copied.
    """

    text: str
    before: tuple[int, ...] | None = None
    after: tuple[int, ...] = ()
    forced_bos_token_id: int | None = None
    source: str | None = None
    target: str | None = None
    preset: Mapping[str, Any] = field(default_factory=dict)
    prefix: str = ""
    blank: bool = False


@dataclass(frozen=True)
class Languages:
    """What a checkpoint speaks and how it is told.

    Attributes:
        scheme: How the family is told.
        codes: The languages, as the checkpoint writes them, and their token ids where they have one.
        presets: What its config names under `task_specific_params`.
        layout: The special tokens around a source, `None` in place of the language's.
        tag: What stands around a code in the text.
        pair: The only source and the only target of the checkpoint, None where it has others or does not say. Either
            may stand for a group of languages, such as `roa`.
        start: The token that answers begin with, which may be a language already (mBART, PLBart).
    """

    scheme: Scheme
    codes: Mapping[str, int | None]
    presets: Mapping[str, Mapping[str, Any]]
    layout: Layout = ((), ())
    tag: tuple[str, str] = (">>", "<<")
    pair: tuple[str | None, str | None] = (None, None)
    start: int | None = None

    @cached_property
    def names(self) -> Names:
        """The codes and what they are called in English."""
        return Names(self.codes)

    @cached_property
    def _resolver(self) -> Resolver:
        return Resolver(self.codes)

    @cached_property
    def _detector(self) -> Detector:
        return Detector(self._resolver)

    @property
    def _told_source(self) -> bool:
        return self.scheme in {"codes", "prefixes"} or self.tag == _MADLAD

    def prepare(self, text: str | None, source: str | None, target: str | None, preset: str | None) -> Prepared:
        """Write a text as the family wants it; without a text, only check what else is given.

        Raises:
            LanguageError: A language is missing, not one the checkpoint speaks, not to be detected, or not that of
                the prefix or tag in the text.
            OptionError: The preset is unknown, given together with languages, or not that of the prefix in the text.
            MissingExtraError: A language is not written as the checkpoint writes it, or to be detected, and the
                packages that can do that are not installed.
        """
        for which, word in (("source", source), ("target", target)):
            if word is not None and not isinstance(word, str):
                raise LanguageError(
                    f"{which}={shown(word)} is not a language: pass a code or a name, such as 'fr' or 'French'."
                )
        if preset is not None and not isinstance(preset, str):
            raise OptionError(f"preset={shown(preset)} is not accepted: it takes a name from Translator.presets.")
        if preset is not None:
            return self._preset(text or "", preset, [name for name in (source, target) if name is not None])
        if source == DETECT and (source := self._detected(text)) is None:
            return Prepared(text or "", target=self._code("target", target), blank=True)
        return getattr(self, f"_{self.scheme}")(text or "", source, target)  # type: ignore[no-any-return]

    def _preset(self, text: str, preset: str, languages: Sequence[str]) -> Prepared:
        if preset not in self.presets:
            known = listed(sorted(self.presets)) or "none"
            raise OptionError(
                f"unknown preset {preset!r}.{nearest(preset, self.presets)} This checkpoint has: {known}."
            )
        if languages:
            raise OptionError(
                f"preset={preset!r} and the language {languages[0]!r} contradict each other: pass one of them."
            )
        pair = _PAIR.fullmatch(preset)
        source, target = pair.groups() if pair else (None, None)
        return self._prefix(text, preset, source, target)

    def _prefix(
        self, text: str, preset: str, source: str | None, target: str | None, error: type[LmkitError] = OptionError
    ) -> Prepared:
        """Put a preset's prefix before a text, unless it is there; `error` is raised where another's is."""
        values = dict(self.presets[preset])
        prefix = str(values.pop("prefix", None) or "")
        if not (prefix and text.startswith(prefix)):
            for other, told in self.presets.items():
                if (begun := str(told.get("prefix") or "")).strip() and text.startswith(begun):
                    raise error(
                        f"the text begins with {begun!r}, the prefix of {other!r}, but {preset!r} is asked for: "
                        "leave one out."
                    )
            text = prefix + text
        return Prepared(text, source=source, target=target, preset=values, prefix=prefix)

    def _detected(self, text: str | None) -> str | None:
        if not self._told_source:
            raise LanguageError("source='detect': this checkpoint is not told the source language. Leave it out.")
        detector = self._detector  # it has to be there, whatever the text
        if text is None or not any(map(str.isalnum, text)):
            return None
        if code := detector(text):
            return code
        raise self.undetected(text)

    def undetected(self, text: str) -> LanguageError:
        """Return the error for a text whose source is needed and was not found."""
        start = text if len(text) <= _SHOWN else text[:_SHOWN] + "…"
        return LanguageError(
            f"source='detect' finds no language in {start!r}. Pass its source, one of: {listed(self.codes)}."
        )

    def _none(self, text: str, source: str | None, target: str | None) -> Prepared:
        if source is not None or target is not None:
            raise LanguageError(
                f"this checkpoint is not told languages, but source={source!r} and target={target!r} were given: it "
                "does one thing only (one pair of languages, or none). Leave them out."
            )
        return Prepared(text)

    def _pair(self, text: str, source: str | None, target: str | None) -> Prepared:
        return Prepared(text, source=self._only(0, source), target=self._only(1, target))

    def _only(self, side: int, word: str | None) -> str | None:
        """Check a language against the only one of its side, which the text is not told."""
        which, only = ("source", "target")[side], self.pair[side]
        if word is None or word == only:
            return only
        if only and (found := Resolver([only]).find(word)):
            return found
        if only and not is_group(only):
            here, there = self.pair
            raise LanguageError(
                f"{which}={word!r} is not what this checkpoint translates, which is {here!r} to {there!r} only."
            )
        return standard(which, word)

    def _codes(self, text: str, source: str | None, target: str | None) -> Prepared:
        source, target = self._code("source", source), self._code("target", target)
        before, after = (_replaced(part, None, self.codes[source]) for part in self.layout)
        told = None if self.codes[target] == self.start else self.codes[target]
        return Prepared(text, before, after, forced_bos_token_id=told, source=source, target=target)

    def _code(self, which: str, language: str | None) -> str:
        detect = f", or {DETECT!r}" if which == "source" and self._told_source else ""
        if language is None:
            raise LanguageError(f"this checkpoint needs {which}=, one of: {listed(self.codes)}{detect}.")
        if code := self._resolver.find(language):
            return code
        raise unknown(which, language, self._resolver, self.codes, detect)

    def _tags(self, text: str, source: str | None, target: str | None) -> Prepared:
        begin, end = self.tag
        given = re.match(rf"\s*{begin}([^<>]+){end}\s*", text)
        if given is not None and target is not None:
            raise LanguageError(
                f"the text begins with {given[0].strip()!r}, and target={target!r} was given too: leave one out."
            )
        code = self._code("target", given[1] if given else target)
        prefix = f"{begin}{code}{end} "
        if self.tag != _MADLAD:
            source = self._only(0, source)
        elif source is not None:
            source = self._code("source", source)
        return Prepared(prefix + text[given.end() if given else 0 :], source=source, target=code, prefix=prefix)

    def _prefixes(self, text: str, source: str | None, target: str | None) -> Prepared:
        if source is None and target is None:
            return Prepared(text)
        codes = self._code("source", source), self._code("target", target)
        name = f"translation_{codes[0]}_to_{codes[1]}"
        if name not in self.presets:
            pairs = listed(sorted(preset for preset in self.presets if _PAIR.fullmatch(preset)))
            raise LanguageError(f"this checkpoint does not translate {codes[0]!r} to {codes[1]!r}. It has: {pairs}.")
        return self._prefix(text, name, *codes, error=LanguageError)


_MADLAD = ("<2", ">")
_SHOWN = 40
_PAIR = re.compile(r"translation_(\w+)_to_(\w+)")
_CODE = re.compile(r"[a-z]{2,3}(_[A-Z]{2}|_[A-Z][a-z]{3})|__[a-z]{3}(_[A-Z][a-z]{3})?__")
"""A token as mBART (`en_XX`), NLLB (`eng_Latn`) or SeamlessM4T (`__cmn_Hant__`) writes it."""
_OPUS = re.compile(r"opus-mt-(?:tc-\w+-)?([a-z]{2,3})-([a-z]{2,3})(?=/|$)")
"""The pair in the name of a Marian checkpoint whose tokenizer does not say it."""


def languages_of(tokenizer: Any, config: Any, generation_config: Any = None) -> Languages:
    """Read from a tokenizer and the configs what the checkpoint speaks; none is changed."""
    named = getattr(config, "task_specific_params", None) or {}
    presets = {name: values for name, values in named.items() if isinstance(values, dict)}
    if codes := _language_tokens(tokenizer):
        spoken = getattr(generation_config, "text_decoder_lang_to_code_id", None)  # SeamlessM4T writes some of them
        codes = {code: codes[code] for code in codes if not spoken or code in spoken}
        start = getattr(generation_config, "decoder_start_token_id", None)
        return Languages("codes", codes, presets, _layout(tokenizer), start=start)
    pair = _only_pair(tokenizer)
    if tags := [tag[2:-2] for tag in getattr(tokenizer, "supported_language_codes", ())]:
        return Languages("tags", dict.fromkeys(tags), presets, pair=(pair[0], None))
    if tags := _madlad_tags(tokenizer):
        return Languages("tags", dict.fromkeys(tags), presets, tag=_MADLAD)
    if pair != (None, None):
        return Languages("pair", dict.fromkeys(code for code in pair if code), presets, pair=pair)
    if pairs := [match.groups() for name in presets if (match := _PAIR.fullmatch(name))]:
        return Languages("prefixes", dict.fromkeys(sorted({code for pair in pairs for code in pair})), presets)
    return Languages("none", {}, presets)


def _only_pair(tokenizer: Any) -> tuple[str | None, str | None]:
    """Return the languages of a tokenizer that has one each, as Marian's and FSMT's say, or a Marian's name does."""
    for here, there in (("source_lang", "target_lang"), ("src_lang", "tgt_lang")):
        if getattr(tokenizer, here, None) or getattr(tokenizer, there, None):
            return getattr(tokenizer, here, None), getattr(tokenizer, there, None)
    name = _OPUS.search(str(getattr(tokenizer, "name_or_path", "")))
    return (name[1], name[2]) if name else (None, None)


def _madlad_tags(tokenizer: Any) -> list[str]:
    """Return MADLAD's languages; their tokens are ordinary pieces of a T5 vocabulary."""
    if tokenizer.convert_tokens_to_ids("<2en>") in {None, tokenizer.unk_token_id}:
        return []
    pieces = sorted(tokenizer.get_vocab().items(), key=lambda piece: piece[1])
    return [tag[1] for piece, _ in pieces if (tag := re.fullmatch(r"<2([a-z]{2,3}(?:_[A-Za-z]+)*)>", piece))]


def _layout(tokenizer: Any) -> Layout:
    """Return the special tokens around a source, None in place of its language's."""
    if type(tokenizer).__name__.startswith("SeamlessM4T"):  # what it has now may be a target's
        return (None,), (tokenizer.eos_token_id,)
    if tokenizer.src_lang is None:  # PLBart without a default: the language's place is empty
        return tuple(tokenizer.prefix_tokens), (*tokenizer.suffix_tokens, None)
    current = tokenizer.convert_tokens_to_ids(_token(tokenizer, tokenizer.src_lang))
    return _replaced(tokenizer.prefix_tokens, current, None), _replaced(tokenizer.suffix_tokens, current, None)


def _replaced(token_ids: Iterable[int | None], old: int | None, new: int | None) -> tuple[Any, ...]:
    return tuple(new if token_id == old else token_id for token_id in token_ids)


def _token(tokenizer: Any, code: str) -> str:
    """Return the token that stands for a language."""
    tokens: Mapping[str, str] = getattr(tokenizer, "lang_code_to_token", {})
    return tokens.get(code, code)


def _language_tokens(tokenizer: Any) -> dict[str, int | None]:
    """Return the languages that have a token of their own, and its id.

    A code that the vocabulary lacks becomes the unknown token without a word, so those are left out.
    """
    if not hasattr(tokenizer, "src_lang"):
        return {}
    named = list(getattr(tokenizer, "lang_code_to_token", {}) or getattr(tokenizer, "lang_code_to_id", {}))
    special = [str(token) for token in tokenizer.all_special_tokens if _CODE.fullmatch(str(token))]
    ids = {code: tokenizer.convert_tokens_to_ids(_token(tokenizer, code)) for code in named or special}
    return {code.strip("_"): token_id for code, token_id in ids.items() if token_id != tokenizer.unk_token_id}
