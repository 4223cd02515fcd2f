"""A plan as a table for people, and as a picture for notebooks."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

from lmkit.fitting import size, summed_names

if TYPE_CHECKING:
    from lmkit.planning import LoadPlan

__all__ = ["drawn", "written"]

SHOWN_TOKENS = 8192
"""How many tokens keys and values are shown for, at the most."""

COLORS = ("#4c78a8", "#72b7b2")
"""Of neighbouring parts in turn."""


def facts(plan: LoadPlan) -> list[tuple[str, str]]:
    """Return what a plan says beside its devices, line by line."""
    lines = [
        ("model", f"{plan.model_class}, {plan.parameters:,} parameters, for {plan.task!r}"),
        ("precision", f"{plan.precision.name}, {size(plan.weights_bytes)} of weights"),
    ]
    context = f"{plan.context_length:,} tokens" if plan.context_length is not None else "not bounded"
    lines.append(("context", context))
    if plan.key_values is not None:
        tokens = min(plan.context_length or SHOWN_TOKENS, SHOWN_TOKENS)
        row = plan.key_values.of(tokens, tokens)
        told = f"{plan.kv_bytes_per_token:,} bytes a token; a row of {tokens:,} tokens takes {size(row)}"
        if plan.fits:
            told += f", and {plan.max_rows(tokens):,} fit"
        lines.append(("keys and values", told))
    lines.append(("fits", "yes" if plan.fits else "NO"))
    return lines + [(f"why: {what}", reason) for what, reason in plan.reasons.items()]


def written(plan: LoadPlan) -> str:
    """Write a plan as a table."""
    lines = [("name", plan.name), *facts(plan)]
    for device, used in plan.bytes_per_device.items():
        inside = [module for module in plan.modules if module.device == device]
        limit = plan.placement.max_memory.get(device)
        room = f" of {size(limit)}" if isinstance(limit, int) else ""
        lines.append((device, f"{size(used)}{room}: {summed_names(inside)}"))
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines)


def drawn(plan: LoadPlan) -> str:
    """Draw a plan: a bar per device, as long as its budget, and a block per part."""
    used = plan.bytes_per_device
    limits = {name: plan.placement.max_memory.get(name) for name in used}
    longest = max((limit if isinstance(limit, int) else used[name]) for name, limit in limits.items())
    bars = []
    for device, held in used.items():
        limit = limits[device]
        whole = limit if isinstance(limit, int) else held
        blocks = "".join(
            f'<div title="{html.escape(f"{part.name}: {part.dtype}, {size(part.bytes)}")}" style="width:'
            f'{100 * part.bytes / max(whole, held, 1):.3f}%;background:{COLORS[number % 2]};height:1.4em"></div>'
            for number, part in enumerate(part for part in plan.modules if part.device == device)
        )
        label = html.escape(f"{device}: {size(held)} of {size(whole)}")
        share = max(100 * max(whole, held) / max(longest, held, 1), 5)
        bars.append(
            f'<div>{label}</div><div style="display:flex;width:{share:.1f}%;background:#ddd;'
            f'margin-bottom:.5em;overflow:hidden">{blocks}</div>'
        )
    rows = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(text)}</td></tr>"
        for name, text in [("name", plan.name), *facts(plan)]
    )
    return f'<div style="max-width:60em">{"".join(bars)}<table>{rows}</table></div>'
