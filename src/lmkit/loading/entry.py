"""`plan()` and `load()`: plan, then weights, then wrapper."""

from __future__ import annotations

import functools
import os
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeAlias, overload

from lmkit._borrowed import check_versions
from lmkit._forks import check_fork
from lmkit._quiet import hushed, without_warnings
from lmkit._tracebacks import frameless
from lmkit.checkpoint.files import Source, tensors_of
from lmkit.checkpoint.find import Access, find, find_headers
from lmkit.checkpoint.gguf import gguf_read_once
from lmkit.checkpoint.tasks import CausalWord, MaskedWord, Seq2SeqWord, Task, TaskWord, resolve_task
from lmkit.errors import OptionError, shown
from lmkit.jobs.job import check_files
from lmkit.kernels.openmp import release_pool
from lmkit.loading.options import LoadOptions, check_options
from lmkit.loading.reading import as_compiled, carry_out, read_model, read_tokenizer, tell, with_kernels
from lmkit.loading.turns import in_turn, silently, without_pool
from lmkit.options.signatures import spelled_out
from lmkit.planning import told_language
from lmkit.planning.adapters import find_adapters, put_on
from lmkit.planning.machine import give_back, this_machine
from lmkit.planning.make import check_fits, make_plan
from lmkit.planning.replicas import places, shared, threads, together
from lmkit.planning.told_language import check_language
from lmkit.planning.trial import Wish
from lmkit.wrappers.base import Loaded
from lmkit.wrappers.generator import Generator
from lmkit.wrappers.progress import watched
from lmkit.wrappers.replica_pool import Pool, check_start
from lmkit.wrappers.replicas import LoadedReplicas, Replicated, model_of
from lmkit.wrappers.translator import Translator
from lmkit.wrappers.unmasker import Unmasker

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from transformers import PreTrainedConfig
    from typing_extensions import Unpack

    from lmkit.loading.options import PrecisionArgument
    from lmkit.planning.placement import Devices
    from lmkit.planning.plan import LoadPlan
    from lmkit.results import JobReport

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
@overload
def load(
    task: str,
    name: str | os.PathLike[str],
    precision: PrecisionArgument = "auto",
    devices: Devices = "auto",
    **options: Unpack[LoadOptions],
) -> Generator | Translator | Unmasker: ...
@spelled_out
def load(
    task: TaskWord | str,
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
    # Who waits for a download in a terminal or a notebook sees the Hub library's bars.
    looked = functools.partial(find, os.fspath(name), access)
    source = without_warnings(looked) if watched() else silently(looked)
    again = {name: value for name, value in options.items() if name != "token"}  # a pickle keeps no secrets
    reload = functools.partial(load, task, name, precision, devices, **again)
    if options.get("replicas") is not None:
        return _replicated(asked, access, options, source, reload)
    try:
        decided, model, tokenizer = in_turn(lambda: _loaded(asked, access, options, source))
    except Exception:
        give_back()
        raise
    hushed(lambda: tell(decided, model, tokenizer))
    with frameless:  # and silently: a compiler talks
        wrapper = silently(lambda: _WRAPPERS[kind](Loaded(model, tokenizer, decided, reload)))
    release_pool()
    return wrapper


def run_job(
    task: TaskWord | str,
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


def _loaded(asked: Asked, access: Access, options: LoadOptions, source: Source) -> tuple[LoadPlan, Any, Any]:
    """Plan, read what is planned, and carry out the rest of the plan."""
    tensors = tensors_of(source, allow_pickle=access.allow_pickle)
    wish = _wish(asked, access, options)
    tokenizer = functools.cache(lambda: read_tokenizer(source, wish))

    def read() -> tuple[LoadPlan, PreTrainedConfig, Any]:
        plan, config = make_plan(wish, source, tensors, this_machine(), tokenizer)
        check_fits(plan)
        tokenizer()
        with frameless:
            return plan, config, read_model(plan, config, source, wish)

    plan, config, model = gguf_read_once(source, read)
    with frameless:
        without_pool(lambda: put_on(model, wish.adapters))
        told_language.put_on(model, check_language(config, wish.language, source.name))
        plan, kernels = with_kernels(plan, model, wish)
        plan = as_compiled(plan, model)
        carry_out(plan, model, kernels)
        return plan, model, tokenizer()


def _replicated(
    asked: Asked, access: Access, options: LoadOptions, source: Source, reload: functools.partial[Any]
) -> Generator | Translator | Unmasker:
    """Plan for all replicas, have a process load each, and take the wrapper of what they say."""
    tensors = tensors_of(source, allow_pickle=access.allow_pickle)
    wish, machine = _wish(asked, access, options), this_machine()
    found = places(options.get("replicas"), asked[2], machine)
    own = shared(machine, found)
    tokenizer_once = functools.cache(lambda: read_tokenizer(source, wish))

    def planned() -> tuple[LoadPlan, PreTrainedConfig]:
        plan, config = together(found, lambda one: make_plan(one, source, tensors, own, tokenizer_once), wish)
        check_fits(plan)
        return plan, config

    decided, config = in_turn(lambda: gguf_read_once(source, planned))
    tokenizer = in_turn(tokenizer_once)
    rest = {name: value for name, value in options.items() if name != "replicas"}
    loads = [functools.partial(load, *reload.args[:3], device, **rest) for device in found]
    pool = Pool(found, loads, threads(found))
    try:
        model = model_of(pool.facts[0], config)
        hushed(lambda: tell(decided, model, tokenizer))
        wrapper: Generator | Translator | Unmasker = _replicated_kind(asked[0])(
            LoadedReplicas(model, tokenizer, decided, reload, pool=pool)
        )
    except BaseException:
        pool.close()  # its threads hold it
        raise
    return wrapper


@functools.cache
def _replicated_kind(task: Task) -> Any:
    """Return the class of a task's replicas, which is one of its wrapper's."""
    wrapper: Any = _WRAPPERS[task]
    return type(f"Replicated{wrapper.__name__}", (Replicated, wrapper), {})


@spelled_out
def plan(
    task: TaskWord | str,
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
    source, tensors = silently(lambda: find_headers(os.fspath(name), access))

    def planned() -> LoadPlan:
        wish, machine = _wish((kind, precision, devices), access, options), this_machine()
        tokenizer = functools.partial(read_tokenizer, source, wish)
        if options.get("replicas") is None:
            make = functools.partial(make_plan, wish, source, tensors, machine, tokenizer, absent=True)
        else:
            found = places(options.get("replicas"), devices, machine)
            own = shared(machine, found)
            make = functools.partial(together, found, lambda one: make_plan(one, source, tensors, own, tokenizer), wish)
        return gguf_read_once(source, make)[0]

    return in_turn(planned)


def _asked(task: str, name: object, options: LoadOptions) -> tuple[Task, Access]:
    """Check the libraries, and the words and options of a call."""
    check_fork()
    check_versions()
    check_options(options)
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
