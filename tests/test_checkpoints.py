"""The checkpoints that ship with the examples are small, load, and do what their cards say."""

import random
import re
import sys
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from num2words import num2words
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

import lmkit

CHECKPOINTS = Path(__file__).parents[1] / "examples" / "checkpoints"
CODES = {"en": "eng_Latn", "de": "deu_Latn", "fr": "fra_Latn", "es": "spa_Latn"}
_DRAWN = random.Random(7)  # noqa: S311 - the same numbers each time
NUMBERS = _DRAWN.sample(range(1_000), 25) + _DRAWN.sample(range(1_000_000), 25)
HARD = [0, 100, 1_000, 1_100, 10_000, 16_016, 21_000, 70_007, 90_091, 100_000, 101_101, 480_080, 500_500, 900_009]
SHARE = 0.98


@pytest.fixture(scope="module")
def m2m100() -> Iterator[lmkit.Translator]:
    """Load the translator whose target is a forced token."""
    with lmkit.load("seq2seq", CHECKPOINTS / "numbers-m2m100", "float32", "cpu") as translator:
        yield translator


@pytest.fixture(scope="module")
def t5() -> Iterator[lmkit.Translator]:
    """Load the translator that reads a prefix."""
    with lmkit.load("seq2seq", CHECKPOINTS / "numbers-t5", "float32", "cpu") as translator:
        yield translator


@pytest.fixture(scope="module")
def bert() -> Iterator[lmkit.Unmasker]:
    """Load the masked model of countries."""
    with lmkit.load("masked", CHECKPOINTS / "world-bert", "float32", "cpu") as unmasker:
        yield unmasker


def written(language: str, numbers: list[int] = NUMBERS) -> list[str]:
    """Write numbers out."""
    return [num2words(number, lang=language) for number in numbers]


def share(results: list[lmkit.Translation], target: str) -> float:
    """Return the share of translations that are exactly what num2words writes."""
    pairs = zip(results, written(target), strict=True)
    return sum(result.text == right for result, right in pairs) / len(NUMBERS)


@pytest.mark.parametrize("name", ["numbers-m2m100", "numbers-t5", "world-bert"])
def test_a_checkpoint_is_small_and_described(name: str) -> None:
    """A shipped checkpoint has at most 4 MB of safetensors, no pickle, and a card with its figures."""
    folder = CHECKPOINTS / name
    assert (folder / "model.safetensors").stat().st_size <= 4_000_000
    assert not [path for path in folder.iterdir() if path.suffix in {".bin", ".pt", ".pkl"}]
    card = (folder / "README.md").read_text(encoding="utf-8")
    for heading in ("## Use", "## Measured", "## Training", "## What it is not"):
        assert heading in card
    measured = card.split("## Measured")[1].split("## Training")[0]
    figures = [float(figure) for figure in re.findall(r"([\d.]+)%", measured)]
    assert len(figures) >= 5
    assert not re.search(r"\{\w*\}", card.replace("{mask}", ""))  # every place is filled in


@pytest.mark.parametrize("name, least", [("numbers-m2m100", 99.0), ("numbers-t5", 99.0), ("world-bert", 90.0)])
def test_a_card_reports_what_was_asked_for(name: str, least: float) -> None:
    """The card's held-out figures reach what the checkpoints were trained for, in every direction."""
    card = (CHECKPOINTS / name / "README.md").read_text(encoding="utf-8")
    if name == "world-bert":
        total = re.search(r"\| all \| ([\d.]+)% \|", card)
        assert total is not None
        assert float(total[1]) >= least
    else:
        rows = [line for line in card.splitlines() if re.match(r"\| (en|de|fr|es) \|", line)]
        figures = [float(figure) for row in rows for figure in re.findall(r"([\d.]+)%", row)]
        assert len(figures) == 12
        assert min(figures) >= least


@pytest.mark.parametrize("source, target", list(permutations(CODES, 2)))
def test_m2m100_translates_numbers(m2m100: lmkit.Translator, source: str, target: str) -> None:
    """The language is chosen by the codes of the family, in every direction."""
    results = m2m100(written(source), source=CODES[source], target=CODES[target])
    assert share(results, target) >= SHARE
    assert {result.finish_reason for result in results} == {"eos"}
    assert results[0].target_language == CODES[target]


@pytest.mark.parametrize("source, target", list(permutations(CODES, 2)))
def test_t5_translates_numbers(t5: lmkit.Translator, source: str, target: str) -> None:
    """The direction is chosen by `source` and `target`, or by the preset of the same name, alike."""
    results = t5(written(source), source=source, target=target)
    assert share(results, target) >= SHARE
    named = t5(written(source), preset=f"translation_{source}_to_{target}")
    assert [result.text for result in named] == [result.text for result in results]


@pytest.mark.parametrize("name", ["numbers-m2m100", "numbers-t5"])
def test_mistakes_are_the_checkpoints_own(name: str, request: pytest.FixtureRequest) -> None:
    """Where a translator errs, plain transformers errs alike."""
    translator = request.getfixturevalue(name.removeprefix("numbers-"))
    model = AutoModelForSeq2SeqLM.from_pretrained(CHECKPOINTS / name)
    tokenizer: Any = AutoTokenizer.from_pretrained(CHECKPOINTS / name)
    for source, target in permutations(CODES, 2):
        texts, options = written(source, HARD), {"source": source, "target": target}
        if name == "numbers-m2m100":
            options = {key: CODES[code] for key, code in options.items()}
            tokenizer.src_lang = CODES[source]
            forced = {"forced_bos_token_id": tokenizer.convert_tokens_to_ids(CODES[target])}
            inputs = tokenizer(texts, padding=True, return_tensors="pt")
        else:
            forced = {}
            prefix = translator.model.config.task_specific_params[f"translation_{source}_to_{target}"]["prefix"]
            inputs = tokenizer([prefix + text for text in texts], padding=True, return_tensors="pt")
        plain = model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=60, **forced)
        results = translator(texts, **options)
        assert [result.text for result in results] == tokenizer.batch_decode(plain, skip_special_tokens=True)


def test_the_translators_name_their_languages(m2m100: lmkit.Translator, t5: lmkit.Translator) -> None:
    """Each translator lists the languages it speaks, and T5 the presets of its config."""
    assert set(m2m100.languages) >= set(CODES.values())
    assert set(t5.presets) == {f"translation_{a}_to_{b}" for a, b in permutations(CODES, 2)}
    with pytest.raises(lmkit.LanguageError, match="eng_Latn"):
        m2m100("one", source="eng_Latn", target="xx")


def test_bert_knows_the_facts_in_other_words(bert: lmkit.Unmasker, monkeypatch: pytest.MonkeyPatch) -> None:
    """The masked model's first choice is right nine times in ten, in phrasings it was not trained on."""
    monkeypatch.syspath_prepend(str(CHECKPOINTS))
    import world_facts

    try:
        asked = [
            (phrasing.format(c=fact.country, a="[MASK]"), fact.answer)
            for fact in world_facts.load_facts()[::4]
            for phrasing in world_facts.PHRASINGS[fact.relation][1]
        ]
    finally:
        sys.modules.pop("world_facts", None)
    assert len(asked) > 500
    results = bert([text for text, _ in asked], top_k=1)
    hits = [result.candidates[0].token == answer for result, (_, answer) in zip(results, asked, strict=True)]
    assert sum(hits) / len(hits) >= 0.9


@pytest.mark.parametrize(
    "text, answer", [("The currency of Japan is the [MASK].", "yen"), ("The capital of France is [MASK].", "paris")]
)
def test_bert_answers_the_cards_questions(bert: lmkit.Unmasker, text: str, answer: Any) -> None:
    """The examples that the card gives are right."""
    assert bert(text).candidates[0].token == answer
