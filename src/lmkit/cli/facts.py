"""What `lmkit info` says of a checkpoint: its config and the names and sizes of its files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from lmkit.cli.options import Checkpoint
    from lmkit.tasks import Task
    from lmkit.weights import Source

__all__ = ["describe", "in_words"]


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what a checkpoint is and how to load it, as plain JSON types.

    Raises:
        ModelNotFoundError: The name is neither here nor reachable.
        WeightsError: A file is absent or broken, or the config needs code that is not trusted.
        UnknownTaskError: transformers does not know the architecture.
    """
    from lmkit._quiet import quiet
    from lmkit.configs import context_length, read_config
    from lmkit.sources import HubOptions, Wanted, find
    from lmkit.tasks import fitting_tasks

    hub = HubOptions(checkpoint.revision, local_files_only=checkpoint.local_files_only)
    trusted = checkpoint.trust_remote_code
    with quiet():
        source = find(checkpoint.name, hub, Wanted(weights=False, code=trusted))
        config = read_config(source, trusted=trusted)
        tasks = fitting_tasks(config)
    files = _weights(source)
    return {
        "name": checkpoint.name,
        "architecture": config.architectures[0] if config.architectures else None,
        "model_type": config.model_type,
        "tasks": tasks,
        "context_length": context_length(config),
        "weights": [file.name for file in files],
        "weights_bytes": sum(file.stat().st_size for file in files),
        "dtype": None if config.dtype is None else str(config.dtype).removeprefix("torch."),
        "presets": sorted(getattr(config, "task_specific_params", None) or {}),
        "chat_template": _has_chat_template(source),
        "load": _python(checkpoint, tasks, pickled=any(file.suffix == ".bin" for file in files)),
    }


def _weights(source: Source) -> list[Path]:
    """Return the weight files that are here; a checkpoint of the Hub is described without fetching them."""
    from lmkit.errors import WeightsError
    from lmkit.weights import weight_files

    if source.gguf_file is not None:
        return [source.folder / source.gguf_file]
    try:
        return weight_files(source, allow_pickle=True)  # listed here, not read
    except WeightsError:
        return []


def _has_chat_template(source: Source) -> bool | None:
    """Whether the checkpoint is made for chats; None for a GGUF file, which would have to be parsed for it."""
    if source.gguf_file is not None:
        return None
    if any((source.folder / f"chat_template.{kind}").is_file() for kind in ("jinja", "json")):
        return True
    file = source.folder / "tokenizer_config.json"
    return file.is_file() and '"chat_template"' in file.read_text(encoding="utf-8")


def _python(checkpoint: Checkpoint, tasks: list[Task], *, pickled: bool) -> str | None:
    """Return the line of Python that loads a checkpoint; None if no task fits."""
    if not tasks:
        return None
    options = {
        "revision": checkpoint.revision,
        "trust_remote_code": checkpoint.trust_remote_code,
        "allow_pickle": pickled,
    }
    given = "".join(f", {name}={value!r}" for name, value in options.items() if value)
    return f"lmkit.load({tasks[0]!r}, {checkpoint.name!r}{given})"


def in_words(value: object) -> str:
    """Write a fact for people."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
