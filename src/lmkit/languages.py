"""What each translation family calls a language, and how source and target reach its model."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from lmkit.errors import LanguageError, OptionError, listed, nearest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["Languages", "Prepared", "languages_of"]

Scheme: TypeAlias = Literal["codes", "tags", "prefixes", "none"]
"""How a family is told: a code token around the source and as the first target token (M2M100, NLLB, mBART), a
tag in the text (multilingual Marian), a prefix in words (T5), or not at all (BART, Pegasus, Marian pairs)."""


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
    """

    text: str
    before: tuple[int, ...] | None = None
    after: tuple[int, ...] = ()
    forced_bos_token_id: int | None = None
    source: str | None = None
    target: str | None = None
    preset: Mapping[str, Any] = field(default_factory=dict)
    prefix: str = ""


@dataclass(frozen=True, slots=True)
class Languages:
    """What a checkpoint speaks and how it is told.

    Attributes:
        scheme: How the family is told.
        codes: The languages, as the checkpoint writes them, and their token ids where they have one.
        presets: What its config names under `task_specific_params`.
        layout: The special tokens around a source, `None` in place of the language's.
    """

    scheme: Scheme
    codes: Mapping[str, int | None]
    presets: Mapping[str, Mapping[str, Any]]
    layout: tuple[tuple[int | None, ...], tuple[int | None, ...]] = ((), ())

    def prepare(self, text: str, source: str | None, target: str | None, preset: str | None) -> Prepared:
        """Write a text as the family wants it.

        Raises:
            LanguageError: A language is missing, or not one the checkpoint speaks; the choices are listed.
            OptionError: The preset is unknown, or given together with languages.
        """
        if preset is not None:
            return self._preset(text, preset, [name for name in (source, target) if name is not None])
        if self.scheme == "codes":
            return self._codes(text, source, target)
        if self.scheme == "tags":
            return self._tagged(text, source, target)
        if self.scheme == "prefixes":
            return self._prefixed(text, source, target)
        if source is not None or target is not None:
            msg = (
                f"this checkpoint is not told languages, but source={source!r} and target={target!r} were given: it "
                "does one thing only (one pair of languages, or none). Leave them out."
            )
            raise LanguageError(msg)
        return Prepared(text)

    def _preset(self, text: str, preset: str, languages: Sequence[str]) -> Prepared:
        if preset not in self.presets:
            known = listed(sorted(self.presets)) or "none"
            msg = f"unknown preset {preset!r}.{nearest(preset, self.presets)} This checkpoint has: {known}."
            raise OptionError(msg)
        if languages:
            msg = f"preset={preset!r} and the language {languages[0]!r} contradict each other: pass one of them."
            raise OptionError(msg)
        values = dict(self.presets[preset])
        pair = _PAIR.fullmatch(preset)
        source, target = pair.groups() if pair else (None, None)
        prefix = str(values.pop("prefix", None) or "")
        return Prepared(prefix + text, source=source, target=target, preset=values, prefix=prefix)

    def _codes(self, text: str, source: str | None, target: str | None) -> Prepared:
        source, target = self._code("source", source), self._code("target", target)
        language = self.codes[source]
        before, after = (tuple(language if token_id is None else token_id for token_id in part) for part in self.layout)
        return Prepared(
            text,
            before=before,  # type: ignore[arg-type]
            after=after,  # type: ignore[arg-type]
            forced_bos_token_id=self.codes[target],
            source=source,
            target=target,
        )

    def _code(self, which: str, language: str | None) -> str:
        if language is None:
            msg = f"this checkpoint needs {which}=, one of: {listed(self.codes)}."
            raise LanguageError(msg)
        if language not in self.codes:
            near = nearest(language.partition("_")[0], self.codes) or nearest(language, self.codes)
            msg = f"{which}={language!r} is not a language of this checkpoint.{near} It speaks: {listed(self.codes)}."
            raise LanguageError(msg)
        return language

    def _tagged(self, text: str, source: str | None, target: str | None) -> Prepared:
        given = re.match(r"\s*>>([^<>]+)<<\s*", text)
        if target is None and given is not None:
            return Prepared(text, source=source, target=self._code("target", given[1]), prefix=given[0])
        code = self._code("target", target)
        if given is not None:
            msg = f"the text begins with {given[0].strip()!r}, and target={target!r} was given too: leave one out."
            raise LanguageError(msg)
        return Prepared(f">>{code}<< {text}", source=source, target=code, prefix=f">>{code}<< ")

    def _prefixed(self, text: str, source: str | None, target: str | None) -> Prepared:
        if source is None and target is None:
            return Prepared(text)
        codes = self._code("source", source), self._code("target", target)
        name = f"translation_{codes[0]}_to_{codes[1]}"
        if name not in self.presets:
            pairs = listed(sorted(preset for preset in self.presets if _PAIR.fullmatch(preset)))
            msg = f"this checkpoint does not translate {codes[0]!r} to {codes[1]!r}. It has: {pairs}."
            raise LanguageError(msg)
        values = dict(self.presets[name])
        prefix = str(values.pop("prefix", None) or "")
        return Prepared(prefix + text, source=codes[0], target=codes[1], preset=values, prefix=prefix)


_PAIR = re.compile(r"translation_(\w+)_to_(\w+)")
_CODE = re.compile(r"[a-z]{2,3}(_[A-Z]{2}|_[A-Z][a-z]{3})")
"""A code as mBART (`en_XX`) or NLLB (`eng_Latn`) writes it."""


def languages_of(tokenizer: Any, config: Any) -> Languages:
    """Read from a tokenizer and a config what the checkpoint speaks; neither is changed."""
    named = getattr(config, "task_specific_params", None) or {}
    presets = {name: values for name, values in named.items() if isinstance(values, dict)}
    if codes := _language_tokens(tokenizer):
        current = tokenizer.convert_tokens_to_ids(_token(tokenizer, tokenizer.src_lang))
        layout = tuple(
            tuple(None if token_id == current else token_id for token_id in part)
            for part in (tokenizer.prefix_tokens, tokenizer.suffix_tokens)
        )
        return Languages("codes", codes, presets, layout)  # type: ignore[arg-type]
    tags = [tag[2:-2] for tag in getattr(tokenizer, "supported_language_codes", ())]
    if tags:
        return Languages("tags", dict.fromkeys(tags), presets)
    pairs = [match.groups() for name in presets if (match := _PAIR.fullmatch(name))]
    if pairs:
        return Languages("prefixes", dict.fromkeys(sorted({code for pair in pairs for code in pair})), presets)
    return Languages("none", {}, presets)


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
    return {code: token_id for code, token_id in ids.items() if token_id != tokenizer.unk_token_id}
