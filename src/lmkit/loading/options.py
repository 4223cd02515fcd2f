"""What `load` and `plan` take by keyword, and what they say of what they do not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias, TypedDict

from lmkit.errors import OptionError, UnknownOptionError, listed, nearest, shown

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    import torch
    from transformers.utils.quantization_config import QuantizationConfigMixin

    from lmkit.planning.adapters import AdapterArgument
    from lmkit.planning.precision import PrecisionWord


class LoadOptions(TypedDict, total=False):
    """The keyword options of `load`.

    Attributes:
        revision: A branch, tag or commit of a Hub repository; the default branch if left out.
        token: A Hub token, for private and gated models; True or None uses the one saved by `hf auth login`.
        cache_dir: Where files from the Hub are kept; the Hub library's own cache if left out.
        local_files_only: Make no network call; what is not here is a `ModelNotFoundError`.
        adapter: A LoRA or other PEFT adapter to put on the model: a folder or a Hub id; or a dict of several by name,
            all of them active.
        reserve_tokens: For how many tokens of one row keys and values must fit beside the weights; 0 if left out. What
            does not fit is a `PlacementError` of `load`, and `fits=False` in a plan.
        attn_implementation: Which attention transformers computes with, in its own words, such as `"sdpa"` or
            `"flash_attention_2"`; if left out, lmkit's own on a CPU, and elsewhere what the config asks for.
        language: Which language the model works in, of a checkpoint that has weights for each: XLM with language
            embeddings, X-MOD. What an `OptionError` names where it is missing. Not for a `Translator`, whose calls take
            `source=` and `target=`.
        trust_remote_code: Run the Python code that comes with the checkpoint. It can do anything.
        context_length: How many tokens the model takes at once, where that is not what its config says, scaled rotary
            positions counted as vLLM does (`LoadPlan.reasons["context"]`).
        compile: True compiles the decode step of a `Generator` or a `Translator` or the pass of an `Unmasker`, for any
            number of rows, and lmkit's own kernels, which attend and multiply what is `"int8"` or `"int4"` on an x86
            processor, with AMX `"bfloat16"` too, if a C++ compiler is here; `"kernels"` compiles these alone. The first
            load of a model takes half a minute longer for its step, the first one on a machine some seconds for the
            kernels, later ones a few seconds: the code is kept in the cache folder of lmkit. With True an `OptionError`
            for families that have no such step.
        prefix_cache_bytes: How many bytes of keys and values of recent prompts and answers a `Generator` may keep, so
            that a prompt which begins like one of them reads only the rest; 0 keeps none. 256 MiB if left out. Families
            whose keys and values cannot be kept keep none, as `LoadPlan.prefix_cache_bytes` says.
        allow_pickle: Read pickled weights where there are no safetensors. Unpickling can run any code.
        replicas: Load the model once per device, each in a process of its own, such as `["cuda:0", "cuda:1"]`, or on a
            CPU a number of times; rows go where there is room. A script has to do that under
            `if __name__ == "__main__":`.
    """

    revision: str | None
    token: str | bool | None
    cache_dir: str | os.PathLike[str] | None
    local_files_only: bool
    adapter: AdapterArgument
    reserve_tokens: int
    context_length: int | None
    compile: bool | Literal["kernels"]
    prefix_cache_bytes: int
    attn_implementation: str | None
    language: str | None
    trust_remote_code: bool
    allow_pickle: bool
    replicas: int | Sequence[str | int | torch.device] | None


PrecisionArgument: TypeAlias = "PrecisionWord | QuantizationConfigMixin"


_MOVED = {
    "load_in_8bit": 'load(task, name, "int8")',
    "load_in_4bit": 'load(task, name, "int4")',
    "torch_dtype": 'load(task, name, "bfloat16")',
    "dtype": 'load(task, name, "bfloat16")',
    "quantization_config": "load(task, name, quantization_config)",
    "max_memory": 'load(task, name, "auto", {"cuda:0": "20GiB", "cpu": "48GiB"})',
    "device_map": 'load(task, name, "auto", devices)',
    "device": 'load(task, name, "auto", "cuda:0")',
    "tokenizer": "tokenizer.save_pretrained(folder) beside the model's files, and load that folder",
}
"""Keywords of from_pretrained and pipeline, and what to write here."""


def check_options(options: Mapping[str, object]) -> None:
    """Refuse what is unknown, and values that are not accepted, as far as no checkpoint has to be asked."""
    known = LoadOptions.__annotations__
    for name in options:
        if name in _MOVED:
            raise UnknownOptionError(f"load() takes no {name}=: write {_MOVED[name]}.")
        if name not in known:
            raise UnknownOptionError(f"load() takes no {name}=.{nearest(name, known)} Accepted: {listed(known)}.")
    compiled = options.get("compile", False)
    if compiled != "kernels" and not isinstance(compiled, bool):
        raise OptionError(f"compile={shown(compiled)} is not accepted: pass True, False or 'kernels'.")
    asked = options.get("attn_implementation")
    if asked is not None and not isinstance(asked, str):
        raise OptionError(f"attn_implementation={shown(asked)} is not accepted: pass a word, as 'sdpa' or 'eager'.")
    for option, (unit, least) in _WHOLE.items():
        number = options.get(option)
        given = option in options and (number is not None or option != "context_length")
        if given and (not isinstance(number, int) or isinstance(number, bool) or number < least):
            told = shown(number)
            raise OptionError(f"{option}={told} is not accepted: pass a whole number of {unit}, {least} or more.")


_WHOLE = {"reserve_tokens": ("tokens", 0), "context_length": ("tokens", 1), "prefix_cache_bytes": ("bytes", 0)}
"""Options that are whole numbers, of what, and the least."""
