"""What the workloads share: the models, loaded once, and how often to repeat."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import _models

if TYPE_CHECKING:
    from collections.abc import Mapping

    from _peers import Peers

Task: TypeAlias = Literal["causal", "masked", "seq2seq"]

DEVICE = "LMKIT_BENCH_DEVICE"
"""The variable that says where models are put; a CPU without it. Processes that are started find it too."""

WIDE: str = os.environ.get("LMKIT_BENCH_WIDE", "bfloat16")
"""The precision of what is not quantized, on all sides: `float32` is it on a processor that multiplies no bfloat16."""

CHILD = Path(__file__).parent / "_child.py"


@dataclass(frozen=True)
class Bench:
    """One run of the benchmark.

    Attributes:
        folder: Where checkpoints are kept that are made for the benchmark.
        repeats: How often each side runs.
        peers: The peers that can be started.
    """

    folder: Path
    repeats: int
    peers: Peers
    _loaded: dict[tuple[str, Path], Any] = field(default_factory=dict)

    def lmkit(self, way: str = WIDE, task: Task = "causal", folder: Path | None = None) -> Any:
        """Load a checkpoint with lmkit, SmolLM2 by default; once for each way.

        Args:
            way: A precision, and behind a comma `kernels` (lmkit's own, without compiled steps) or `compiled`.
            task: What the checkpoint is loaded for.
            folder: Where it is.
        """
        precision, _, asked = way.partition(", ")
        key = way, folder or self.checkpoint
        if key not in self._loaded:
            compile: Any = True if asked == "compiled" else asked or False  # noqa: A001 - the option's name
            self._loaded[key] = load(task, key[1], precision, compile=compile)
        return self._loaded[key]

    @cached_property
    def checkpoint(self) -> Path:
        """Where SmolLM2 is."""
        return _models.smollm2(self.folder)

    @cached_property
    def tokenizer(self) -> Any:
        """SmolLM2's tokenizer."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.checkpoint)

    @cached_property
    def model(self) -> Any:
        """SmolLM2 for transformers, in `WIDE`: another copy than lmkit's."""
        import torch
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(self.checkpoint, dtype=getattr(torch, WIDE))
        return model.to(device())

    @property
    def generator(self) -> Any:
        """SmolLM2 for lmkit, in `WIDE`."""
        return self.lmkit()

    @cached_property
    def ends(self) -> list[int]:
        """SmolLM2's end tokens; rows that must run to their budget may not write them."""
        return ends(self.model)


def device() -> str:
    """Say where models are put."""
    return os.environ.get(DEVICE, "cpu")


def tried(way: str) -> bool:
    """Say whether a way of lmkit's is measured where models are: kernels and compiled steps are a CPU's."""
    return device() == "cpu" or "," not in way


def ends(model: Any) -> list[int]:
    """Return the tokens that end a model's texts."""
    own = model.generation_config.eos_token_id
    return [own] if isinstance(own, int) else list(own)


def load(task: Task, folder: Path, precision: Any = WIDE, *, reuse: bool = False, **options: Any) -> Any:
    """Load a checkpoint with lmkit.

    Prefixes are not kept from one call to the next unless `reuse`: a repeat would find the prompts of the one before.
    """
    import lmkit

    if not reuse and task != "masked":
        options["prefix_cache_bytes"] = 0
    lmkit_load: Any = lmkit.load  # its options are spelled out for users, not for a dict of them
    return lmkit_load(task, folder, precision, device(), **options)


def in_fresh_process(*arguments: str, cache: Path | None = None) -> dict[str, Any]:
    """Run a measurement of `_child.py` and return what it found.

    Args:
        arguments: Its name, and what it takes.
        cache: Where compiled artifacts are kept; the usual places by default.
    """
    places: Mapping[str, str] = (
        {}
        if cache is None
        else {
            "XDG_CACHE_HOME": str(cache),
            "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
            "TRITON_CACHE_DIR": str(cache / "triton"),
        }
    )
    command = [sys.executable, str(CHILD), *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env={**os.environ, **places})
    if done.returncode:
        msg = f"{' '.join(arguments)} failed:\n{done.stderr[-2000:]}"
        raise RuntimeError(msg)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
