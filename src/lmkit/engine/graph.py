"""What a model computes from some tensors as one compiled graph: traced once for any sizes, and kept on disk.

Much of a pass is Python and calls of small kernels. Inductor compiles it; other processes load the artifact.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import shutil
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from lmkit._interrupts import surely
from lmkit.engine.inputs import input_device
from lmkit.engine.repeats import Call, Chain, divided
from lmkit.engine.replay import REPLAYED_ON, Replay
from lmkit.errors import EngineError
from lmkit.kernels.native.build import cache_folder
from lmkit.kernels.native.operators import refusal
from lmkit.kernels.quantized import QuantizedLinear
from lmkit.kernels.tied import head_copies
from lmkit.kernels.together import WithWholes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

logger = logging.getLogger("lmkit.engine")

TOLERANCE = 0.05
"""How far compiled scores of the median row may be from the model's own, as a share of their spread: of SmolLM2's rows
most are the same bit for bit, in bfloat16, int8 and int4, and single ones up to 0.2 off (Xeon)."""

TRACED = 8
"""The number of what is traced: another one where a `_traced` or the order of its inputs has changed."""

SETTINGS = {
    "pattern_matcher": False,
    "size_asserts": False,
    "alignment_asserts": False,
    "emulate_precision_casts": True,
}
"""For inductor: packed weights (`kernels.packed`) have no strides to assert, and as inputs fit none of its patterns.
Fused operations round to half precision where the model does, so that tokens are the model's."""

LARGEST = 2**31 - 1
"""How many numbers a tensor of a graph may have on a card: inductor's kernels there count in 32 bits."""

CALLS, KERNELS = "calls.json", "kernels"
"""What a graph's folder holds beside its parts: how they are called, and inductor's own cache with their kernels."""

UNFINISHED, ABANDONED = "unfinished-", 24 * 3600
"""What the folder of a graph that is being compiled begins with, and after how many seconds nobody compiles there."""

Taken: TypeAlias = "tuple[tuple[int | str, ...], torch.dtype]"
"""An input's shape, whose words name sizes that may be any, and its dtype."""


def _without_pool() -> None:
    """End the threads that inductor compiled kernels in, which it would keep."""
    from torch._inductor.async_compile import AsyncCompile

    pool: Any = AsyncCompile.pool
    if pool.cache_info().currsize:
        threads = pool()
        pool.cache_clear()  # first, so that who else compiles takes a new one
        threads.shutdown()


def compiled_for(device: torch.device) -> list[str]:
    """Name what runs compiled code: what is kept in a home folder may be found by a machine with another card."""
    found = [torch.backends.cpu.get_cpu_capability()]
    if device.type == "cuda":
        cuda: Any = torch.cuda
        found += [cuda.get_device_name(device), str(cuda.get_device_capability(device)), str(torch.version.cuda)]
    with contextlib.suppress(PackageNotFoundError):
        found.append(f"triton {version('triton')}")
    return found


class Graph(ABC):
    """A computation of a model, compiled; one thread at a time calls it.

    Raises:
        EngineError: Compilation failed, or gave other scores than the model.
    """

    def __init__(self, model: Any) -> None:
        """Load the graph of `model`, whose plan says that it has one, from the cache folder; or compile and keep it."""
        self._model = model
        self._device = input_device(model)
        self._replay = Replay()
        self._named = every = WithWholes(model, head_copies(model))
        named = [*every.named_parameters(remove_duplicate=False), *every.named_buffers(remove_duplicate=False)]
        once = {id(tensor): tensor for _, tensor in named}
        places = {key: place for place, key in enumerate(once)}
        self._weights = [tensor.detach() for tensor in once.values()]
        self._places = {name: places[id(tensor)] for name, tensor in named}
        with torch.no_grad():
            try:
                self._chain = self._artifact(cache_folder("compiled") / self._key())
                self._verify(*self._tried())
            except Exception as error:
                raise EngineError(
                    f"{type(model).__name__} could not be compiled: load it without compile=True ({error})."
                ) from error

    @property
    @abstractmethod
    def _sizes(self) -> Mapping[str, int]:
        """Return the names of the sizes that may be any, and what they are traced as: all different; 1 stays that."""

    @property
    @abstractmethod
    def _takes(self) -> Sequence[Taken]:
        """Return what it takes beside weights."""

    @abstractmethod
    def _traced(self, *inputs: Any) -> torch.Tensor:
        """Compute, as it is traced."""

    @abstractmethod
    def _tried(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what the graph gives for a few tokens, and what the model does. *Shape:* `(rows, vocabulary)`."""

    @property
    def most_positions(self) -> int:
        """How long texts may be where that is said: a graph asks no table how long it is, and can have none grow."""
        return int(getattr(self._model.config, "max_position_embeddings", None) or sys.maxsize)

    def _compute(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Run the graph."""
        return self._chain([*self._weights, *inputs])

    def _replayed(self, inputs: Sequence[torch.Tensor], kept: range) -> torch.Tensor:
        """Run the graph, by a record where there is one; inputs at the places `kept` are read and written in place."""
        if self._device.type not in REPLAYED_ON:
            return self._compute(*inputs)
        return self._replay(self._compute, inputs, kept)

    def _tokens(self, rows: int, columns: int, seed: int) -> torch.Tensor:
        """Draw tokens to try the model with. *Shape:* `(rows, columns)`."""
        size = self._model.config.get_text_config(decoder=True).vocab_size
        drawn = torch.randint(size, (rows, columns), generator=torch.Generator().manual_seed(seed), device="cpu")
        return drawn.to(self._device)

    def _key(self) -> str:
        """Name what the compiled code depends on: inductor writes the number of threads into its kernels too.

        What adapters multiply by is a number in their layers, and the module of a checkpoint's own code has its hash.
        """
        import transformers

        described = [(name, place, str(self._weights[place].dtype)) for name, place in self._places.items()]
        shapes = [(tuple(weight.shape), weight.is_mkldnn) for weight in self._weights]
        orders = {module.native for module in self._model.modules() if isinstance(module, QuantizedLinear)}
        told = [
            [version("lmkit"), torch.__version__, transformers.__version__, SETTINGS, TRACED, type(self).__name__],
            [self._model.config._attn_implementation],  # noqa: SLF001 - it has no public name
            [str(self._device), torch.get_num_threads(), compiled_for(self._device)],
            [str(type(self._model)), self._model.config.to_dict(), described, shapes],
            [vars(module).get("scaling") for module in self._model.modules()],
            [dict(self._sizes), [*self._takes], sorted(map(str, orders))],
        ]
        return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:32]

    def _artifact(self, folder: Path) -> Callable[[list[Any]], torch.Tensor]:
        """Load a graph and its kernels from their folder; or compile them in another, which gets its name once whole.

        Inductor takes for whole what a compiler that was killed has left.
        """
        if folder.exists():
            try:
                return self._kept(folder)
            except Exception as error:  # noqa: BLE001 - whatever is wrong with it, it can be made again
                logger.warning("the graph kept in %s does not load, and is compiled again: %s", folder, error)
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        for left in folder.parent.glob(f"{UNFINISHED}*"):  # by processes that were killed
            with contextlib.suppress(OSError):  # another process was faster
                if time.time() - left.stat().st_mtime > ABANDONED:
                    shutil.rmtree(left, ignore_errors=True)
        unfinished = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=folder.parent))
        try:
            chain = self._made(unfinished)
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # another process was faster
                unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        return chain

    def _kept(self, folder: Path) -> Chain:
        """Load the graph that is in a folder."""
        from torch._inductor.standalone_compile import CompiledArtifact

        told = json.loads((folder / CALLS).read_text(encoding="utf-8"))
        with self._inductor(folder):
            parts = [CompiledArtifact.load(path=str(folder / name)) for name in told["parts"]]
        return Chain([Call(*call) for call in told["calls"]], parts, told["inputs"], told["sizes"], told["result"])

    def _made(self, folder: Path) -> Chain:
        """Compile the graph, and keep it in a folder."""
        graph, check = self._trace()
        check()
        calls, graphs, takes, sizes, result = divided(graph)
        names = [f"{number}.part" for number in range(len(graphs))]
        inputs = len(graph.graph.find_nodes(op="placeholder"))
        with self._inductor(folder):
            parts = [self._part(*part) for part in zip(graphs, takes, strict=True)]
            check()  # inductor asks about sizes too
            for part, name in zip(parts, names, strict=True):
                part.save(path=str(folder / name))
        told = json.dumps({"calls": calls, "parts": names, "inputs": inputs, "sizes": sizes, "result": result})
        (folder / CALLS).write_text(told, encoding="utf-8")
        return Chain(calls, parts, inputs, sizes, result)

    @contextlib.contextmanager
    def _inductor(self, folder: Path) -> Iterator[None]:
        """Set inductor up: it keeps kernels in a folder, and on a CPU compiles as many at once as torch has threads.

        Where lmkit's own kernels were built, it need not try first whether a compiler knows the processor.
        """
        from torch._inductor.runtime.cache_dir_utils import temporary_cache_dir

        inductor: Any = torch._inductor  # noqa: SLF001 - this part of torch is all there is for the purpose
        threads = torch.get_num_threads() if self._device.type == "cpu" else 1  # else it starts processes
        known = True if refusal() is None else None
        patch = inductor.config.patch({**SETTINGS, "compile_threads": threads, "cpp.vec_isa_ok": known})
        with temporary_cache_dir(str(folder / KERNELS)), patch:
            yield

    @staticmethod
    def _part(graph: Any, inputs: list[Any]) -> Any:
        """Compile a part."""
        inductor: Any = torch._inductor  # noqa: SLF001 - as above
        compile_it = functools.partial(inductor.standalone_compile, dynamic_shapes="from_graph", options={})
        return surely(lambda: compile_it(graph, inputs), _without_pool)

    def _trace(self) -> tuple[Any, Callable[[], None]]:
        """Write the computation down as a graph, without computing: for any sizes; and return what checks that."""
        from torch._subclasses import FakeTensorMode
        from torch.fx.experimental.proxy_tensor import make_fx
        from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
        from torch.fx.traceback import preserve_node_meta

        mode: Any = FakeTensorMode(shape_env=ShapeEnv())
        traced = self._sizes.values()
        dims = [DimDynamic.STATIC if size == 1 else DimDynamic.DYNAMIC for size in traced]
        shaped = torch.empty(*traced, dtype=torch.bool, device="meta")
        symbols = mode.from_tensor(shaped, symbolic_context=StatelessSymbolicContext(dims)).shape
        named: dict[int | str, Any] = dict(zip(self._sizes, symbols, strict=True))
        with mode:
            inputs = [torch.empty(one.shape, dtype=one.dtype, device=one.device) for one in self._weights]
            inputs += [
                torch.empty([named.get(size, size) for size in shape], dtype=dtype, device=self._device)
                for shape, dtype in self._takes
            ]
        with mode, preserve_node_meta():
            graph = make_fx(self._on_weights)(*inputs)
        for node in graph.graph.nodes:
            if node.target is torch.ops.mkldnn._linear_pointwise.default:  # noqa: SLF001
                # Else inductor asserts that the packed weight is a constant.
                node.meta.setdefault("custom", {})["fallback_to_eager"] = True
        return graph, lambda: self._check(mode.shape_env, named)

    def _check(self, found: Any, named: Mapping[int | str, Any]) -> None:
        """Refuse code that took a path for the sizes that are traced which it does not take for all.

        Args:
            found: What tracing found out about sizes.
            named: The symbols of sizes, by their names.
        """
        if found.replacements:  # other sizes would be read beyond their end
            raise EngineError("its code takes a size for a constant that differs from text to text")
        for length in (3, self.most_positions):
            many = {"rows": 2**12, "sources": 2**10, "places": 2**12, "read": length - 1}
            symbols = {one.node.expr: name for name, one in named.items() if isinstance(one, torch.SymInt)}
            sizes = {symbol: many.get(str(name), length) for symbol, name in symbols.items()}
            # Those who call see to what a card's kernels can count.
            asked = [guard.expr for guard in found.guards if LARGEST not in guard.expr.atoms()]
            if not all(expr.subs(sizes) for expr in asked):
                raise EngineError("its code reads long texts otherwise than short ones")

    def _on_weights(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        """What is traced, with all tensors as inputs."""
        given = {name: inputs[place] for name, place in self._places.items()}
        rest = (self._traced, *inputs[len(self._weights) :])
        found: Any = torch.func.functional_call(self._named, given, rest, tie_weights=False)
        return [found]

    def _verify(self, found: torch.Tensor, expected: torch.Tensor) -> None:
        """Compare scores with the model's own."""
        errors = (found - expected).float().square().mean(-1).sqrt() / expected.float().std(-1)
        off = float(errors.median())
        if not off < TOLERANCE:
            raise EngineError(f"its compiled step gave other scores, off by {off:.2f} standard deviations")
