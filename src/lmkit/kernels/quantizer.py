"""lmkit's weight-only quantizer for CPUs, registered with transformers by the name `"lmkit"`.

A checkpoint is quantized tensor by tensor while it is read, so that no more of it is wide at a time than one module.
One that was saved quantized is read as it is. Importing this module is what registers it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import inspect
import re
import secrets
import sys
from typing import TYPE_CHECKING, Any

import torch
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lmkit.kernels.packed import let_go_of_file
from lmkit.kernels.quantized import GROUP, Int4Linear, Int8Linear, QuantizedLinear
from lmkit.kernels.tied import Int8Embedding, TiedHead

if TYPE_CHECKING:
    from collections.abc import Collection

METHOD = "lmkit"
TRIM_BYTES = 2**24
"""After how many bytes of wide tensors their room on the heap is given back; after each one, a load takes twice."""


class WeightOnlyConfig(QuantizationConfigMixin):
    """What is quantized, as `config.json` has it.

    Attributes:
        bits: 8 or 4. Embeddings that are the output layer's weight, and output layers, always have 8.
        group_size: How many weights share a scale in 4 bits.
        skip: Modules that keep the dtype that is computed in.
        untied: Weights that have values of their own, although transformers ties them in a new model.
        saving: What the weight files say too that were written with this; None before it is saved.
    """

    def __init__(
        self,
        bits: int = 8,
        group_size: int = GROUP,
        skip: Collection[str] = (),
        untied: Collection[str] = (),
        saving: str | None = None,
        **_kwargs: Any,
    ) -> None:
        """Take the settings; what else a `config.json` has is not read."""
        self.quant_method = METHOD  # type: ignore[assignment]  # transformers' enum is for its own methods
        self.bits, self.group_size, self.skip, self.untied = bits, group_size, list(skip), list(untied)
        self.saving = saving
        if bits not in (4, 8) or group_size != GROUP:
            raise ValueError(
                f"bits={bits!r}, group_size={group_size!r} is not to be had: 4 or 8 bits, in groups of {GROUP}."
            )


_Base: Any = HfQuantizer  # some of its methods are annotated as returning nothing


class WeightOnlyQuantizer(_Base):  # type: ignore[misc]
    """Puts `lmkit.kernels.quantized` modules into a model before its weights are read."""

    quantization_config: WeightOnlyConfig

    def param_needs_quantization(self, model: Any, param_name: str, **_kwargs: Any) -> bool:
        """Say whether a tensor of the checkpoint is a weight to quantize."""
        module, _, name = param_name.rpartition(".")
        quantized = isinstance(model.get_submodule(module), (QuantizedLinear, Int8Embedding))
        return quantized and name == "weight" and not self.pre_quantized

    def get_quantize_ops(self) -> ConversionOps:
        """Return what quantizes a tensor."""
        return _Quantize()

    def _process_model_before_weight_loading(self, model: Any, **_kwargs: Any) -> None:
        config = self.quantization_config
        for name in config.untied:
            model.all_tied_weights_keys.pop(name, None)
        # transformers leaves a family's delicate modules wide, such as T5's `wo` in float16, by name.
        replace(model, config.bits, [*config.skip, *model._get_dtype_plan(model.dtype)])  # noqa: SLF001

    def _process_model_after_weight_loading(self, model: Any, **_kwargs: Any) -> Any:
        for module in model.modules():
            own = isinstance(module, (QuantizedLinear, Int8Embedding))
            let_go_of_file(module, integers=self.pre_quantized or not own)
            if own:
                module.pack()
                _heap.freed(8 * module.weight.numel())  # int4 is packed from int32
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, str]]:
        """Mark the config and the weight files that are about to be written, in this order, as of one saving."""
        saving = model.config.quantization_config.saving = secrets.token_hex(8)
        return None, {"lmkit_saving": saving}  # which `checkpoint.files` compares with the config's

    def is_serializable(self) -> bool:
        """Say that such a model can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Say that adapters can be trained on it, though not the model."""
        return False


class _Heap:
    """Gives the system what tensors left free on the heap, every `TRIM_BYTES` of them.

    glibc keeps it, and once something small lies behind a free room finds none in it for a next tensor of the same
    size, aligned as torch asks for: without this a model of 86 MB took up to 330 on one of three loads.
    """

    _freed = 0

    def freed(self, size: int) -> None:
        """Say that a tensor of so many bytes has come and is going."""
        self._freed += size
        if self._freed >= TRIM_BYTES:
            self._freed = 0
            with contextlib.suppress(AttributeError, OSError, TypeError):  # only glibc has it
                ctypes.CDLL(None).malloc_trim(0)


_heap = _Heap()


class _Quantize(ConversionOps):
    """Turns one tensor into a weight and its scales."""

    def convert(self, input_dict: dict[str, Any], *_args: Any, model: Any = None, **_kwargs: Any) -> dict[str, Any]:
        ((name, given),) = input_dict.items()
        tensor = given[0] if isinstance(given, list) else given
        path = name.rpartition(".")[0]
        module = model.get_submodule(path)
        if isinstance(module, QuantizedLinear) and module.transposed:
            tensor = tensor.T.contiguous()
        kind = module if isinstance(module, QuantizedLinear) else Int8Linear
        weight, scales = kind.quantize(tensor, module.scales.dtype)
        _heap.freed(tensor.nbytes)
        return {name: weight, f"{path}.scales": scales}


def replace(model: Any, bits: int, skip: Collection[str] = ()) -> None:
    """Replace the linear layers of a model on the meta device, and the embedding that its output layer shares."""
    kept = {name for name in skip if name} | used_directly(model)
    # T5 casts what it multiplies with its `wo` to the dtype of that weight, unless it is int8.
    delicate = set(model._keep_in_fp32_modules or ())  # noqa: SLF001 - where transformers names it
    head = model.get_output_embeddings()
    tied = {name.removesuffix(".weight") for pair in model.all_tied_weights_keys.items() for name in pair}
    for name, module in list(model.named_modules()):
        names = {name, *name.split(".")}
        if type(module) in (torch.nn.Linear, Conv1D) and name not in tied and not kept & names:
            wide = module is head or delicate & names
            _put(model, name, _layer(module, 8 if wide else bits))
    _replace_tied(model, head, kept)


def used_directly(model: Any) -> set[str]:
    """Name the modules whose weight a family's code does not leave to them: these have to stay what they are.

    Mamba multiplies with one itself, and casts what it gives to its output layer to the dtype of that one's weight.
    """
    found: set[str] = set()
    for name, module in model.named_modules():
        code = _source(type(module).__module__, type(module).__qualname__)
        for child, _ in module.named_children():
            weight = rf"self\.{re.escape(child)}\.weight"
            cast = re.search(rf"\.to\({weight}\.dtype\)", code) and "torch.int8" not in code  # T5 asks for that
            if cast or re.search(rf"{weight}\s*@|@\s*{weight}", code):
                found.add(f"{name}.{child}".lstrip("."))
    return found


@functools.cache
def _source(module: str, name: str) -> str:
    """Return the source of a class of transformers'; nothing for others."""
    kind = getattr(sys.modules.get(module), name, None)
    return inspect.getsource(kind) if module.startswith("transformers.models.") and kind is not None else ""


def _replace_tied(model: Any, head: Any, kept: Collection[str]) -> None:
    """Quantize an embedding that is the output layer's weight, if it is a plain one; both stay one."""
    ties: dict[str, str] = model.all_tied_weights_keys
    names = {id(module): name for name, module in model.named_modules()}
    name = names.get(id(head), "")
    source = ties.get(f"{name}.weight")
    sharers = [target for target, origin in ties.items() if origin == source]
    if type(head) is not torch.nn.Linear or source is None or len(sharers) != 1 or name in kept:
        return
    embedding = model.get_submodule(source.removesuffix(".weight"))
    dtype, scale = embedding.weight.dtype, _scale(embedding)
    if scale is None:
        return
    with torch.device("meta"):
        shared = Int8Embedding(embedding.num_embeddings, embedding.embedding_dim, dtype, scale)
        _put(model, source.removesuffix(".weight"), shared)
        _put(model, name, TiedHead(shared, dtype, bias=head.bias is not None))
    del ties[f"{name}.weight"]


def _scale(embedding: Any) -> float | None:
    """Return what an embedding multiplies with what it looks up; None if it does something else."""
    if type(embedding).forward is torch.nn.Embedding.forward:
        return 1.0
    if (rounded := getattr(embedding, "scalar_embed_scale", None)) is not None:  # Gemma rounds it to the model's dtype
        return float(torch.tensor(rounded, dtype=embedding.weight.dtype, device="cpu"))
    scale = getattr(embedding, "embed_scale", None)
    return float(scale) if isinstance(scale, (int, float)) else None


def _layer(module: Any, bits: int) -> QuantizedLinear:
    transposed = isinstance(module, Conv1D)
    outputs, inputs = module.weight.shape[::-1] if transposed else module.weight.shape
    kind = Int4Linear if bits == 4 and Int4Linear.fits(inputs) else Int8Linear  # noqa: PLR2004
    with torch.device("meta"):
        layer = kind(inputs, outputs, module.weight.dtype, bias=module.bias is not None)
    layer.transposed = transposed
    return layer


def _put(model: Any, name: str, module: torch.nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    model.get_submodule(parent)._modules[child] = module.eval()  # noqa: SLF001 - setattr would do the same


if METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantization_config(METHOD)(WeightOnlyConfig)
    register_quantizer(METHOD)(WeightOnlyQuantizer)
