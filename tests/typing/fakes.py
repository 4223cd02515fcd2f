"""Fakes and `from_dict` as a user's tests see them: checked by mypy and basedpyright, never run."""

from collections.abc import Mapping
from typing import Any, assert_type

import lmkit
from lmkit.testing import Call, FakeGenerator, FakeTranslator, FakeUnmasker


def answer(prompt: str, options: Mapping[str, Any]) -> str:
    return f"{prompt} {options}"


def fill(text: str, options: Mapping[str, Any]) -> list[list[str]]:
    return [[text], [str(options)]]


def tested(generator: lmkit.Generator, translator: lmkit.Translator, unmasker: lmkit.Unmasker) -> None:
    assert_type(generator("a"), lmkit.Generation)
    assert_type(translator("a"), lmkit.Translation)
    assert_type(unmasker("[MASK]"), lmkit.Unmasking)


fake = FakeGenerator({"a": "b", "c": ["d", "e"], "f": RuntimeError("g")})
tested(fake, FakeTranslator({"a": "b"}, languages=["en", "de"], presets=["x"]), FakeUnmasker({"[MASK]": ["a", "b"]}))
tested(FakeGenerator(answer), FakeTranslator(answer), FakeUnmasker(fill))
assert_type(fake("a", max_new_tokens=2), lmkit.Generation)
assert_type(fake(["a", "b"]), list[lmkit.Generation])
assert_type(fake.calls, list[Call])
assert_type(fake.calls[0].options, dict[str, Any])
assert_type(lmkit.Translation.from_dict({}), lmkit.Translation)
assert_type(lmkit.EngineStats.from_dict(fake.stats.to_dict()), lmkit.EngineStats)


def refused() -> None:
    FakeGenerator({"a": 1})  # type: ignore[dict-item]  # pyright: ignore[reportArgumentType]
    fake("a", max_new_token=5)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
