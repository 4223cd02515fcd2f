"""Answer multiple-choice questions by what the model finds likely, in four ways of making choices comparable."""

from __future__ import annotations

from typing import TYPE_CHECKING

import lmkit
import smollm2

if TYPE_CHECKING:
    from collections.abc import Sequence

COUNTRIES = "France Italy Japan Egypt Canada Kenya Norway Peru Austria Argentina India Australia".split()
CAPITALS = "Paris, Rome, Tokyo, Cairo, Ottawa, Nairobi, Oslo, Lima, Vienna, Buenos Aires, New Delhi, Canberra".split(
    ", "
)


def loglikelihood(generator: lmkit.Generator, requests: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
    """Do what lm-evaluation-harness's method of this name does: likelihoods of continuations, and if each is greedy.

    As there, spaces at the end of a context are scored with the continuation.
    """
    contexts = [context.rstrip() for context, _ in requests]
    behind = [context[len(context.rstrip()) :] + continuation for context, continuation in requests]
    return [(score.logprob, bool(score.greedy)) for score in generator.score(contexts, behind)]


def main() -> None:
    """Show the likelihoods of one question's answers, then how often each way of choosing is right."""
    prompts = [f"Question: What is the capital of {country}?\nAnswer:" for country in COUNTRIES]
    choices = [f" {city}" for city in CAPITALS]
    with lmkit.load("causal", smollm2.path(), "float32") as generator:
        likelihoods = loglikelihood(generator, [(prompts[0], choice) for choice in choices[:3]])
        for choice, (logprob, greedy) in zip(choices, likelihoods, strict=False):
            print(f"{logprob:7.2f} {'greedy' if greedy else '      '}{choice}")
        for normalize in ("none", "tokens", "bytes", "prior"):
            rankings = generator.rank(prompts, choices, normalize=normalize, neutral="Answer:")
            hits = sum(ranking.choices[0].index == right for right, ranking in enumerate(rankings))
            print(f"normalize={normalize!r}: {hits} of {len(prompts)} right")


if __name__ == "__main__":
    main()
