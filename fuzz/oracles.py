"""What may come of a hostile checkpoint: an `LmkitError`, or the tokens of plain transformers; and nothing else."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cases

import lmkit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SECONDS = 5
"""Of the processor, however busy the machine is; who waits for nothing is found by `PATIENCE`."""
BYTES = 2**30

_FORBIDDEN = {
    *("socket.connect", "socket.bind", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.exec"),
    *("os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "pickle.find_class"),
}
_watched: list[str] | None = None
_writable: list[str] = []


class Hang(BaseException):
    """A case took too long. Nothing below catches it."""


def watch(*folders: str | Path) -> None:
    """Note, from now on and for good, what a case does that it may not; it may write into `folders`."""
    _writable.extend(str(Path(folder).resolve()) for folder in folders)
    sys.addaudithook(_hook)


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _watched is None:
        return
    if event in _FORBIDDEN:
        _watched.append(f"{event}{arguments!r:.200}")
    elif event == "open" and isinstance(arguments[0], (str, bytes)):
        path, mode, flags = arguments
        writes = set(mode or "") & set("wax+") or (mode is None and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        where = os.path.realpath(os.fsdecode(path))
        if writes and not where.startswith(("/dev/", "/proc/", *_writable)) and "__pycache__" not in where:
            _watched.append(f"writes {where}")


@contextlib.contextmanager
def _bounded() -> Iterator[list[str]]:
    """Collect what is wrong with what runs inside: what it did, how long it took, what memory it had at the most."""
    global _watched  # noqa: PLW0603 - the hook reads it
    found: list[str] = []
    most, started = _peak(), time.process_time()
    signal.signal(signal.SIGPROF, _ring)
    signal.setitimer(signal.ITIMER_PROF, 2 * SECONDS)
    _watched = found
    try:
        yield found
    except lmkit.LmkitError as error:
        found.extend(["an error without a word"] if not str(error).strip() else [])
    except (Exception, Hang) as error:  # noqa: BLE001 - anything else is what is looked for
        found.append(f"{type(error).__name__}: {error!s:.300}")
    finally:
        _watched = None
        signal.setitimer(signal.ITIMER_PROF, 0)
    if (took := time.process_time() - started) > SECONDS:
        found.append(f"took {took:.1f} s")
    if _peak() - most > BYTES:
        found.append(f"took {(_peak() - most) / 2**20:.0f} MiB")


def _ring(*_: object) -> None:
    raise Hang


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def planned(case: cases.Case, folder: Path) -> tuple[list[str], str]:
    """Plan a case; return what is wrong, and how it ended."""
    task, name, options = _asked(case, folder)
    ended = "refused"
    with _bounded() as wrong:
        lmkit.plan(task, name, "float32", "cpu", **options)
        ended = "planned"
    return wrong, ended


def loaded(case: cases.Case, folder: Path) -> tuple[list[str], str]:
    """Load a case and let it answer; return what is wrong, and how it ended."""
    task, name, options = _asked(case, folder)
    answer: Any = None
    ended = "refused"
    with _bounded() as wrong, lmkit.load(task, name, "float32", "cpu", **options) as model:
        ended = "loaded"
        answer = _answer(model, task)
        if task == "causal" and model.tokenizer.chat_template:
            with contextlib.suppress(lmkit.LmkitError):
                model.chat([{"role": "user", "content": "She"}], max_new_tokens=2)
    if answer is not None and not wrong and case["base"] != "adapter":
        ended = "answered"
        with contextlib.suppress(Exception):  # what transformers does not run there is nothing to compare with
            right = _plain(task, folder)
            ended = "the same"
            if answer != right:
                wrong.append(f"{answer} and not {right}")
    return wrong, ended


def _asked(case: cases.Case, folder: Path) -> tuple[Any, str, dict[str, Any]]:
    task = cases.TASKS[case["base"]]
    if case["base"] == "adapter":
        return task, str(cases.base("llama")), {"local_files_only": True, "adapter": str(folder)}
    return task, str(folder), {"local_files_only": True}


def _answer(model: Any, task: str) -> Any:
    if task == "masked":
        return [one.token_id for one in model(f"She {model.tokenizer.mask_token}.", top_k=3).masks[0].candidates]
    return list(model("She", max_new_tokens=3).token_ids)


def _plain(task: str, folder: Path) -> Any:
    """Return what plain transformers answers, greedily."""
    import torch

    import checkpoints

    model, tokenizer = _quietly(lambda: checkpoints.plain(task, folder))
    text = f"She {tokenizer.mask_token}." if task == "masked" else "She"
    inputs = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        if task == "masked":
            place = inputs["input_ids"][0].tolist().index(tokenizer.mask_token_id)
            return model(**inputs).logits[0, place].topk(3).indices.tolist()
        ids = model.generate(**inputs, max_new_tokens=3, do_sample=False, num_beams=1)[0].tolist()
    written = ids[1:] if task == "seq2seq" else ids[inputs["input_ids"].shape[1] :]
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return written[:-1] if written and written[-1] in ends else written


def _quietly(do: Callable[[], Any]) -> Any:
    with Path(os.devnull).open("w", encoding="utf-8") as nothing, contextlib.redirect_stderr(nothing):
        return do()
