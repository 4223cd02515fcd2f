"""Whether a file has the weights that a model needs, by names and shapes, and which tied ones have their own."""

from __future__ import annotations

import copy
import re
from typing import TYPE_CHECKING, Any

import torch

from lmkit.errors import WeightsError, listed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from lmkit.checkpoint.headers import TensorInfo
    from lmkit.planning.skeleton import Skeleton


def check_names(skeleton: Skeleton, tensors: Mapping[str, TensorInfo], name: str) -> None:
    """Check, by the headers alone, that a file has all weights of a model.

    Where names differ from the model's own, transformers itself loads tensors without values, since many families
    rename, divide or join what files hold; it takes a tenth of a second.

    Raises:
        WeightsError: It lacks some, or has other shapes for them.
    """
    found = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    if all(found.get(key) == shape for key, shape in skeleton.shapes.items()):
        return
    dtype, kind = skeleton.precision.dtype, type(skeleton.model)
    empty = {key: torch.empty(shape, dtype=dtype, device="meta") for key, shape in found.items()}
    _, report = kind.from_pretrained(
        None,
        config=copy.deepcopy(skeleton.model.config),  # the text part, where the class is the text's
        state_dict=empty,
        dtype=dtype,
        device_map={"": "meta"},
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    check_report(report, name, kind.__name__)


def with_own_values(model: Any, names: Iterable[str], weights: Callable[[], Mapping[str, torch.Tensor]]) -> list[str]:
    """Return which weights, tied in a new model, a file has with values of their own, so that they are not tied.

    Args:
        model: The model on the meta device, all of its ties in place.
        names: What the file holds.
        weights: Maps its weights into memory. One whose header alone is here counts as another than what it would be
            tied to.
    """
    held = _by_own_names(model, names)
    own = []
    for target, origin in model.all_tied_weights_keys.items():  # as PreTrainedModel.tie_weights goes through them
        if target in held and origin in held:
            if not _same(*(weights().get(held[name]) for name in (target, origin))):
                own.append(target)
        elif target in held:
            held[origin] = held[target]
    return own


def _by_own_names(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Return the names in a file by those that the model has for them."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    steps, state = get_model_conversion_mapping(model), model.state_dict()
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    converters = [step for step in steps if isinstance(step, WeightConverter)]
    return {rename_source_key(name, renamings, converters, model.base_model_prefix, state)[0]: name for name in names}


def _same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None or one.shape != other.shape:
        return False
    wide = torch.promote_types(one.dtype, other.dtype)
    return torch.equal(one.to(wide), other.to(wide))


_WRAPPED = re.compile(r"_orig_mod\.|_fsdp_wrapped_module\.|^module\.|^base_model\.model\.")


def check_held(method: str | None, tensors: Mapping[str, TensorInfo], name: str) -> None:
    """Check that what a config says bitsandbytes has quantized is.

    Raises:
        WeightsError: The file has none of what bitsandbytes keeps beside a weight.
    """
    if method == "bitsandbytes" and not any(key.endswith((".SCB", ".absmax")) for key in tensors):
        raise WeightsError(
            f"the config of {name!r} has a quantization_config of bitsandbytes, and its weights are plain: take it out "
            "of config.json, and pass precision='nf4' or 'int8' to quantize them."
        )


def check_report(report: Mapping[str, Any], name: str, model_class: str) -> None:
    """Refuse a model of which a part was not in the file: it would be random there."""
    # transformers leaves out of the report what is tied or what the class declares as not saved.
    for what, kind in (("missing_keys", "lacks"), ("mismatched_keys", "has other shapes for")):
        if names := sorted(key if isinstance(key, str) else str(key[0]) for key in report.get(what) or ()):
            wrapped = {found[0] for key in report.get("unexpected_keys") or () if (found := _WRAPPED.search(key))}
            if wrapped:
                raise WeightsError(
                    f"the names of the weights in {name!r} have {listed(sorted(wrapped))}, which a wrapper put there "
                    "(of torch.compile, data parallel training or peft): save the model inside it, or rename them."
                )
            shown = f"{listed(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"  # noqa: PLR2004
            raise WeightsError(
                f"{name!r} {kind} weights that {model_class} needs: {shown}. They would be random: "
                "load a checkpoint that was saved with this head, or under the task it was saved for."
            )
