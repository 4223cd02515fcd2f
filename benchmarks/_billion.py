"""A Llama of a billion random parameters, as safetensors in bfloat16 and as a GGUF file in 4 bits."""

from __future__ import annotations

import shutil
import statistics
import time
from typing import TYPE_CHECKING, Any

from _harness import say

if TYPE_CHECKING:
    from pathlib import Path

SIZES: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 49152,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
"""The shape of Llama 3.2 1B, with the vocabulary of SmolLM2."""


def checkpoint(folder: Path, tokenizer: Path) -> Path:
    """Save the model in bfloat16 with SmolLM2's tokenizer, and return where; once per folder."""
    saved = folder / "llama-1b-random-bfloat16"
    if (saved / "tokenizer_config.json").is_file():
        return saved
    import torch
    import transformers

    hf: Any = transformers
    say("  making a model of a billion parameters")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = hf.AutoModelForCausalLM.from_config(hf.LlamaConfig(**SIZES), dtype=torch.bfloat16)
    model.save_pretrained(saved)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (tokenizer / name).is_file():
            shutil.copy(tokenizer / name, saved / name)
    return saved


def gguf_file(folder: Path, vocabulary: Path) -> Path:
    """Write random weights of the same shape as GGUF, and return where; once per folder.

    Linear layers are Q4_0, which llama.cpp multiplies fastest; the embedding, which is the output layer too, is Q8_0,
    as lmkit's is int8. The vocabulary is that of another GGUF file.
    """
    path = folder / "llama-1b-random.Q4_0.gguf"
    if path.is_file():
        return path
    import gguf

    say("  writing its GGUF file")
    package: Any = gguf
    unfinished = path.with_suffix(".unfinished")
    writer = package.GGUFWriter(str(unfinished), "llama")
    writer.add_context_length(SIZES["max_position_embeddings"])
    writer.add_embedding_length(SIZES["hidden_size"])
    writer.add_block_count(SIZES["num_hidden_layers"])
    writer.add_feed_forward_length(SIZES["intermediate_size"])
    writer.add_head_count(SIZES["num_attention_heads"])
    writer.add_head_count_kv(SIZES["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(SIZES["rms_norm_eps"])
    writer.add_rope_dimension_count(SIZES["head_dim"])
    writer.add_vocab_size(SIZES["vocab_size"])
    for field in package.GGUFReader(str(vocabulary)).fields.values():
        if field.name.startswith("tokenizer."):
            kind = field.types[0]
            inner = field.types[-1] if kind == package.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), kind, inner)
    for name, shape in shapes().items():
        writer.add_tensor(name, *_values(name, shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    unfinished.replace(path)
    return path


def shapes() -> dict[str, tuple[int, ...]]:
    """Return the tensors of a GGUF file of this shape, by llama.cpp's names."""
    width, inner = SIZES["hidden_size"], SIZES["intermediate_size"]
    keys = SIZES["num_key_value_heads"] * SIZES["head_dim"]
    found: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (SIZES["vocab_size"], width),
        "output_norm.weight": (width,),
    }
    for number in range(SIZES["num_hidden_layers"]):
        block = {
            "attn_norm": (width,),
            "attn_q": (width, width),
            "attn_k": (keys, width),
            "attn_v": (keys, width),
            "attn_output": (width, width),
            "ffn_norm": (width,),
            "ffn_gate": (inner, width),
            "ffn_up": (inner, width),
            "ffn_down": (width, inner),
        }
        found |= {f"blk.{number}.{name}.weight": shape for name, shape in block.items()}
    return found


def _values(name: str, shape: tuple[int, ...]) -> tuple[Any, ...]:
    import gguf
    import numpy as np

    package: Any = gguf
    if len(shape) == 1:
        return (np.ones(shape, dtype=np.float32),)
    kind = package.GGMLQuantizationType.Q8_0 if name.startswith("token_embd") else package.GGMLQuantizationType.Q4_0
    drawn = np.random.default_rng(len(name)).standard_normal(shape, dtype=np.float32) * 0.02
    packed = package.quants.quantize(drawn, kind)
    return packed, None, kind


def read_bytes_per_second(size: int = 2**29) -> float:
    """Measure how fast all cores together read memory: the best of a few sums over more than any cache holds."""
    import torch

    numbers = torch.ones(size // 8, dtype=torch.int64)
    taken = []
    for _ in range(7):
        begun = time.perf_counter()
        numbers.sum()
        taken.append(time.perf_counter() - begun)
    return size / statistics.quantiles(taken, n=4)[0]
