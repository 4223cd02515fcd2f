"""Task words to transformers' Auto classes, and which task a checkpoint was made for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, get_args

from lmkit.errors import UnknownTaskError, listed, nearest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedConfig

Task: TypeAlias = Literal["causal", "seq2seq", "masked"]
CausalWord: TypeAlias = Literal["causal", "text-generation"]
Seq2SeqWord: TypeAlias = Literal["seq2seq", "translation", "summarization", "text2text-generation"]
MaskedWord: TypeAlias = Literal["masked", "fill-mask"]
TaskWord: TypeAlias = CausalWord | Seq2SeqWord | MaskedWord

TASK_WORDS: Final[Mapping[str, Task]] = {
    word: words[0] for words in map(get_args, (CausalWord, Seq2SeqWord, MaskedWord)) for word in words
}
"""Each task's name, which is the first of its words, and the names people know from pipelines."""


def resolve_task(word: object, name: str = "") -> Task:
    """Return the task a word stands for.

    Raises:
        UnknownTaskError: The word is none of `TASK_WORDS`; the nearest one is named.
    """
    if isinstance(word, str) and word in TASK_WORDS:
        return TASK_WORDS[word]
    if name in TASK_WORDS:
        raise UnknownTaskError(f"the task comes first: load({name!r}, {word!r}), not load({word!r}, {name!r}).")
    hint = nearest(word, TASK_WORDS) if isinstance(word, str) else ""
    raise UnknownTaskError(f"unknown task {word!r}.{hint} Accepted: {listed(TASK_WORDS)}.")


def auto_class(task: Task, config: PreTrainedConfig | None = None) -> Any:
    """Return the transformers Auto class that loads models for a task, or the one that loads this config's."""
    kinds = _autos(task)
    return next((kind for kind in kinds if config is not None and config.model_type in _mapping(kind)), kinds[0])


def _autos(task: Task) -> tuple[Any, ...]:
    """Return the Auto classes for a task, the usual one first: models of images and text write text as well."""
    import transformers

    return {
        "causal": (transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText),
        "seq2seq": (transformers.AutoModelForSeq2SeqLM,),
        "masked": (transformers.AutoModelForMaskedLM,),
    }[task]


def check_task(task: Task, config: PreTrainedConfig, name: str, *, trusted: bool = False) -> str:
    """Return the name of the architecture to load, if the checkpoint was made for the task.

    Twenty model types can be built both as causal and as masked models, so the type alone does not tell:
    BERT loaded as "causal" would generate nonsense. What the checkpoint says its architecture is decides.

    Raises:
        UnknownTaskError: The checkpoint was made for another task, which is named, or for none of them.
    """
    saved = (config.architectures or [""])[0]
    own = getattr(config, "auto_map", None) or {}
    if trusted and (brought := own.get(_autos(task)[0].__name__)):
        return str(brought).rpartition(".")[2]
    fitting = fitting_tasks(config)
    if task in fitting:
        classes = _classes(task, config)
        return saved if saved in classes else classes[0]
    kind = f"{saved or 'a model'} (model type {config.model_type!r})"
    if fitting:
        msg = f"{name!r} is {kind}, made for {listed(fitting)}, not {task!r}: load({fitting[0]!r}, …)."
    else:
        msg = f"{name!r} is {kind}, which does none of lmkit's tasks: {listed(get_args(Task))}."
    raise UnknownTaskError(msg)


def fitting_tasks(config: PreTrainedConfig) -> list[Task]:
    """Return the tasks a checkpoint was made for, by the architecture it names, else by its model type."""
    saved = (config.architectures or [""])[0]
    possible: list[Task] = [task for task in get_args(Task) if _classes(task, config)]
    if named := [task for task in get_args(Task) if saved in _all_classes(task)]:
        return [task for task in possible if task in named]
    if "masked" in possible and "causal" in possible and not getattr(config, "is_decoder", False):
        possible.remove("causal")
    return possible


def _classes(task: Task, config: PreTrainedConfig) -> list[str]:
    """Return the names of the classes that load this model type for a task."""
    kinds = _autos(task)[:1] if config.is_encoder_decoder else _autos(task)
    entries = (_mapping(kind).get(config.model_type, ()) for kind in kinds)
    return next((_names(entry) for entry in entries if entry), [])


def _all_classes(task: Task) -> set[str]:
    return {name for kind in _autos(task) for entry in _mapping(kind).values() for name in _names(entry)}


def _mapping(kind: Any) -> Mapping[str, str | tuple[str, ...]]:
    mapping: Mapping[str, str | tuple[str, ...]] = kind._model_mapping._model_mapping  # noqa: SLF001 - names alone
    return mapping


def _names(entry: str | tuple[str, ...]) -> list[str]:
    return [entry] if isinstance(entry, str) else list(entry)
