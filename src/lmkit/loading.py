"""`plan()` and `load()`: plan, then weights, then wrapper."""

from __future__ import annotations

import copy
import functools
import logging
import os
import sys
import threading
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict, TypeVar, overload

from lmkit._borrowed import check_versions, warn_of_gone
from lmkit._forks import check_fork, renew, share
from lmkit._interrupts import holding, surely
from lmkit._quiet import hushed, quiet, without_warnings
from lmkit._tracebacks import frameless
from lmkit.checkpoint.config import chat_template
from lmkit.checkpoint.files import Source, reading, reading_weights, tensors_of
from lmkit.checkpoint.find import Access, find, find_headers
from lmkit.checkpoint.gguf import gguf_read_once
from lmkit.checkpoint.tasks import CausalWord, MaskedWord, Seq2SeqWord, Task, TaskWord, auto_class, resolve_task
from lmkit.errors import OptionError, UnknownOptionError, listed, nearest, shown
from lmkit.jobs.job import check_files
from lmkit.kernels import attention, ordered, rotary
from lmkit.kernels.native.build import NoKernelsError, instructions
from lmkit.kernels.native.operators import operators, refusal
from lmkit.kernels.openmp import release_pool
from lmkit.kernels.packed import pack
from lmkit.kernels.together import join
from lmkit.kernels.wide_copies import Copies, keep_copies
from lmkit.options.signatures import spelled_out
from lmkit.planning import told_language
from lmkit.planning.adapters import AdapterArgument, bringing, find_adapters, put_on, templated
from lmkit.planning.machine import accelerator, this_machine
from lmkit.planning.make import check_fits, make_plan
from lmkit.planning.replicas import places, shared, threads, together
from lmkit.planning.running import unexpected
from lmkit.planning.told_language import check_language
from lmkit.planning.trial import Wish
from lmkit.planning.weight_names import check_report
from lmkit.wrappers.base import Loaded, embedded_rows
from lmkit.wrappers.generator import Generator
from lmkit.wrappers.replica_pool import Pool, check_start
from lmkit.wrappers.replicas import LoadedReplicas, Replicated, model_of
from lmkit.wrappers.translator import Translator
from lmkit.wrappers.unmasker import Unmasker

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch
    from transformers import PreTrainedConfig
    from transformers.utils.quantization_config import QuantizationConfigMixin
    from typing_extensions import Unpack

    from lmkit.planning.placement import Devices
    from lmkit.planning.plan import LoadPlan
    from lmkit.planning.precision import PrecisionWord
    from lmkit.results import JobReport

logger = logging.getLogger("lmkit")
ResultT = TypeVar("ResultT")


class _OneAtATime:
    """transformers builds a model with torch's default dtype set to the model's: a setting of the whole process."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        share(self)

    def forked(self) -> bool:
        """Make ready for a process that was forked; see `lmkit._forks`."""
        return renew(self._lock)

    def __call__(self, do: Callable[[], ResultT]) -> ResultT:
        """Call `do` when it is this thread's turn, in silence; what a load sets does not outlast it."""
        return holding(self._lock, lambda: _silently(lambda: _settings_kept(do)))


def _silently(do: Callable[[], ResultT]) -> ResultT:
    return quiet(lambda: without_warnings(do))


def _settings_kept(do: Callable[[], ResultT]) -> ResultT:
    """Put torch's settings back: some models draw numbers for what they then compute or load."""
    import torch

    dtype, grad, states = torch.get_default_dtype(), torch.is_grad_enabled(), _random_states()
    overrides: Any = torch.overrides
    stack = overrides._get_current_function_mode_stack  # noqa: SLF001 - there is no public one
    modes = stack()  # such as a default device

    def undo() -> None:
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(grad)
        while (now := stack()) != modes[: len(now)]:
            overrides._pop_mode()  # noqa: SLF001
        for mode in modes[len(stack()) :]:
            overrides._push_mode(mode)  # noqa: SLF001
        for put, state in states:
            put(state)

    return surely(do, undo)


def _without_pool(do: Callable[[], ResultT]) -> ResultT:
    """Have transformers read tensors in this thread: Ctrl-C inside its pool's locks would keep Python from exiting.

    On a CPU its threads save nothing: what is read is mapped, and torch converts with all cores.
    """
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    if name in os.environ:
        return do()

    def alone() -> ResultT:
        os.environ[name] = "1"
        return do()

    return surely(alone, lambda: os.environ.pop(name, None))


def _random_states() -> list[tuple[Callable[[torch.Tensor], None], torch.Tensor]]:
    import torch

    found: list[tuple[Callable[[torch.Tensor], None], torch.Tensor]] = [(torch.set_rng_state, torch.get_rng_state())]
    if kind := accelerator():
        module = torch.get_device_module(kind)
        for number in range(torch.accelerator.device_count()):
            put = functools.partial(module.set_rng_state, device=number)
            found.append((put, module.get_rng_state(number)))
    return found


_in_turn = _OneAtATime()


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
        attn_implementation: Which attention transformers computes with, in its own words, such as `"sdpa"` or
            `"flash_attention_2"`; if left out, lmkit's own on a CPU, and elsewhere what the config asks for.
        language: Which language the model works in, of a checkpoint that has weights for each: XLM with language
            embeddings, X-MOD. What an `OptionError` names where it is missing. Not for a `Translator`, whose calls take
            `source=` and `target=`.
        trust_remote_code: Run the Python code that comes with the checkpoint. It can do anything.
        context_length: How many tokens the model takes at once, where that is not what its config says, scaled rotary
            positions counted as vLLM does (`LoadPlan.reasons["context"]`).
        compile: True compiles the decode step of a `Generator`, for any number of rows, and lmkit's own kernels, which
            multiply what is `"int8"` or `"int4"` on an x86 processor, if a C++ compiler is here; `"kernels"` compiles
            these alone, for every task. The first load of a model takes about a minute longer for its step, the first
            one on a machine some seconds for the kernels, later ones a few seconds: the code is kept in the cache
            folder of lmkit. With True an `OptionError` for families that have no such step.
        prefix_cache_bytes: How many bytes of keys and values of recent prompts and answers a `Generator` may keep, so
            that a prompt which begins like one of them reads only the rest; 0 keeps none. 256 MiB if left out. Families
            whose keys and values cannot be kept keep none, as `LoadPlan.prefix_cache_bytes` says.
        allow_pickle: Read pickled weights where there are no safetensors. Unpickling can run any code.
        replicas: Load the model once per device, each in a process of its own, such as `["cuda:0", "cuda:1"]`, or on a
            CPU a number of times; rows go where there is room. A script has to do that under
            `if __name__ == "__main__":`.
    """

    revision: str | None
    token: str | bool | None
    cache_dir: str | os.PathLike[str] | None
    local_files_only: bool
    adapter: AdapterArgument
    reserve_tokens: int
    context_length: int | None
    compile: bool | Literal["kernels"]
    prefix_cache_bytes: int
    wide_copy_bytes: int
    attn_implementation: str | None
    language: str | None
    trust_remote_code: bool
    allow_pickle: bool
    replicas: int | Sequence[str | int | torch.device] | None


PrecisionArgument: TypeAlias = "PrecisionWord | QuantizationConfigMixin"
Asked: TypeAlias = "tuple[Task, PrecisionArgument, Devices]"


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
@spelled_out
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
        OptionError: An option is unknown or not accepted, or compiled steps are not to be had.
        EngineError: The step could not be compiled.
        MissingExtraError: The checkpoint needs a package that is not installed.
        VersionError: transformers, torch or accelerate is too old.
    """
    if options.get("replicas") is not None:
        check_start()
    kind, access = _asked(task, name, options)
    asked = (kind, precision, devices)
    # Who waits for a download in a terminal sees the Hub library's bars.
    looked = functools.partial(find, os.fspath(name), access)
    source = looked() if sys.stderr.isatty() else quiet(looked)
    again = {name: value for name, value in options.items() if name != "token"}  # a pickle keeps no secrets
    reload = functools.partial(load, task, name, precision, devices, **again)
    if options.get("replicas") is not None:
        return _replicated(asked, access, options, source, reload)
    decided, model, tokenizer, copies = _in_turn(lambda: _loaded(asked, access, options, source))
    hushed(lambda: _tell(decided, model, tokenizer))
    with frameless:  # and silently: a compiler talks
        wrapper = _silently(lambda: _WRAPPERS[kind](Loaded(model, tokenizer, decided, reload, copies)))
    release_pool()
    return wrapper


def run_job(
    task: TaskWord,
    name: str | os.PathLike[str],
    in_file: str | os.PathLike[str],
    out_file: str | os.PathLike[str],
    /,
    *,
    precision: PrecisionArgument = "auto",
    devices: Devices = "auto",
    **options: Any,
) -> JobReport:
    """Load a model, and answer each row of a file; what is cut short goes on when it is run again.

    ```python
    lmkit.run_job("seq2seq", "facebook/m2m100_418M", "in.jsonl", "out.jsonl", column="text", source="en", target="de")
    ```

    Args:
        task: As for `load`.
        name: As for `load`.
        in_file: As for the method `run_job` of what is loaded.
        out_file: The same.
        precision: As for `load`.
        devices: As for `load`.
        **options: Those of `load` and of the method.

    Raises:
        LmkitError: As `load` and the method do.
    """
    check_files(in_file, out_file)
    loading = {name: options.pop(name) for name in LoadOptions.__annotations__ if name in options}
    with load(task, name, precision, devices, **loading) as model:
        return model.run_job(in_file, out_file, **options)


def _loaded(
    asked: Asked, access: Access, options: LoadOptions, source: Source
) -> tuple[LoadPlan, Any, Any, Copies | None]:
    """Plan, read what is planned, and carry out the rest of the plan."""
    tensors = tensors_of(source, allow_pickle=access.allow_pickle)
    wish = _wish(asked, access, options)
    read_tokenizer = functools.cache(lambda: _read_tokenizer(source, wish))

    def read() -> tuple[LoadPlan, PreTrainedConfig, Any]:
        plan, config = make_plan(wish, source, tensors, this_machine(), read_tokenizer)
        check_fits(plan)
        read_tokenizer()
        with frameless:
            return plan, config, _read_model(plan, config, source, wish)

    plan, config, model = gguf_read_once(source, read)
    with frameless:
        _without_pool(lambda: put_on(model, wish.adapters))
        told_language.put_on(model, check_language(config, wish.language, source.name))
        plan, kernels = _with_kernels(plan, model, wish)
        return plan, model, read_tokenizer(), _carry_out(plan, model, wish, kernels)


def _replicated(
    asked: Asked, access: Access, options: LoadOptions, source: Source, reload: functools.partial[Any]
) -> Generator | Translator | Unmasker:
    """Plan for all replicas, have a process load each, and take the wrapper of what they say."""
    tensors = tensors_of(source, allow_pickle=access.allow_pickle)
    wish, machine = _wish(asked, access, options), this_machine()
    found = places(options.get("replicas"), asked[2], machine)
    own = shared(machine, found)
    read_tokenizer = functools.cache(lambda: _read_tokenizer(source, wish))

    def planned() -> tuple[LoadPlan, PreTrainedConfig]:
        plan, config = together(found, lambda one: make_plan(one, source, tensors, own, read_tokenizer), wish)
        check_fits(plan)
        return plan, config

    decided, config = _in_turn(lambda: gguf_read_once(source, planned))
    tokenizer = _in_turn(read_tokenizer)
    rest = {name: value for name, value in options.items() if name != "replicas"}
    loads = [functools.partial(load, *reload.args[:3], device, **rest) for device in found]
    pool = Pool(found, loads, threads(found))
    model = model_of(pool.facts[0], config)
    hushed(lambda: _tell(decided, model, tokenizer))
    wrapper: Generator | Translator | Unmasker = _replicated_kind(asked[0])(
        LoadedReplicas(model, tokenizer, decided, reload, pool=pool)
    )
    return wrapper


@functools.cache
def _replicated_kind(task: Task) -> Any:
    """Return the class of a task's replicas, which is one of its wrapper's."""
    wrapper: Any = _WRAPPERS[task]
    return type(f"Replicated{wrapper.__name__}", (Replicated, wrapper), {})


@spelled_out
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
        OptionError: An option is unknown or not accepted, or compiled steps are not to be had.
        MissingExtraError: The checkpoint needs a package that is not installed.
        VersionError: transformers, torch or accelerate is too old.
    """
    kind, access = _asked(task, name, options)
    source, tensors = _silently(lambda: find_headers(os.fspath(name), access))

    def planned() -> LoadPlan:
        wish, machine = _wish((kind, precision, devices), access, options), this_machine()
        tokenizer = functools.partial(_read_tokenizer, source, wish)
        if options.get("replicas") is None:
            make = functools.partial(make_plan, wish, source, tensors, machine, tokenizer, absent=True)
        else:
            found = places(options.get("replicas"), devices, machine)
            own = shared(machine, found)
            make = functools.partial(together, found, lambda one: make_plan(one, source, tensors, own, tokenizer), wish)
        return gguf_read_once(source, make)[0]

    return _in_turn(planned)


def _asked(task: TaskWord, name: object, options: LoadOptions) -> tuple[Task, Access]:
    """Check the libraries, and the words and options of a call."""
    check_fork()
    check_versions()
    _check_options(options)
    if not isinstance(name, (str, os.PathLike)):
        raise OptionError(
            f"name={shown(name)} is not accepted: pass a Hub id, a folder or a .gguf file, as a string or a path."
        )
    given = _of(Access, options)
    if given.get("cache_dir") is not None:
        given["cache_dir"] = os.fspath(given["cache_dir"])
    return resolve_task(task, os.fspath(name)), Access(**given)


def _wish(asked: Asked, access: Access, options: LoadOptions) -> Wish:
    adapters = find_adapters(options.get("adapter"), access)
    return Wish(*asked, adapters=adapters, access=access, **_of(Wish, options))


def _of(kind: type[Access | Wish], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that are fields of a class."""
    return {field.name: options[field.name] for field in fields(kind) if field.name in options}


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
    "tokenizer": "tokenizer.save_pretrained(folder) beside the model's files, and load that folder",
}
"""Keywords of from_pretrained and pipeline, and what to write here."""


def _check_options(options: Mapping[str, object]) -> None:
    known = LoadOptions.__annotations__
    for name in options:
        if name in _MOVED:
            raise UnknownOptionError(f"load() takes no {name}=: write {_MOVED[name]}.")
        if name not in known:
            raise UnknownOptionError(f"load() takes no {name}=.{nearest(name, known)} Accepted: {listed(known)}.")
    compiled = options.get("compile", False)
    if compiled != "kernels" and not isinstance(compiled, bool):
        raise OptionError(f"compile={shown(compiled)} is not accepted: pass True, False or 'kernels'.")
    asked = options.get("attn_implementation")
    if asked is not None and not isinstance(asked, str):
        raise OptionError(f"attn_implementation={shown(asked)} is not accepted: pass a word, as 'sdpa' or 'eager'.")
    for option, (unit, least) in _WHOLE.items():
        number = options.get(option)
        given = option in options and (number is not None or option != "context_length")
        if given and (not isinstance(number, int) or isinstance(number, bool) or number < least):
            told = shown(number)
            raise OptionError(f"{option}={told} is not accepted: pass a whole number of {unit}, {least} or more.")


_WHOLE = {
    "reserve_tokens": ("tokens", 0),
    "context_length": ("tokens", 1),
    "prefix_cache_bytes": ("bytes", 0),
    "wide_copy_bytes": ("bytes", 0),
}
"""Options that are whole numbers, of what, and the least."""


def _read_tokenizer(source: Source, wish: Wish) -> Any:
    """Read the tokenizer: the adapter's, or with its chat template, where it brings one."""
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    brought, template = bringing(wish.adapters), templated(wish.adapters)
    name, folder = (source.name, source.folder) if brought is None else (brought.origin, brought.folder)
    gguf = {"gguf_file": source.gguf_file} if source.gguf_file and brought is None else {}
    trusted = wish.access.trust_remote_code
    with reading(f"the tokenizer of {name!r}"):
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted, local_files_only=True, **gguf)
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise TypeError(f"{type(tokenizer).__name__} is no tokenizer of one vocabulary")
        if not isinstance(tokenizer.model_max_length, (int, float)):
            raise TypeError(f"model_max_length is {tokenizer.model_max_length!r}, not a number")
        try:
            tokenizer.all_special_ids  # noqa: B018 - transformers looks for what is no token as for the unknown one
        except RecursionError as error:
            raise ValueError(f"its unk_token {tokenizer.unk_token!r} is not in its vocabulary") from error
        if template is not None:
            tokenizer.chat_template = chat_template(template.folder)
    if brought is not None and not tokenizer.chat_template:
        tokenizer.chat_template = _read_tokenizer(source, replace(wish, adapters=())).chat_template
    return tokenizer


def _read_model(plan: LoadPlan, config: PreTrainedConfig, source: Source, wish: Wish) -> Any:
    """Read the weights as planned, or leave nothing behind."""
    placed, quantization = plan.placement, plan.precision.quantization
    arguments: dict[str, Any] = {
        "config": config,
        "dtype": plan.precision.dtype,
        "device_map": dict(plan.device_map),
        "trust_remote_code": wish.access.trust_remote_code,
        "local_files_only": True,
        "adapter_kwargs": {"subfolder": "none"},  # transformers would put one on that lies beside the weights
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # so that the report names them, and is refused below
    }
    if placed.offload_folder is not None:
        arguments["offload_folder"] = placed.offload_folder
    if quantization is not None:
        arguments["quantization_config"] = copy.deepcopy(quantization)
    if source.gguf_file is not None:
        arguments["gguf_file"] = source.gguf_file
    if wish.attn_implementation is not None:
        arguments["attn_implementation"] = wish.attn_implementation
    read = functools.partial(auto_class(plan.task, config).from_pretrained, source.folder, **arguments)
    with reading_weights(source):
        model, report = _without_pool(read) if placed.device_type == "cpu" else read()
    check_report(report, plan.name, plan.model_class)
    if source.gguf_file is not None and plan.end_token_ids:
        model.generation_config.eos_token_id = list(plan.end_token_ids)
    return model


def _with_kernels(plan: LoadPlan, model: Any, wish: Wish) -> tuple[LoadPlan, Any]:
    """Put lmkit's own kernels into a model, as planned; return the plan, which says where that failed, and them."""
    attends = wish.compile and plan.attention == attention.NAME and refusal() is None
    if plan.kernels != "native" and not attends:
        return plan, None
    try:
        isa = instructions()
        kernels = operators(isa)
    except NoKernelsError as error:
        why = f"torch's, although lmkit's own were asked for: {error}"
        logger.warning("%s: kernels: %s", plan.name, why)
        told = {"kernels": why} | ({"attention": f"without a kernel of lmkit's own: {error}"} if attends else {})
        kept = "torch" if plan.kernels == "native" else plan.kernels
        return replace(plan, kernels=kept, reasons={**plan.reasons, **told}), None
    if plan.kernels == "native":
        ordered.put_on(model, isa)
    return plan, kernels


def _carry_out(plan: LoadPlan, model: Any, wish: Wish, kernels: Any) -> Copies | None:
    """Replace of a model that was read what the plan says; return what keeps wide copies of its layers."""
    if plan.kernels == "packed":
        pack(model, plan._together)  # noqa: SLF001 - names that are for this alone
    else:
        join(model, plan._together)  # noqa: SLF001
    if plan.attention == attention.NAME:
        attention.put_on(model, kernels)
    rotary.put_on(model)
    on_cpu = wish.wide_copy_bytes and plan.placement.device_type == "cpu" and plan.kernels != "native"
    return keep_copies(model, wish.wide_copy_bytes) if on_cpu else None


def _warn_of_tokens(model: Any, tokenizer: Any, name: str) -> None:
    """Log that a tokenizer has tokens which the model has no embeddings for: texts with one of them fail."""
    rows = embedded_rows(model)
    if rows is not None and len(tokenizer) > rows:
        beyond = [tokenizer.convert_ids_to_tokens(token_id) for token_id in range(rows, min(len(tokenizer), rows + 5))]
        more = " and others" if len(tokenizer) > rows + len(beyond) else ""
        logger.warning("%s: tokens without an embedding, %d are there: %s%s", name, rows, listed(beyond), more)


def _tell(plan: LoadPlan, model: Any, tokenizer: Any) -> None:
    """Log each reason; as warnings that a part is offloaded, that rows run slower than known, and what is gone."""
    for what, reason in plan.reasons.items():
        logger.log(logging.WARNING if what == "offload" else logging.INFO, "%s: %s: %s", plan.name, what, reason)
    if (told := unexpected(plan.task, plan.engine, model.config.model_type)) is not None:
        logger.warning("%s: %s: %s", plan.name, plan.reasons["engine"], told)
    warn_of_gone()
    _warn_of_tokens(model, tokenizer, plan.name)
