"""A checkpoint's config: read safely, and what it says of quantization and context."""

from __future__ import annotations

import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lmkit.checkpoint.bounds import Bounds
from lmkit.checkpoint.code import check_code, import_modeling
from lmkit.checkpoint.files import Source, read_object, reading
from lmkit.checkpoint.tasks import TASK_WORDS
from lmkit.errors import OptionError, UnknownTaskError, WeightsError, listed

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from transformers import PreTrainedConfig


def saved_quantization(source: Source, config: PreTrainedConfig) -> str | None:
    """Name how a checkpoint's weights are quantized in its file already; None if they are not."""
    if source.gguf_file is not None:
        return "gguf"
    saved = getattr(config, "quantization_config", None)
    if saved is None:
        return None
    settings: Any = saved if isinstance(saved, dict) else saved.to_dict()
    method: Any = settings.get("quant_method")
    if method == "lmkit":
        import lmkit.kernels.quantizer  # noqa: F401 - transformers knows it from now on

        return f"int{settings.get('bits')}"
    return None if method is None else str(getattr(method, "value", method))


def read_config(
    source: Source, *, trusted: bool, bounds: Bounds | None = None, attention: str | None = None
) -> PreTrainedConfig:
    """Read a checkpoint's config into its transformers class.

    Args:
        source: The checkpoint's small files.
        trusted: Whether code that it brings or names may run.
        bounds: The largest model that its weights could fill, where their headers were read.
        attention: What the caller asks for in the place of the attention that it names.

    Raises:
        UnknownTaskError: transformers does not know the architecture.
        WeightsError: The config is absent or not JSON, claims more than `bounds`, or needs code that is not trusted,
            or names some.
    """
    from transformers import AutoConfig, PreTrainedConfig

    gguf: dict[str, Any] = {"gguf_file": source.gguf_file} if source.gguf_file else {}
    if not gguf:
        content = source.read_config()
        check_class(source, content, trusted=trusted)
        check_code(source.name, content, trusted=trusted, attention=attention)
        _check_values(source, content)
        if named := content.get("transformers_weights"):
            raise WeightsError(
                f"the config of {source.name!r} names other weights, {named!r}: lmkit reads model.safetensors only."
            )
    with reading(f"the config of {source.name!r}"):
        raw, _ = PreTrainedConfig.get_config_dict(source.folder, local_files_only=True, **gguf)
        (bounds or Bounds()).check_config(raw, source.name)
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            source.folder, trust_remote_code=trusted, local_files_only=True, **gguf
        )
        import_modeling(config, trusted=trusted)
        _check_kinds(config)
    quantized = getattr(config, "quantization_config", None)
    if isinstance(quantized, dict) and quantized.keys() & {"load_in_4bit", "load_in_8bit"}:
        quantized.setdefault("quant_method", "bitsandbytes")  # old ones leave it out
    return config


def _check_kinds(config: Any) -> None:
    """Refuse what transformers keeps as it is, and whatever asks for it stumbles over."""
    named = config.architectures
    if named is not None and not (isinstance(named, list) and all(isinstance(one, str) for one in named)):
        raise ValueError(f"architectures is {named!r}, not a list of names of classes")
    for decoder in (True, False):
        if not hasattr(inside := config.get_text_config(decoder=decoder), "model_type"):
            raise ValueError(f"{inside!r} stands where the config of the text model belongs")


def _check_values(source: Source, content: dict[str, Any]) -> None:
    """Refuse values that transformers stumbles over.

    Raises:
        WeightsError: One is not what transformers takes; the message names the file and what it takes.
    """
    import torch

    file = source.folder / "config.json"
    dtype = content.get("dtype") or content.get("torch_dtype")
    if dtype is not None and not (isinstance(dtype, str) and isinstance(getattr(torch, dtype, None), torch.dtype)):
        raise WeightsError(f'{file} has dtype {json.dumps(dtype)}: write "bfloat16", "float16" or "float32" there.')
    _numbers(file, content)
    grouped, quantized = content.get("quantization"), content.get("quantization_config")
    if isinstance(grouped, dict) and {"group_size", "bits"} <= grouped.keys():
        raise WeightsError(
            f"{source.name!r} is quantized for Apple's MLX, which transformers does not read: load the checkpoint that "
            "it was made from."
        )
    if isinstance(quantized, dict) and not {"quant_method", "load_in_4bit", "load_in_8bit"} & quantized.keys():
        raise WeightsError(
            f"{file} has a quantization_config without quant_method, so there is no telling how its weights are held: "
            "add it there, or take the quantization_config out if the weights are plain."
        )


def _numbers(file: Path, content: dict[str, Any]) -> list[int]:
    """Return the tokens that a file says end a text."""
    said = content.get("eos_token_id")
    ends = said if isinstance(said, list) else [] if said is None else [said]
    if not all(type(end) is int for end in ends):
        raise WeightsError(
            f"{file} has eos_token_id {json.dumps(said)}, which is not the number of a token, or a list of numbers: "
            "correct it there."
        )
    return ends


def check_class(source: Source, content: dict[str, Any], *, trusted: bool) -> None:
    """Refuse a config whose class transformers does not have, and one whose class is the checkpoint's own code.

    Raises:
        UnknownTaskError: transformers does not know the architecture.
        WeightsError: It needs its own code and `trusted` is False.
    """
    from transformers import CONFIG_MAPPING

    brought, kind = content.get("auto_map"), content.get("model_type")
    if isinstance(kind, str) and kind in CONFIG_MAPPING:
        return
    if not brought:
        raise UnknownTaskError(
            f"{source.name!r} has model type {kind!r}, an architecture the installed transformers does not know: "
            f"update transformers, or load a checkpoint made for one of {listed(sorted(set(TASK_WORDS.values())))}."
        )
    if not trusted:
        code = sorted(map(str, brought.values() if isinstance(brought, dict) else [brought]))
        raise WeightsError(
            f"{source.name!r} needs its own code ({listed(code)}), which could do anything on this machine: "
            "read it, and pass trust_remote_code=True if you trust it."
        )


def end_token_ids(source: Source, config: PreTrainedConfig) -> list[int]:
    """Return the tokens that end a text by what a checkpoint says to `generate`.

    Raises:
        WeightsError: What it says is no token's number, and no list of them.
    """
    file = source.folder / "generation_config.json"
    if file.is_file():
        return _numbers(file, read_object(file))
    return _numbers(file, {"eos_token_id": getattr(config.get_text_config(decoder=True), "eos_token_id", None)})


def chat_template(folder: Path) -> Any:
    """Return the chat template that a folder has for a tokenizer: a text, or several by name; None if it has none."""
    with reading(f"the chat template in {folder}"):
        if (file := folder / "chat_template.jinja").is_file():
            return file.read_text(encoding="utf-8")
        settings = folder / "tokenizer_config.json"
        written = read_object(settings).get("chat_template") if settings.is_file() else None
        if isinstance(written, list):  # as transformers writes several
            return {one["name"]: one["template"] for one in written}
        return written


def context(config: PreTrainedConfig, asked: int | None = None) -> tuple[int | None, str | None]:
    """Return how many tokens a model takes at once, and why, where its config does not simply say so.

    Positions that are relative (T5, BLOOM, DeBERTa-v2) or none at all (Mamba) have no bound, whatever the config
    mentions. RoBERTa-like tables lose the places up to the padding token's. Rotary positions that are scaled reach as
    far as vLLM counts them.

    Args:
        config: The checkpoint's config.
        asked: What the caller says it is.

    Raises:
        OptionError: Positions have places of their own in a table, and fewer than `asked`.
    """
    length, reason = _scaled(config, _written_length(config))
    if asked is None:
        return length, reason
    if length is not None and asked > length and not rotary_settings(config):
        raise OptionError(
            f"context_length={asked} is not accepted: {config.model_type!r} has a table of {length} positions. Pass at "
            "most as many, or leave it out."
        )
    return asked, f"as asked; the config says {'nothing' if length is None else f'{length:,} tokens'}"


def rotary_settings(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """Return the settings of a model's rotary positions: one for each type of its layers where these differ."""
    found: Any = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    inside = [one for one in found.values() if isinstance(one, dict)]
    return inside if inside or not found else [found]


@contextmanager
def known_rotary(config: PreTrainedConfig, name: str) -> Iterator[None]:
    """Say which scaling of rotary positions transformers does not know, while a model is built.

    Raises:
        WeightsError: The config names an unknown one.
    """
    try:
        yield
    except KeyError as error:
        kind = error.args[0]
        if kind not in [settings.get("rope_type") for settings in rotary_settings(config)]:
            raise
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        raise WeightsError(
            f"the config of {name!r} scales its rotary positions by {kind!r}, which the installed transformers does "
            f"not know: update transformers. It knows {listed(['default', *ROPE_INIT_FUNCTIONS])}."
        ) from error


def _scaled(config: PreTrainedConfig, length: int | None) -> tuple[int | None, str | None]:
    """Return how far positions reach that are scaled: vLLM's rule, but for a factor that is not a number.

    LongRoPE and Llama 3 write the scaled length into the config, and so does Gemma 3.
    """
    if length is None or "gemma3" in config.model_type:
        return length, None
    for settings in rotary_settings(config):
        kind, factor = settings.get("rope_type"), settings.get("factor")
        if kind in ("default", "su", "longrope", "llama3") or not isinstance(factor, (int, float)) or factor == 1:
            continue
        before = int(settings.get("original_max_position_embeddings", length)) if kind == "yarn" else length
        return int(before * factor), f"{kind} scales {before:,} positions by {factor:g}"
    return length, None


def _written_length(config: PreTrainedConfig) -> int | None:
    text: Any = config.get_text_config(decoder=True)
    tabled = text.model_type in _OFFSET_BY_PADDING
    relative = hasattr(text, "relative_attention_num_buckets") and not tabled  # MPNet has both
    unplaced = getattr(text, "position_biased_input", True) is False or getattr(text, "alibi", False)
    length = getattr(text, "max_position_embeddings", None)
    if relative or unplaced or text.model_type in _UNBOUNDED or length is None:
        return None
    return int(length) - (int(text.pad_token_id) + 1 if tabled and text.pad_token_id is not None else 0)


_UNBOUNDED = frozenset({"bloom", "mpt", "mamba", "mamba2", "falcon_mamba", "rwkv", "xlnet", "transfo-xl"})
_OFFSET_BY_PADDING = frozenset(
    "camembert data2vec-text esm ibert longformer luke mpnet roberta roberta-prelayernorm "
    "xlm-roberta xlm-roberta-xl xmod".split()
)
"""Model types whose position ids begin behind the padding token's id."""
