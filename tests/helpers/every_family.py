"""A tiny random checkpoint of any model type that the installed transformers has, from its config class alone.

`differs` has plain transformers and lmkit read one, and says in what they do.
"""

import contextlib
import dataclasses
import inspect
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

import checkpoints
import lmkit

hf: Any = transformers

VOCABULARY = 128
MASK = 4
FIRST, SEEN = 20, "".join(chr(number) for number in range(33, 127))
"""The characters of prompts, and the id of the first of them."""

SIZES: dict[str, int] = {
    r"(.*_)?vocab_size(_per_layer_input)?": VOCABULARY,
    r"hidden_size|d_model|n_embd|dim|emb_dim|embed_dim|model_dim|word_embed_proj_dim|embedding_size|embedding_dim": 32,
    r"attention_hidden_size|lru_width|attn_hidden_size|encoder_hidden_size|adapter_input_size|backbone_hidden_size": 32,
    r"hidden_size_per_layer_input": 8,
    r"num_hidden_layers|n_layers?|num_layers|encoder_layers|decoder_layers|num_(en|de)coder_layers|depth": 4,
    r"num_attention_heads|n_heads?|num_heads|(en|de)coder_attention_heads|num_(en|de)coder_attention_heads": 4,
    r"num_key_value_heads|num_kv_heads|n_head_kv|num_query_groups|multi_query_group_num": 2,
    r"(.*_)?head_dim|d_kv|kv_channels|attention_head_size|dim_head|rotary_dim": 8,
    r"intermediate_size|.*_intermediate_size|ffn_dim|n_inner|d_ff|(en|de)coder_ffn_dim|hidden_dim|ffn_hidden_size": 64,
    r"num_experts|num_local_experts|n_routed_experts|moe_num_experts": 4,
    r"num_experts_per_tok|top_k_experts|moe_top_k|moe_k|num_experts_per_token": 2,
    r"n_positions|max_position_embeddings|n_ctx|max_seq_len": 128,
    r"sliding_window|attention_window_size|window_size|index_topk": 8,
    r"q_lora_rank|kv_lora_rank": 16,
    r"n_group|topk_group|first_k_dense_replace": 1,
    r"image_size": 16,
    r"patch_size": 8,
}
"""What an attribute is set to, by its name."""

LAYERS = 4

_MIXED = ["linear_attention", "linear_attention", "full_attention", "full_attention"]
_MAMBA: dict[str, Any] = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8}
_SHARED: dict[str, Any] = {"num_kv_shared_layers": 1}
_QWEN4: dict[str, Any] = {
    "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8,
    "indexer_budget": 8, "indexer_compress_ratio": 4,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "hc_lowrank": 8,
}  # fmt: skip

_QWEN2_VL: dict[str, Any] = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 1, 2]}
}

OVERRIDES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_types": _MIXED},
    "bamba": {**_MAMBA, "attn_layer_indices": [1, 3]},
    "blenderbot": {"encoder_layers": 4},
    "cohere_compass_text": {"sliding_window": 8, "layer_types": ["full_attention"] * 4},
    "deepseek_v2": {"num_experts_per_tok": 2},
    # Its indexer scores many columns 0, and which of these it picks depends on where padding lies, in transformers too.
    "deepseek_v32": {"index_topk": 64},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "gemma3n_text": _SHARED,
    "gemma4_text": {"hidden_size_per_layer_input": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {**_MAMBA, "layer_types": ["mamba", "attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": _MIXED},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"num_layers": 2, "qk_head_dim": 16},
    "mamba2": {"num_heads": 8, "n_groups": 1},
    "perceiver": {"d_latents": 32, "num_latents": 16, "num_self_attends_per_block": 2},
    "qwen2_5_vl_text": _QWEN2_VL,
    "qwen2_vl_text": _QWEN2_VL,
    "qwen4_exp_text": _QWEN4,
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "attn_layers": ["local", "lsh"]},
    "xlstm": {"num_heads": 2, "qk_dim_factor": 2.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 8, "attn_layer_period": 2, "attn_layer_offset": 1, "attention_hidden_size": 64},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
}
"""What a model type needs beside small sizes, such as a layer that attends among its first ones."""


def tiny(model_type: str) -> Any:
    """Return a tiny config of a model type."""
    return _tiny(hf.CONFIG_MAPPING[model_type], model_type)


def _tiny(kind: Any, model_type: str | None = None) -> Any:
    overrides = OVERRIDES.get(model_type or kind.model_type, {})
    default = kind()
    taken = (
        set(getattr(kind, "sub_configs", ()))
        | set(inspect.signature(kind.__init__).parameters)
        | {f.name for f in dataclasses.fields(kind)}
    )
    before = {name: value for name, value in vars(default).items() if name in taken}
    values = {name: _smaller(name, value) for name, value in before.items()}
    heads, shared = ("num_attention_heads", "num_key_value_heads")
    if before.get(heads) == before.get(shared) and heads in before:
        values[shared] = values[heads]
    changed = {name: value for name, value in values.items() if value is not before[name]}
    return kind(**{**changed, **overrides})


def _smaller(name: str, value: Any) -> Any:
    if isinstance(value, hf.PreTrainedConfig):
        return _tiny(type(value)).to_dict()
    if value is None and name in ("head_dim", "num_key_value_heads"):
        return {"head_dim": 8, "num_key_value_heads": 4}[name]
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    if re.fullmatch(r".*_token_(id|index)", name):
        return value if value < VOCABULARY else 1
    return min(value, next((size for pattern, size in SIZES.items() if re.fullmatch(pattern, name)), value))


AUTO = {"causal": "AutoModelForCausalLM", "seq2seq": "AutoModelForSeq2SeqLM", "masked": "AutoModelForMaskedLM"}
LENGTHS = (5, 19, 2, 11)
"""How many tokens the prompts have: beyond the tiny windows of 8, and shorter."""

NEW = 12

IMAGES = (
    "aya_vision deepseek_vl gemma3 gemma4 glm4_moe idefics2 idefics3 internvl llama4 llava llava_next llava_onevision "
    "mistral3 mllama paligemma qwen2_5_vl qwen2_vl qwen3_5 qwen3_5_moe qwen3_vl qwen3_vl_moe qwen4_exp smolvlm vipllava"
).split()
"""Model types of images and text that are saved with all of their parts."""


def model_types() -> list[tuple[str, str]]:
    """Return what is tried: a task and a model type of it, or "images" and one whose text side is loaded as causal."""
    mappings = {task: getattr(hf, name)._model_mapping._model_mapping for task, name in AUTO.items()}
    whole = hf.AutoModelForImageTextToText._model_mapping._model_mapping
    text = [(task, model_type) for task, mapping in mappings.items() for model_type in mapping]
    return text + [("images", model_type) for model_type in IMAGES if model_type in whole]


def save(model: Any, folder: Path) -> None:
    """Save a model with random weights that tell texts apart, and a tokenizer."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(4)  # initial ones hardly do
    settings = getattr(model, "generation_config", None)
    if settings is not None and model.config.is_encoder_decoder and settings.decoder_start_token_id is None:
        settings.decoder_start_token_id = 0
    model.eval().save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def built(task: str, model_type: str) -> Any:
    """Build the tiny model of a type, always the same."""
    auto = getattr(hf, AUTO.get(task, "AutoModelForImageTextToText"))
    with torch.random.fork_rng(devices=[]), contextlib.redirect_stdout(io.StringIO()):
        torch.manual_seed(0)
        return auto.from_config(tiny(model_type))


def tokenizer() -> Any:
    """Make a tokenizer of single characters, which classes of byte-level families take for one of their own, too."""
    named = ["<pad>", "<s>", "<|endoftext|>", "<unk>", "<mask>"]
    rare = [chr(0xC0 + number) for number in range(FIRST - len(named))]
    more = [chr(0x100 + number) for number in range(VOCABULARY - FIRST - len(SEEN))]
    vocabulary = {token: number for number, token in enumerate([*named, *rare, *SEEN, *more])}
    letters = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    special = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "<|endoftext|>", "mask_token": "<mask>"}
    return hf.TokenizersBackend(tokenizer_object=letters, **special)


def prompts() -> list[list[int]]:
    """Return token ids of a few prompts; none of them is special."""
    drawn = torch.Generator().manual_seed(1)
    return [torch.randint(FIRST, FIRST + len(SEEN), (length,), generator=drawn).tolist() for length in LENGTHS]


def written(token_ids: Sequence[int]) -> str:
    """Write token ids as the text that has them."""
    return "".join("<mask>" if number == MASK else SEEN[number - FIRST] for number in token_ids)


def plain(task: str, folder: Path) -> Any:
    """Load a checkpoint with transformers: a model of images and text where the causal class has no such type."""
    config = hf.AutoConfig.from_pretrained(folder)
    names = [AUTO.get(task, AUTO["causal"]), "AutoModelForImageTextToText"]
    auto = next(getattr(hf, name) for name in names if type(config) in getattr(hf, name)._model_mapping)
    with contextlib.redirect_stdout(io.StringIO()):
        return auto.from_pretrained(folder, dtype=torch.float32).eval()


Answer = tuple[list[int], list[float]]
"""Tokens, and how likely each is: written ones by their logarithms, fills of a mask by their probabilities."""


def generated(model: Any, token_ids: list[int]) -> Answer:
    """Return what plain `generate` writes behind a prompt alone."""
    with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
        found = model.generate(
            torch.tensor([token_ids]), do_sample=False, num_beams=1, max_new_tokens=NEW,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
    new = found.sequences[0][-len(found.logits) :]
    scores = torch.stack(found.logits)[:, 0].float().log_softmax(-1).gather(-1, new[:, None])[:, 0]
    kept = len(new) - int(new[-1].item() in checkpoints.ends(model))
    return new[:kept].tolist(), scores[:kept].tolist()


def masked(token_ids: list[int]) -> list[int]:
    """Put a mask into the middle of a prompt."""
    return [*token_ids[: len(token_ids) // 2], MASK, *token_ids[len(token_ids) // 2 :]]


def filled(model: Any, token_ids: list[int]) -> Answer:
    """Return what a plain pass finds likeliest at the mask."""
    with torch.no_grad():
        scores = model(torch.tensor([token_ids])).logits[0, token_ids.index(MASK)].float().softmax(-1)
    best = scores.topk(5)
    return best.indices.tolist(), best.values.tolist()


def expected(task: str, folder: Path) -> list[Answer]:
    """Return what plain transformers answers to each prompt, alone."""
    model = plain(task, folder)
    if task == "masked":
        return [filled(model, masked(one)) for one in prompts()]
    return [generated(model, one) for one in prompts()]


def differs(task: str, folder: Path, right: list[Answer] | None = None) -> str | None:
    """Say in what lmkit differs from plain transformers, with a row alone or in a batch; None if in nothing."""
    right = right or expected(task, folder)
    texts = [written(masked(one) if task == "masked" else one) for one in prompts()]
    options: dict[str, Any] = {"masked": {}, "seq2seq": {"split": "none"}}.get(task, {})
    if task != "masked":
        options |= {"max_new_tokens": NEW, "logprobs": 1}
    kind: Any = task if task in AUTO else "causal"
    with lmkit.load(kind, folder, "float32", "cpu") as wrapper:
        answers = [("alone", wrapper(text, **options)) for text in texts]
        answers += [("in a batch", result) for result in wrapper(texts, **options)]
        for (how, result), (tokens, likely) in zip(answers, right * 2, strict=True):
            found = _answer(result, task)
            if found[0] != tokens:
                return f"{how}: {found[0]}, not {tokens}"
            if not torch.allclose(torch.tensor(found[1]), torch.tensor(likely), atol=1e-3):
                return f"{how}: {found[1]}, not {likely}"
        held = {id(part): part.nbytes for part in wrapper.model.state_dict(keep_vars=True).values()}
        if wrapper.plan.weights_bytes != sum(held.values()):
            return f"{wrapper.plan.weights_bytes} bytes are planned, and it holds {sum(held.values())}"
    return None


def _answer(result: Any, task: str) -> Answer:
    if task == "masked":
        return [one.token_id for one in result.candidates], [one.score for one in result.candidates]
    tokens = list(result.token_ids)
    return tokens, [one.logprob for one in result.logprobs][: len(tokens)]
