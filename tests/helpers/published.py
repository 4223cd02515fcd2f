"""Published models at their published sizes: their configs, their parameter counts, and files that take no disk.

A config says what the model's own `config.json` on the Hub says of sizes, tying, dtype, positions and windows. A count
is what its source states, and transformers counts the same on the meta device; `source="computed"` marks counts that
only transformers gave.
"""

import functools
import json
import math
import struct
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from transformers.core_model_loading import revert_weight_conversion

hf: Any = transformers  # Its annotations are narrower than what it accepts.

Tensor = tuple[str, tuple[int, ...]]
"""A dtype as safetensors writes it, and a shape."""

BUDGETS: Mapping[str, Mapping[str, str]] = {
    "24GiB": {"cuda:0": "24GiB"},
    "80GiB": {"cuda:0": "80GiB"},
    "2x80GiB": {"cuda:0": "80GiB", "cuda:1": "80GiB"},
    "cpu": {"cpu": "64GiB"},
}
"""The machines that `Published.fits_bfloat16` and `Published.fits_int4` speak of."""

ANYWHERE = {"24GiB": True, "80GiB": True, "2x80GiB": True, "cpu": True}

FEW_BYTES = 10 * 10**9
SHARD_BYTES = 5 * 10**9
"""More than `FEW_BYTES` are written in shards of at most `SHARD_BYTES`, as save_pretrained did for most of these."""

HUB = "the safetensors metadata on the Hub"


@dataclass(frozen=True, eq=False)  # equal only to itself, so that its mappings need no hash
class Published:
    """A published model.

    Attributes:
        name: Its Hub id.
        task: What it is loaded for.
        config: Its `config.json`.
        parameters: What the loaded model has; a weight that is tied, or there twice, counts once.
        source: Who states that count, or `"computed"`.
        kv_bytes_per_token: What its keys and values take in bfloat16 for one more token, before any window is full;
            of an encoder-decoder model, for one more token of the output. None for a masked model, which has no cache.
        cross_bytes_per_token: What those of an encoder-decoder model take for one more token of the input.
        context_length: The most tokens it takes; None where nothing bounds it.
        fits_bfloat16: For each of `BUDGETS`, whether its weights fit in bfloat16.
        fits_int4: The same in 4 bits; a budget on which it is too close to say is left out.
        stored: How many numbers the published file has, where that is known and not `parameters`.
        extra: Tensors of the published file that the model does not have.
        absent: Tensors of the model that the published file does not have, and that need no values.
        repeated: Tied weights that the published file has a second time.
        untied: Weights that transformers 5 ties in a new model, and that the published file has with other values.
        kept_float32: How many of the parameters stay in float32 when the rest is float16.
        renamed: Parts of names in transformers 5, and what the published file has in their place.
        why: Why `stored` is not `parameters`, and what else is odd about it.
    """

    name: str
    task: Literal["causal", "seq2seq", "masked"]
    config: Mapping[str, Any]
    parameters: int
    source: str
    kv_bytes_per_token: int | None
    context_length: int | None
    cross_bytes_per_token: int = 0
    fits_bfloat16: Mapping[str, bool] = field(default_factory=lambda: ANYWHERE)
    fits_int4: Mapping[str, bool] = field(default_factory=lambda: ANYWHERE)
    stored: int | None = None
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    absent: tuple[str, ...] = ()
    repeated: tuple[str, ...] = ()
    untied: tuple[str, ...] = ()
    kept_float32: int = 0
    renamed: tuple[tuple[str, str], ...] = ()
    why: str = ""

    def __str__(self) -> str:
        """Return the name without its owner, for pytest to show."""
        return self.name.rpartition("/")[2]

    @property
    def dtype(self) -> str:
        """The dtype of the published file: float32 where the config does not say."""
        return str(self.config.get("torch_dtype", "float32"))


@functools.cache
def meta_model(entry: Published) -> Any:
    """Build the model as transformers does, without memory for its weights."""
    content = json.loads(json.dumps(dict(entry.config)))  # a config keeps the dicts it is given, and changes them
    config = hf.CONFIG_MAPPING[content["model_type"]].from_dict(content)
    auto = {"causal": hf.AutoModelForCausalLM, "seq2seq": hf.AutoModelForSeq2SeqLM, "masked": hf.AutoModelForMaskedLM}[
        entry.task
    ]
    with torch.device("meta"):
        return auto.from_config(config, dtype=getattr(torch, entry.dtype))


@functools.cache
def tensors(entry: Published) -> Mapping[str, Tensor]:
    """Return what the published file holds, under its published names."""
    model = meta_model(entry)
    left_out = {*model.all_tied_weights_keys} - {*entry.repeated, *entry.untied} | {*entry.absent}
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in left_out}
    held: dict[str, Tensor] = {}
    for name, tensor in revert_weight_conversion(model, state).items():
        for ours, theirs in entry.renamed:
            name = name.replace(ours, theirs)  # noqa: PLW2901 - one name, in steps
        held[name] = (_SAFETENSORS_DTYPES[tensor.dtype], tuple(tensor.shape))
    return {**held, **entry.extra}


_SAFETENSORS_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}
_SIZES = {"F32": 4, "BF16": 2, "F16": 2, "I64": 8}


def write(entry: Published, folder: Path) -> Path:
    """Write the checkpoint into a folder: real headers, and holes where the weights would be.

    The files have their full sizes and take no disk. The tokenizer is a name only: nothing can be loaded from here.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(entry.config)), encoding="utf-8")
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    shards = list(_shards(tensors(entry)))
    if len(shards) == 1:
        _write_sparse(shards[0], folder / "model.safetensors", {*entry.untied})
        return folder
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = folder / f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_sparse(shard, file, {*entry.untied})
        weight_map.update(dict.fromkeys(shard, file.name))
    total = sum(size(tensor) for tensor in tensors(entry).values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def size(tensor: Tensor) -> int:
    """Return the bytes of a tensor."""
    dtype, shape = tensor
    return _SIZES[dtype] * math.prod(shape)


def _shards(held: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    few = sum(map(size, held.values())) <= FEW_BYTES
    shard: dict[str, Tensor] = {}
    filled = 0
    for name, tensor in held.items():
        if filled + size(tensor) > SHARD_BYTES and not few:
            yield shard
            shard, filled = {}, 0
        shard[name] = tensor
        filled += size(tensor)
    yield shard


def _write_sparse(held: Mapping[str, Tensor], file: Path, untied: AbstractSet[str]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in held.items():
        start, end = end, end + size((dtype, shape))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of eight
    with file.open("wb") as opened:
        opened.write(struct.pack("<Q", len(text)) + text)
        opened.truncate(8 + len(text) + end)
        for name in untied & held.keys():
            opened.seek(8 + len(text) + header[name]["data_offsets"][0])
            opened.write(b"\1")


# Causal models ----------------------------------------------------------------------------------

_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "rms_norm_eps": 1e-05,
    "torch_dtype": "bfloat16",
}
_EXPERTS = """bitsandbytes quantizes nn.Linear, and transformers 5 holds the experts of a layer as two parameters of
three dimensions: they stay in bfloat16 on a GPU. What int4 makes of them on a CPU is left open here."""

CAUSAL = (
    Published(
        "meta-llama/Meta-Llama-3-8B",
        "causal",
        {
            **_LLAMA,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 8192,
            "rope_theta": 500000.0,
            "tie_word_embeddings": False,
            "vocab_size": 128256,
        },
        parameters=8_030_261_248,
        source=HUB,
        kv_bytes_per_token=2 * 32 * 8 * 128 * 2,
        context_length=8192,
    ),
    Published(
        "meta-llama/Meta-Llama-3-70B",
        "causal",
        {
            **_LLAMA,
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "max_position_embeddings": 8192,
            "rope_theta": 500000.0,
            "tie_word_embeddings": False,
            "vocab_size": 128256,
        },
        parameters=70_553_706_496,
        source=HUB,
        kv_bytes_per_token=2 * 80 * 8 * 128 * 2,
        context_length=8192,
        # 141 GB are 131 GiB; in 4 bits about 40 GB, of which 4 are the embeddings in bfloat16.
        fits_bfloat16={"24GiB": False, "80GiB": False, "2x80GiB": True, "cpu": False},
        fits_int4={"24GiB": False, "80GiB": True, "2x80GiB": True, "cpu": True},
    ),
    Published(
        "meta-llama/Llama-3.2-1B",
        "causal",
        {
            **_LLAMA,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "head_dim": 64,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "rope_theta": 500000.0,
            "rope_scaling": {
                "factor": 32.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "tie_word_embeddings": True,
            "vocab_size": 128256,
        },
        parameters=1_235_814_400,
        source=HUB,
        kv_bytes_per_token=2 * 16 * 8 * 64 * 2,
        context_length=131072,
    ),
    Published(
        "HuggingFaceTB/SmolLM2-135M",
        "causal",
        {
            **_LLAMA,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "max_position_embeddings": 8192,
            "rope_theta": 100000,
            "tie_word_embeddings": True,
            "vocab_size": 49152,
        },
        parameters=134_515_008,
        source=HUB,
        kv_bytes_per_token=2 * 30 * 3 * 64 * 2,
        context_length=8192,
    ),
    Published(
        "openai-community/gpt2",
        "causal",
        {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "activation_function": "gelu_new",
            "n_ctx": 1024,
            "n_embd": 768,
            "n_head": 12,
            "n_layer": 12,
            "n_positions": 1024,
            "vocab_size": 50257,
        },
        parameters=124_439_808,
        source=f"{HUB}, less the masks",
        kv_bytes_per_token=2 * 12 * 12 * 64 * 2,
        context_length=1024,
        stored=137_022_720,
        extra={f"h.{layer}.attn.bias": ("F32", (1, 1, 1024, 1024)) for layer in range(12)},
        renamed=(("transformer.", ""),),
        why="the file has twelve causal masks of 1024 x 1024, and the names of the model without a head",
    ),
    Published(
        "EleutherAI/gpt-neo-2.7B",
        "causal",
        {
            "architectures": ["GPTNeoForCausalLM"],
            "model_type": "gpt_neo",
            "activation_function": "gelu_new",
            "attention_layers": ["global", "local"] * 16,
            "attention_types": [[["global", "local"], 16]],
            "hidden_size": 2560,
            "intermediate_size": None,
            "max_position_embeddings": 2048,
            "num_heads": 20,
            "num_layers": 32,
            "vocab_size": 50257,
            "window_size": 256,
        },
        parameters=2_651_307_520,
        source="printed by the benchmark of state-spaces/mamba, which loads it",
        kv_bytes_per_token=2 * 32 * 20 * 128 * 2,
        context_length=2048,
        why="the file on the Hub has causal masks too, as GPT-2's has; how many is not known here, so none are written",
    ),
    Published(
        "EleutherAI/pythia-2.8b",
        "causal",
        {
            "architectures": ["GPTNeoXForCausalLM"],
            "model_type": "gpt_neox",
            "hidden_act": "gelu",
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "max_position_embeddings": 2048,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "rotary_emb_base": 10000,
            "rotary_pct": 0.25,
            "tie_word_embeddings": False,
            "torch_dtype": "float16",
            "use_parallel_residual": True,
            "vocab_size": 50304,
        },
        parameters=2_517_652_480 + 2 * 50304 * 2560,
        source="arXiv 2304.01373, table 1, without the two embeddings",
        kv_bytes_per_token=2 * 32 * 32 * 80 * 2,
        context_length=2048,
    ),
    Published(
        "mistralai/Mistral-7B-v0.1",
        "causal",
        {
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            "hidden_act": "silu",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "rope_theta": 10000.0,
            "sliding_window": 4096,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "vocab_size": 32000,
        },
        parameters=7_241_732_096,
        source=HUB,
        kv_bytes_per_token=2 * 32 * 8 * 128 * 2,
        context_length=32768,
    ),
    Published(
        "mistralai/Mixtral-8x7B-v0.1",
        "causal",
        {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "hidden_act": "silu",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "num_attention_heads": 32,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "vocab_size": 32000,
        },
        parameters=46_702_792_704,
        source=HUB,
        kv_bytes_per_token=2 * 32 * 8 * 128 * 2,
        context_length=32768,
        # 93 GB are 87 GiB, 84 of them experts.
        fits_bfloat16={"24GiB": False, "80GiB": False, "2x80GiB": True, "cpu": False},
        fits_int4={"24GiB": False, "80GiB": False, "2x80GiB": True},
        why=_EXPERTS,
    ),
    Published(
        "google/gemma-2-9b-it",
        "causal",
        {
            "architectures": ["Gemma2ForCausalLM"],
            "model_type": "gemma2",
            "attn_logit_softcapping": 50.0,
            "cache_implementation": "hybrid",
            "final_logit_softcapping": 30.0,
            "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh",
            "hidden_size": 3584,
            "intermediate_size": 14336,
            "max_position_embeddings": 8192,
            "num_attention_heads": 16,
            "num_hidden_layers": 42,
            "num_key_value_heads": 8,
            "query_pre_attn_scalar": 256,
            "rope_theta": 10000.0,
            "sliding_window": 4096,
            "sliding_window_size": 4096,
            "torch_dtype": "bfloat16",
            "vocab_size": 256000,
        },
        parameters=9_241_705_984,
        source=HUB,
        kv_bytes_per_token=2 * 42 * 8 * 256 * 2,
        context_length=8192,
    ),
    Published(
        "google/gemma-3-1b-it",
        "causal",
        {
            "architectures": ["Gemma3ForCausalLM"],
            "model_type": "gemma3_text",
            "cache_implementation": "hybrid",
            "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh",
            "hidden_size": 1152,
            "intermediate_size": 6912,
            "max_position_embeddings": 32768,
            "num_attention_heads": 4,
            "num_hidden_layers": 26,
            "num_key_value_heads": 1,
            "query_pre_attn_scalar": 256,
            "rope_local_base_freq": 10000,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": 512,
            "sliding_window_pattern": 6,
            "torch_dtype": "bfloat16",
            "vocab_size": 262144,
        },
        parameters=999_885_952,
        source=HUB,
        kv_bytes_per_token=2 * 26 * 1 * 256 * 2,
        context_length=32768,
    ),
    Published(
        "Qwen/Qwen2.5-7B-Instruct",
        "causal",
        {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "hidden_act": "silu",
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "max_position_embeddings": 32768,
            "max_window_layers": 28,
            "num_attention_heads": 28,
            "num_hidden_layers": 28,
            "num_key_value_heads": 4,
            "rope_theta": 1000000.0,
            "sliding_window": 131072,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "use_sliding_window": False,
            "vocab_size": 152064,
        },
        parameters=7_615_616_512,
        source=HUB,
        kv_bytes_per_token=2 * 28 * 4 * 128 * 2,
        context_length=32768,
    ),
    Published(
        "Qwen/Qwen3-0.6B",
        "causal",
        {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "attention_bias": False,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "max_position_embeddings": 40960,
            "max_window_layers": 28,
            "num_attention_heads": 16,
            "num_hidden_layers": 28,
            "num_key_value_heads": 8,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": None,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
        parameters=751_632_384 - 151_936 * 1024,
        source=f"{HUB}, less the repeated head",
        kv_bytes_per_token=2 * 28 * 8 * 128 * 2,
        context_length=40960,
        stored=751_632_384,
        repeated=("lm_head.weight",),
        why="the file has the tied head a second time",
    ),
    Published(
        "Qwen/Qwen3-30B-A3B",
        "causal",
        {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "attention_bias": False,
            "decoder_sparse_step": 1,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "max_position_embeddings": 40960,
            "max_window_layers": 48,
            "mlp_only_layers": [],
            "moe_intermediate_size": 768,
            "norm_topk_prob": True,
            "num_attention_heads": 32,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 48,
            "num_key_value_heads": 4,
            "rope_scaling": None,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
        parameters=30_532_122_624,
        source=HUB,
        kv_bytes_per_token=2 * 48 * 4 * 128 * 2,
        context_length=40960,
        # 61 GB are 57 GiB, 54 of them experts.
        fits_bfloat16={"24GiB": False, "80GiB": True, "2x80GiB": True, "cpu": True},
        fits_int4={"24GiB": False, "80GiB": True, "2x80GiB": True},
        why=_EXPERTS,
    ),
    Published(
        "microsoft/Phi-3-mini-4k-instruct",
        "causal",
        {
            "architectures": ["Phi3ForCausalLM"],
            "model_type": "phi3",
            "attention_bias": False,
            "auto_map": {
                "AutoConfig": "configuration_phi3.Phi3Config",
                "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
            },
            "bos_token_id": 1,
            "eos_token_id": 32000,
            "hidden_act": "silu",
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "max_position_embeddings": 4096,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 32,
            "original_max_position_embeddings": 4096,
            "pad_token_id": 32000,
            "rope_scaling": None,
            "rope_theta": 10000.0,
            "sliding_window": 2047,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "vocab_size": 32064,
        },
        parameters=3_821_079_552,
        source=HUB,
        kv_bytes_per_token=2 * 32 * 32 * 96 * 2,
        context_length=4096,
        why="its config brings code for older versions of transformers, which is not run",
    ),
    Published(
        "deepseek-ai/DeepSeek-V2-Lite",
        "causal",
        {
            "architectures": ["DeepseekV2ForCausalLM"],
            "model_type": "deepseek_v2",
            "attention_bias": False,
            "auto_map": {
                "AutoConfig": "configuration_deepseek.DeepseekV2Config",
                "AutoModelForCausalLM": "modeling_deepseek.DeepseekV2ForCausalLM",
            },
            "first_k_dense_replace": 1,
            "hidden_act": "silu",
            "hidden_size": 2048,
            "intermediate_size": 10944,
            "kv_lora_rank": 512,
            "max_position_embeddings": 163840,
            "moe_intermediate_size": 1408,
            "moe_layer_freq": 1,
            "n_group": 1,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "norm_topk_prob": False,
            "num_attention_heads": 16,
            "num_experts_per_tok": 6,
            "num_hidden_layers": 27,
            "num_key_value_heads": 16,
            "q_lora_rank": None,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "rope_scaling": {
                "beta_fast": 32,
                "beta_slow": 1,
                "factor": 40,
                "mscale": 0.707,
                "mscale_all_dim": 0.707,
                "original_max_position_embeddings": 4096,
                "type": "yarn",
            },
            "rope_theta": 10000,
            "routed_scaling_factor": 1.0,
            "tie_word_embeddings": False,
            "topk_group": 1,
            "topk_method": "greedy",
            "torch_dtype": "bfloat16",
            "v_head_dim": 128,
            "vocab_size": 102400,
        },
        parameters=15_706_484_224,
        source=HUB,
        # A layer keeps one latent of 512 and one rotated key of 64 for all its heads: arXiv 2405.04434, section 2.1.
        kv_bytes_per_token=27 * (512 + 64) * 2,
        context_length=163840,
        # 31 GB are 29 GiB, 27 of them experts.
        fits_bfloat16={"24GiB": False, "80GiB": True, "2x80GiB": True, "cpu": True},
        fits_int4={"24GiB": False, "80GiB": True, "2x80GiB": True},
        why=_EXPERTS,
    ),
    Published(
        "state-spaces/mamba-2.8b-hf",
        "causal",
        {
            "architectures": ["MambaForCausalLM"],
            "model_type": "mamba",
            "conv_kernel": 4,
            "expand": 2,
            "hidden_act": "silu",
            "hidden_size": 2560,
            "intermediate_size": 5120,
            "num_hidden_layers": 64,
            "state_size": 16,
            "time_step_rank": 160,
            "torch_dtype": "float32",
            "use_bias": False,
            "use_conv_bias": True,
            "vocab_size": 50280,
        },
        parameters=2_768_345_600,
        source="printed by the benchmark of state-spaces/mamba, which loads it",
        kv_bytes_per_token=0,
        context_length=None,
        why="its state has one size, whatever the length",
    ),
    Published(
        "ai21labs/Jamba-v0.1",
        "causal",
        {
            "architectures": ["JambaForCausalLM"],
            "model_type": "jamba",
            "attn_layer_offset": 4,
            "attn_layer_period": 8,
            "expert_layer_offset": 1,
            "expert_layer_period": 2,
            "hidden_act": "silu",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "mamba_conv_bias": True,
            "mamba_d_conv": 4,
            "mamba_d_state": 16,
            "mamba_dt_rank": 256,
            "mamba_expand": 2,
            "mamba_proj_bias": False,
            "max_position_embeddings": 262144,
            "num_attention_heads": 32,
            "num_experts": 16,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "use_mamba_kernels": True,
            "vocab_size": 65536,
        },
        parameters=103_140_646_656 // 2,
        source="total_size of its model.safetensors.index.json, two bytes a parameter",
        kv_bytes_per_token=2 * 4 * 8 * 128 * 2,  # layers 4, 12, 20 and 28 attend
        context_length=262144,
        # 103 GB are 96 GiB, 84 of them experts.
        fits_bfloat16={"24GiB": False, "80GiB": False, "2x80GiB": True, "cpu": False},
        fits_int4={"24GiB": False, "80GiB": False, "2x80GiB": True},
        why=_EXPERTS,
    ),
    Published(
        "Qwen/Qwen3-Next-80B-A3B-Instruct",
        "causal",
        {
            "architectures": ["Qwen3NextForCausalLM"],
            "model_type": "qwen3_next",
            "attention_bias": False,
            "decoder_sparse_step": 1,
            "full_attention_interval": 4,
            "head_dim": 256,
            "hidden_act": "silu",
            "hidden_size": 2048,
            "intermediate_size": 5120,
            "linear_conv_kernel_dim": 4,
            "linear_key_head_dim": 128,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 32,
            "linear_value_head_dim": 128,
            "max_position_embeddings": 262144,
            "mlp_only_layers": [],
            "moe_intermediate_size": 512,
            "norm_topk_prob": True,
            "num_attention_heads": 16,
            "num_experts": 512,
            "num_experts_per_tok": 10,
            "num_hidden_layers": 48,
            "num_key_value_heads": 2,
            "partial_rotary_factor": 0.25,
            "rope_scaling": None,
            "rope_theta": 10000000,
            "shared_expert_intermediate_size": 512,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "vocab_size": 151936,
        },
        parameters=79_674_391_296,
        source=f"{HUB} for Qwen/Qwen3-Coder-Next, which has no predictor",
        kv_bytes_per_token=2 * 12 * 2 * 256 * 2,  # every fourth of the 48 layers attends
        context_length=262144,
        stored=81_324_862_720,
        extra={
            "mtp.fc.weight": ("BF16", (2048, 2 * 2048)),
            **{
                f"mtp.{name}.weight": ("BF16", (2048,))
                for name in (
                    "norm",
                    "pre_fc_norm_embedding",
                    "pre_fc_norm_hidden",
                    "layers.0.input_layernorm",
                    "layers.0.post_attention_layernorm",
                )
            },
            "mtp.layers.0.self_attn.q_proj.weight": ("BF16", (2 * 16 * 256, 2048)),
            "mtp.layers.0.self_attn.k_proj.weight": ("BF16", (2 * 256, 2048)),
            "mtp.layers.0.self_attn.v_proj.weight": ("BF16", (2 * 256, 2048)),
            "mtp.layers.0.self_attn.o_proj.weight": ("BF16", (2048, 16 * 256)),
            "mtp.layers.0.self_attn.q_norm.weight": ("BF16", (256,)),
            "mtp.layers.0.self_attn.k_norm.weight": ("BF16", (256,)),
            "mtp.layers.0.mlp.gate.weight": ("BF16", (512, 2048)),
            "mtp.layers.0.mlp.shared_expert_gate.weight": ("BF16", (1, 2048)),
            **{
                f"mtp.layers.0.mlp.{expert}.{name}_proj.weight": ("BF16", shape)
                for expert in ("shared_expert", *(f"experts.{number}" for number in range(512)))
                for name, shape in (("gate", (512, 2048)), ("up", (512, 2048)), ("down", (2048, 512)))
            },
        },
        # 159 GB are 148 GiB, 144 of them experts: in 4 bits that is too near to two GPUs of 80 GiB to say.
        fits_bfloat16={"24GiB": False, "80GiB": False, "2x80GiB": True, "cpu": False},
        fits_int4={"24GiB": False, "80GiB": False},
        why=f"the file has a predictor of several tokens, which transformers leaves out. {_EXPERTS}",
    ),
)

# Encoder-decoder models -------------------------------------------------------------------------

_T5 = {
    "architectures": ["T5ForConditionalGeneration"],
    "model_type": "t5",
    "decoder_start_token_id": 0,
    "eos_token_id": 1,
    "is_encoder_decoder": True,
    "n_positions": 512,
    "num_layers": 24,
    "pad_token_id": 0,
    "relative_attention_num_buckets": 32,
    "vocab_size": 32128,
}
_M2M100 = {
    "architectures": ["M2M100ForConditionalGeneration"],
    "model_type": "m2m_100",
    "activation_function": "relu",
    "bos_token_id": 0,
    "d_model": 1024,
    "decoder_attention_heads": 16,
    "decoder_ffn_dim": 4096,
    "decoder_layers": 12,
    "decoder_start_token_id": 2,
    "encoder_attention_heads": 16,
    "encoder_ffn_dim": 4096,
    "encoder_layers": 12,
    "eos_token_id": 2,
    "is_encoder_decoder": True,
    "max_position_embeddings": 1024,
    "pad_token_id": 1,
    "scale_embedding": True,
}

SEQ2SEQ = (
    Published(
        "google/flan-t5-xl",
        "seq2seq",
        {
            **_T5,
            "d_ff": 5120,
            "d_kv": 64,
            "d_model": 2048,
            "feed_forward_proj": "gated-gelu",
            "num_decoder_layers": 24,
            "num_heads": 32,
            "tie_word_embeddings": False,
        },
        parameters=2_849_757_184,
        source=HUB,
        kv_bytes_per_token=2 * 24 * 32 * 64 * 2,
        cross_bytes_per_token=2 * 24 * 32 * 64 * 2,
        context_length=None,
        untied=("lm_head.weight",),
        kept_float32=48 * 5120 * 2048,
        why="its head is not tied; transformers 5 ties it in a new T5, whatever the config says, and unties it in "
        "from_pretrained where the file has other values for it",
    ),
    Published(
        "google-t5/t5-3b",
        "seq2seq",
        {**_T5, "d_ff": 16384, "d_kv": 128, "d_model": 1024, "num_heads": 32},
        parameters=2_851_598_336,
        source="KerasHub's preset t5_3b",
        kv_bytes_per_token=2 * 24 * 32 * 128 * 2,
        cross_bytes_per_token=2 * 24 * 32 * 128 * 2,
        context_length=None,
        stored=2_851_599_360,
        extra={"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": ("F32", (32, 32))},
        kept_float32=48 * 16384 * 1024,
        why="the file has a position bias for the attention between decoder and encoder, which was never used",
    ),
    Published(
        "facebook/m2m100_418M",
        "seq2seq",
        {**_M2M100, "vocab_size": 128112},
        parameters=483_905_536,
        source="computed",  # the card says 418M, the paper's count without what is shared
        kv_bytes_per_token=2 * 12 * 1024 * 2,
        cross_bytes_per_token=2 * 12 * 1024 * 2,
        context_length=1024,
        why="its sinusoidal tables are no parameters and in no file",
    ),
    Published(
        "facebook/nllb-200-distilled-600M",
        "seq2seq",
        {**_M2M100, "torch_dtype": "float32", "vocab_size": 256206},
        parameters=615_073_792,
        source="computed",  # the card says 600M
        kv_bytes_per_token=2 * 12 * 1024 * 2,
        cross_bytes_per_token=2 * 12 * 1024 * 2,
        context_length=1024,
    ),
    Published(
        "Helsinki-NLP/opus-mt-en-de",
        "seq2seq",
        {
            "architectures": ["MarianMTModel"],
            "model_type": "marian",
            "activation_function": "swish",
            "bos_token_id": 0,
            "d_model": 512,
            "decoder_attention_heads": 8,
            "decoder_ffn_dim": 2048,
            "decoder_layers": 6,
            "decoder_start_token_id": 58100,
            "encoder_attention_heads": 8,
            "encoder_ffn_dim": 2048,
            "encoder_layers": 6,
            "eos_token_id": 0,
            "is_encoder_decoder": True,
            "max_position_embeddings": 512,
            "normalize_before": False,
            "normalize_embedding": False,
            "pad_token_id": 58100,
            "scale_embedding": True,
            "static_position_embeddings": True,
            "vocab_size": 58101,
        },
        parameters=74_410_496,
        source="computed",
        kv_bytes_per_token=2 * 6 * 512 * 2,
        cross_bytes_per_token=2 * 6 * 512 * 2,
        context_length=512,
        stored=74_410_496 + 58_101,
        why="two sinusoidal tables of 512 x 512 count as parameters; the file has a bias of the scores besides",
    ),
    Published(
        "facebook/bart-large",
        "seq2seq",
        {
            "architectures": ["BartModel"],
            "model_type": "bart",
            "activation_function": "gelu",
            "bos_token_id": 0,
            "d_model": 1024,
            "decoder_attention_heads": 16,
            "decoder_ffn_dim": 4096,
            "decoder_layers": 12,
            "decoder_start_token_id": 2,
            "encoder_attention_heads": 16,
            "encoder_ffn_dim": 4096,
            "encoder_layers": 12,
            "eos_token_id": 2,
            "is_encoder_decoder": True,
            "max_position_embeddings": 1024,
            "pad_token_id": 1,
            "scale_embedding": False,
            "vocab_size": 50265,
        },
        parameters=406_291_456,
        source=HUB,
        kv_bytes_per_token=2 * 12 * 1024 * 2,
        cross_bytes_per_token=2 * 12 * 1024 * 2,
        context_length=1024,
        absent=("final_logits_bias",),
        renamed=(("model.", ""),),
        why="the file is of the model without a head, which is tied and so needs no weights",
    ),
)

# Masked models ----------------------------------------------------------------------------------

_BASE = {
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
}

MASKED = (
    Published(
        "google-bert/bert-base-uncased",
        "masked",
        {
            **_BASE,
            "architectures": ["BertForMaskedLM"],
            "model_type": "bert",
            "max_position_embeddings": 512,
            "pad_token_id": 0,
            "type_vocab_size": 2,
            "vocab_size": 30522,
        },
        parameters=110_106_428 - (768 * 768 + 768) - (2 * 768 + 2),
        source=f"{HUB}, less the pooler and the head for the next sentence",
        kv_bytes_per_token=None,
        context_length=512,
        stored=110_106_428,
        extra={
            "bert.pooler.dense.bias": ("F32", (768,)),
            "bert.pooler.dense.weight": ("F32", (768, 768)),
            "cls.seq_relationship.bias": ("F32", (2,)),
            "cls.seq_relationship.weight": ("F32", (2, 768)),
        },
        renamed=(("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")),
        why="the file is of the model as it was trained; the model without heads, with its pooler, has 109,482,240",
    ),
    Published(
        "FacebookAI/roberta-base",
        "masked",
        {
            **_BASE,
            "architectures": ["RobertaForMaskedLM"],
            "model_type": "roberta",
            "bos_token_id": 0,
            "eos_token_id": 2,
            "layer_norm_eps": 1e-05,
            "max_position_embeddings": 514,
            "pad_token_id": 1,
            "type_vocab_size": 1,
            "vocab_size": 50265,
        },
        parameters=124_697_433,
        source=HUB,
        kv_bytes_per_token=None,
        context_length=512,
        stored=124_697_433 + 514,
        extra={"roberta.embeddings.position_ids": ("I64", (1, 514))},
        why="the file numbers the positions",
    ),
    Published(
        "FacebookAI/xlm-roberta-base",
        "masked",
        {
            **_BASE,
            "architectures": ["XLMRobertaForMaskedLM"],
            "model_type": "xlm-roberta",
            "bos_token_id": 0,
            "eos_token_id": 2,
            "layer_norm_eps": 1e-05,
            "max_position_embeddings": 514,
            "pad_token_id": 1,
            "type_vocab_size": 1,
            "vocab_size": 250002,
        },
        parameters=278_295_186,
        source="computed",  # the Hub shows 0.3B; the model without a head has 278,043,648 with its pooler
        kv_bytes_per_token=None,
        context_length=512,
    ),
    Published(
        "microsoft/deberta-v3-base",
        "masked",
        {
            **_BASE,
            "model_type": "deberta-v2",
            "layer_norm_eps": 1e-07,
            "max_position_embeddings": 512,
            "max_relative_positions": -1,
            "norm_rel_ebd": "layer_norm",
            "pad_token_id": 0,
            "pooler_dropout": 0,
            "pooler_hidden_act": "gelu",
            "pooler_hidden_size": 768,
            "pos_att_type": "p2c|c2p",
            "position_biased_input": False,
            "position_buckets": 256,
            "relative_attention": True,
            "share_att_key": True,
            "type_vocab_size": 0,
            "vocab_size": 128100,
        },
        parameters=183_831_552 + (768 * 768 + 768) + 2 * 768 + 128_100,
        source="KerasHub's preset deberta_v3_base_en has no head; the head is computed",
        kv_bytes_per_token=None,
        context_length=None,
        why="its own config names no architecture",
    ),
)

PUBLISHED = (*CAUSAL, *SEQ2SEQ, *MASKED)
