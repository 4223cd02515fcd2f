"""PEFT adapters: what their files hold, whether they were made for this model, and how they are put on it."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import regex
import torch

from lmkit.checkpoint.code import check_adapter_code, import_without_kernels
from lmkit.checkpoint.config import chat_template
from lmkit.checkpoint.files import VOCABULARY_FILES, read_object, reading
from lmkit.checkpoint.find import ADAPTER_WEIGHTS, Access, find_adapter
from lmkit.checkpoint.headers.safetensors import read_safetensors
from lmkit.errors import OptionError, PrecisionError, WeightsError, listed
from lmkit.kernels.quantized import QuantizedLinear
from lmkit.kernels.tied import Int8Embedding, TiedHead
from lmkit.planning.placement import main_device

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lmkit.checkpoint.headers import TensorInfo
    from lmkit.planning.skeleton import Skeleton

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
        tensors: Its weights, by the names that the model's modules have; what the file has twice, once.
        whole: The ends of the names of modules of which it brings another one beside the model's.
    """

    name: str
    origin: str
    folder: Path
    tensors: Mapping[str, TensorInfo]
    whole: tuple[str, ...]

    @property
    def elements(self) -> int:
        """How many numbers it adds: not those that stand in the place of the model's own."""
        total = 0
        for name, tensor in self.tensors.items():
            module, leaf = _place(name)
            beside = any(map(module.endswith, self.whole))  # as peft finds them: "norm" is in input_layernorm too
            twice = leaf.endswith("trainable_tokens_delta")  # peft keeps the rows that it stands for as well
            total += tensor.elements * (2 if twice else int(beside or leaf not in _REPLACING))
        return total


_REPLACING = ("weight", "bias", "base_layer.weight", "base_layer.bias")
"""Parts of a module that are read into the model's own."""


def find_adapters(given: AdapterArgument, access: Access) -> list[Adapter]:
    """Find what `adapter=` names.

    Raises:
        OptionError: It is neither a name nor a dict of names.
        ModelNotFoundError: One is neither here nor reachable.
        WeightsError: The weights of one are absent, truncated or corrupt, or its config names code.
    """
    if given is None:
        return []
    named: Mapping[Any, Any] = given if isinstance(given, Mapping) else {DEFAULT: given}
    paths = all(isinstance(path, (str, os.PathLike)) for path in named.values())
    if not named or not paths or not all(isinstance(name, str) and re.fullmatch(r"\w+", name) for name in named):
        raise OptionError(
            f"adapter={given!r} is not accepted: pass a folder or a Hub id, or a dict of several by name, each a word "
            "of letters, digits and '_'."
        )
    return [_found(name, os.fspath(path), access) for name, path in named.items()]


def _found(name: str, origin: str, access: Access) -> Adapter:
    folder = find_adapter(origin, access)
    settings = read_object(folder / "adapter_config.json")
    check_adapter_code(origin, settings, trusted=access.trust_remote_code)
    import_without_kernels("bitsandbytes", trusted=access.trust_remote_code)  # peft will
    tensors = read_safetensors(folder / ADAPTER_WEIGHTS)
    own = {renamed: tensor for key, tensor in tensors.items() if (renamed := _renamed(key))}
    with reading(f"the config of the adapter {origin!r}"):
        _check_patterns(origin, settings)
        return Adapter(name, origin, folder, own, tuple(map(str, _several(settings.get("modules_to_save")))))


def _check_patterns(origin: str, settings: Mapping[str, Any]) -> None:
    """Refuse patterns of module names that Python does not take, and parts of names that could take for ever to match.

    Whole names are what `_matched` matches, in bounded time; parts of them peft puts into patterns of its own.

    Raises:
        WeightsError: There is one in the adapter's config.
    """
    parts = [one for key in _PARTS for one in _several(settings.get(key))]
    for pattern in (*parts, *map(settings.get, _WHOLE)):
        if not isinstance(pattern, str):
            continue
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise WeightsError(f"the adapter {origin!r} has the pattern {pattern!r:.200}: {error}.") from error
        many = _NESTED.search(pattern) or len(_CHOICES.findall(pattern)) > _MOST_CHOICES
        copies = math.prod(map(int, re.findall(r"\d+(?=\})", pattern)))
        if copies > _MOST_COPIES or (many and pattern in parts):
            raise WeightsError(
                f"the adapter {origin!r} has the pattern {pattern!r:.200}, which can take for ever to match: write it "
                f"with at most {_MOST_CHOICES} of * + ? {{ and |, none inside of another, and counts that are small."
            )


def _several(given: Any) -> list[Any]:
    return [given] if isinstance(given, str) else list(given or ())


_PARTS = ("modules_to_save", "layers_pattern", "rank_pattern", "alpha_pattern")
_WHOLE = ("target_modules", "exclude_modules", "feedforward_modules")
"""What an adapter's config may have patterns in: lists of them, or for keys; and one for a whole name, if a string."""
_NESTED = re.compile(r"[+*}?][^()]*\)[+*{?]")
_CHOICES = re.compile(r"(?<!\()[*+?{|]")
_MOST_CHOICES, _MOST_COPIES = 4, 10_000


def _matched(settings: Mapping[str, Any], model: Any, origin: str) -> dict[str, list[str]]:
    """Return in the place of patterns of whole names those of a model's modules that they match.

    Raises:
        WeightsError: That takes longer than `_SECONDS`. Python's own patterns, which peft has, know no end of time.
    """
    until = time.perf_counter() + _SECONDS
    found: dict[str, list[str]] = {}
    names = [name for name, _ in model.named_modules()]
    for key in _WHOLE:
        pattern = settings.get(key)
        if not isinstance(pattern, str) or pattern.replace("-", "_").isidentifier():  # "all-linear" is a word
            continue
        matches = functools.partial(regex.compile(pattern).fullmatch, concurrent=False)
        try:
            found[key] = [name for name in names if matches(name, timeout=max(until - time.perf_counter(), 1e-3))]
            found[key] = found[key] or [pattern]  # a name that no module has, for peft to say so
        except TimeoutError as error:
            raise WeightsError(
                f"the adapter {origin!r} has the pattern {pattern!r:.200}, which takes longer than a second to "
                f"match the names of {len(names)} modules: write a list of names there."
            ) from error
    return found


_SECONDS = 1.0


def _renamed(key: str) -> str | None:
    """Return what the model calls a tensor of a file; None for what peft writes twice of modules it saves whole."""
    if ".original_module." in key or ".modules_to_save." in key:
        return None
    name = key.removeprefix("base_model.model.")
    return f"{name}.weight" if name.endswith(_MAGNITUDE) else name  # as peft does when it reads, and transformers not


_MAGNITUDE = "lora_magnitude_vector"


def _place(name: str) -> tuple[str, str]:
    """Divide the name of an adapter's weight into the module that it is for and what it is of it."""
    found = re.fullmatch(r"(.*?)\.((lora_|oft_|ln_tuning_|base_layer\.|token_adapter\.).*|[^.]+)", name)
    return (found[1], found[2]) if found else ("", name)


def rows_of(adapters: Sequence[Adapter], model: Any) -> int | None:
    """Return how many tokens adapters were trained with; None where these are the model's own.

    Raises:
        WeightsError: They do not agree, or one lacks what the model would need for its tokens.
    """
    if not adapters:
        return None
    names = {id(module): name for name, module in model.named_modules()}
    tables = [table for table in (model.get_input_embeddings(), model.get_output_embeddings()) if table is not None]
    own = tables[0].weight.shape[0]
    wanted: dict[int, str] = {}
    for adapter in adapters:
        held = [
            {shape[0] for leaf in _REPLACING[::2] if (shape := _shape(adapter, f"{names[id(table)]}.{leaf}"))}
            for table in tables
        ]
        rows = {size for sizes in held for size in sizes} or {own}
        tied = len(tables) > 1 and f"{names[id(tables[1])]}.weight" in model.all_tied_weights_keys
        if rows != {own} and not (any(held) if tied else all(held)):
            raise WeightsError(
                f"the adapter {adapter.origin!r} was trained with {max(rows)} tokens, this model has {own}, and the "
                "adapter lacks the embeddings or the output layer for them: save it with save_embedding_layers=True, "
                "or load it on the model that its tokens were added to."
            )
        wanted |= dict.fromkeys(rows, adapter.origin)
    if len(wanted) > 1:
        told = ", ".join(f"{origin!r} with {size} tokens" for size, origin in wanted.items())
        raise WeightsError(f"the adapters were trained with different vocabularies: {told}. Load them one by one.")
    return next((size for size in wanted if size != own), None)


def _shape(adapter: Adapter, name: str) -> tuple[int, ...] | None:
    return adapter.tensors[name].shape if name in adapter.tensors else None


def check_base(adapter: Adapter, skeleton: Skeleton) -> None:
    """Check that an adapter's modules are the model's, of the same sizes, and such that they can be changed.

    Raises:
        WeightsError: It was made for another model.
        PrecisionError: It replaces or measures layers that would be quantized.
    """
    modules = dict(skeleton.model.named_modules())
    _matched(read_object(adapter.folder / "adapter_config.json"), skeleton.model, adapter.origin)
    for name, tensor in adapter.tensors.items():
        module, leaf = _place(name)
        base: Any = modules.get(module)
        _check_precision(adapter, skeleton.precision.name, module, leaf, base)
        size, axis = _SIZES.get(leaf, ("", 0))
        if not size and leaf not in _REPLACING:
            continue  # what peft knows besides is peft's to check
        wanted = getattr(base, size, None) if size else getattr(getattr(base, leaf.split(".")[-1], None), "shape", None)
        if base is None or (wanted is not None and wanted != (tensor.shape[axis] if size else tensor.shape)):
            what = "which this model does not have" if base is None else f"of another size ({tensor.shape})"
            raise WeightsError(
                f"the adapter {adapter.origin!r} was made for another base model: it changes {module!r}, {what}. "
                "Load the model that its adapter_config.json names."
            )


_SIZES = {
    "lora_A.weight": ("in_features", 1),
    "lora_B.weight": ("out_features", 0),
    "lora_embedding_A": ("num_embeddings", 1),
    "lora_embedding_B": ("embedding_dim", 0),
}
"""Which size of a module each part of LoRA has, and where."""


def _check_precision(adapter: Adapter, word: str, module: str, leaf: str, base: object) -> None:
    own = isinstance(base, (QuantizedLinear, Int8Embedding))
    if leaf in _REPLACING[::2] and (own or type(base).__module__.startswith("bitsandbytes")):
        why = f"replaces {module!r}, which {word} would quantize"
    elif isinstance(base, (Int8Embedding, TiedHead)):
        why = f"changes {module!r}, the embedding that is the output layer's weight too, which {word} would quantize"
    elif own and _MAGNITUDE in leaf:
        why = f"is a DoRA of {module!r}, whose weights it measures, and {word} would quantize them"
    else:
        return
    raise PrecisionError(
        f"the adapter {adapter.origin!r} {why}: pass precision='bfloat16', or an adapter of LoRA on others."
    )


def bringing(adapters: Sequence[Adapter]) -> Adapter | None:
    """Return the one adapter that has a tokenizer in its folder; None for none or several."""
    return _only([one for one in adapters if any(next(one.folder.glob(name), None) for name in VOCABULARY_FILES)])


def templated(adapters: Sequence[Adapter]) -> Adapter | None:
    """Return the one adapter that has a chat template in its folder; None for none or several."""
    return _only([one for one in adapters if chat_template(one.folder)])


def _only(found: Sequence[Adapter]) -> Adapter | None:
    return found[0] if len(found) == 1 else None


def put_on(model: Any, adapters: Sequence[Adapter]) -> None:
    """Put adapters on a model, all of them active: what they change adds up."""
    if (rows := rows_of(adapters, model)) is not None:
        model.resize_token_embeddings(rows, mean_resizing=False)  # the rows are the adapter's, as is checked
    for adapter in adapters:
        with reading(f"the adapter {adapter.origin!r}"), _where_modules_compute(model):
            _load(model, adapter)
    if len(adapters) > 1:
        _activate(model, [adapter.name for adapter in adapters])


def _load(model: Any, adapter: Adapter) -> None:
    from peft import PeftConfig
    from safetensors.torch import load_file

    tensors = load_file(adapter.folder / ADAPTER_WEIGHTS)
    config = PeftConfig.from_pretrained(str(adapter.folder))
    vars(config).update(_matched(vars(config), model, adapter.origin))
    report = model.load_adapter(
        peft_config=config,
        adapter_state_dict={name: tensors[key] for key in tensors if (name := _renamed(key))},
        adapter_name=adapter.name,
    )
    _tie_again(model)
    if strange := sorted(map(str, report.unexpected_keys)):
        raise WeightsError(
            f"the adapter {adapter.origin!r} has weights for modules this model does not have: {listed(strange[:5])}."
        )


def _tie_again(model: Any) -> None:
    """Make one of what an adapter's file had twice, equal, or has for one of two: each was read apart."""
    for pair in model.all_tied_weights_keys.items():
        if not all(name.endswith(".weight") for name in pair):
            continue
        head, table = (model.get_submodule(name.removesuffix(".weight")) for name in pair)
        if hasattr(table, "original_module"):  # of no use where a module of the adapter's own is in its place
            head, table = table, head
        one, other = _bare(head), _bare(table)
        if one.weight is not other.weight and (hasattr(head, "original_module") or _equal(one.weight, other.weight)):
            one.weight = other.weight


def _bare(module: Any) -> Any:
    """Return a module without what peft has put around it."""
    while (inner := getattr(module, "original_module", getattr(module, "base_layer", None))) is not None:
        module = inner
    return module


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.device == other.device and one.device.type != "meta" and torch.equal(one, other)


def _activate(model: Any, names: list[str]) -> None:
    """Make several adapters active.

    Not by `model.set_adapter`, which refuses versions of peft that the loading before it takes: transformers 5.24 wants
    one that is not released.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    for module in model.modules():
        if isinstance(module, (BaseTunerLayer, ModulesToSaveWrapper)):
            module.set_adapter(names)


@contextlib.contextmanager
def _where_modules_compute(model: Any) -> Iterator[None]:
    """Let an adapter's weights lie where modules compute: transformers gives those of offloaded modules no values."""
    placed = getattr(model, "hf_device_map", None)
    if placed is None:
        yield
        return
    main = main_device(map(str, placed.values()))
    model.hf_device_map = {name: main if where in ("cpu", "disk") else where for name, where in placed.items()}
    try:
        yield
    finally:
        model.hf_device_map = placed
