"""The parts of a step, alone: attention, the step itself with and without compilation, and threads.

Prints the small tables of docs/performance.md.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import _data
import _models
import torch
from _context import load

from lmkit._borrowed import cache_name, cache_of
from lmkit.engine.compiled import CompiledStep
from lmkit.kernels import attention
from lmkit.kernels.openmp import release_pool
from lmkit.kernels.packed import pack
from lmkit.kernels.quantized import Int4Linear, Int8Linear
from lmkit.kernels.together import join

if TYPE_CHECKING:
    from collections.abc import Callable

LAYERS = 8
"""How many layers' keys and values are read in turn, so that no cache holds them."""

COLUMNS, ROOM = 150, 50


def milliseconds(work: Callable[[], object], times: int = 15) -> float:
    """Return the median time of a few calls, after three that do not count."""
    taken = []
    for _ in range(3 + times):
        begun = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken[3:]) * 1000


def attending(rows: int, heads: int, groups: int, columns: int, worth: int) -> float:
    """Time one layer's attention; `worth` decides the way it goes."""
    cache = [
        [torch.randn(rows, groups, columns + ROOM, 64).bfloat16()[:, :, :columns] for _ in range(2)]
        for _ in range(LAYERS)
    ]
    query, mask = torch.randn(rows, heads, 1, 64).bfloat16(), torch.rand(rows, 1, 1, columns) > 0.1  # noqa: PLR2004
    layer: Any = SimpleNamespace(num_key_value_groups=heads // groups, is_causal=True)
    before, attention.WORTH = attention.WORTH, worth
    try:
        return milliseconds(lambda: [attention.attend(layer, query, key, value, mask) for key, value in cache]) / LAYERS
    finally:
        attention.WORTH = before


def prompts(rows: int, heads: int, groups: int, tokens: int, worth: int) -> float:
    """Time one causal layer's attention of prompts; `worth` decides the way it goes."""
    query, key, value = (torch.randn(rows, count, tokens, 64).bfloat16() for count in (heads, groups, groups))
    layer: Any = SimpleNamespace(num_key_value_groups=heads // groups, is_causal=True)
    before, attention.WORTH_SCORES = attention.WORTH_SCORES, worth
    try:
        return milliseconds(lambda: attention.attend(layer, query, key, value, None))
    finally:
        attention.WORTH_SCORES = before


def reading_the_same(kind: str, outputs: tuple[int, ...], rows: int) -> tuple[float, float]:
    """Time layers of 576 inputs one by one and joined, in microseconds; so many that no cache holds them."""
    single, joined = ([_siblings(kind, outputs, joins=joins) for _ in range(LAYERS)] for joins in (False, True))
    given = torch.randn(rows, 576).bfloat16()
    taken: tuple[list[float], list[float]] = ([], [])
    for _ in range(5):  # in turns
        for times, models in zip(taken, (single, joined), strict=True):
            work = [layer for model in models for layer in model]
            times.append(milliseconds(lambda work=work: [layer(given) for layer in work]) * 1000 / LAYERS)  # type: ignore[misc]
    return min(taken[0]), min(taken[1])


def _siblings(kind: str, outputs: tuple[int, ...], *, joins: bool) -> torch.nn.ModuleList:
    plain = [
        torch.nn.Linear(576, count, bias=False).bfloat16().requires_grad_(requires_grad=False) for count in outputs
    ]
    names = [[str(number) for number in range(len(plain))]] if joins else []
    if kind == "bfloat16":
        model = torch.nn.ModuleList(plain)
        pack(model, names)
        return model
    quantized = []
    for layer in plain:
        made = {"int8": Int8Linear, "int4": Int4Linear}[kind](576, layer.out_features, torch.bfloat16, bias=False)
        made.weight.data, made.scales.data = made.quantize(layer.weight, torch.bfloat16)
        made.pack()
        quantized.append(made)
    model = torch.nn.ModuleList(quantized)
    join(model, names)
    return model


def accuracy(folder: Path) -> dict[str, float]:
    """Return how far the scores after 48 texts are from those of float32, as a share of their spread."""
    from transformers import AutoTokenizer

    models: dict[str, Any] = {name: load("causal", folder, name).model for name in ("float32", "bfloat16")}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows, columns = 48, COLUMNS
    ids: list[int] = tokenizer(_data.document(tokenizer, rows * (columns + 1) + 100, seed=0))["input_ids"]
    texts = torch.tensor(ids[: rows * (columns + 1)]).view(rows, columns + 1)

    def scores(model: Any) -> torch.Tensor:
        read = cache_of(model(input_ids=texts[:, :columns], use_cache=True, logits_to_keep=1))
        before = {cache_name(model) or "": read}
        found: torch.Tensor = model(input_ids=texts[:, columns:], **before).logits[:, -1].float()
        return found

    exact = scores(models["float32"])
    off = {}
    for name in ("lmkit", "sdpa", "eager"):
        models["bfloat16"].set_attn_implementation(name)
        errors = (scores(models["bfloat16"]) - exact).square().mean(-1).sqrt() / exact.std(-1)
        off[name] = float(errors.mean())
    return off


def stepping(folder: Path, rows: list[int]) -> list[tuple[int, float, float]]:
    """Time a step of so many rows at `COLUMNS` tokens, as the model comes and compiled."""
    model = load("causal", folder).model
    step = CompiledStep(model)
    found = []
    for count in rows:
        cache = cache_of(model(input_ids=torch.ones(count, COLUMNS - 1, dtype=torch.long), use_cache=True))
        token_ids, positions = torch.ones(count, 1, dtype=torch.long), torch.full((count, 1), COLUMNS - 1)
        pairs = [(layer.keys, layer.values) for layer in cache.layers]
        widened = [
            tuple(torch.nn.functional.pad(part, (0, 0, 0, ROOM + 1)).contiguous() for part in pair) for pair in pairs
        ]
        seen = torch.arange(COLUMNS + ROOM) < COLUMNS
        mask = seen.expand(count, 1, 1, -1).contiguous()
        slot = torch.tensor([COLUMNS - 1])

        def plain(cache: Any = cache, token_ids: Any = token_ids) -> None:
            model(input_ids=token_ids, use_cache=True, **{cache_name(model) or "": cache})
            cache.crop(-1)

        def compiled(given: Any = (token_ids, positions, mask, slot, widened)) -> None:
            step(*given)

        found.append((count, milliseconds(plain), milliseconds(compiled)))
    return found


def in_another_thread(*, released: bool) -> float:
    """Time a small operation, in microseconds, in a second thread, with and without a pool of the first one's."""
    (torch.ones(2**20) * 2).sum()
    if released:
        release_pool()
    taken: list[float] = []

    def work() -> None:
        small = torch.randn(64, 1536)
        taken.append(milliseconds(lambda: [torch.nn.functional.silu(small) for _ in range(100)]) * 10)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return taken[0]


@torch.no_grad()
def main() -> None:
    """Print the tables."""
    print("| attention of one layer, microseconds | torch | products |\n| --- | --- | --- |")
    for name, heads, groups, columns in (("SmolLM2", 9, 3, COLUMNS), ("Marian", 8, 8, 172)):
        for rows in (8, 16, 64):
            ways = (attending(rows, heads, groups, columns, worth) for worth in (10**9, 0))
            print(f"| {name}, {rows} rows of {columns} tokens |", " | ".join(f"{way * 1000:.0f}" for way in ways), "|")
    print("\n| attention of prompts in one layer, milliseconds | torch | products |\n| --- | --- | --- |")
    for rows, tokens in ((1, 30), (1, 60), (1, 128), (1, 250), (10, 200), (1, 1000), (1, 2000)):
        ways = (prompts(rows, 9, 3, tokens, worth) for worth in (10**12, 0))
        print(f"| SmolLM2, {rows} x {tokens} tokens |", " | ".join(f"{way:.2f}" for way in ways), "|")
    print("\n| layers that read the same input, microseconds: one by one, as one | bfloat16 | int8 | int4 |")
    print("| --- | --- | --- | --- |")
    for name, outputs in (("q, k, v", (576, 192, 192)), ("gate, up", (1536, 1536))):
        for rows in (1, 4, 8, 32, 64, 256):
            cells = (reading_the_same(kind, outputs, rows) for kind in ("bfloat16", "int8", "int4"))
            print(f"| {name}, {rows} rows |", " | ".join(f"{one:.0f}, {both:.0f}" for one, both in cells), "|")
    pools = [f"{in_another_thread(released=released):.0f}" for released in (False, True)]
    print(f"\nsilu in a second thread: {pools[0]} microseconds beside a pool of the first one's, {pools[1]} without")
    with tempfile.TemporaryDirectory() as spare:
        folder = _models.smollm2(Path(os.environ.get("LMKIT_BENCH_CHECKPOINTS", spare)))
        off = ", ".join(f"{name} {error:.3f}" for name, error in accuracy(folder).items())
        print(f"\nscores against float32, off as a share of their spread: {off}\n")
        print("| a step, milliseconds | plain | compiled |\n| --- | --- | --- |")
        for rows, *taken in stepping(folder, [1, 8, 32, 64]):
            print(f"| {rows} rows |", " | ".join(f"{one:.1f}" for one in taken), "|")


if __name__ == "__main__":
    main()
