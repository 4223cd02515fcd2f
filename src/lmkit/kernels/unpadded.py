"""Rows of different lengths read as one row of tokens, without the padding between them.

All that a model does to tokens one by one, its products above all, is done to tokens alone. They are spread to rows
of one width where they are kept as keys and values, and where they attend; what they attended to is one row again.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Final

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

_NOTE: Final = "_lmkit_layout"
"""What keys carry, so that no other model's are taken for them: a hook may call one in the middle of a pass."""


class Layout:
    """Where the tokens of a pass lie.

    Attributes:
        shape: How many rows there are, and how many columns the pass reads of each.
        rows: In which row each token is. *Shape:* `(tokens,)`.
        columns: In which column of its row. *Shape:* the same.
        last: Which token is the last of each row, where all rows have one; on the CPU, to index on any device.
            *Shape:* `(rows,)`.
    """

    def __init__(self, there: torch.Tensor, send: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Lay tokens out where they are `there`.

        Args:
            there: *Shape:* `(rows, columns)`, bool, on the CPU.
            send: Copies numbers to where the model computes.
        """
        self.shape = tuple(there.shape)
        self.rows, self.columns = send(there.nonzero().T)
        self.last = there.sum(1).cumsum(0) - 1
        self._tokens = send((there.flatten().cumsum(0) - 1).clamp(min=0))  # of each place; in padding it is any
        self._places = self.rows * there.shape[1] + self.columns

    def spread(self, states: torch.Tensor) -> torch.Tensor:
        """Lay tokens out in rows; their padding has the values of any, so it is for queries, whose padding is not read.

        Args:
            states: *Shape:* `(1, heads, tokens, size)`.

        Returns:
            *Shape:* `(rows, heads, columns, size)`.
        """
        chosen = states[0].transpose(0, 1).index_select(0, self._tokens.to(states.device))
        return chosen.view(*self.shape, *chosen.shape[1:]).transpose(1, 2)

    def write(self, states: torch.Tensor, to: torch.Tensor) -> None:
        """Write tokens to their places, and nothing beside them. *Shape:* as of what `spread` takes and returns."""
        to.transpose(1, 2)[self.rows.to(to.device), self.columns.to(to.device)] = states[0].transpose(0, 1)

    def gathered(self, states: torch.Tensor) -> torch.Tensor:
        """Take tokens out of rows. *Shape:* `(rows, columns, heads, size)`; returns `(1, tokens, heads, size)`."""
        return states.flatten(0, 1).index_select(0, self._places.to(states.device))[None]


def laid_out(states: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Note on keys by which layout their tokens were spread, for the attention that takes them next."""
    setattr(states, _NOTE, layout)
    return states


def spreading(attend: Callable[..., Any]) -> Callable[..., Any]:
    """Return an attention function that attends as `attend` does, also where queries are one row of tokens.

    The keys say so then; they, values and the mask have the rows, whose cache spreads them.
    """

    @functools.wraps(attend)
    def spread(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, *more: Any, **options: Any) -> Any:
        layout = None if torch.compiler.is_compiling() else getattr(key, _NOTE, None)
        if layout is None:
            return attend(module, query, key, *more, **options)
        attended, weights = attend(module, layout.spread(query), key, *more, **options)
        return layout.gathered(attended), weights

    return spread
