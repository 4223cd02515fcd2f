"""Whether a file has the weights that a model needs, by names and shapes."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

from lmkit.errors import WeightsError, listed

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedConfig

    from lmkit.headers import TensorInfo
    from lmkit.skeleton import Skeleton

__all__ = ["check_names", "check_report"]


def check_names(skeleton: Skeleton, config: PreTrainedConfig, tensors: Mapping[str, TensorInfo], name: str) -> None:
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
        config=copy.deepcopy(config),
        state_dict=empty,
        dtype=dtype,
        device_map={"": "meta"},
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    check_report(report, name, kind.__name__)


def check_report(report: Mapping[str, Any], name: str, model_class: str) -> None:
    """Refuse a model of which a part was not in the file: it would be random there."""
    # transformers leaves out of the report what is tied or what the class declares as not saved.
    for what, kind in (("missing_keys", "lacks"), ("mismatched_keys", "has other shapes for")):
        if names := sorted(key if isinstance(key, str) else str(key[0]) for key in report.get(what) or ()):
            shown = f"{listed(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"  # noqa: PLR2004
            msg = (
                f"{name!r} {kind} weights that {model_class} needs: {shown}. They would be random: "
                "load a checkpoint that was saved with this head, or under the task it was saved for."
            )
            raise WeightsError(msg)
