"""`LoadPlan`: what was decided about a load, as data, as a table and as a picture."""

from __future__ import annotations

import html
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

from lmkit.errors import OptionError, listed
from lmkit.planning.layout import Layout, ModulePlan, size, summed_names
from lmkit.results.base import Result
from lmkit.results.pictures import Block, Facts, as_it_is, to_html

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lmkit.checkpoint.tasks import Task
    from lmkit.planning.keyvalues import KeyValueBytes
    from lmkit.planning.placement import Placement
    from lmkit.planning.precision import Precision
    from lmkit.planning.running import EngineWord

SHOWN_TOKENS = 8192
"""How many tokens keys and values are shown for, at the most."""

COLORS = ("#4c78a8", "#72b7b2")
"""Of neighbouring parts in turn."""


@dataclass(frozen=True, slots=True, repr=False)
class LoadPlan(Result):
    """What will be loaded, in what precision, where to, and why.

    Bytes are those of weights and of keys and values; what a forward pass computes with comes on top. `str()` is a
    table, a notebook shows a picture, `to_dict()` is JSON.

    Attributes:
        task: What the model is loaded for.
        name: The name as the caller wrote it.
        architecture: What the checkpoint calls its model; its model type if it does not say.
        model_class: The transformers class that will hold it.
        parameters: How many numbers it has, tied weights counted once.
        precision: What the weights will be held in.
        placement: Which devices may hold them, and how much of each.
        kernels: `"packed"` where linear layers are kept in the order of the processor's own kernel, `"native"` where
            they are in that of lmkit's own, quantized or in bfloat16, else `"torch"`.
        attention: `"lmkit"` for its own attention on a CPU (`reasons` says what that gains), else what transformers
            calls the one that it chooses, such as `"sdpa"`.
        engine: `"lmkit"` where its own loop runs rows, `"generate"` where each step is prepared by transformers.
        compiled: Whether the decode step is compiled.
        prefix_cache_bytes: How many bytes of keys and values of recent prompts may be kept; 0 where none can be. What
            fits does not count them.
        key_values: What keys and values of one row take; None for masked models, which keep none, and where that only
            shows when the model runs.
        context_length: The most tokens the model takes at once; None where nothing bounds it.
        end_token_ids: Tokens that end an answer beside those of the generation config: of a GGUF file in every text, of
            other checkpoints in chats.
        fits: Whether all of it fits its devices.
        reasons: Why, a sentence per automatic choice, such as under `"precision"`, `"engine"`, `"attention"`,
            `"compiled"`, `"together"` and `"prefixes"`; under `"fits"` what does not fit, and what would.
    """

    task: Task
    name: str
    architecture: str
    model_class: str
    parameters: int
    precision: Precision
    placement: Placement
    kernels: Literal["torch", "packed", "native"]
    attention: str
    engine: EngineWord
    compiled: bool
    prefix_cache_bytes: int
    key_values: KeyValueBytes | None
    context_length: int | None
    end_token_ids: tuple[int, ...]
    fits: bool
    reasons: Mapping[str, str]
    _layout: Layout = field(repr=False)
    _together: tuple[tuple[str, ...], ...] = field(default=(), repr=False)

    def __getstate__(self) -> dict[str, Any]:
        """Pickle fields by their names."""
        return {one.name: getattr(self, one.name) for one in fields(self)}

    def __setstate__(self, state: dict[str, Any] | list[Any]) -> None:
        """Open a pickle; one of 0.1, which has values in order, says nothing of how rows run."""
        if isinstance(state, list):
            names = "task name architecture model_class parameters precision placement device_map modules kernels "
            state = dict(zip((names + "key_values context_length fits reasons _layout").split(), state, strict=True))
            del state["device_map"], state["modules"]
            state |= {"attention": "sdpa", "engine": "lmkit", "compiled": False, "prefix_cache_bytes": 0}
        for name, value in ({"end_token_ids": (), "_together": ()} | state).items():
            object.__setattr__(self, name, value)

    def __hash__(self) -> int:
        """Hash what of a plan can be: its maps cannot."""
        return hash((self.task, self.name, self.model_class, self.precision.name, self.modules, self.fits))

    @property
    def device_map(self) -> Mapping[str, str]:
        """A device, or `"disk"`, per module name, where `""` is the whole model."""
        return self._layout.device_map

    @property
    def modules(self) -> tuple[ModulePlan, ...]:
        """The parts that stay whole, each with its device, its dtype and its bytes."""
        return self._layout.modules

    @property
    def weights_bytes(self) -> int:
        """What the weights take in all, scales of quantized ones included."""
        return sum(module.bytes for module in self.modules)

    @property
    def beside_bytes(self) -> int:
        """What is held beside the weights: buffers that no file has, adapters, layers held twice."""
        return self._layout.beside

    @property
    def bytes_per_device(self) -> dict[str, int]:
        """What the weights take on each device, the disk among them."""
        return self._layout.bytes_per_device

    @property
    def kv_bytes_per_token(self) -> int | None:
        """What keys and values of one more token take, before any window is full; of an encoder-decoder, of its output.

        None where `key_values` is.
        """
        return None if self.key_values is None else self.key_values.of(1) - self.key_values.fixed

    def max_rows(self, tokens: int, source_tokens: int | None = None) -> int | None:
        """Return how many rows fit beside the weights.

        Args:
            tokens: How many tokens each row may have, its prompt included.
            source_tokens: Of an encoder-decoder, how many its source may have; as many if left out.

        Returns:
            None where `key_values` is.

        Raises:
            OptionError: A row of no tokens.
        """
        if tokens < 1 or (source_tokens is not None and source_tokens < 0):
            raise OptionError(
                f"max_rows({tokens!r}, {source_tokens!r}) is not accepted: pass a number of tokens, 1 or more."
            )
        if self.key_values is None:
            return None
        return self._layout.rows(self.key_values.of(tokens, tokens if source_tokens is None else source_tokens))

    def __str__(self) -> str:
        """Write the plan as a table for people."""
        lines = _facts(self)
        for device, used in self.bytes_per_device.items():
            inside = [module for module in self.modules if module.device == device]
            room = f" of {size(self._layout.limits[device])}" if device in self._layout.limits else ""
            lines.append((device, f"{size(used)}{room}: {summed_names(inside)}"))
        width = max(len(name) for name, _ in lines)
        return "\n".join(f"{name:<{width}}  {text}" for name, text in lines)

    def __repr__(self) -> str:
        """Say the plan in a line."""
        what = f"{self.task!r}, {self.name!r}, {self.precision.name!r}"
        return f"LoadPlan({what}, {size(self.weights_bytes)} on {listed(self.bytes_per_device)}, fits={self.fits})"

    def _picture(self) -> list[Block]:
        return [as_it_is(str(self))]

    def _repr_html_(self) -> str:
        """Draw the plan for a notebook: a bar per device as long as its budget, the parts in it; every text escaped."""
        used = self.bytes_per_device
        budgets = {device: self._layout.limits.get(device, held) for device, held in used.items()}
        longest = max(budgets.values())
        bars = []
        for device, held in used.items():
            whole = max(budgets[device], held)
            blocks = "".join(
                f'<div title="{html.escape(f"{part.name}: {part.dtype}, {size(part.bytes)}")}" style="width:'
                f'{100 * part.bytes / max(whole, 1):.3f}%;background:{COLORS[number % 2]};height:1.4em"></div>'
                for number, part in enumerate(part for part in self.modules if part.device == device)
            )
            label = html.escape(f"{device}: {size(held)} of {size(budgets[device])}")
            share = max(100 * whole / max(longest, held, 1), 5)
            bars.append(
                f'<div>{label}</div><div style="display:flex;width:{share:.1f}%;background:rgba(128,128,128,.3);'
                f'margin-bottom:.5em;overflow:hidden">{blocks}</div>'
            )
        return f'<div style="max-width:60em">{"".join(bars)}{to_html([Facts(dict(_facts(self)))])}</div>'


def _facts(plan: LoadPlan) -> list[tuple[str, str]]:
    """Return what a plan says beside its devices, line by line."""
    lines = [
        ("name", plan.name),
        ("model", f"{plan.model_class}, {plan.parameters:,} parameters, for {plan.task!r}"),
        ("precision", f"{plan.precision.name}, {size(plan.weights_bytes)} of weights"),
        ("context", f"{plan.context_length:,} tokens" if plan.context_length is not None else "not bounded"),
    ]
    if plan.key_values is not None:
        tokens = min(plan.context_length or SHOWN_TOKENS, SHOWN_TOKENS)
        row = plan.key_values.of(tokens, tokens)
        told = f"{plan.kv_bytes_per_token:,} bytes a token; a row of {tokens:,} tokens takes {size(row)}"
        if plan.fits:
            told += f", and {plan.max_rows(tokens):,} fit"
        lines.append(("keys and values", told))
    lines.append(("fits", "yes" if plan.fits else "NO"))
    return lines + [(f"why: {what}", reason) for what, reason in plan.reasons.items()]
