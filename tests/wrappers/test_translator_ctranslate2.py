"""Translations compared with CTranslate2's of the same checkpoint, in float32."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ctranslate2
import pytest
from ctranslate2.converters import TransformersConverter
from num2words import num2words

import lmkit

FOLDER = Path(__file__).parents[2] / "examples" / "checkpoints" / "numbers-m2m100"
CODES = {"eng_Latn": "en", "deu_Latn": "de", "fra_Latn": "fr", "spa_Latn": "es"}
NUMBERS = [3, 17, 42, 80, 99, 101, 256, 999, 1_000, 4_711, 23_456, 90_071, 314_159, 999_999]


@pytest.fixture(scope="module")
def translator() -> Iterator[lmkit.Translator]:
    """Load the number translator."""
    with lmkit.load("seq2seq", FOLDER, "float32", "cpu") as loaded:
        yield loaded


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Load the same checkpoint with CTranslate2."""
    where = str(tmp_path_factory.mktemp("ctranslate2") / "model")
    TransformersConverter(str(FOLDER)).convert(where, quantization="float32")
    return ctranslate2.Translator(where, device="cpu", compute_type="float32")


def pieces(translator: lmkit.Translator, text: str, code: str) -> list[str]:
    """Write a text as CTranslate2 reads it: its pieces behind its language."""
    tokenizer: Any = translator.tokenizer
    return [code, *tokenizer.tokenize(text), "</s>"]


def test_greedy_translations_are_those_of_ctranslate2(translator: lmkit.Translator, converted: Any) -> None:
    """Every direction of languages, all in one call, gives the tokens that CTranslate2 gives."""
    rows = [(pair, n) for pair in itertools.permutations(CODES, 2) for n in NUMBERS]
    texts = [num2words(n, lang=CODES[source]) for (source, _), n in rows]
    results = translator(texts, source=[s for (s, _), _ in rows], target=[t for (_, t), _ in rows])
    theirs = converted.translate_batch(
        [pieces(translator, text, source) for text, ((source, _), _) in zip(texts, rows, strict=True)],
        target_prefix=[[target] for (_, target), _ in rows],
        beam_size=1,
    )
    tokenizer: Any = translator.tokenizer
    found = [tokenizer.convert_ids_to_tokens(list(result.token_ids)) for result in results]
    assert found == [one.hypotheses[0] for one in theirs]


def test_scores_are_those_of_ctranslate2(translator: lmkit.Translator, converted: Any) -> None:
    """`score` of right and wrong translations is `score_batch`, the end token included."""
    texts = [num2words(n) for n in NUMBERS]
    answers = [num2words(n + n % 3, lang="de") for n in NUMBERS]
    ours = translator.score(texts, answers, source="eng_Latn", target="deu_Latn")
    theirs = converted.score_batch(
        [pieces(translator, text, "eng_Latn") for text in texts],
        [["deu_Latn", *pieces(translator, answer, "deu_Latn")[1:-1]] for answer in answers],
    )
    # The language is scored there and told here.
    assert [score.logprob for score in ours] == pytest.approx([sum(one.log_probs[1:]) for one in theirs], abs=1e-4)
