"""Embeddings in 8 bits, and output layers that multiply with the same weight."""

from __future__ import annotations

import torch

from lmkit.kernels.native import linear
from lmkit.kernels.ordered import Ordered, hold
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
