import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from lmkit.engine.repeats import MOST_CALLS, Chain, Parts, divided

SIZE, COLUMNS = 4, 6


def inputs(layers: int, rows: int = 3) -> list[torch.Tensor]:
    """Draw a hidden state, and a weight and a buffer for each layer."""
    draws = torch.Generator().manual_seed(layers)
    shapes = [(rows, SIZE), *[(SIZE, SIZE)] * layers, *[(rows, COLUMNS, SIZE)] * layers]
    return [torch.randn(shape, generator=draws) for shape in shapes]


def model(layers: int, scale: Callable[[int], float] = lambda _layer: 0.5) -> Callable[..., list[torch.Tensor]]:
    """Return what writes to a buffer in each layer and reads it, as a step with keys does, and ends with a sum."""

    def compute(hidden: torch.Tensor, *rest: torch.Tensor) -> list[torch.Tensor]:
        weights, buffers = rest[:layers], rest[layers:]
        hidden = hidden.exp() - 1
        last = torch.ones(1, dtype=torch.long) * (COLUMNS - 1)
        for layer, (weight, buffer) in enumerate(zip(weights, buffers, strict=True)):
            buffer.index_copy_(1, last, (hidden @ weight)[:, None])
            hidden = hidden + buffer.sum(1).tanh() * scale(layer)
        return [hidden.cos().sum(-1)]

    return compute


def agree(compute: Callable[..., list[torch.Tensor]], given: list[torch.Tensor], other: list[torch.Tensor]) -> Parts:
    """Divide what is traced with some tensors; compare its parts, run with others, with what it is made of."""
    traced = make_fx(compute, tracing_mode="symbolic")(*given)
    parts = divided(traced)
    for values in (given, other):
        expected, found = ([one.clone() for one in values] for _ in range(2))
        (result,) = compute(*expected)
        chain: Any = Chain(parts.calls, parts.graphs, len(given), parts.sizes, parts.result)
        held = [*found]
        assert torch.equal(chain(held), result)
        assert sum(one is not None for one in held[len(given) :]) == 1  # what parts gave each other is let go
        assert all(map(torch.equal, found, expected))  # the buffers too
    return parts


@pytest.mark.parametrize("layers", [1, 2, 3, 7, 8, 9, 11, 17, 23, 30])
def test_layers_that_are_alike_are_one_part(layers: int) -> None:
    """Any number of layers is divided into few parts and calls that compute the same, for any sizes."""
    parts = agree(model(layers), inputs(layers), inputs(layers, rows=5))
    assert len(parts.calls) <= MOST_CALLS + 2
    if layers <= 3:  # too little is saved
        assert len(parts.graphs) == len(parts.calls) == 1
        return
    assert len(parts.graphs) <= 3
    products = [str(graph.code).count("mm.default") for graph in parts.graphs]
    assert sum(products[call.part] for call in parts.calls) == layers
    assert sum(products) <= max(1, layers // 3)


def test_layers_that_differ_in_a_number_are_not_alike() -> None:
    """A factor that is another one in each layer is code: such a graph stays whole."""
    parts = agree(model(5, scale=lambda layer: 1 / (layer + 1)), inputs(5), inputs(5, rows=2))
    assert len(parts.graphs) == 1


def test_layers_that_take_turns_are_alike_in_pairs() -> None:
    """Where each second layer is another one, a part holds two."""
    parts = agree(model(12, scale=lambda layer: 1.0 + layer % 2), inputs(12), inputs(12, rows=2))
    called = [call.part for call in parts.calls]
    (repeated,) = (graph for number, graph in enumerate(parts.graphs) if called.count(number) > 1)
    assert len(repeated.graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default)) == 2


def test_odd_layers_do_not_keep_others_apart() -> None:
    """Layers between others that are not like them are code of their own, beside those that are alike."""
    odd = {0: 9.0, 1: 8.0, 15: 7.0}
    parts = agree(model(16, scale=lambda layer: odd.get(layer, 0.5)), inputs(16), inputs(16, rows=2))
    products = [str(graph.code).count("mm.default") for graph in parts.graphs]
    assert sum(products) < 16
    assert sum(products[call.part] for call in parts.calls) == 16


@pytest.mark.parametrize("seed", range(40))
def test_any_graph_is_divided_into_parts_that_compute_the_same(seed: int) -> None:
    """Random operations, in a random order that repeats itself, with values from anywhere before."""
    draws = random.Random(seed)  # noqa: S311 - a test's cases
    steps = [(draws.choice(["add", "mul", "sin", "cos"]), draws.randint(1, 6)) for _ in range(draws.randint(1, 5))]
    noise = [(draws.choice(["add", "neg"]), draws.randint(1, 3)) for _ in range(draws.randint(0, 4))]
    order = [*noise, *itertools.chain(*[steps] * draws.randint(1, 20)), *noise]

    def compute(*given: torch.Tensor) -> list[torch.Tensor]:
        values = [*given]
        for name, back in order:
            one, other = values[-1], values[max(len(values) - back, 0)]
            found = getattr(torch, name)(one, other) if name in ("add", "mul") else getattr(torch, name)(one)
            values.append(found / 2)
        return [values[-1]]

    agree(compute, inputs(2)[:1], inputs(2, rows=7)[:1])
