"""Whether a file has the weights that a model needs, by names and shapes, and which tied ones have their own."""

from __future__ import annotations

import copy
import functools
import re
from collections import defaultdict
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
    rename, divide or join what files hold. It takes a tenth of a millisecond for each, so it is first given one of all
    layers that are alike; if that leaves a doubt, it loads all.

    Raises:
        WeightsError: It lacks some, or has other shapes for them.
    """
    found = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    if all(found.get(key) == shape for key, shape in skeleton.shapes.items()):
        return
    alike = {} if _names_layers(skeleton.model) else _alike(found, skeleton.shapes)
    first = {key: shape for key, shape in found.items() if key not in alike}
    report = _report(skeleton, first)
    if alike and set(report["missing_keys"]) <= alike.keys() and not report["mismatched_keys"]:
        return
    check_report(_report(skeleton, found) if alike else report, name, type(skeleton.model).__name__)


def _report(skeleton: Skeleton, found: Mapping[str, tuple[int, ...]]) -> Mapping[str, Any]:
    """Have transformers load tensors of these shapes without values; return what it says of them."""
    dtype = skeleton.precision.dtype
    report: Mapping[str, Any]
    _, report = type(skeleton.model).from_pretrained(
        None,
        config=copy.deepcopy(skeleton.model.config),  # the text part, where the class is the text's
        state_dict={key: torch.empty(shape, dtype=dtype, device="meta") for key, shape in found.items()},
        dtype=dtype,
        device_map={"": "meta"},
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    return report


_NUMBER = re.compile(r"(?:^|(?<=\.))\d+(?=\.)")


def _names_layers(model: Any) -> bool:
    """Say whether transformers' patterns for a model name a layer by its number: else all numbers are alike to them."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    steps = get_model_conversion_mapping(model)
    patterns = [one for step in steps for one in (*step.source_patterns, getattr(step, "scope_prefix", None) or "")]
    return any(re.search(r"(?<![A-Za-z_\d])\d", re.sub(r"\\d|\[0-9\]", "", pattern)) for pattern in patterns)


def _alike(found: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Return the weights, of a file and of a model, whose layer is like another: in both the same but for its number.

    Numbers of as many digits are compared, for a pattern may tell these apart.

    Returns:
        The name of each, and the number of the layer that it is like.
    """
    layers: dict[str, list[tuple[bool, str, tuple[int, ...]]]] = defaultdict(list)
    numbers: dict[str, str] = {}
    for which, tensors in ((False, found), (True, shapes)):
        for key, shape in tensors.items():
            if (number := _NUMBER.search(key)) is not None:
                layers[number[0]].append((which, f"{key[: number.start()]}#{key[number.end() :]}", shape))
                numbers[key] = number[0]
    first: dict[object, str] = {}
    like = {number: first.setdefault((len(number), frozenset(layer)), number) for number, layer in layers.items()}
    return {key: like[number] for key, number in numbers.items() if like[number] != number}


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
    """Return the names in a file by those that the model has for them; those of tied weights at the least."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    steps, state = get_model_conversion_mapping(model), model.state_dict()
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    converters = [step for step in steps if isinstance(step, WeightConverter)]

    def own(name: str) -> str:
        return rename_source_key(name, renamings, converters, model.base_model_prefix, state)[0]

    if not _names_layers(model):
        ties = {_unnumbered(name) for pair in model.all_tied_weights_keys.items() for name in pair}
        tied = functools.cache(lambda key: _unnumbered(own(key)) in ties)
        first: dict[str, str] = {}
        names = [name for name in names if tied(first.setdefault(_unnumbered(name), name))]
    return {own(name): name for name in names}


def _unnumbered(name: str) -> str:
    """Return a name with something else in the place of its numbers, of the same length."""
    return _NUMBER.sub(lambda number: "#" * len(number[0]), name)


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
