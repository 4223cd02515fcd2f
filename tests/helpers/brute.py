"""Masks filled by hand with plain transformers: every way, one token after the other, as the chain rule says."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch

Chained = tuple[dict[int, float], tuple[int, ...]]
"""The log-probability of the token at each place, and the places in the order in which they were filled."""


def log_probabilities(model: Any, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Return the log-softmax of all scores of rows of one length."""
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([list(row) for row in rows])).logits
    return logits.float().log_softmax(-1)


def chain(model: Any, row: Sequence[int], tokens: dict[int, int], order: str) -> Chained:
    """Fill masked places of a row with given tokens, one after the other.

    Args:
        model: A masked model of plain transformers.
        row: What it reads, with the mask token at all places of `tokens`.
        tokens: What comes to each place.
        order: `"left_to_right"`, or `"most_certain"`: the place first where some token is likeliest.
    """
    row, found = list(row), dict[int, float]()
    while len(found) < len(tokens):
        scores = log_probabilities(model, [row])[0]
        left = [place for place in sorted(tokens) if place not in found]
        place = left[0] if order == "left_to_right" else max(left, key=lambda one: float(scores[one].max()))
        found[place] = float(scores[place, tokens[place]])
        row[place] = tokens[place]
    return found, tuple(found)


def all_ways(model: Any, row: Sequence[int], places: Sequence[int], words: Sequence[int], order: str) -> dict[Any, Any]:
    """Return the `chain` of every way of filling two or more places with words of one token each."""
    known: dict[tuple[tuple[int, int], ...], torch.Tensor] = {}
    ways = {}
    for way in itertools.product(words, repeat=len(places)):
        filled: dict[int, int] = {}
        found = dict[int, float]()
        while len(filled) < len(places):
            key = tuple(sorted(filled.items()))
            if key not in known:
                known[key] = log_probabilities(model, [[filled.get(n, one) for n, one in enumerate(row)]])[0]
            scores = known[key]
            left = [place for place in places if place not in filled]
            place = left[0] if order == "left_to_right" else max(left, key=lambda one: float(scores[one].max()))
            filled[place] = way[places.index(place)]
            found[place] = float(scores[place, filled[place]])
        ways[way] = found, tuple(places.index(place) for place in found)
    return ways


def total(found: dict[int, float]) -> float:
    """Return a way's joint log-probability."""
    return math.fsum(found.values())
