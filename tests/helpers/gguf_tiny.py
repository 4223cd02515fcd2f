"""A GGUF file of a tiny Llama with a byte-level vocabulary, written in process."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

import tokenizers_tiny

WIDTH, LAYERS, HEADS = 32, 1, 4


def save(file: Path, *last: str, seed: int = 0, **named: int) -> Sequence[str]:
    """Write a checkpoint whose vocabulary ends with the given tokens; return its vocabulary.

    Args:
        file: Where to.
        last: Control tokens behind the ordinary ones; the first of them is the end of a text.
        seed: Of its weights.
        named: Tokens that the metadata names, such as `eot`.
    """
    plain, merges = tokenizers_tiny.byte_bpe()
    tokens = [*plain, *(last or ("<end>",))]
    writer: Any = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(2 * WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(plain) + [3] * (len(tokens) - len(plain)))
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_eos_token_id(len(plain))
    writer.add_add_bos_token(False)  # noqa: FBT003 - its only argument
    for name, number in named.items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", number)
    draw = np.random.default_rng(seed)
    wide, square = (2 * WIDTH, WIDTH), (WIDTH, WIDTH)
    shapes = {"token_embd": (len(tokens), WIDTH), "output": (len(tokens), WIDTH), "output_norm": (WIDTH,)}
    for layer in range(LAYERS):
        shapes |= {f"blk.{layer}.attn_{part}": square for part in ("q", "k", "v", "output")}
        shapes |= {f"blk.{layer}.{part}_norm": (WIDTH,) for part in ("attn", "ffn")}
        shapes |= {f"blk.{layer}.ffn_{part}": wide for part in ("gate", "up")}
        shapes[f"blk.{layer}.ffn_down"] = wide[::-1]
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", draw.normal(size=shape, scale=0.5).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tokens
