"""A traced graph in parts: layers that are alike are one part, which is compiled once and called again and again.

Compiling is Python over operations, and a model of 30 layers has 30 times those of one.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch.fx import Graph, GraphModule, Node

LEAST = 16
"""How many operations a division must save."""

MOST_CALLS = 8
"""How often the part of layers is called at the most: it holds as many of them as that takes. A call costs a step some
15 microseconds, and a layer in a part one or two seconds of compiling (Xeon, two cores)."""


class Call(NamedTuple):
    """The call of a part.

    Attributes:
        part: Which one.
        takes: Where its inputs stand among all values: those of the graph first, its sizes, then what calls give.
    """

    part: int
    takes: Sequence[int]


class Parts(NamedTuple):
    """A graph in parts.

    Attributes:
        calls: In their order.
        graphs: Each part as a graph, which returns a tuple.
        inputs: What each part is traced with.
        sizes: The sizes that parts are given: of which of the graph's inputs, and along which dimension.
        result: Where the graph's result stands among all values.
    """

    calls: list[Call]
    graphs: list[GraphModule]
    inputs: list[list[Any]]
    sizes: list[tuple[int, int]]
    result: int


@dataclass(frozen=True)
class Chain:
    """Computes a graph, of so many inputs, by calling its parts one after another, as `Parts` says."""

    calls: Sequence[Call]
    parts: Sequence[Callable[..., Sequence[Any]]]
    inputs: int
    sizes: Sequence[Sequence[int]]
    result: int

    def __call__(self, values: list[Any]) -> torch.Tensor:
        """Compute from the graph's inputs, to which what parts give is appended for as long as others take it."""
        values += [values[place].shape[dim] for place, dim in self.sizes]
        for (part, takes), last in zip(self.calls, self._last, strict=True):
            values += self.parts[part](*[values[place] for place in takes])
            for place in last:
                values[place] = None
        found: torch.Tensor = values[self.result]
        return found

    @cached_property
    def _last(self) -> list[list[int]]:
        """What each call is the last one to take, of what calls give."""
        calls = {place: number for number, call in enumerate(self.calls) for place in call.takes}
        calls = {place: number for place, number in calls.items() if self.inputs <= place != self.result}  # sizes too
        return [[place for place, last in calls.items() if last == number] for number in range(len(self.calls))]


class Layers(NamedTuple):
    """Where in a graph there are layers that are alike: with which operation the first one begins, and so on."""

    begin: int
    operations: int
    number: int


def divided(traced: GraphModule) -> Parts:
    """Divide a graph that returns one tensor into what stands before layers that are alike, these, and the rest.

    Layers are found as what repeats itself among operations and shapes, whatever a model calls them. They are alike if
    they differ in nothing but where their inputs come from. A graph in which nothing repeats itself is one part.
    """
    (output,) = traced.graph.find_nodes(op="output")
    given = traced.graph.find_nodes(op="placeholder")
    operations = [node for node in traced.graph.nodes if node.op not in ("placeholder", "output")]
    sizes = _sizes(traced.graph, given)
    places = {node: place for place, node in enumerate([*given, *sizes.values()])}
    pieces = _pieces(operations)
    if not all(any(isinstance(node.meta.get("val"), torch.Tensor) for node in _leaves(piece)) for piece in pieces):
        pieces = [operations]  # what gives nothing but sizes is no part
    wanted = [[*_takes(piece), *_asked(piece, sizes)] for piece in pieces]
    used = {*output.all_input_nodes, *itertools.chain(*wanted)}
    known: dict[str, int] = {}
    calls: list[Call] = []
    graphs: list[GraphModule] = []
    inputs: list[list[Any]] = []
    for piece, takes in zip(pieces, wanted, strict=True):
        leaves = [node for node in piece if node in used]
        spelled = f"{_spelled(piece)} {[*map(piece.index, leaves)]}"
        if spelled not in known:
            known[spelled] = len(graphs)
            graphs.append(_graph(traced, piece, takes, leaves))
            inputs.append([node.meta["val"] for node in takes])
        calls.append(Call(known[spelled], [places[node] for node in takes]))
        places |= {node: len(places) + number for number, node in enumerate(leaves)}
    asked = [(places[size.all_input_nodes[0]], int(str(size.args[1]))) for size in sizes.values()]
    return Parts(calls, graphs, inputs, asked, places[output.all_input_nodes[0]])


def _sizes(graph: Graph, given: list[Node]) -> dict[str, Node]:
    """Ask for each size that may be any: parts are given those that they need.

    Inductor of torch 2.14 takes them from no tensor that the part does not ask, nor from one of bools.
    """
    found: dict[str, Node] = {}
    begin = given[-1].next
    for node in given:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.dtype != torch.bool:
            shape: tuple[Any, ...] = tuple(value.shape)
            for dim, size in enumerate(shape):
                name = str(size)
                if isinstance(size, torch.SymInt) and name not in found and name in _symbols(node):
                    with graph.inserting_before(begin):
                        found[name] = graph.call_function(torch.ops.aten.sym_size.int, (node, dim))
                    found[name].meta["val"] = size
    return found


def _asked(piece: list[Node], sizes: Mapping[str, Node]) -> list[Node]:
    """Return the sizes that operations depend on, of those that they neither ask for nor take."""
    takes = _takes(piece)
    names = set().union(*map(_symbols, (*takes, *piece)))
    there = {*takes, *piece}
    return [size for name, size in sizes.items() if name in names and size not in there]


def _symbols(node: Node) -> set[str]:
    """Name the sizes that may be any in what a node gives."""
    value = node.meta.get("val")
    sizes = value.shape if isinstance(value, torch.Tensor) else [value]
    return {str(one) for size in sizes if isinstance(size, torch.SymInt) for one in size.node.expr.free_symbols}


def _pieces(operations: list[Node]) -> list[list[Node]]:
    """Cut operations into the first ones, groups of layers, and the last ones."""
    layers = _alike(operations)
    fewest = -(-layers.number // MOST_CALLS)
    each = min((fewest, fewest + 1), key=lambda many: layers.number % many) if layers.number else 0
    size = layers.operations * each
    end = layers.begin + layers.operations * layers.number
    groups = layers.number // each if each else 0
    cuts = [0, *(end - size * left for left in range(groups, -1, -1)), len(operations)]
    return [operations[first:last] for first, last in itertools.pairwise(cuts) if first < last]


def _alike(operations: list[Node]) -> Layers:
    """Find the layers that are alike and have most operations in all, counted without the first one."""
    numbers: dict[str, int] = {}
    looks = torch.tensor([numbers.setdefault(_look(node), len(numbers)) for node in operations])
    best, found = LEAST, Layers(0, 0, 0)
    for size in range(1, len(operations) // 2 + 1):
        same = looks[:-size] == looks[size:]
        edge = same.new_zeros(1)
        ends = torch.cat([edge, same, edge]).int().diff().nonzero().flatten().tolist()
        for begin, end in zip(ends[::2], ends[1::2], strict=True):
            if (end - begin) // size * size > best:  # else it cannot be better
                layers = _cut(operations, begin, end + size, size)
                if (saved := (layers.number - 1) * size) > best:
                    best, found = saved, layers
    return found


def _cut(operations: list[Node], begin: int, end: int, size: int) -> Layers:
    """Choose where between two places layers of this size begin: where the fewest values go from one to the next."""

    def passed(first: int) -> int:
        piece = operations[first + size : first + 2 * size]
        return len(_takes(piece)) + len(_leaves(piece))

    first = min(range(begin, min(begin + size, end - 2 * size + 1)), key=passed)
    places = range(first, end - size + 1, size)
    spelled = [_spelled(operations[place : place + size]) for place in places]
    alike = [[*run] for _, run in itertools.groupby(range(len(places)), key=spelled.__getitem__)]
    longest = max(alike, key=len)
    return Layers(places[longest[0]], size, len(longest))


def _look(node: Node) -> str:
    """Say what an operation looks like, wherever its inputs come from."""
    return _spelled([node])


def _spelled(piece: list[Node]) -> str:
    """Spell operations, their inputs as numbers: what is spelled alike computes the same."""
    numbers = {node: f"own {number}" for number, node in enumerate(piece)}
    numbers |= {node: f"given {number} {_described(node)}" for number, node in enumerate(_takes(piece))}
    return str(
        [
            (str(node.target), torch.fx.map_arg((node.args, node.kwargs), numbers.__getitem__), _described(node))
            for node in piece
        ]
    )


def _described(node: Node) -> str:
    """Describe what a node gives: a tensor's shape, strides, dtype and device, or a size."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return str(value)
    strides = None if value.is_mkldnn else value.stride()
    return f"{tuple(value.shape)} {strides} {value.dtype} {value.device}"


def _takes(piece: list[Node]) -> list[Node]:
    """Return what operations take from outside, in the order in which they ask for it."""
    own = set(piece)
    return [*dict.fromkeys(one for node in piece for one in node.all_input_nodes if one not in own)]


def _leaves(piece: list[Node]) -> list[Node]:
    """Return what others take from operations."""
    own = set(piece)
    return [node for node in piece if not own.issuperset(node.users)]


def _graph(traced: GraphModule, piece: list[Node], takes: list[Node], leaves: list[Node]) -> GraphModule:
    """Write operations as a graph of their own."""
    graph = torch.fx.Graph()
    copies: dict[Node, Node] = {}
    for number, node in enumerate(takes):
        copies[node] = graph.placeholder(f"given_{number}")
        copies[node].meta = dict(node.meta)
    for node in piece:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    for node in leaves:
        copies[node].meta["example_value"] = node.meta["val"]  # where inductor looks for what the sizes' symbols mean
    graph.output(tuple(copies[node] for node in leaves))
    return torch.fx.GraphModule(traced, graph)
