"""What `lmkit info` says of a checkpoint: its config and the names and sizes of its files."""

from __future__ import annotations

import functools
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from lmkit.checkpoint.files import Source
    from lmkit.checkpoint.tasks import Task
    from lmkit.cli.options import Checkpoint


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what a checkpoint is and how to load it, as plain JSON types.

    Raises:
        ModelNotFoundError: The name is neither here nor reachable.
        WeightsError: A file is absent or broken, or the config needs code that is not trusted.
        UnknownTaskError: transformers does not know the architecture.
    """
    from lmkit._quiet import quiet
    from lmkit.checkpoint.config import context, read_config
    from lmkit.checkpoint.find import Access, find
    from lmkit.checkpoint.gguf import gguf_read_once
    from lmkit.checkpoint.tasks import fitting_tasks

    options = asdict(checkpoint)
    access = Access(**{field.name: options[field.name] for field in fields(Access) if field.name in options})
    source = quiet(lambda: find(checkpoint.name, access, weights=False))
    read = functools.partial(read_config, source, trusted=access.trust_remote_code)
    config = quiet(lambda: gguf_read_once(source, read))
    tasks = quiet(lambda: fitting_tasks(config))
    files = _weights(source)
    return {
        "name": checkpoint.name,
        "architecture": config.architectures[0] if config.architectures else None,
        "model_type": config.model_type,
        "tasks": tasks,
        "context_length": context(config)[0],
        "weights": [file.name for file in files],
        "weights_bytes": sum(file.stat().st_size for file in files),
        "dtype": None if config.dtype is None else str(config.dtype).removeprefix("torch."),
        "presets": sorted(getattr(config, "task_specific_params", None) or {}),
        "chat_template": _has_chat_template(source),
        "load": _python(checkpoint, tasks, pickled=any(file.suffix == ".bin" for file in files)),
    }


def _weights(source: Source) -> list[Path]:
    """Return the weight files that are here; a checkpoint of the Hub is described without fetching them."""
    from lmkit.checkpoint.files import weight_files
    from lmkit.errors import WeightsError

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
    needed = {**asdict(checkpoint), "allow_pickle": pickled}
    names = [name for name in ("revision", "trust_remote_code", "allow_pickle") if needed[name]]
    given = "".join(f", {name}={needed[name]!r}" for name in names)
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
