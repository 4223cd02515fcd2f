"""How rows will run, and why: by lmkit's own loop or by `generate`'s preparation, with which attention, compiled."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from lmkit._borrowed import TESTED, cache_name
from lmkit.errors import OptionError, listed
from lmkit.kernels import attention, rotary
from lmkit.kernels.native.operators import refusal
from lmkit.kernels.packed import packs

if TYPE_CHECKING:
    from lmkit.checkpoint.tasks import Task

EngineWord: TypeAlias = Literal["lmkit", "generate"]

PADDING_SENSITIVE: Final = frozenset(
    """
    bart bigbird_pegasus blenderbot blenderbot-small blt cpmant deepseek_v4 git marian mbart mvp paligemma pegasus
    plbart prophetnet recurrent_gemma reformer roformer rwkv trocr whisper xlm xlnet xlstm
    """.split()
)
"""Causal model types whose result left padding changes: found by running tiny checkpoints of all types."""

OWN: Final = frozenset(
    """
    apertus arcee bart bert big_bird bigbird_pegasus biogpt bitnet blenderbot blenderbot-small bloom camembert
    codegen cohere cohere2 cohere2_moe data2vec-text dbrx deepseek_v2 deepseek_v3 doge dots1 electra ernie ernie4_5
    ernie4_5_moe exaone4 exaone_moe falcon fsmt gemma gemma2 gemma3_text glm glm4 glm4_moe glm4_moe_lite gpt-sw3
    gpt2 gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese gpt_oss gptj granite granitemoe granitemoeshared helium
    hunyuan_v1_dense hunyuan_v1_moe jetmoe led llama longt5 m2m_100 marian mbart megatron-bert mimo_v2_flash
    minicpm3 minimax_m2 ministral ministral3 mistral mixtral modernbert-decoder mpt mt5 mvp nemotron nllb-moe olmo
    olmo2 olmo3 olmoe opt pegasus pegasus_x persimmon phi phi3 phimoe plbart prophetnet qwen2 qwen2_moe qwen3
    qwen3_moe rembert roberta roberta-prelayernorm roc_bert seed_oss smollm3 stablelm starcoder2 switch_transformers
    t5 t5gemma umt5 vaultgemma xglm xlm-roberta xlm-roberta-xl
    """.split()
)
"""Model types of text that run on lmkit's own loop with every version that it was tested with."""

_GAIN: Final = {
    "causal": "heads that share keys read them once",
    "seq2seq": "beams share the keys of their source",
    "masked": "long rows in blocks that a CPU's cache holds where it has products in bfloat16, else as torch's kernel",
}

_COMPILED: Final = {
    "causal": "a step of all layers",
    "seq2seq": "a step of the decoder",
    "masked": "a pass of all layers",
}


@dataclass(frozen=True, slots=True)
class Running:
    """How rows will run.

    Attributes:
        engine: `"lmkit"`, or `"generate"` where each step is prepared by transformers.
        attention: `"lmkit"`, or what transformers calls the one it chooses.
        keeps_prefixes: Whether keys and values can be taken out of a batch and put into another.
        reasons: Why, by what; None where there is nothing to say.
    """

    engine: EngineWord
    attention: str
    keeps_prefixes: bool
    reasons: dict[str, str | None]


def pads(model: Any) -> bool:
    """Say whether rows of different lengths may share a batch of this model."""
    return bool(model.config.is_encoder_decoder or model.config.model_type not in PADDING_SENSITIVE)


def how_rows_run(
    task: Task, model: Any, device_type: str, *, compiled: bool, asked: bool = False, kernels: bool = False
) -> Running:
    """Decide how rows of a model will run; on the meta device too.

    Args:
        task: What it is loaded for.
        model: The model, before its attention is replaced.
        device_type: Where it computes.
        compiled: Whether compiled steps are asked for.
        asked: Whether the model's attention is, so that it is left alone.
        kernels: Whether lmkit's own kernels are asked for.

    Raises:
        OptionError: Compiled steps are asked for, and not to be had.
    """
    why = told = None
    plain = False
    if task != "masked":
        why = _not_own(model)
        plain = why is None and _kinds(model) == {DynamicLayer}
        begin = "begin one by one" if task == "causal" else "begin together"
        told = (
            f"generate() prepares each step, since {why}: rows do not join a batch that runs, and no prefix is reused"
            if why
            else f"lmkit's own loop: rows {begin} and end one by one, each with its own options"
        )
    chosen = model.config._attn_implementation  # noqa: SLF001 - it has no public name
    here = device_type == "cpu"
    ours = not asked and (here or why is None) and attention.fits(model, kernels=kernels and here)
    if compiled:
        _check_compiled(task, model, eager=str(chosen) == "eager" and not ours)
    gain = f"lmkit's: {_GAIN[task]}" if here else "torch's kernels, with one mask for all layers, which lmkit makes"
    if here and str(model.dtype) == "torch.bfloat16" and packs():
        gain += ", and products are those of this CPU's bfloat16 kernel"
    if here and kernels:
        missing = refusal()
        gain += f"; {'one token a row by a kernel in C++' if missing is None else f'none in C++, since {missing}'}"
    most = None if task == "causal" else getattr(model.config, "max_position_embeddings", None)
    within = f", for up to {most:,} tokens" if most else ""  # see `Graph.most_positions`
    reasons = {
        "engine": told,
        "compiled": f"as asked: {_COMPILED[task]} as one graph, kept for later loads{within}" if compiled else None,
        "rotary": rotary.scaling(model).reason,
        "attention": gain if ours else "as asked" if asked else None,
    }
    how = attention.NAME if ours else str(chosen)
    return Running("generate" if why else "lmkit", how, plain and task == "causal", reasons)


def _not_own(model: Any) -> str | None:
    """Say why lmkit's own loop cannot run a model; None if it can."""
    if cache_name(model) is None:
        return "its forward takes no cache by a name that lmkit knows ('cache' or 'past_key_values')"
    if not pads(model):
        return "padding on the left changes its results"
    asked = getattr(model, "_supports_default_dynamic_cache", None)  # as generate() asks
    if asked is None:
        return "transformers does not say any more which cache it keeps"
    if not asked():
        return "it keeps a cache of its own kind"
    kinds = _kinds(model)
    if strange := sorted(kind.__name__ for kind in kinds - {DynamicLayer, DynamicSlidingWindowLayer}):
        return f"it keeps {listed(strange)} beside plain keys and values"
    return None if kinds else "its layers keep no keys and values"


def _kinds(model: Any) -> set[type]:
    """Return the kinds of layers in the cache that transformers makes for a model."""
    return {type(layer) for layer in DynamicCache(config=model.config.get_text_config(decoder=True)).layers}


def _check_compiled(task: Task, model: Any, *, eager: bool) -> None:
    why = None if task == "masked" else _not_own(model)
    if why is None and task != "masked" and eager:
        why = "its attention, transformers' 'eager', takes no mask that is not made for it"
    if why is None and task == "seq2seq" and _kinds(model) != {DynamicLayer}:
        why = "its decoder keeps windows beside plain keys and values"
    if why is None and task == "causal":
        why = _not_alike(model)
    if why is None and task == "causal" and "position_ids" not in inspect.signature(model.forward).parameters:
        why = "it takes no positions"
    if why is None and rotary.scaling(model).exact:
        why = "its rotary positions are scaled by the length of each text, which a graph does not know"
    if why:
        raise OptionError(f"compile=True is not to be had for {type(model).__name__}, since {why}: leave it out.")


def _not_alike(model: Any) -> str | None:
    """Say why a causal model's windows are not those that a graph knows: one for all layers that have any."""
    config = model.config.get_text_config(decoder=True)
    layers = DynamicCache(config=config).layers
    windows = {layer.sliding_window for layer in layers if isinstance(layer, DynamicSlidingWindowLayer)}
    kinds = {"full_attention", "sliding_attention"}
    known = kinds.issuperset(getattr(config, "layer_types", None) or ())
    return None if len(windows) < 2 and known else "its layers have windows of several kinds"  # noqa: PLR2004


def unexpected(task: Task, engine: EngineWord, model_type: str) -> str | None:
    """Say that a family should run on lmkit's own loop and does not; None if all is as it should be."""
    padding = task == "causal" and model_type in PADDING_SENSITIVE
    if engine == "lmkit" or padding or model_type not in OWN:
        return None
    return (
        f"{model_type!r} ran on lmkit's own loop with transformers {TESTED['transformers']}, which lmkit was tested "
        f"with; here are {version('transformers')}, or the checkpoint's own code"
    )
