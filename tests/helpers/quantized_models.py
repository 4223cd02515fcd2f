"""Tiny checkpoints that can be quantized, loaded in few bits, and what they hold, counted by hand."""

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
import transformers

import checkpoints
import families
import lmkit
from lmkit.kernels.quantized import QuantizedLinear
from lmkit.kernels.tied import Int8Embedding, TiedHead

hf: Any = transformers
load: Any = lmkit.load  # What these tests pass is often not what is accepted.


@cache
def quantized(name: str, word: str) -> Any:
    """Return a family's wrapper in 8 or 4 bits; nobody closes or changes it."""
    return load(checkpoints.FAMILIES[name].task, checkpoints.folder(name), word, "cpu")


def layers(model: Any) -> dict[str, Any]:
    """Return the modules of a model that hold integers, heads without a weight of their own left out."""
    kinds = (QuantizedLinear, Int8Embedding)
    return {n: m for n, m in model.named_modules() if isinstance(m, kinds) and not isinstance(m, TiedHead)}


@cache
def wide(name: str = "llama", odd: int = 0) -> Path:
    """Save a family's checkpoint with widths that bitsandbytes can multiply, or with an odd one among them."""
    family = checkpoints.FAMILIES[name]
    widths = {
        "llama": {"hidden_size": 128, "head_dim": 32, "intermediate_size": 256 + odd},
        "t5": {"d_model": 128, "d_kv": 32, "d_ff": 256 + odd},
        "bert": {"hidden_size": 128, "intermediate_size": 256 + odd},
        "gpt2": {"n_embd": 128},
    }[name]

    def build(folder: Path) -> families.Checkpoint:
        model, tokenizer = family.build(folder)
        for field, width in widths.items():
            setattr(model.config, field, width)
        return type(model)(model.config), tokenizer

    return families.save(dataclasses.replace(family, build=build), checkpoints.ROOT / f"wide-{name}-{odd}")


def by_hand(model: Any) -> int:
    """Count the bytes of what a model holds: weights, buffers, and what bitsandbytes keeps beside a weight."""
    found: dict[int, int] = {}

    def add(tensor: Any) -> None:
        if isinstance(tensor, torch.Tensor):
            if tensor.is_mkldnn:
                found[id(tensor)] = tensor.numel() * tensor.element_size()
            elif tensor.numel():
                found[tensor.data_ptr()] = tensor.nbytes  # tied weights, and a weight that a state names too, are one

    for module in model.modules():
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            add(tensor)
            state = getattr(tensor, "quant_state", None)
            while state is not None:
                for part in (state.absmax, state.code, state.offset):
                    add(part)
                state = getattr(state, "state2", None)
            add(getattr(tensor, "SCB", None))
        if isinstance(module, bitsandbytes.nn.Linear8bitLt):
            add(module.state.CB)
            add(module.state.SCB)
    return sum(found.values())


@cache
def checkpoint(name: str, dtype: str = "bfloat16", odd: int = 0) -> Path:
    """Save a family's checkpoint in a dtype, its widths 128 and 256, or 256 and some."""
    folder = checkpoints.ROOT / f"{name}-{dtype}-{odd}"
    task = checkpoints.FAMILIES[name].task
    auto = getattr(hf, checkpoints._AUTO[task])
    auto.from_pretrained(wide(name, odd), dtype=getattr(torch, dtype)).save_pretrained(folder)
    hf.AutoTokenizer.from_pretrained(wide(name, odd)).save_pretrained(folder)
    return folder
