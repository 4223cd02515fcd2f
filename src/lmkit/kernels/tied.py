"""Embeddings in 8 bits, and output layers that multiply with the same weight."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses import FakeTensor

from lmkit.kernels.native import linear
from lmkit.kernels.ordered import DTYPES, Ordered, hold
from lmkit.kernels.quantized import Int8Linear, aligned


class Int8Embedding(Ordered):
    """An embedding in 8 bits, with one scale for each token.

    Attributes:
        num_embeddings: How many tokens there are.
        embedding_dim: How many numbers a token has.
        weight: The integers. *Shape:* `(num_embeddings, embedding_dim)`.
        scales: *Shape:* `(num_embeddings,)`.
        embed_scale: What a family multiplies with what it looks up.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, dtype: torch.dtype, embed_scale: float = 1.0) -> None:
        """Make an embedding without values."""
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.embed_scale = num_embeddings, embedding_dim, embed_scale
        hold(self, *Int8Linear.empty(embedding_dim, num_embeddings, dtype))

    def pack(self) -> None:
        """Bring the weight to where the kernel of a `TiedHead` can read it."""
        self.weight.data = aligned(self.weight.data)

    @property
    def in_features(self) -> int:  # type: ignore[override]
        """The numbers of a token."""
        return self.embedding_dim

    @property
    def out_features(self) -> int:  # type: ignore[override]
        """The tokens."""
        return self.num_embeddings

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - torch's name for it
        """Look tokens up. *Shape:* any, to the same and `embedding_dim`."""
        rows = self.weight[input] if self.native is None else linear.rows8(self.weight, input)
        found = rows[..., : self.embedding_dim].to(self.scales.dtype) * self.scales[input][..., None]
        return found if self.embed_scale == 1 else found * self.embed_scale


class TiedHead(Int8Linear):
    """The output layer of a model whose embedding is its weight: it has a bias of its own at most."""

    def __init__(self, embedding: Int8Embedding, dtype: torch.dtype, *, bias: bool) -> None:
        """Share the weight and the scales of `embedding`."""
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = embedding.embedding_dim, embedding.num_embeddings
        self.bias = (
            torch.nn.Parameter(torch.empty(self.out_features, dtype=dtype), requires_grad=False) if bias else None
        )
        self._embedding = (embedding,)  # in a tuple, so that its weight is not this module's a second time

    def pack(self) -> None:
        """Leave the weight to the embedding."""

    def to_native(self, isa: str) -> bool:
        """Leave it to the embedding here too."""
        return self._embedding[0].to_native(isa)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The embedding's."""
        return self._embedding[0].weight

    @property
    def scales(self) -> torch.nn.Parameter:  # type: ignore[override]
        """The embedding's."""
        return self._embedding[0].scales

    @property
    def native(self) -> str | None:  # type: ignore[override]
        """The embedding's."""
        return self._embedding[0].native


def wide_head(model: Any, quantizer: Any) -> torch.nn.Linear | None:
    """Return a quantized model's output layer if it is wide, since several embeddings have its weight: Marian's."""
    head = model.get_output_embeddings()
    ties: dict[str, str] = model.all_tied_weights_keys
    name = next((name for name, module in model.named_modules() if module is head), "")
    tied = f"{name}.weight" in ties or f"{name}.weight" in ties.values()
    left = {name, *name.split(".")} & {*quantizer.quantization_config.skip}
    plain = type(head) is torch.nn.Linear and "forward" not in vars(head) and not hasattr(head, "_hf_hook")
    return head if plain and tied and not left and head.weight.dtype in DTYPES else None


def put_on_head(model: Any, isa: str) -> bool:
    """Have a `wide_head` multiply by a copy of its weight in 8 bits, as other output layers do; return whether.

    The module keeps its weight, which is the embeddings', and uses it where it is trained, was changed, or is traced by
    others: lmkit's own graphs are given the copy.
    """
    head = wide_head(model, model.hf_quantizer)
    if head is None or head.weight.device.type != "cpu":
        return False
    layer = Int8Linear(head.in_features, head.out_features, head.weight.dtype, bias=False)
    hold(layer, *Int8Linear.quantize(head.weight.detach(), head.weight.dtype))
    layer.bias = head.bias
    layer.to_native(isa)
    head.forward = _ByCopy(head, layer)  # type: ignore[method-assign, assignment]
    return True


def head_copies(model: Any) -> list[Int8Linear]:
    """Return the layers of `put_on_head`, which are no modules of the model."""
    ways = (vars(module).get("forward") for module in model.modules())
    return [way.layer for way in ways if isinstance(way, _ByCopy)]


class _ByCopy:
    """The forward of an output layer that multiplies by a copy of its weight.

    Attributes:
        layer: What holds the copy.
    """

    def __init__(self, head: torch.nn.Linear, layer: Int8Linear) -> None:
        self._head, self._address, self.layer = head, head.weight.data_ptr(), layer

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        weight = self._head.weight
        if type(self.layer.weight) is FakeTensor:  # a graph's input
            return self.layer.product(rows)
        trained = torch.is_grad_enabled() and (rows.requires_grad or weight.requires_grad)
        traced = type(rows) is not torch.Tensor or torch.compiler.is_compiling()
        if traced or trained or weight.data_ptr() != self._address:
            return torch.nn.functional.linear(rows, weight, self._head.bias)
        return self.layer.product(rows)
