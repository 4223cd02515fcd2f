"""Completion, help and notebooks see every option of every verb."""

import inspect
import pydoc
import typing
from typing import Any

import jedi
import pytest

import checkpoints
import lmkit
from lmkit.loading import LoadOptions
from lmkit.options.generation import GeneratorOptions
from lmkit.options.option import declared
from lmkit.options.tasks import PairOptions, TranslationOptions, UnmaskOptions

VERBS = ("__call__", "map", "stream", "acall", "astream")
OPTIONS: list[tuple[Any, Any]] = [
    *((getattr(lmkit.Generator, verb), GeneratorOptions) for verb in (*VERBS, "chat")),
    *((getattr(lmkit.Translator, verb), TranslationOptions) for verb in VERBS),
    *((getattr(lmkit.Unmasker, verb), UnmaskOptions) for verb in VERBS),
    *((getattr(lmkit.Translator, verb), PairOptions) for verb in ("score", "ascore", "rank", "arank")),
    (lmkit.load, LoadOptions),
    (lmkit.plan, LoadOptions),
]


@pytest.mark.parametrize("verb, options", OPTIONS, ids=lambda one: getattr(one, "__qualname__", ""))
def test_a_verb_tells_all_its_options(verb: Any, options: Any) -> None:
    """Each option is a keyword of the signature, with a type, and is explained by `help`; `**options` is not left."""
    found = inspect.signature(verb).parameters
    missing = [name for name in options.__annotations__ if name not in found]
    assert missing == []
    assert all(one.kind is not one.VAR_KEYWORD for one in found.values())
    assert all(found[name].annotation not in ("", inspect.Parameter.empty) for name in options.__annotations__)
    told = pydoc.render_doc(verb, renderer=pydoc.plaintext)
    assert all(f"\n        {name}: " in told for name in options.__annotations__), told


def test_help_says_what_an_option_takes() -> None:
    """The words are those of the one declaration, which errors and the pages use too."""
    told = " ".join(str(lmkit.Generator.__call__.__doc__).split())
    option = declared(GeneratorOptions)["temperature"]
    assert f"temperature: {option.meaning}. Takes {option.accepts}. Default: {option.default}." in told


@pytest.mark.parametrize("text", ["generator(temp", "generator.chat(chat, temp", "lmkit.load('causal', 'a', prefix"])
def test_jedi_completes_options(text: str) -> None:
    """As notebooks ask it: with the objects that are there."""
    namespace = {"generator": checkpoints.wrapper("llama"), "lmkit": lmkit, "chat": []}
    found = [one.name for one in jedi.Interpreter(text, [namespace]).complete()]
    assert found[0] in ("temperature=", "prefix_cache_bytes=")


def test_type_checkers_see_what_is_written() -> None:
    """Nothing but what is read at run time changes."""
    assert typing.get_overloads(lmkit.Generator.__call__)
    assert lmkit.Generator.__call__.__annotations__["options"] == "Unpack[GeneratorOptions]"
