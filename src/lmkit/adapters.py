"""PEFT adapters: what their files hold, whether they were made for this model, and how they are put on it."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from lmkit.errors import OptionError, PrecisionError, WeightsError, listed
from lmkit.headers import read_safetensors
from lmkit.quantized import Int8Embedding, QuantizedLinear
from lmkit.sources import ADAPTER_WEIGHTS, find_adapter
from lmkit.weights import read_json, reading

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from lmkit.headers import TensorInfo
    from lmkit.skeleton import Skeleton
    from lmkit.sources import HubOptions

__all__ = ["Adapter", "AdapterArgument"]

AdapterArgument: TypeAlias = "str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]] | None"
"""What `adapter=` accepts: a folder or Hub id, or several by name."""

DEFAULT = "default"
"""What a single adapter is called, as in peft."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter's files.

    Attributes:
        name: What it is called on the model.
        origin: The folder or Hub id as the caller wrote it.
        folder: Where its files are.
        tensors: Its weights, by their names in the file.
    """

    name: str
    origin: str
    folder: Path
    tensors: Mapping[str, TensorInfo]


def find_adapters(given: AdapterArgument, hub: HubOptions) -> list[Adapter]:
    """Find what `adapter=` names.

    Raises:
        OptionError: It is neither a name nor a dict of names.
        ModelNotFoundError: One is neither here nor reachable.
        WeightsError: The weights of one are absent, truncated or corrupt.
    """
    if given is None:
        return []
    named: Mapping[Any, Any] = given if isinstance(given, Mapping) else {DEFAULT: given}
    paths = all(isinstance(path, (str, os.PathLike)) for path in named.values())
    if not named or not paths or not all(isinstance(name, str) and re.fullmatch(r"\w+", name) for name in named):
        msg = (
            f"adapter={given!r} is not accepted: pass a folder or a Hub id, or a dict of several by name, each a word "
            "of letters, digits and '_'."
        )
        raise OptionError(msg)
    found = []
    for name, path in named.items():
        folder = find_adapter(os.fspath(path), hub)
        read_json(folder / "adapter_config.json")  # peft reads it when the weights are there
        found.append(Adapter(name, os.fspath(path), folder, read_safetensors(folder / ADAPTER_WEIGHTS)))
    return found


def check_base(adapter: Adapter, skeleton: Skeleton) -> None:
    """Check that a LoRA adapter's modules are the model's, and of the same sizes.

    Raises:
        WeightsError: It was made for another model.
        PrecisionError: It replaces whole layers, which would be quantized.
    """
    modules = dict(skeleton.model.named_modules())
    for name, tensor in adapter.tensors.items():
        module, _, part = name.removeprefix("base_model.model.").partition(".lora_")
        if not part and _quantized(modules.get(whole := module.removesuffix(".weight"))):
            msg = (
                f"the adapter {adapter.origin!r} replaces {whole!r} (its modules_to_save), which "
                f"{skeleton.precision.name} would quantize: pass precision='bfloat16', or an adapter of LoRA alone."
            )
            raise PrecisionError(msg)
        if part not in ("A.weight", "B.weight"):
            continue  # what peft knows besides is peft's to check
        base: Any = modules.get(module)
        sizes = {"A.weight": ("in_features", 1), "B.weight": ("out_features", 0)}[part]
        wanted = None if base is None else getattr(base, sizes[0], None)
        if base is None or (wanted is not None and wanted != tensor.shape[sizes[1]]):
            what = "which this model does not have" if base is None else f"of another size ({tensor.shape})"
            msg = (
                f"the adapter {adapter.origin!r} was made for another base model: it changes {module!r}, {what}. "
                "Load the model that its adapter_config.json names."
            )
            raise WeightsError(msg)


def _quantized(module: object) -> bool:
    """Say whether a module holds integers, into which nothing else can be read."""
    return isinstance(module, (QuantizedLinear, Int8Embedding)) or type(module).__module__.startswith("bitsandbytes")


def put_on(model: Any, adapters: list[Adapter]) -> None:
    """Put adapters on a model, all of them active: what they change adds up."""
    for adapter in adapters:
        with reading(f"the adapter {adapter.origin!r}"), _where_modules_compute(model):
            report = model.load_adapter(
                str(adapter.folder), adapter_name=adapter.name, adapter_kwargs={"local_files_only": True}
            )
        if strange := sorted(map(str, report.unexpected_keys)):
            msg = (
                f"the adapter {adapter.origin!r} has weights for modules this model does not have: "
                f"{listed(strange[:5])}."
            )
            raise WeightsError(msg)
    if len(adapters) > 1:
        model.set_adapter([adapter.name for adapter in adapters])


@contextlib.contextmanager
def _where_modules_compute(model: Any) -> Iterator[None]:
    """Let an adapter's weights lie where modules compute: transformers gives those of offloaded modules no values."""
    placed = getattr(model, "hf_device_map", None)
    if placed is None:
        yield
        return
    main = next((where for where in placed.values() if where not in ("cpu", "disk")), "cpu")
    model.hf_device_map = {name: main if where in ("cpu", "disk") else where for name, where in placed.items()}
    try:
        yield
    finally:
        model.hf_device_map = placed
