"""A model in two parts: what reads tokens, and the head that scores the vocabulary, run at chosen places only."""

from __future__ import annotations

import copy
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

EXACT, ROUGH = 1e-3, 0.05
"""How far scores of one probe may lie apart, of the largest: sums are not added up in the same order, and in half
precision that shows. A head that misses its bias, its scaling or its softcap is further off."""


class Reader:
    """Reads with a model, and turns what it read into scores of the vocabulary, a few places at a time.

    A copy of the model's outer modules has a stand-in for its body, which keeps the hidden states and later hands
    back some of them. So biases, scalings and softcaps behind the body are the model's own code, for any family, and
    the model itself is not touched: other threads may run it. Which submodule is the body is found by trying them; a
    model that none of them reproduces runs as a whole, with scores at all places.

    Attributes:
        model: The model.
        expected: The model's scores for the probe.
    """

    def __init__(self, model: Any, probe: Mapping[str, Any]) -> None:
        """Find the body of `model` by trying it on the inputs `probe`."""
        self.model = model
        self.expected: torch.Tensor = model(**probe, return_dict=True).logits
        names = [name for name, _ in model.named_children()]
        names += [f"{name}.{inner}" for name, child in model.named_children() for inner, _ in child.named_children()]
        names.sort(key=lambda name: name != model.base_model_prefix)
        self._names, self._probe = names, probe

    @cached_property
    def body(self) -> str | None:
        """The name of the submodule that is read without the head; None for a model that runs as a whole."""
        return next((name for name in self._names if self._reproduces(name, self._probe)), None)

    def read(
        self, inputs: Mapping[str, Any], body: str | None = None
    ) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
        """Read tokens.

        Returns:
            Hidden states (*shape:* `(rows, tokens, size)`), and what turns some of them (`(places, size)`) into scores
            (`(places, vocabulary)`). Where the model runs as a whole, its scores take the place of hidden states.
        """
        body = body or self.body
        if body is None:
            return self.model(**inputs, return_dict=True).logits, lambda scores: scores
        stand_in = _StandIn(self.model.get_submodule(body))
        outer = _with_module(self.model, body.split("."), stand_in)
        outer(**inputs, return_dict=True)

        def head(hidden: torch.Tensor) -> torch.Tensor:
            stand_in.given = hidden[None]
            scores: torch.Tensor = outer(**inputs, return_dict=True).logits[0]
            return scores

        return stand_in.hidden, head

    def at(self, inputs: Mapping[str, Any], places: torch.Tensor) -> torch.Tensor:
        """Read tokens, and score the vocabulary at chosen places only, in one pass.

        Args:
            inputs: What the model is given.
            places: Rows, and columns. *Shape:* `(2, places)`.

        Returns:
            *Shape:* `(places, vocabulary)`.
        """
        rows, columns = places
        logits: torch.Tensor
        if self.body is None:
            logits = self.model(**inputs, return_dict=True).logits[rows, columns]
        else:
            stand_in = _StandIn(self.model.get_submodule(self.body), lambda hidden: hidden[rows, columns][None])
            outer = _with_module(self.model, self.body.split("."), stand_in)
            logits = outer(**inputs, return_dict=True).logits[0]
        return logits

    def _reproduces(self, body: str, probe: Mapping[str, Any]) -> bool:
        try:
            hidden, head = self.read(probe, body)
            # In two parts: a head that looks at other places too is not one that can run at some.
            found = torch.stack([torch.cat([head(row[:1]), head(row[1:])]) for row in hidden])
        except Exception:  # noqa: BLE001 - whatever it is, this submodule is not what stands before the head
            return False
        if hidden.shape[:-1] != self.expected.shape[:-1]:
            return False  # it reads the source
        heads = hidden.shape != found.shape or not alike(hidden, found)  # else the head is inside the body
        return heads and found.shape == self.expected.shape and alike(found, self.expected)


class _StandIn(torch.nn.Module):
    """Stands for a body: runs it, keeps its hidden states and hands back some; or hands back the ones it is given."""

    def __init__(self, body: Any, pick: Callable[[torch.Tensor], torch.Tensor] = lambda hidden: hidden[:1, :1]) -> None:
        super().__init__()
        self._pick = pick
        self.__dict__["_body"] = body  # not registered: it stays the model's
        self.hidden = torch.empty(0)
        self.given: torch.Tensor | None = None
        self._outputs: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_body"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.given is None:
            outputs = self.__dict__["_body"](*args, **kwargs)
            self.hidden = outputs[0]
            self._outputs = with_states(outputs, self._pick(self.hidden))
            return self._outputs
        return with_states(self._outputs, self.given)


def _with_module(model: Any, path: Sequence[str], stand_in: _StandIn) -> Any:
    """Copy the modules on a path, their weights and other submodules shared, with `stand_in` at its end."""
    inner = _with_module(model.get_submodule(path[0]), path[1:], stand_in) if path[1:] else stand_in
    copied = object.__new__(type(model))
    copied.__dict__.update(model.__dict__, _modules={**model._modules, path[0]: inner})  # noqa: SLF001
    copied.__dict__.pop("forward", None)  # accelerate's wrapper, which would run the module that it wrapped
    return copied


def with_states(outputs: Any, hidden: torch.Tensor) -> Any:
    """Return the outputs of a body or an encoder with other hidden states."""
    if isinstance(outputs, tuple):
        return (hidden, *outputs[1:])
    other = copy.copy(outputs)
    other[next(iter(outputs.keys()))] = hidden
    return other


def alike(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Say whether scores are the same but for the order of sums."""
    tolerance = EXACT if expected.dtype in (torch.float32, torch.float64) else ROUGH
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())
