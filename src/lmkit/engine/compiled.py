"""One decode step, compiled ahead: much of a step is Python and calls of small kernels.

The step is traced once, for any number of rows and any width of the cache, and compiled by inductor; the artifact is
kept on disk for other processes.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import shutil
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from lmkit._borrowed import cache_name
from lmkit.engine.cache import KeyValues
from lmkit.engine.inputs import input_device
from lmkit.errors import EngineError
from lmkit.kernels.native.build import cache_folder
from lmkit.kernels.quantized import QuantizedLinear
from lmkit.kernels.together import WithWholes

if TYPE_CHECKING:
    from collections.abc import Sequence

ROWS, WIDTH = 64, 256
"""The rows and the width of the cache that are traced; the compiled step takes any, but for `most_rows`."""

VERIFIED = 32
"""How many rows are compared with the model's own after compilation."""

TOLERANCE = 0.1
"""How far compiled scores of the median row may be from the model's own, as a share of their spread: fused steps round
bfloat16 elsewhere, SmolLM2's by 0.08 in the median with two tokens of context, single rows more."""

TRACED = 3
"""The number of what is traced: another one where `_step` or the order of its inputs has changed."""

SETTINGS = {"pattern_matcher": False, "size_asserts": False, "alignment_asserts": False, "compile_threads": 1}
"""For inductor: packed weights (`kernels.packed`) have no strides to assert, and as inputs fit none of its patterns;
its pool of compiling threads would stay behind, for a start that is a tenth shorter."""


STEP, KERNELS = "compiled.step", "kernels"
"""What a compiled step's folder holds: the step, and inductor's own cache with the kernels that it calls."""


class _Slot(DynamicLayer):
    """Buffers of one layer; a step writes the column `slot`."""

    is_compileable = True

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, slot: torch.Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys, self.values, self._slot = keys, values, slot
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write one column; return all of them."""
        assert self.keys is not None  # noqa: S101 - for the type checkers
        assert self.values is not None  # noqa: S101
        self.keys.index_copy_(2, self._slot, key_states)
        self.values.index_copy_(2, self._slot, value_states)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Return 0: positions are given."""
        return 0


class CompiledStep:
    """The compiled step of a model; only the thread that leads its engine calls it.

    Attributes:
        most_rows: How many rows it takes. Models on torch's quantized kernels are traced for one: with more, their
            layers are no faster compiled, and one row that is known to be one is a tenth faster.

    Raises:
        EngineError: Compilation failed, or gave other scores than the model.
    """

    def __init__(self, model: Any) -> None:
        """Load the step of `model`, whose plan says that it has one, from the cache folder; or compile and keep it."""
        folder = cache_folder("compiled")
        self._model = model
        self._cached = cache_name(model) or ""
        self._orders = {module.native for module in model.modules() if isinstance(module, QuantizedLinear)}
        self.most_rows = 1 if None in self._orders else sys.maxsize
        self._named = every = WithWholes(model)
        named = [*every.named_parameters(remove_duplicate=False), *every.named_buffers(remove_duplicate=False)]
        once = {id(tensor): tensor for _, tensor in named}
        places = {key: place for place, key in enumerate(once)}
        self._weights = [tensor.detach() for tensor in once.values()]
        self._places = {name: places[id(tensor)] for name, tensor in named}
        with torch.no_grad():
            self._sample = self._read_tokens()
            try:
                self._run = self._artifact(folder / self._key())
                self._verify()
            except Exception as error:
                raise EngineError(
                    f"{type(model).__name__} could not be compiled: load it without compile=True ({error})."
                ) from error

    def __call__(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor,
        slot: torch.Tensor,
        buffers: Sequence[tuple[torch.Tensor, torch.Tensor]],
    ) -> torch.Tensor:
        """Read a token per row.

        Args:
            token_ids: *Shape:* `(rows, 1)`.
            positions: Their places in the texts. *Shape:* `(rows, 1)`.
            mask: Which columns each sees, its own among them. *Shape:* `(rows, 1, 1, width)`, bool.
            slot: The column to write. *Shape:* `(1,)`.
            buffers: Keys and values of each layer, contiguous, written in place. *Shape:* `(rows, heads, width, size)`.

        Returns:
            The scores that follow. *Shape:* `(rows, vocabulary)`.
        """
        keys, values = [pair[0] for pair in buffers], [pair[1] for pair in buffers]
        scores: torch.Tensor = self._run(*self._weights, token_ids, positions, slot, *keys, *values, mask)[0]
        return scores

    def _read_tokens(self) -> KeyValues:
        """Run the model on one token per row, to see the shapes of its keys and values."""
        cache = KeyValues(self._model.config.get_text_config(decoder=True))
        token_ids = self._some_tokens(1)
        self._model(input_ids=token_ids, use_cache=True, **{self._cached: cache.cache})
        return cache

    def _some_tokens(self, seed: int) -> torch.Tensor:
        """Draw tokens to try the step with, for `VERIFIED` rows at the most. *Shape:* `(rows, 1)`."""
        size = self._model.config.get_text_config(decoder=True).vocab_size
        drawn = torch.randint(
            size, (min(VERIFIED, self.most_rows), 1), generator=torch.Generator().manual_seed(seed), device="cpu"
        )
        return drawn.to(input_device(self._model))

    def _key(self) -> str:
        """Name what the compiled code depends on: inductor writes the number of threads into its kernels too."""
        import transformers

        described = [(name, place, str(self._weights[place].dtype)) for name, place in self._places.items()]
        shapes = [(tuple(weight.shape), weight.is_mkldnn) for weight in self._weights]
        told = [
            [version("lmkit"), torch.__version__, transformers.__version__, SETTINGS, TRACED],
            [self._model.config._attn_implementation],  # noqa: SLF001 - it has no public name
            [str(input_device(self._model)), torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()],
            [type(self._model).__qualname__, self._model.config.to_dict(), described, shapes, self.most_rows],
            sorted(map(str, self._orders)),
        ]
        return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:32]

    def _artifact(self, folder: Path) -> Any:
        """Load a step and its kernels from their folder; or compile them in another, which gets its name once whole.

        Inductor takes for whole what a compiler that was killed has left.
        """
        from torch._inductor.runtime.cache_dir_utils import temporary_cache_dir
        from torch._inductor.standalone_compile import CompiledArtifact

        with contextlib.suppress(Exception), temporary_cache_dir(str(folder / KERNELS)):  # absent or damaged
            return CompiledArtifact.load(path=str(folder / STEP))
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=folder.parent))
        try:
            with temporary_cache_dir(str(unfinished / KERNELS)):
                artifact = self._compiled()
                artifact.save(path=str(unfinished / STEP))
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # another process was faster
                unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        return artifact

    def _compiled(self) -> Any:
        inductor: Any = torch._inductor  # noqa: SLF001 - this part of torch is all there is for the purpose
        graph, inputs = self._trace()
        settings = {"config_patches": dict(SETTINGS)}
        return inductor.standalone_compile(graph, inputs, dynamic_shapes="from_graph", options=settings)

    def _trace(self) -> tuple[Any, list[torch.Tensor]]:
        """Write the step down as a graph, without computing: for any number of rows and any width."""
        from torch._subclasses import FakeTensorMode
        from torch.fx.experimental.proxy_tensor import make_fx
        from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
        from torch.fx.traceback import preserve_node_meta

        mode: Any = FakeTensorMode(shape_env=ShapeEnv())
        device = input_device(self._model)
        any_rows = DimDynamic.STATIC if self.most_rows == 1 else DimDynamic.DYNAMIC
        dims = [any_rows, DimDynamic.STATIC, DimDynamic.STATIC, DimDynamic.DYNAMIC]
        mask = mode.from_tensor(
            torch.zeros(min(ROWS, self.most_rows), 1, 1, WIDTH, dtype=torch.bool, device=device),
            symbolic_context=StatelessSymbolicContext(dims),
        )
        rows, _, _, width = mask.shape
        with mode:
            weights = [torch.empty(w.shape, dtype=w.dtype, device=w.device) for w in self._weights]
            one = [torch.empty(rows, 1, dtype=torch.long, device=device) for _ in range(2)]
            slot = torch.empty(1, dtype=torch.long, device=device)
            keys = [_widened(layer.keys, rows, width) for layer in self._sample.layers]
            values = [_widened(layer.values, rows, width) for layer in self._sample.layers]
        inputs = [*weights, *one, slot, *keys, *values, mask]
        with mode, preserve_node_meta():
            graph = make_fx(self._step)(*inputs)
        for node in graph.graph.nodes:
            if node.target is torch.ops.mkldnn._linear_pointwise.default:  # noqa: SLF001
                # Else inductor asserts that the packed weight is a constant.
                node.meta.setdefault("custom", {})["fallback_to_eager"] = True
        return graph, inputs

    def _step(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        """What is traced: the model's forward, with all tensors as inputs."""
        count, layers = len(self._weights), len(self._sample.layers)
        token_ids, positions, slot, *cache, mask = inputs[count:]
        # Without asserts of sizes, inductor of torch 2.14 knows only those that the graph itself asks for, and not of a
        # bool tensor: the width is that of the first keys.
        slot = slot.clamp(max=cache[0].shape[2] - 1)
        slots: list[Any] = [_Slot(*pair, slot) for pair in zip(cache[:layers], cache[layers:], strict=True)]
        outputs: Any = torch.func.functional_call(
            self._named,
            {name: inputs[place] for name, place in self._places.items()},
            kwargs={
                "input_ids": token_ids,
                "attention_mask": mask,
                "position_ids": positions,
                self._cached: Cache(layers=slots),
                "use_cache": True,
                "return_dict": True,
            },
            tie_weights=False,
        )
        return [outputs.logits[:, -1]]

    def _verify(self) -> None:
        """Compare one step with the model's own."""
        device = input_device(self._model)
        token_ids = self._some_tokens(2)
        positions = torch.ones_like(token_ids)
        seen = torch.arange(WIDTH, device=device) < 2  # noqa: PLR2004 - a token before, and its own
        room = functools.partial(torch.nn.functional.pad, pad=(0, 0, 0, WIDTH - 1))
        buffers = [(room(layer.keys), room(layer.values)) for layer in self._sample.layers]
        slot = torch.ones(1, dtype=torch.long, device=device)
        found = self(token_ids, positions, seen.expand(len(token_ids), 1, 1, -1).contiguous(), slot, buffers)
        before = {self._cached: self._sample.cache}
        expected = self._model(input_ids=token_ids, position_ids=positions, use_cache=True, **before).logits[:, -1]
        errors = (found - expected).float().square().mean(-1).sqrt() / expected.float().std(-1)
        off = float(errors.median())
        if not off < TOLERANCE:
            raise EngineError(f"its compiled step gave other scores, off by {off:.2f} standard deviations")


def _widened(part: torch.Tensor, rows: Any, width: Any) -> torch.Tensor:
    """Make keys or values like these for as many rows and columns, which may be symbols."""
    return torch.empty(rows, part.shape[1], width, part.shape[3], dtype=part.dtype, device=part.device)
