"""The two that are always compared: lmkit, and transformers as its users would call it at its best."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any

from _context import WIDE, device, ends
from _harness import Run, Side

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from _data import Chat

STATIC_SIZES = (16, 32, 64)
"""Batch sizes of which the best stands for the static `model.generate`."""


def lmkit_side(
    wrapper: Any, inputs: Sequence[Any], prompts: Sequence[Sequence[int]], name: str = "lmkit", **options: Any
) -> Side:
    """One call with all rows; texts are encoded and decoded within the time.

    Raises:
        ValueError: lmkit read another number of tokens than the other sides are given.
    """

    def run() -> Run:
        begun = time.perf_counter()
        results = wrapper(inputs, **options)
        seconds = time.perf_counter() - begun
        if [result.prompt_tokens for result in results] != [len(ids) for ids in prompts]:
            msg = "lmkit reads other prompts than the other sides"
            raise ValueError(msg)
        return Run(seconds, tuple(result.generated_tokens for result in results))

    return Side(name, run)


def static_sides(
    model: Any,
    prompts: Sequence[Sequence[int]],
    budgets: Sequence[int],
    sizes: Sequence[int] = STATIC_SIZES,
    **options: Any,
) -> list[Side]:
    """`model.generate` on batches sorted by budget, then by length, each run to the largest budget in it."""
    order = sorted(range(len(prompts)), key=lambda row: (budgets[row], len(prompts[row])))

    def side(size: int) -> Side:
        def run() -> Run:
            tokens = [0] * len(prompts)
            begun = time.perf_counter()
            for start in range(0, len(order), size):
                rows = order[start : start + size]
                wanted = [budgets[row] for row in rows]
                counts = generate(model, [prompts[row] for row in rows], wanted, **options)
                for row, count in zip(rows, counts, strict=True):
                    tokens[row] = count
            return Run(time.perf_counter() - begun, tuple(tokens))

        return Side(f"generate {WIDE}, batches of {size}", run)

    return [side(size) for size in sizes]


def generate(model: Any, prompts: Sequence[Sequence[int]], budgets: Sequence[int], **options: Any) -> list[int]:
    """Run one batch greedily and count the useful tokens of each row: up to its end token or its budget."""
    import torch

    decoder_only = not model.config.is_encoder_decoder
    pad, stops = model.generation_config.pad_token_id, ends(model)
    longest = max(map(len, prompts))
    fill = [[pad] * (longest - len(ids)) for ids in prompts]
    rows = zip(fill, prompts, strict=True)
    ids = torch.tensor([[*gap, *row] if decoder_only else [*row, *gap] for gap, row in rows])
    rows = zip(fill, prompts, strict=True)
    mask = torch.tensor(
        [[0] * len(gap) + [1] * len(row) if decoder_only else [1] * len(row) + [0] * len(gap) for gap, row in rows]
    )
    settings = {"max_new_tokens": max(budgets), "do_sample": False, "num_beams": 1} | options
    output = model.generate(ids.to(model.device), attention_mask=mask.to(model.device), **settings)
    new = output[:, longest if decoder_only else 1 :].tolist()
    return [useful(row, stops, budget) for row, budget in zip(new, budgets, strict=True)]


def useful(token_ids: Sequence[int], stops: Sequence[int], budget: int) -> int:
    """Count the tokens up to and with the first end token, at most as many as were asked for."""
    whole = list(token_ids[:budget])
    return next((number for number, token_id in enumerate(whole, start=1) if token_id in stops), len(whole))


def pipeline_side(
    model: Any, tokenizer: Any, chats: Sequence[Chat], prompts: Sequence[Sequence[int]], budget: int
) -> Side:
    """The pipeline as it comes: one chat after the other.

    It is asked for token ids instead of text, which spares it the decoding, so that they can be counted.
    """
    from transformers import pipeline

    pipe: Any = pipeline("text-generation", model=model, tokenizer=tokenizer)

    def run() -> Run:
        begun = time.perf_counter()
        answers = pipe(list(chats), max_new_tokens=budget, do_sample=False, return_tensors=True)
        seconds = time.perf_counter() - begun
        whole = [list(answer[0]["generated_token_ids"]) for answer in answers]
        if any(ids[: len(prompt)] != list(prompt) for ids, prompt in zip(whole, prompts, strict=True)):
            msg = "the pipeline reads other prompts than the other sides"
            raise ValueError(msg)
        return Run(seconds, tuple(len(ids) - len(prompt) for ids, prompt in zip(whole, prompts, strict=True)))

    return Side(f"pipeline as it comes, {WIDE}", run)


def stream_side(start: Callable[[], Iterator[Any]], name: str = "lmkit") -> Side:
    """Stream one row to its end; the first token counts when its text is there."""

    def run() -> Run:
        begun = time.perf_counter()
        first: float | None = None
        count = 0
        for chunk in start():
            first = first or time.perf_counter() - begun
            count = count if chunk.result is None else chunk.result.generated_tokens
        return Run(time.perf_counter() - begun, (count,), first)

    return Side(name, run)


def single_side(model: Any, prompt: Sequence[int], budget: int, **options: Any) -> Side:
    """`model.generate` of one row."""

    def run() -> Run:
        begun = time.perf_counter()
        counts = generate(model, [prompt], [budget], **options)
        return Run(time.perf_counter() - begun, tuple(counts))

    return Side("model.generate", run)


class Clock:
    """What `generate` calls with the prompt and then with each token: it notes when the first one came."""

    def __init__(self) -> None:
        """Start now."""
        self.begun = time.perf_counter()
        self.puts = 0
        self.first = 0.0

    def put(self, _value: Any) -> None:
        """Note the time of the second call, which is the first token's."""
        self.puts += 1
        if self.puts == 2:  # noqa: PLR2004 - the first call brings the prompt
            self.first = time.perf_counter() - self.begun

    def end(self) -> None:
        """Nothing is left to do."""


def generate_side(model: Any, prompt: Sequence[int], budget: int, **options: Any) -> Side:
    """`model.generate` of one row, with the time of its first token."""

    def run() -> Run:
        clock = Clock()
        counts = generate(model, [prompt], [budget], streamer=clock, **options)
        return Run(time.perf_counter() - clock.begun, tuple(counts), clock.first)

    return Side("model.generate", run)


def decoding(side: Side, name: str | None = None) -> Side:
    """Of a side that runs one row and knows the time of its first token, count only what comes behind it."""

    def run() -> Run:
        whole = side.run()
        assert whole.first_seconds is not None  # noqa: S101 - the side's kind
        return Run(whole.seconds - whole.first_seconds, tuple(count - 1 for count in whole.tokens))

    return Side(name or side.name, run)


def prefill_side(model: Any, prompt: Sequence[int], times: int = 5) -> Side:
    """The median of a few bare forward passes over a prompt, with a new cache and the last position's scores."""
    import torch

    ids = torch.tensor([list(prompt)], device=device())

    def once() -> float:
        begun = time.perf_counter()
        with torch.no_grad():
            model(input_ids=ids, use_cache=True, logits_to_keep=1).logits.argmax(-1).item()
        return time.perf_counter() - begun

    def run() -> Run:
        seconds = statistics.median(once() for _ in range(times))
        return Run(seconds, (1,), seconds)

    return Side("bare prefill", run)
