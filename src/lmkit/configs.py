"""A checkpoint's config: read safely, and what it says of quantization and context."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lmkit.errors import UnknownTaskError, WeightsError, listed
from lmkit.tasks import TASK_WORDS
from lmkit.weights import check_code, reading

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from lmkit.weights import Source

__all__ = ["context_length", "packing", "read_config"]


def packing(source: Source, config: PreTrainedConfig) -> str | None:
    """Name how a checkpoint's weights are quantized in its file already; None if they are not."""
    if source.gguf_file is not None:
        return "gguf"
    saved = getattr(config, "quantization_config", None)
    if saved is None:
        return None
    settings: Any = saved if isinstance(saved, dict) else saved.to_dict()
    method: Any = settings.get("quant_method")
    if method == "lmkit":
        import lmkit.quantizer  # noqa: F401 - transformers knows it from now on

        return f"int{settings.get('bits')}"
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
    tabled = text.model_type in _OFFSET_BY_PADDING  # MPNet has both
    if not tabled and hasattr(text, "relative_attention_num_buckets"):
        return None
    if getattr(text, "position_biased_input", True) is False:
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
