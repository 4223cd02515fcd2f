"""What the files of a checkpoint name as code, and whether it may be fetched and run: the one place that decides."""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final

from lmkit.errors import WeightsError, listed

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from transformers import PreTrainedConfig

logger = logging.getLogger("lmkit")

_OWN: Final = frozenset(["batched_mm", "eager", "flex_attention", "grouped_mm", "sdpa"])
"""Implementations of attention and experts that are in transformers; others are repositories, or stand for some."""
_FETCHING: Final = frozenset("eetq fbgemm_fp8 fp8 metal mxfp4 nvfp4".split())
"""Ways of quantizing for which transformers fetches native code, where the package `kernels` is installed."""
_FETCHING_MODELS: Final = frozenset(["mra", "rwkv", "yoso"])
"""Model types for which it does so on a GPU."""
_OF_ADAPTERS: Final = ("megatron_config", "shadow_model", "adapters")
"""Keys of an adapter's config for which peft imports a module, or fetches other models."""


def check_code(name: str, content: Mapping[str, Any], *, trusted: bool, attention: str | None = None) -> None:
    """Refuse a config that names native code; say which, where it is trusted.

    Args:
        name: The checkpoint's.
        content: Its config.json.
        trusted: Whether the caller trusts code that comes with it, or that it names.
        attention: What the caller asks for in the place of the attention that it names.

    Raises:
        WeightsError: It names code, and `trusted` is False.
    """
    _check(name, [*_implementations(content, attention), *_fetched(content)], trusted=trusted)


def check_adapter_code(name: str, content: Mapping[str, Any], *, trusted: bool) -> None:
    """Refuse an adapter's config that names modules or other models.

    Raises:
        WeightsError: It does, and `trusted` is False.
    """
    _check(name, [_shown(key, content[key]) for key in _OF_ADAPTERS if content.get(key)], trusted=trusted)


def _check(name: str, found: list[str], *, trusted: bool) -> None:
    if found and not trusted:
        raise WeightsError(
            f"the config of {name!r} names code that would be fetched and run ({listed(found)}), which could do "
            "anything on this machine: pass trust_remote_code=True if you trust it. Of an attention, "
            "attn_implementation='sdpa' does without."
        )
    if found:
        logger.warning("%s: code that its config names may be fetched and run, as it is trusted: %s", name, found)


def _shown(key: str, value: Any) -> str:
    return f"{key}: {json.dumps(value)[:80]}"


def _implementations(content: Any, attention: str | None) -> Iterator[str]:
    """Find what a config, or one inside it, names as the implementation of a part."""
    if isinstance(content, list):
        for one in content:
            yield from _implementations(one, attention)
    for key, value in content.items() if isinstance(content, dict) else ():
        if "_implementation" in key and not (attention is not None and "attn" in key):
            words = value.values() if isinstance(value, dict) else [value]
            yield from (_shown(key, value) for word in words if not _here(word))
        else:
            yield from _implementations(value, attention)


def _here(word: Any) -> bool:
    """Say whether a word stands for what is installed."""
    if not isinstance(word, str):
        return word is None
    plain = word.removeprefix("paged|")
    if "/" in plain or find_spec("kernels") is not None:
        return plain in _OWN or _is_installed(plain)
    return True  # transformers says what it does not know, or which package is not installed


def _is_installed(word: str) -> bool:
    """Say whether a word stands for one of the flash attentions, and its own package is installed."""
    from transformers import utils

    return bool(getattr(utils, f"is_flash_attn_{word.removeprefix('flash_attention_')}_available", bool)())


def _fetched(content: Mapping[str, Any]) -> Iterator[str]:
    """Find what transformers fetches code for by itself."""
    if find_spec("kernels") is None:
        return
    import torch

    quantized, kind = content.get("quantization_config"), content.get("model_type")
    if isinstance(quantized, dict) and (method := quantized.get("quant_method")) in _FETCHING:
        yield _shown("quant_method", method)
    if kind in _FETCHING_MODELS and torch.cuda.is_available():
        yield _shown("model_type", kind)


def import_without_kernels(module: str, *, trusted: bool) -> None:
    """Import a module that fetches native code while it is imported, without that; it has other code for it.

    What cannot be imported is left to whoever needs it. Loads and plans, which call this, run one at a time.
    """
    if module in sys.modules:
        return
    asking = logging.getLogger("bitsandbytes.backends.cpu.ops")
    asking.addFilter(_no_kernels)  # it tells whoever has not installed `kernels`, for nothing
    try:
        with contextlib.nullcontext() if trusted else _hidden("kernels"), contextlib.suppress(Exception):
            importlib.import_module(module)
    finally:
        asking.removeFilter(_no_kernels)


def import_modeling(config: PreTrainedConfig, *, trusted: bool) -> None:
    """Import transformers' code for a model and its parts without what that fetches: Falcon's, GPT-J's and others'."""
    import transformers.modeling_utils  # noqa: F401 - it looks for kernels itself, and fetches none

    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        module = type(part).__module__
        if module.startswith("transformers.models."):
            import_without_kernels(module.replace(".configuration_", ".modeling_"), trusted=trusted)


def _no_kernels(record: logging.LogRecord) -> bool:
    return "from kernels-community" not in record.getMessage()


@contextlib.contextmanager
def _hidden(package: str) -> Iterator[None]:
    """Have a package not be found."""
    modules: dict[str, Any] = sys.modules  # None in it is what Python does not import
    held = {package: modules[package]} if package in modules else {}
    modules[package] = None
    try:
        yield
    finally:
        del modules[package]
        modules.update(held)
