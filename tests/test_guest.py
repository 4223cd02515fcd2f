"""A library is a guest: what its caller has is the same after import, load and every verb."""

import asyncio
import copy
import json
import logging
import os
import random
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import utils as hub
from transformers.utils import logging as transformers_logging

import checkpoints
import lmkit

LOGGERS = ("", "lmkit", "transformers", "accelerate", "bitsandbytes", "huggingface_hub", "peft", "torch", "py.warnings")
NAMES = ["qwen3", "llama", "m2m100", "t5", "marian", "bert", "xlm"]
"""Fast tokenizers and slow ones, with and without sentencepiece, of all three tasks."""


def surroundings() -> dict[str, Any]:
    """Return what a process has that a library could change."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    return {
        "environment": dict(os.environ),
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "torch threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "loggers": [(x.name, x.level, list(x.handlers), x.propagate, x.disabled, list(x.filters)) for x in loggers],
        "disabled": logging.root.manager.disable,
        "bars": (transformers_logging.is_progress_bar_enabled(), hub.are_progress_bars_disabled()),
        "filters": list(warnings.filters),
        "showwarning": warnings.showwarning,
        "torch random": torch.get_rng_state().tolist(),
        "random": random.getstate(),
        "numpy random": [str(part) for part in np.random.get_state()],  # noqa: NPY002 - the global one
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul": torch.get_float32_matmul_precision(),
        "folder": os.getcwd(),  # noqa: PTH109 - as a text
        "path": list(sys.path),
        "hooks": (sys.excepthook, sys.displayhook, threading.excepthook),
        "streams": (sys.stdout, sys.stderr, sys.stdin),
    }


def belongings(wrapper: Any) -> dict[str, Any]:
    """Return what the caller may hold of a wrapper: its model's and tokenizer's settings."""
    model, tokenizer = wrapper.model, wrapper.tokenizer
    modules = list(model.modules())
    return {
        "config": model.config.to_dict(),
        "generation config": model.generation_config.to_dict() if model.can_generate() else None,
        "training": [module.training for module in modules],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in modules],
        "attributes": sorted(vars(model)),
        "forward": "forward" in vars(model),
        "weights": {name: tensor.sum().item() for name, tensor in model.state_dict().items()},
        "gradients": [p.grad is None and p.requires_grad for p in model.parameters()],
        "tokenizer": tokenizer_state(tokenizer),
    }


def tokenizer_state(tokenizer: Any) -> Any:
    """Return all settings of a tokenizer."""
    names = ("padding_side", "truncation_side", "model_max_length", "chat_template", "src_lang", "tgt_lang")
    backend = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else None
    kept = {name: getattr(tokenizer, name, None) for name in names}
    tokens = (copy.deepcopy(tokenizer.special_tokens_map), len(tokenizer), str(tokenizer.init_kwargs))
    lists = (getattr(tokenizer, "prefix_tokens", None), getattr(tokenizer, "suffix_tokens", None))
    return kept, tokens, copy.deepcopy(lists), backend


def differences(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Return what is not equal, for a message that can be read."""
    return {name: (before[name], after[name]) for name in before if before[name] != after[name]}


def settle() -> None:
    """Give the threads in which transformers reads weights, told to end already, two seconds to do so."""
    deadline = time.monotonic() + 2
    while any("ThreadPool" in thread.name for thread in threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.005)


async def _all_of(chunks: Any) -> list[Any]:
    return [chunk async for chunk in chunks]


Verb = Callable[[Any, list[str], dict[str, Any]], Any]
VERBS: dict[str, Verb] = {
    "call": lambda w, texts, options: w(texts[0], **options),
    "list": lambda w, texts, options: w(texts, **options),
    "map": lambda w, texts, options: list(w.map(iter(texts), **options)),
    "stream": lambda w, texts, options: list(w.stream(texts, **options)),
    "broken off": lambda w, texts, options: next(iter(w.stream(texts, **options))),
    "acall": lambda w, texts, options: asyncio.run(w.acall(texts, **options)),
    "astream": lambda w, texts, options: asyncio.run(_all_of(w.astream(texts, **options))),
}
WRITING: dict[str, Verb] = {
    "sample": lambda w, texts, options: w(texts, temperature=0.8, seed=3, **options),
    "sample without seed": lambda w, texts, options: w(texts, temperature=0.8, num_return_sequences=2, **options),
    "beams": lambda w, texts, options: w(texts, num_beams=3, num_return_sequences=2, **options),
    "stop": lambda w, texts, options: w(texts, stop=["e", "a"], logprobs=2, **options),
    "penalties": lambda w, texts, options: w(texts, repetition_penalty=1.3, no_repeat_ngram_size=2, **options),
}
CHAT = [{"role": "user", "content": "She <|im_end|> asks"}]
OWN: dict[str, dict[str, Verb]] = {
    "qwen3": {"chat": lambda w, _texts, options: w.chat(CHAT, **options)},
    "t5": {"preset": lambda w, texts, options: w(texts, preset="summarization", **options)},
    "bert": {
        "targets": lambda w, texts, _options: w(texts, targets=["the", "a"], top_k=1),
        "two masks": lambda w, texts, _options: w(texts[0] + " [MASK]"),
    },
}
CASES = [
    (name, verb)
    for name in NAMES
    for verb in (*VERBS, *(WRITING if checkpoints.FAMILIES[name].task != "masked" else ()), *OWN.get(name, ()))
]


@pytest.mark.parametrize("name, verb", CASES)
def test_a_verb_changes_nothing(
    name: str, verb: str, network: list[str], capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Every verb leaves the process, the model, the tokenizer and the options as they were, and is silent."""
    wrapper = checkpoints.wrapper(name)
    settle()
    options: dict[str, Any] = dict(checkpoints.languages(name))
    if checkpoints.FAMILIES[name].task != "masked":
        options["max_new_tokens"] = 5
    texts = checkpoints.texts(name)[:3]
    given = copy.deepcopy((texts, options))
    capfd.readouterr()
    caplog.clear()  # what loading said, if the wrapper was loaded just now and an earlier test has lowered a level
    process, own = surroundings(), belongings(wrapper)
    run = (VERBS | WRITING | OWN.get(name, {}))[verb]
    with caplog.at_level(logging.WARNING):
        run(wrapper, texts, options)
        after = surroundings()
    assert differences({**process, "loggers": 0}, {**after, "loggers": 0}) == {}
    assert differences(own, belongings(wrapper)) == {}
    assert (texts, options) == given
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []
    assert network == []


@pytest.mark.parametrize("name", checkpoints.FAMILIES)
def test_loading_changes_nothing(name: str, network: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    """Loading and closing leave the process as it was, print nothing and ask no network."""
    checkpoints.wrapper(name)  # so that nothing is imported for the first time below
    settle()
    capfd.readouterr()
    before = surroundings()
    checkpoints.fresh(name).close()
    settle()
    assert differences(before, surroundings()) == {}
    assert capfd.readouterr() == ("", "")
    assert network == []


@pytest.mark.parametrize("name", ["llama", "m2m100", "bert"])
def test_calls_leave_the_loggers(name: str) -> None:
    """After a call every logger has the level and handlers that its user gave it."""
    wrapper = checkpoints.wrapper(name)
    before = surroundings()["loggers"]
    wrapper(checkpoints.texts(name)[0], **checkpoints.languages(name))
    assert surroundings()["loggers"] == before


@pytest.mark.parametrize("name", ["llama", "m2m100", "bert"])
def test_an_error_changes_nothing_either(name: str) -> None:
    """A call that is refused leaves the process and the caller's objects as they were."""
    wrapper = checkpoints.wrapper(name)
    settle()
    process, own = surroundings(), belongings(wrapper)
    with pytest.raises(lmkit.OptionError):
        wrapper(checkpoints.texts(name)[0], no_such_option=1)
    with pytest.raises(lmkit.LmkitError):
        lmkit.load("causal", "no/such/name")
    assert differences(process, surroundings()) == {}
    assert differences(own, belongings(wrapper)) == {}


def test_the_callers_dicts_are_not_changed() -> None:
    """Messages, lists of options, budgets and a generation mode are equal before and after."""
    wrapper = checkpoints.wrapper("qwen3")
    chats = [[{"role": "user", "content": "She"}], [{"role": "user", "content": "The old sailor"}]]
    options: dict[str, Any] = {"stop": [["a"], ["e", "i"]], "seed": [1, 2], "temperature": [0.5, 0.7]}
    given = copy.deepcopy((chats, options))
    wrapper.chat(chats, max_new_tokens=4, **options)
    assert (chats, options) == given


def test_loading_in_inference_mode_or_without_gradients_is_the_callers_choice() -> None:
    """A call inside `torch.no_grad` or another default dtype leaves those, and writes the same tokens."""
    wrapper = checkpoints.wrapper("llama")
    expected = wrapper("She", max_new_tokens=5).token_ids
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad():
            assert wrapper("She", max_new_tokens=5).token_ids == expected
            assert not torch.is_grad_enabled()
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(default)


FRESH = """
import json, logging, os, sys, threading, warnings

def state():
    return {
        "environment": dict(os.environ),
        "threads": threading.active_count(),
        "root": [str(h) for h in logging.root.handlers] + [logging.root.level],
        "filters": [str(f) for f in warnings.filters],
        "path": list(sys.path),
    }

before = state()
import lmkit
imported = state()
import torch
threads = torch.get_num_threads()
torch_state = state()
with lmkit.load("causal", sys.argv[1]) as generator:
    generator(["She", "The"], max_new_tokens=3)
    generator("She", temperature=1.0, seed=1, max_new_tokens=3)
    generator("She", num_beams=2, max_new_tokens=3)
with lmkit.load("seq2seq", sys.argv[2]) as translator:
    translator("She", source="en", target="fr", max_new_tokens=3)
with lmkit.load("masked", sys.argv[3]) as unmasker:
    unmasker("She [MASK].")
used = state()
different = {k: [before[k], imported[k]] for k in before if before[k] != imported[k]}
different |= {k + " used": [torch_state[k], used[k]] for k in used if torch_state[k] != used[k]}
if torch.get_num_threads() != threads:
    different["torch threads"] = [threads, torch.get_num_threads()]
if logging.getLogger("lmkit").handlers or logging.getLogger("lmkit").level:
    different["lmkit logger"] = True
print(json.dumps(different))
"""


@pytest.mark.slow
def test_a_fresh_process_is_left_as_it_was() -> None:
    """In a new interpreter, where warnings are errors, import, load and calls change and print nothing."""
    folders = [str(checkpoints.folder(name)) for name in ("llama", "m2m100", "bert")]
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", FRESH, *folders], capture_output=True, text=True, check=False
    )
    assert ran.stderr == ""
    assert json.loads(ran.stdout) == {}
