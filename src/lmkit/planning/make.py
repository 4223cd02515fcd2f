"""Everything about a load is decided here, from the config and the headers of the weight files alone.

`load()` makes a `LoadPlan` and executes exactly it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lmkit.checkpoint.bounds import Bounds
from lmkit.checkpoint.config import chat_template, end_token_ids, read_config
from lmkit.checkpoint.files import Source, check_tokenizer, read_json, reading
from lmkit.checkpoint.gguf import end_tokens
from lmkit.checkpoint.tasks import check_task
from lmkit.errors import PlacementError, listed
from lmkit.kernels.native.build import instructions
from lmkit.kernels.native.linear import rounding
from lmkit.kernels.native.operators import refusal
from lmkit.planning.adapters import bringing, templated
from lmkit.planning.layout import offload, size
from lmkit.planning.placement import Placement, resolve_placement
from lmkit.planning.plan import LoadPlan
from lmkit.planning.told_language import check_language
from lmkit.planning.trial import PREFIX_CACHE_BYTES, Case, Trial, Wish
from lmkit.planning.weight_names import check_held, check_names
from lmkit.text.codec import turn_end

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from transformers import PreTrainedConfig

    from lmkit.checkpoint.headers import TensorInfo
    from lmkit.planning.machine import Machine


def make_plan(
    wish: Wish,
    source: Source,
    tensors: Mapping[str, TensorInfo] | None,
    machine: Machine,
    read_tokenizer: Callable[[], Any],
    *,
    absent: bool = False,
) -> tuple[LoadPlan, PreTrainedConfig]:
    """Decide how to load a checkpoint; only its config and the headers of its weights are read.

    Args:
        wish: What the caller asked for.
        source: The checkpoint's small files.
        tensors: What the headers of its weights say; None for pickles.
        machine: What is here.
        read_tokenizer: Reads the tokenizer, which is asked how texts end where the checkpoint may not say it all.
        absent: Plan for devices that are not here, too.

    Raises:
        UnknownTaskError: The checkpoint was made for another task.
        WeightsError: A file is absent, broken or refused.
        OptionError: Compiled steps are asked for, and the family has none; or `language` is missing or not accepted.
        PrecisionError: `precision` is not accepted, or an adapter replaces what it would quantize.
        PlacementError: `devices` is not accepted. What does not fit is said in the plan.
    """
    bounds, trusted = Bounds.of(tensors), wish.access.trust_remote_code
    config = read_config(source, trusted=trusted, bounds=bounds, attention=wish.attn_implementation)
    model_class = check_task(wish.task, config, source.name, trusted=trusted)
    language = check_language(config, wish.language, source.name)
    placed = resolve_placement(wish.devices, machine, absent=absent)
    _check_beside(source)
    case = Case(wish, machine, source, tensors, config)
    trial = _tried(case, placed)
    moved = trial.only_the_cpu_has_room
    if moved:
        trial = Trial.of(case, _without_accelerators(placed))
    ends = _end_tokens(case, read_tokenizer)
    reasons = _reasons(trial) | {
        "ends": _told(ends, source),
        "language": language and f"the model works in {language!r} alone",
    }
    if moved:
        told = "no accelerator has room for a part, so that the CPU holds and computes all of it"
        reasons["offload"] = reasons["offload"] or told
    return _planned(trial, model_class, ends, reasons), config


def _tried(case: Case, placed: Placement) -> Trial:
    """Try what was asked for with a checkpoint, and check that the headers say what the model needs."""
    tensors, name = case.tensors, case.source.name
    if tensors is not None:
        check_held(case.saved_quantization, tensors, name)
    trial = Trial.of(case, placed)
    if tensors is not None and case.saved_quantization is None:
        with reading(f"the weights of {name!r}"):
            check_names(trial.skeleton, tensors, name)
    return trial


def _planned(trial: Trial, model_class: str, ends: Iterable[int], reasons: Mapping[str, str | None]) -> LoadPlan:
    case, skeleton = trial.case, trial.skeleton
    return LoadPlan(
        task=case.wish.task,
        name=case.source.name,
        architecture=(case.config.architectures or [case.config.model_type])[0],
        model_class=model_class,
        parameters=skeleton.parameters,
        precision=skeleton.precision,
        placement=trial.placed,
        kernels="native" if trial.native else "packed" if trial.packed else "torch",
        attention=skeleton.running.attention,
        engine=skeleton.running.engine,
        compiled=case.wish.compile is True,
        prefix_cache_bytes=case.wish.prefix_cache_bytes if skeleton.running.keeps_prefixes else 0,
        key_values=skeleton.key_values,
        context_length=case.context[0],
        end_token_ids=tuple(ends),
        fits=reasons["fits"] is None,
        reasons={what: reason for what, reason in reasons.items() if reason},
        _layout=trial.layout,
        _together=trial.together,
    )


def check_fits(plan: LoadPlan) -> None:
    """Refuse a plan that does not fit.

    Raises:
        PlacementError: It does not; the message names the device, what is needed and what is there, and what would fit.
    """
    if not plan.fits:
        raise PlacementError(f"the devices cannot hold {plan.name!r}: {plan.reasons['fits']}")


def _check_beside(source: Source) -> None:
    """Check the files beside the weights, of which transformers would go on without a broken one."""
    check_tokenizer(source)
    if (source.folder / "generation_config.json").is_file() and not source.gguf_file:
        read_json(source.folder / "generation_config.json")


def _end_tokens(case: Case, read_tokenizer: Callable[[], Any]) -> Mapping[int, str]:
    """Return tokens that end an answer and that the generation config may lack, with their texts."""
    source, adapters = case.source, case.wish.adapters
    if source.gguf_file is not None:
        with reading(source.name):
            return end_tokens(source.folder / source.gguf_file)
    known = end_token_ids(source, case.config)
    folders = [source.folder, *(one.folder for one in adapters)]
    if case.wish.task != "causal" or not any(map(chat_template, folders)):
        return {}
    tokenizer = read_tokenizer()
    end = turn_end(tokenizer)
    return {} if end is None or end in known else {end: tokenizer.convert_ids_to_tokens(end)}


def _told(ends: Mapping[int, str], source: Source) -> str | None:
    if not ends:
        return None
    if source.gguf_file is not None:
        return f"{listed(ends.values())}, as llama.cpp counts the ends of this GGUF file"
    return f"{listed(ends.values())} ends an answer in chats, since it ends a turn in the chat template"


def _without_accelerators(placed: Placement) -> Placement:
    """Return what is left of a placement whose accelerators have no room for any part: the CPU computes."""
    device_map = {"": "cpu"} if placed.offload_folder is None else "auto"
    reason = f"{placed.reason}; no accelerator has room for a part"
    budgets = {"cpu": placed.max_memory["cpu"]}
    return replace(placed, device_map=device_map, max_memory=budgets, reason=reason)


def _reasons(trial: Trial) -> dict[str, str | None]:
    """Say why, a sentence per automatic choice."""
    skeleton = trial.skeleton
    return {
        "precision": skeleton.precision.reason,
        "devices": trial.placed.reason,
        "context": trial.case.context[1],
        "format": _widened(trial),
        "quantized": _quantized(trial),
        "untied": _untied(trial),
        "kernels": _kernels(trial),
        "together": _together(trial),
        "adapter": _adapters(trial),
        **skeleton.running.reasons,
        "prefixes": _prefixes(trial),
        "offload": offload(trial.layout, trial.placed),
        "fits": trial.shortage(),
    }


def _widened(trial: Trial) -> str | None:
    """Say that a GGUF file's weights are not held as they lie there."""
    if trial.case.source.gguf_file is None:
        return None
    inside = size(sum(tensor.nbytes for tensor in (trial.case.tensors or {}).values()))
    return f"GGUF: the {inside} of packed weights are widened to {trial.skeleton.precision.dtype} as they are read"


def _quantized(trial: Trial) -> str | None:
    """Say how much of a quantized model is not."""
    if trial.skeleton.quantizer is None:
        return None
    held = [(dtype, count) for _, dtype, count in trial.skeleton.tensors()]
    wide = sum(count for dtype, count in held if "float" in dtype)
    total = sum(count for _, count in held)
    return f"{size(total - wide)} are quantized, {size(wide)} stay in {trial.skeleton.precision.dtype}"


def _untied(trial: Trial) -> str | None:
    """Say which weights are held beside those that a new model has in their place."""
    pairs = [f"{name} beside {origin}" for name, origin in trial.skeleton.untied.items()]
    told = "transformers ties them in a new model, and the file has both, different"
    return f"{', '.join(pairs)}: {told}" if pairs else None


def _kernels(trial: Trial) -> str | None:
    if not trial.native and trial.skeleton.native:
        return f"torch's, although lmkit's own were asked for: {refusal()}"
    if not (trial.native or trial.packed):
        return None
    if trial.native:
        isa = instructions()
        rows = "linear layers in bfloat16 are reordered once for them" if trial.packed else rounding(isa)
        reason = f"lmkit's own, for this processor's {isa}, compiled once on this machine: {rows}"
    else:
        reason = "bfloat16 on this CPU: linear layers are reordered once for its matrix kernel"
    twice = trial.skeleton.twice_bytes if trial.packed else trial.skeleton.head_bytes
    if not twice:
        return reason
    if trial.packed:
        return f"{reason}; those whose weight is another module's too are held twice, {size(twice)} more"
    return f"{reason}; the output layer, which is embeddings' too, is held in 8 bits as well, {size(twice)} more"


def _together(trial: Trial) -> str | None:
    """Say how many layers become how many products."""
    if trial.skeleton.together is None:
        return "none: which linear layers read the same input only shows when this model runs"
    layers = sum(map(len, trial.together))
    return f"{layers} linear layers that read the same input are {len(trial.together)} products" if layers else None


def _adapters(trial: Trial) -> str | None:
    """Say what adapters take, whose tokenizer is used, and that one beside the weights is left alone."""
    source, adapters = trial.case.source, trial.case.wish.adapters
    if not adapters:
        beside = (source.folder / "adapter_config.json").is_file()
        return f"one beside the weights is not put on: adapter={source.name!r} would do that" if beside else None
    rows, told = trial.skeleton.rows, [f"{size(trial.adapters)} beside the model's own weights"]
    if (brought := bringing(adapters)) is not None:
        whose = "its" if chat_template(brought.folder) else "the model's"
        told.append(f"the tokenizer is that of {brought.origin!r}, with {whose} chat template")
    elif (brought := templated(adapters)) is not None:
        told.append(f"the chat template is that of {brought.origin!r}")
    elif len(adapters) > 1:
        told.append("the tokenizer is the model's")
    if rows is not None:
        told.append(f"embeddings of {rows} tokens, with which it was trained")
    return "; ".join(told)


def _prefixes(trial: Trial) -> str | None:
    """Say that prefixes cannot be kept, where that was asked for."""
    if trial.skeleton.running.keeps_prefixes or trial.case.wish.prefix_cache_bytes in (0, PREFIX_CACHE_BYTES):
        return None
    return "none are kept: only plain keys and values of a causal model, on lmkit's own loop, can be put into a batch"
