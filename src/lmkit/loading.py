"""`plan()` and `load()`: plan, then weights, then wrapper."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import logging
import os
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict, overload

from lmkit import attention
from lmkit._gguf import gguf_read_once
from lmkit._openmp import release_pool
from lmkit._quiet import quiet, without_warnings
from lmkit.adapters import find_adapters, put_on
from lmkit.copies import keep_copies
from lmkit.errors import LmkitError, OptionError, UnknownOptionError, listed, nearest
from lmkit.generator import Generator
from lmkit.machine import accelerator, this_machine
from lmkit.matching import check_report
from lmkit.packing import pack
from lmkit.planning import Wish, check_fits, make_plan
from lmkit.sources import HubOptions, Wanted, find, find_headers
from lmkit.tasks import auto_class, resolve_task
from lmkit.translator import Translator
from lmkit.unmasker import Unmasker
from lmkit.weights import reading, tensors_of
from lmkit.wrapper import Loaded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from transformers import PreTrainedConfig
    from transformers.utils.quantization_config import QuantizationConfigMixin
    from typing_extensions import Unpack

    from lmkit.adapters import Adapter, AdapterArgument
    from lmkit.placement import Devices
    from lmkit.plans import LoadPlan
    from lmkit.precision import PrecisionWord
    from lmkit.tasks import CausalWord, MaskedWord, Seq2SeqWord, Task, TaskWord
    from lmkit.weights import Source

__all__ = ["LoadOptions", "load", "plan"]

logger = logging.getLogger("lmkit")

_one_at_a_time = threading.RLock()
"""transformers builds a model with torch's default dtype set to the model's: a setting of the whole process."""


PREFIX_CACHE_BYTES = 256 * 2**20
"""What `prefix_cache_bytes` is when nobody says: a chat of 11,000 tokens on SmolLM2-135M, 2,000 on a model of 7B."""


class LoadOptions(TypedDict, total=False):
    """The keyword options of `load`.

    Attributes:
        revision: A branch, tag or commit of a Hub repository; the default branch if left out.
        token: A Hub token, for private and gated models; True or None uses the one saved by `hf auth login`.
        cache_dir: Where files from the Hub are kept; the Hub library's own cache if left out.
        local_files_only: Make no network call; what is not here is a `ModelNotFoundError`.
        adapter: A LoRA or other PEFT adapter to put on the model: a folder or a Hub id; or a dict of several by name,
            all of them active.
        reserve_tokens: For how many tokens of one row keys and values must fit beside the weights; 0 if left out. What
            does not fit is a `PlacementError` of `load`, and `fits=False` in a plan.
        wide_copy_bytes: How many bytes an `"int8"` or `"int4"` model on a CPU may take beside its weights, for bfloat16
            copies of its layers with which prompts and batches of more than four rows are faster. They are made when
            such rows first come, and given back by `close()`; 0 if left out.
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
    adapter: AdapterArgument
    reserve_tokens: int
    compile: bool
    prefix_cache_bytes: int
    wide_copy_bytes: int
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
    kind, hub, wanted = _asked(task, name, options)
    if options.get("compile") and kind != "causal":
        msg = f"compile=True is for causal models, and {os.fspath(name)!r} is loaded as {kind!r}: leave it out."
        raise OptionError(msg)
    # Who waits for a download in a terminal sees the Hub library's bars.
    with contextlib.nullcontext() if sys.stderr.isatty() else quiet():
        source = find(os.fspath(name), hub, wanted)
    with _one_at_a_time, quiet(), without_warnings():
        tensors = tensors_of(source, allow_pickle=wanted.pickle)
        with _reading_gguf(source):
            adapters = find_adapters(options.get("adapter"), hub)
            wish = _wish((kind, precision, devices), adapters, options)
            decided, config = make_plan(wish, source, tensors, this_machine())
            check_fits(decided)
            tokenizer = _read_tokenizer(source, trusted=wanted.code)
            model = _read_model(decided, config, source, trusted=wanted.code)
        put_on(model, adapters)
        if decided.kernels == "packed":
            pack(model)
        budget = options.get("wide_copy_bytes", 0)
        copies = keep_copies(model, budget) if budget and decided.placement.device_type == "cpu" else None
        if decided.placement.device_type == "cpu":
            attention.put_on(model)
    _tell(decided)
    again = {name: value for name, value in options.items() if name != "token"}  # a pickle keeps no secrets
    reload = functools.partial(load, task, name, precision, devices, **again)
    kept = options.get("prefix_cache_bytes", PREFIX_CACHE_BYTES)
    folder = compile_folder() if options.get("compile") else None
    with quiet(), without_warnings():  # a compiler talks
        wrapper = _WRAPPERS[kind](Loaded(model, tokenizer, decided, reload, kept, folder, copies))
    release_pool()
    return wrapper


def plan(
    task: TaskWord,
    name: str | os.PathLike[str],
    precision: PrecisionArgument = "auto",
    devices: Devices = "auto",
    **options: Unpack[LoadOptions],
) -> LoadPlan:
    """Decide how `load` would load a model, without reading a weight; the arguments are those of `load`.

    ```python
    print(lmkit.plan("causal", "meta-llama/Meta-Llama-3-8B", "int4", {"cuda:0": "24GiB", "cpu": "64GiB"}))
    ```

    Of a checkpoint on the Hub the config, the tokenizer's files and the headers of the weights are fetched. Devices
    need not be on this machine, if they have a budget in bytes.

    Returns:
        The plan, which says whether it fits; nothing is loaded.

    Raises:
        UnknownTaskError: The task is unknown, or the checkpoint was made for another one.
        ModelNotFoundError: The name is neither here nor reachable.
        WeightsError: A file is absent, broken or refused.
        PrecisionError: The precision is unknown, or not to be had for this checkpoint.
        PlacementError: `devices` is not accepted.
        MissingExtraError: The checkpoint needs a package that is not installed.
    """
    kind, hub, wanted = _asked(task, name, options)
    with quiet(), without_warnings():
        source, tensors = find_headers(os.fspath(name), hub, wanted)
        adapters = find_adapters(options.get("adapter"), hub)
    with _one_at_a_time, quiet(), without_warnings():
        wish = _wish((kind, precision, devices), adapters, options)
        with _reading_gguf(source):
            return make_plan(wish, source, tensors, this_machine(), absent=True)[0]


def _asked(task: TaskWord, name: object, options: LoadOptions) -> tuple[Task, HubOptions, Wanted]:
    """Check the words and options of a call."""
    _check_options(options)
    if not isinstance(name, (str, os.PathLike)):
        msg = f"name={name!r} is not accepted: pass a Hub id, a folder or a .gguf file, as a string or a path."
        raise OptionError(msg)
    kind = resolve_task(task, os.fspath(name))
    for option, unit in (("reserve_tokens", "tokens"), ("wide_copy_bytes", "bytes")):
        number: Any = options.get(option, 0)
        if not isinstance(number, int) or number < 0:
            msg = f"{option}={number!r} is not accepted: pass a whole number of {unit}, 0 or more."
            raise OptionError(msg)
    cache = options.get("cache_dir")
    hub = HubOptions(
        options.get("revision"),
        options.get("token"),
        None if cache is None else os.fspath(cache),
        options.get("local_files_only", False),
    )
    return kind, hub, Wanted(pickle=options.get("allow_pickle", False), code=options.get("trust_remote_code", False))


def _wish(asked: tuple[Task, PrecisionArgument, Devices], adapters: Sequence[Adapter], options: LoadOptions) -> Wish:
    reserved, copied = options.get("reserve_tokens", 0), options.get("wide_copy_bytes", 0)
    return Wish(*asked, reserved, options.get("trust_remote_code", False), adapters, copied)


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
        "device_map": dict(plan.device_map),
        "trust_remote_code": trusted,
        "local_files_only": True,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # so that the report names them, and is refused below
    }
    if placed.offload_folder is not None:
        arguments["offload_folder"] = placed.offload_folder
    if quantization is not None:
        arguments["quantization_config"] = copy.deepcopy(quantization)
    if source.gguf_file is not None:
        arguments["gguf_file"] = source.gguf_file
    with reading(f"the weights of {source.name!r}"), _random_state_kept():
        model, report = auto_class(plan.task).from_pretrained(source.folder, **arguments)
    try:
        check_report(report, plan.name, plan.model_class)
    except LmkitError:
        del model
        gc.collect()
        raise
    return model


@contextlib.contextmanager
def _random_state_kept() -> Iterator[None]:
    """Put torch's random state back: some models draw numbers for what they then compute or load."""
    import torch

    kind = accelerator()
    devices = range(torch.accelerator.device_count()) if kind else ()
    with torch.random.fork_rng(devices=devices, device_type=kind or "cuda"):
        yield


def _tell(plan: LoadPlan) -> None:
    """Log each reason; that a part is offloaded, as a warning."""
    for what, reason in plan.reasons.items():
        logger.log(logging.WARNING if what == "offload" else logging.INFO, "%s: %s: %s", plan.name, what, reason)
