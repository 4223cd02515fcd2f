"""The parts of a step, alone: attention, the step itself with and without compilation, and threads.

Prints the small tables of docs/performance.md.
"""

from __future__ import annotations

import itertools
import os
import statistics
import tempfile
import threading
import time
from contextlib import contextmanager
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
from lmkit.kernels.native.build import instructions
from lmkit.kernels.native.operators import operators, refusal
from lmkit.kernels.openmp import release_pool
from lmkit.kernels.ordered import hold
from lmkit.kernels.packed import Order, PackedLinear, multiplies, pack
from lmkit.kernels.quantized import Int4Linear, Int8Linear
from lmkit.kernels.together import join

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LAYERS = 8
"""How many layers' keys and values are read in turn, so that no cache holds them."""

COLUMNS, ROOM = 150, 50
MOST_BYTES = 2**29
"""What those keys and values may take."""


def milliseconds(work: Callable[[], object], times: int = 15) -> float:
    """Return the median time of a few calls, after three that do not count."""
    taken = []
    for _ in range(3 + times):
        begun = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken[3:]) * 1000


WAYS = {"torch": 10**12, "products": 0, "kernel": 0}
"""Ways to attend, and from how much work on lmkit's products are taken."""


@contextmanager
def way(name: str) -> Iterator[Any]:
    """Attend in one of `WAYS`; gives the kernels to do it with."""
    before = attention.WORTH, attention.WORTH_SCORES
    attention.WORTH = attention.WORTH_SCORES = WAYS[name]
    try:
        yield operators() if name == "kernel" else None
    finally:
        attention.WORTH, attention.WORTH_SCORES = before


def attending(rows: int, heads: int, groups: int, columns: int, *, ragged: bool) -> list[float]:
    """Time one layer's attention of one token a row, in each of `WAYS`; of ragged rows the shortest has a quarter."""
    layers = max(1, min(LAYERS, MOST_BYTES // (256 * rows * groups * columns)))
    cache = [
        [torch.randn(rows, groups, columns + ROOM, 64).bfloat16()[:, :, :columns] for _ in range(2)]
        for _ in range(layers)
    ]
    query, mask = torch.randn(rows, heads, 1, 64).bfloat16(), None
    if ragged:
        mask = (torch.arange(columns) >= torch.linspace(0, 0.75 * columns, rows)[:, None])[:, None, None]
    layer: Any = SimpleNamespace(num_key_value_groups=heads // groups, is_causal=True)

    def work(kernels: Any) -> None:
        for key, value in cache:
            attention.attend(layer, query, key, value, mask, kernels=kernels)

    return [taken / layers for taken in timed(work)]


def prompts(rows: int, heads: int, groups: int, tokens: int) -> list[float]:
    """Time one causal layer's attention of prompts, in each of `WAYS`."""
    query, key, value = (torch.randn(rows, count, tokens, 64).bfloat16() for count in (heads, groups, groups))
    layer: Any = SimpleNamespace(num_key_value_groups=heads // groups, is_causal=True)
    return timed(lambda kernels: attention.attend(layer, query, key, value, None, kernels=kernels), times=5)


def timed(work: Callable[[Any], object], times: int = 15) -> list[float]:
    """Time some work in each of `WAYS`."""
    taken = []
    for name in WAYS:
        with way(name) as kernels:
            taken.append(milliseconds(lambda kernels=kernels: work(kernels), times))  # type: ignore[misc]
    return taken


SIDES = (
    "packed bfloat16",
    "torch int8",
    "torch int4",
    "lmkit int8",
    "lmkit int4",
    "lmkit bfloat16 (without AMX torch's)",
)


def products(outputs: int, inputs: int, rows: list[int]) -> list[tuple[int, list[float]]]:
    """Time a linear layer on all kinds of kernels, in microseconds: the least of calls in turns."""
    weight = torch.randn(outputs, inputs).bfloat16()
    linear = torch.nn.Linear(inputs, outputs, bias=False, dtype=torch.bfloat16)
    linear.weight.data = weight
    layers: list[torch.nn.Module] = [PackedLinear(linear, tied=False)]
    for native in (False, True):
        for kind in (Int8Linear, Int4Linear):
            layer = kind(inputs, outputs, torch.bfloat16, bias=False)
            hold(layer, *kind.quantize(weight, torch.bfloat16))
            if native and refusal() is None:
                operators()
                layer.to_native(instructions())
            layer.pack()
            layers.append(layer)
    isa = instructions() if refusal() is None else None
    own = isa is not None and multiplies(isa)
    layers.append(PackedLinear(linear, tied=False, kernel=Order(isa)) if own else layers[0])
    found = []
    for count in rows:
        given = torch.randn(count, inputs).bfloat16()
        times = max(10, min(300, 10**9 // (count * outputs * inputs)))
        taken = [[_seconds(layer, given) for layer in layers] for _ in range(times)]
        found.append((count, [min(one) * 1e6 for one in zip(*taken, strict=True)]))
    return found


def _seconds(layer: torch.nn.Module, rows: torch.Tensor) -> float:
    layer(rows)
    begun = time.perf_counter()
    layer(rows)
    return time.perf_counter() - begun


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
    attention.put_on(models["bfloat16"], operators())
    for name in (models["bfloat16"].config._attn_implementation, "lmkit", "sdpa", "eager"):  # noqa: SLF001
        models["bfloat16"].set_attn_implementation(name)
        errors = (scores(models["bfloat16"]) - exact).square().mean(-1).sqrt() / exact.std(-1)
        off[name] = float(errors.mean())
    return off


def stepping(folder: Path, rows: list[int]) -> list[tuple[int, float, float]]:
    """Time a step of so many rows at `COLUMNS` tokens, as the model comes and compiled."""
    model = load("causal", folder, compile="kernels").model
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

        def compiled(given: Any = (token_ids, positions, [(slot, mask)], widened)) -> None:
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
    print("| attention of one layer, microseconds | torch | products | kernel |\n| --- | --- | --- | --- |")
    shapes = itertools.product(
        (("SmolLM2", 9, 3), ("Marian", 8, 8)), (COLUMNS, 1000), (1, 8, 16, 64, 256), (False, True)
    )
    for (name, heads, groups), columns, rows, ragged in shapes:
        if rows > 1 or not ragged:
            what = f"{name}, {rows} rows of {columns * 250 // 1000 if ragged else columns} to {columns} tokens"
            ways = attending(rows, heads, groups, columns, ragged=ragged)
            print(f"| {what} |", " | ".join(f"{way * 1000:.0f}" for way in ways), "|")
    print(
        "\n| attention of prompts in one layer, milliseconds | torch | products | kernel |\n| --- | --- | --- | --- |"
    )
    for rows, tokens in ((1, 30), (1, 60), (1, 128), (1, 250), (1, 450), (10, 200), (1, 1800), (1, 7200)):
        ways = prompts(rows, 9, 3, tokens)
        print(f"| SmolLM2, {rows} x {tokens} tokens |", " | ".join(f"{way:.2f}" for way in ways), "|")
    told = refusal() or instructions()
    print(f"\n| a linear layer, microseconds ({told}) | rows | {' | '.join(SIDES)} |\n|{' --- |' * (2 + len(SIDES))}")
    for outputs, inputs in ((1536, 576), (2048, 2048), (8192, 2048)):
        for count, spent in products(outputs, inputs, [1, 4, 16, 64, 256]):
            print(f"| {outputs} x {inputs} | {count} |", " | ".join(f"{one:.0f}" for one in spent), "|")
    print("\n| layers that read the same input, microseconds: one by one, as one | bfloat16 | int8 | int4 |")
    print("| --- | --- | --- | --- |")
    for name, widths in (("q, k, v", (576, 192, 192)), ("gate, up", (1536, 1536))):
        for rows in (1, 4, 8, 32, 64, 256):
            cells = (reading_the_same(kind, widths, rows) for kind in ("bfloat16", "int8", "int4"))
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
