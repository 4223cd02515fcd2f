"""`LoadPlan`: everything that is decided about a load before its weights are read.

`load()` makes one and executes exactly it. What a plan does not hold yet (bytes per module and device,
what would fit) belongs here, from the headers that `weights` reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lmkit.errors import UnknownTaskError, WeightsError, listed
from lmkit.packing import packs
from lmkit.placement import resolve_placement
from lmkit.precision import resolve_precision
from lmkit.results import Result
from lmkit.tasks import TASK_WORDS, check_task
from lmkit.weights import check_code, check_tokenizer, check_weights, read_json, reading

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedConfig

    from lmkit.placement import Devices, Placement
    from lmkit.precision import Precision
    from lmkit.tasks import Task
    from lmkit.weights import Source

__all__ = ["LoadPlan"]


@dataclass(frozen=True, slots=True)
class LoadPlan(Result):
    """What will be loaded, in what precision, where to, and why.

    Attributes:
        task: What the model is loaded for.
        name: The name as the caller wrote it.
        architecture: What the checkpoint calls its model; its model type if it does not say.
        model_class: The transformers class that will hold it.
        precision: What the weights will be held in.
        placement: Where they will go.
        kernels: `"packed"` where linear layers are kept in the order of the processor's own kernel, else `"torch"`.
        context_length: The most tokens the model takes at once; None where nothing bounds it.
        reasons: Why, a sentence per automatic choice.
    """

    task: Task
    name: str
    architecture: str
    model_class: str
    precision: Precision
    placement: Placement
    kernels: Literal["torch", "packed"]
    context_length: int | None
    reasons: Mapping[str, str]


def make_plan(
    task: Task,
    source: Source,
    precision: Any,
    devices: Devices,
    *,
    trust_remote_code: bool,
    allow_pickle: bool,
) -> tuple[LoadPlan, PreTrainedConfig]:
    """Decide how to load a checkpoint; only its config and the headers of its weights are read.

    Raises:
        UnknownTaskError: The checkpoint was made for another task.
        WeightsError: A file is absent, broken or refused.
        PrecisionError: `precision` is not accepted.
        PlacementError: `devices` is not accepted.
    """
    config = read_config(source, trusted=trust_remote_code)
    model_class = check_task(task, config, source.name, trusted=trust_remote_code)
    placed = resolve_placement(devices)
    # Only what the checkpoint says: PreTrainedConfig.dtype is None where config.json has none.
    saved = None if source.gguf_file else config.dtype
    chosen = resolve_precision(precision, saved, placed.device_type, packed=packing(source, config))
    check_weights(source, allow_pickle=allow_pickle)
    check_tokenizer(source)
    if (source.folder / "generation_config.json").is_file() and not source.gguf_file:
        read_json(source.folder / "generation_config.json")  # transformers goes on without a broken one
    architecture = (config.architectures or [config.model_type])[0]
    reasons = {"precision": chosen.reason, "devices": placed.reason}
    if source.gguf_file is not None:
        reasons["format"] = f"GGUF: its packed weights are widened to {chosen.dtype} as they are read"
    packed = (
        placed.device_type == "cpu"
        and str(chosen.dtype) == "torch.bfloat16"
        and chosen.quantization is None
        and packs()
    )
    if packed:
        reasons["kernels"] = "bfloat16 on this CPU: linear layers are reordered once for its matrix kernel"
    plan = LoadPlan(
        task=task,
        name=source.name,
        architecture=architecture,
        model_class=model_class,
        precision=chosen,
        placement=placed,
        kernels="packed" if packed else "torch",
        context_length=context_length(config),
        reasons=reasons,
    )
    return plan, config


def packing(source: Source, config: PreTrainedConfig) -> str | None:
    """Name how a checkpoint's weights are quantized in its file already; None if they are not."""
    if source.gguf_file is not None:
        return "gguf"
    saved = getattr(config, "quantization_config", None)
    if saved is None:
        return None
    method: Any = saved.get("quant_method") if isinstance(saved, dict) else saved.quant_method
    return None if method is None else str(getattr(method, "value", method))


def read_config(source: Source, *, trusted: bool) -> PreTrainedConfig:
    """Read a checkpoint's config into its transformers class.

    Raises:
        UnknownTaskError: transformers does not know the architecture.
        WeightsError: The config is absent or not JSON, or needs code that is not trusted.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    gguf: dict[str, Any] = {"gguf_file": source.gguf_file} if source.gguf_file else {}
    if not gguf:
        content = source.read_config()
        check_code(source, content, trusted=trusted)
        if named := content.get("transformers_weights"):
            msg = f"the config of {source.name!r} names other weights, {named!r}: lmkit reads model.safetensors only."
            raise WeightsError(msg)
        kind = content.get("model_type")
        if not (isinstance(kind, str) and kind in CONFIG_MAPPING) and not content.get("auto_map"):
            msg = (
                f"{source.name!r} has model type {kind!r}, an architecture the installed transformers does not know: "
                f"update transformers, or load a checkpoint made for one of {listed(sorted(set(TASK_WORDS.values())))}."
            )
            raise UnknownTaskError(msg)
    with reading(f"the config of {source.name!r}"):
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            source.folder, trust_remote_code=trusted, local_files_only=True, **gguf
        )
    return config


def context_length(config: PreTrainedConfig) -> int | None:
    """Return how many tokens a model takes at once, by its config; None where nothing bounds it.

    Positions that are relative (T5, BLOOM, DeBERTa-v2) or none at all (Mamba) have no bound, whatever the
    config mentions. RoBERTa-like tables lose the places up to the padding token's.
    """
    text: Any = config.get_text_config(decoder=True)
    if hasattr(text, "relative_attention_num_buckets") or getattr(text, "position_biased_input", True) is False:
        return None
    if getattr(text, "alibi", False) or text.model_type in _UNBOUNDED:
        return None
    length = getattr(text, "max_position_embeddings", None)
    if length is None:
        return None
    if text.model_type in _OFFSET_BY_PADDING and text.pad_token_id is not None:
        return int(length) - int(text.pad_token_id) - 1
    return int(length)


_UNBOUNDED = frozenset({"bloom", "mpt", "mamba", "mamba2", "falcon_mamba", "rwkv", "xlnet", "transfo-xl"})
_OFFSET_BY_PADDING = frozenset(
    [
        "camembert",
        "data2vec-text",
        "esm",
        "ibert",
        "longformer",
        "luke",
        "mpnet",
        "roberta",
        "roberta-prelayernorm",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xmod",
    ]
)
"""Model types whose position ids begin behind the padding token's id."""
