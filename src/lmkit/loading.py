"""`load()`: plan, then weights, then wrapper."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict, overload

from lmkit import attention
from lmkit._gguf import gguf_read_once
from lmkit._openmp import release_pool
from lmkit._quiet import quiet, without_warnings
from lmkit.errors import (
    LmkitError,
    OptionError,
    PlacementError,
    UnknownOptionError,
    WeightsError,
    listed,
    nearest,
)
from lmkit.generator import Generator
from lmkit.packing import pack
from lmkit.placement import accelerator
from lmkit.planning import make_plan
from lmkit.precision import computes_bfloat16
from lmkit.sources import HubOptions, Wanted, find, find_adapter
from lmkit.tasks import auto_class, resolve_task
from lmkit.translator import Translator
from lmkit.unmasker import Unmasker
from lmkit.weights import reading
from lmkit.wrapper import Loaded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from transformers import PreTrainedConfig
    from transformers.utils.quantization_config import QuantizationConfigMixin
    from typing_extensions import Unpack

    from lmkit.placement import Devices, Placement
    from lmkit.planning import LoadPlan
    from lmkit.precision import PrecisionWord
    from lmkit.tasks import CausalWord, MaskedWord, Seq2SeqWord, Task, TaskWord
    from lmkit.weights import Source

__all__ = ["LoadOptions", "load"]

logger = logging.getLogger("lmkit")


PREFIX_CACHE_BYTES = 256 * 2**20
"""What `prefix_cache_bytes` is when nobody says: a chat of 11,000 tokens on SmolLM2-135M, 2,000 on a model of 7B."""


class LoadOptions(TypedDict, total=False):
    """The keyword options of `load`.

    Attributes:
        revision: A branch, tag or commit of a Hub repository; the default branch if left out.
        token: A Hub token, for private and gated models; True or None uses the one saved by `hf auth login`.
        cache_dir: Where files from the Hub are kept; the Hub library's own cache if left out.
        local_files_only: Make no network call; what is not here is a `ModelNotFoundError`.
        adapter: A LoRA or other PEFT adapter to put on the model: a folder or a Hub id.
        trust_remote_code: Run the Python code that comes with the checkpoint. It can do anything.
        compile: Compile the decode step of a `Generator`, for any number of rows. The first load of a model takes a
            minute longer, later ones about two seconds: the code is kept in the cache folder of lmkit.
        prefix_cache_bytes: How many bytes of keys and values of recent prompts and answers a `Generator` may keep, so
            that a prompt which begins like one of them reads only the rest; 0 keeps none. 256 MiB if left out.
        allow_pickle: Read pickled weights where there are no safetensors. Unpickling can run any code.
    """

    revision: str | None
    token: str | bool | None
    cache_dir: str | os.PathLike[str] | None
    local_files_only: bool
    adapter: str | None
    compile: bool
    prefix_cache_bytes: int
    trust_remote_code: bool
    allow_pickle: bool


PrecisionArgument: TypeAlias = "PrecisionWord | QuantizationConfigMixin"


@overload
def load(
    task: CausalWord,
    name: str | os.PathLike[str],
    precision: PrecisionArgument = "auto",
    devices: Devices = "auto",
    **options: Unpack[LoadOptions],
) -> Generator: ...
@overload
def load(
    task: Seq2SeqWord,
    name: str | os.PathLike[str],
    precision: PrecisionArgument = "auto",
    devices: Devices = "auto",
    **options: Unpack[LoadOptions],
) -> Translator: ...
@overload
def load(
    task: MaskedWord,
    name: str | os.PathLike[str],
    precision: PrecisionArgument = "auto",
    devices: Devices = "auto",
    **options: Unpack[LoadOptions],
) -> Unmasker: ...
def load(
    task: TaskWord,
    name: str | os.PathLike[str],
    precision: PrecisionArgument = "auto",
    devices: Devices = "auto",
    **options: Unpack[LoadOptions],
) -> Generator | Translator | Unmasker:
    """Load a text language model by name.

    ```python
    generator = lmkit.load("causal", "HuggingFaceTB/SmolLM2-135M-Instruct")
    translator = lmkit.load("seq2seq", "facebook/m2m100_418M", "bfloat16", "cuda:0")
    unmasker = lmkit.load("masked", "./my-bert", local_files_only=True)
    ```

    Args:
        task: `"causal"`, `"seq2seq"` or `"masked"`, or the name a pipeline has for it.
        name: A Hub id, a local folder, a `.gguf` file, or `"repo/id:file.gguf"`.
        precision: `"auto"`, `"float32"`, `"bfloat16"`, `"float16"`, `"int8"`, `"int4"`, `"nf4"`, a short form, or
            a transformers quantization config.
        devices: `"auto"`, a device, a list of devices to split over, a dict of budgets, or a `Placement`.
        **options: See `LoadOptions`.

    Returns:
        A `Generator`, a `Translator` or an `Unmasker`, by the task.

    Raises:
        UnknownTaskError: The task is unknown, or the checkpoint was made for another one.
        ModelNotFoundError: The name is neither here nor reachable.
        WeightsError: A file is absent, broken, refused, or does not match the architecture.
        PrecisionError: The precision is unknown, or not to be had for this checkpoint.
        PlacementError: The devices are not here, or cannot hold the model.
        MissingExtraError: The checkpoint needs a package that is not installed.
    """
    _check_options(options)
    kind = resolve_task(task, os.fspath(name))
    if options.get("compile") and kind != "causal":
        msg = f"compile=True is for causal models, and {os.fspath(name)!r} is loaded as {kind!r}: leave it out."
        raise OptionError(msg)
    trusted, pickles = options.get("trust_remote_code", False), options.get("allow_pickle", False)
    cache = options.get("cache_dir")
    hub = HubOptions(
        options.get("revision"),
        options.get("token"),
        None if cache is None else os.fspath(cache),
        options.get("local_files_only", False),
    )
    # Who waits for a download in a terminal sees the Hub library's bars.
    with contextlib.nullcontext() if sys.stderr.isatty() else quiet():
        source = find(os.fspath(name), hub, Wanted(pickle=pickles, code=trusted))
    with quiet(), without_warnings():
        with _reading_gguf(source):
            plan, config = make_plan(kind, source, precision, devices, trust_remote_code=trusted, allow_pickle=pickles)
            tokenizer = _read_tokenizer(source, trusted=trusted)
            model = _read_model(plan, config, source, trusted=trusted)
        if (adapter := options.get("adapter")) is not None:
            _put_on(model, adapter, hub)
        if plan.kernels == "packed":
            pack(model)
        if plan.placement.device_type == "cpu":
            attention.put_on(model)
    _tell(plan, model)
    again = {name: value for name, value in options.items() if name != "token"}  # a pickle keeps no secrets
    reload = functools.partial(load, task, name, precision, devices, **again)
    kept = options.get("prefix_cache_bytes", PREFIX_CACHE_BYTES)
    folder = compile_folder() if options.get("compile") else None
    with quiet(), without_warnings():  # a compiler talks
        wrapper = _WRAPPERS[kind](Loaded(model, tokenizer, plan, reload, kept, folder))
    release_pool()
    return wrapper


def compile_folder() -> Path:
    """Return where compiled steps are kept: in the user's cache, where nobody else should be able to write."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lmkit" / "compiled"


_WRAPPERS: dict[Task, Callable[[Loaded], Generator | Translator | Unmasker]] = {
    "causal": Generator,
    "seq2seq": Translator,
    "masked": Unmasker,
}

_MOVED = {
    "load_in_8bit": 'load(task, name, "int8")',
    "load_in_4bit": 'load(task, name, "int4")',
    "torch_dtype": 'load(task, name, "bfloat16")',
    "dtype": 'load(task, name, "bfloat16")',
    "quantization_config": "load(task, name, quantization_config)",
    "max_memory": 'load(task, name, "auto", {"cuda:0": "20GiB", "cpu": "48GiB"})',
    "device_map": 'load(task, name, "auto", devices)',
    "device": 'load(task, name, "auto", "cuda:0")',
}
"""Keywords of from_pretrained and pipeline, and what to write here."""


def _check_options(options: Mapping[str, object]) -> None:
    known = LoadOptions.__annotations__
    for name in options:
        if name in _MOVED:
            msg = f"load() takes no {name}=: write {_MOVED[name]}."
            raise UnknownOptionError(msg)
        if name not in known:
            msg = f"load() takes no {name}=.{nearest(name, known)} Accepted: {listed(known)}."
            raise UnknownOptionError(msg)


def _reading_gguf(source: Source) -> contextlib.AbstractContextManager[None]:
    if source.gguf_file is None:
        return contextlib.nullcontext()
    with reading(source.name):  # a missing package is an error that says so
        import gguf  # noqa: F401
    return gguf_read_once()


def _read_tokenizer(source: Source, *, trusted: bool) -> Any:
    from transformers import AutoTokenizer

    gguf = {"gguf_file": source.gguf_file} if source.gguf_file else {}
    with reading(f"the tokenizer of {source.name!r}"):
        return AutoTokenizer.from_pretrained(source.folder, trust_remote_code=trusted, local_files_only=True, **gguf)


def _read_model(plan: LoadPlan, config: PreTrainedConfig, source: Source, *, trusted: bool) -> Any:
    """Read the weights as planned, or leave nothing behind."""
    placed, quantization = plan.placement, plan.precision.quantization
    arguments: dict[str, Any] = {
        "config": config,
        "dtype": plan.precision.dtype,
        "device_map": placed.device_map if isinstance(placed.device_map, str) else dict(placed.device_map),
        "trust_remote_code": trusted,
        "local_files_only": True,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # so that the report names them, and is refused below
    }
    if placed.max_memory:
        arguments["max_memory"] = dict(placed.max_memory)  # transformers writes into the one it is given
    if placed.offload_folder is not None:
        arguments["offload_folder"] = placed.offload_folder
    if quantization is not None:
        arguments["quantization_config"] = _without_traps(copy.deepcopy(quantization), plan, config)
    if source.gguf_file is not None:
        arguments["gguf_file"] = source.gguf_file
    with reading(f"the weights of {source.name!r}"), _random_state_kept():
        model, report = auto_class(plan.task).from_pretrained(source.folder, **arguments)
    try:
        _check_report(report, plan)
        _check_offload(model, placed)
    except LmkitError:
        del model
        gc.collect()
        raise
    return model


def _without_traps(quantization: Any, plan: LoadPlan, config: PreTrainedConfig) -> Any:
    """Leave out what bitsandbytes' 4-bit kernel for bfloat16 processors cannot multiply.

    It takes outputs in multiples of 32 and inputs in multiples of 64, and finds out at the first forward pass.
    """
    four_bit = getattr(quantization, "load_in_4bit", False)
    if not (four_bit and plan.placement.device_type == "cpu" and computes_bfloat16()):
        return quantization
    import torch
    from transformers.quantizers.base import get_keys_to_not_convert

    with torch.device("meta"):
        model = auto_class(plan.task).from_config(config)
    linear = [(name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    if awkward := [name for name, module in linear if module.out_features % 32 or module.in_features % 64]:
        # A list of one's own replaces the one that transformers would make.
        own = quantization.llm_int8_skip_modules or get_keys_to_not_convert(model)
        quantization.llm_int8_skip_modules = [*own, *awkward]
    return quantization


@contextlib.contextmanager
def _random_state_kept() -> Iterator[None]:
    """Put torch's random state back: some models draw numbers for what they then compute or load."""
    import torch

    kind = accelerator()
    devices = range(torch.accelerator.device_count()) if kind else ()
    with torch.random.fork_rng(devices=devices, device_type=kind or "cuda"):
        yield


def _check_report(report: Mapping[str, Any], plan: LoadPlan) -> None:
    """Refuse a model of which a part was not in the file: it would be random there."""
    # transformers leaves out of the report what is tied or what the class declares as not saved.
    for what, kind in (("missing_keys", "lacks"), ("mismatched_keys", "has other shapes for")):
        if names := sorted(name if isinstance(name, str) else str(name[0]) for name in report.get(what) or ()):
            shown = f"{listed(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"  # noqa: PLR2004
            msg = (
                f"{plan.name!r} {kind} weights that {plan.model_class} needs: {shown}. They would be random: "
                "load a checkpoint that was saved with this head, or under the task it was saved for."
            )
            raise WeightsError(msg)


def _check_offload(model: Any, placed: Placement) -> None:
    where = getattr(model, "hf_device_map", None) or {}
    if "disk" in where.values() and placed.offload_folder is None:
        spilled = [name for name, device in where.items() if device == "disk"]
        msg = (
            f"the devices cannot hold {listed(spilled[:3]) if any(spilled) else 'the model'} "
            f"({len(spilled)} of {len(where)} parts): raise a budget, "
            "choose a smaller precision, or name a folder for them: devices={…, 'disk': 'offload/'}."
        )
        raise PlacementError(msg)


def _put_on(model: Any, adapter: str, hub: HubOptions) -> None:
    folder = find_adapter(adapter, hub)
    with reading(f"the adapter {adapter!r}"):
        report = model.load_adapter(str(folder), adapter_kwargs={"local_files_only": True})
    if strange := sorted(map(str, report.unexpected_keys)):
        msg = f"the adapter {adapter!r} has weights for modules this model does not have: {listed(strange[:5])}."
        raise WeightsError(msg)


def _tell(plan: LoadPlan, model: Any) -> None:
    for what, reason in plan.reasons.items():
        logger.info("%s: %s: %s", plan.name, what, reason)
    where = getattr(model, "hf_device_map", None) or {}
    slow = {device for device in where.values() if device in ("cpu", "disk")}
    if "disk" in slow or (slow and len(set(where.values())) > 1):
        logger.warning("%s: parts of it are offloaded to %s, which is slow", plan.name, listed(sorted(slow)))
