"""Numbers written out in four languages: those trained on, those held out, how a text splits."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from functools import cache

import numpy as np
from num2words import num2words

NLLB_CODES = {"en": "eng_Latn", "de": "deu_Latn", "fr": "fra_Latn", "es": "spa_Latn"}
ENGLISH_NAMES = {"en": "English", "de": "German", "fr": "French", "es": "Spanish"}
LANGUAGES = tuple(NLLB_CODES)
DIRECTIONS = tuple(itertools.permutations(LANGUAGES, 2))

LIMIT = 1_000_000
HELD_OUT_COUNT = 1_000
WORD_START = "▁"

# German writes a number as one word; these are its parts, longest first where one begins another.
_GERMAN_PART = (
    "hundert|tausend|und|null|eins|ein|zwei|drei|vier|fünf|sechs|sech|sieben|sieb|acht|neun|zehn|elf|zwölf|zwan|zig|ßig"
)
_PIECES = {"de": re.compile(f"{WORD_START}?(?:{_GERMAN_PART})"), "other": re.compile(f"{WORD_START}?\\w+|[-,]")}


# Round numbers are few below a million, and people type them first; the roundest are listed most.
ROUND_NUMBERS = (
    np.array([first * 10**zeros for zeros in range(6) for first in range(1, 10)]),
    np.arange(10_000, LIMIT, 10_000),
    np.arange(1_000, LIMIT, 1_000),
    np.arange(100, 100_000, 100),
    np.arange(1_000),
)


@dataclass(frozen=True)
class NumberCorpus:
    """Numbers in rising order and, for each language, their texts in the same order."""

    numbers: np.ndarray
    texts: dict[str, list[str]]


def write_out(numbers: np.ndarray) -> NumberCorpus:
    """Return `numbers` with their texts exactly as num2words gives them."""
    texts = {code: [num2words(int(n), lang=code) for n in numbers] for code in LANGUAGES}
    return NumberCorpus(numbers, texts)


@cache
def number_corpora(seed: int, size: int = 50_000) -> tuple[NumberCorpus, NumberCorpus]:
    """Return the training corpus and the held-out one, which share no number.

    The held-out numbers are uniform below a million. What remains for training is every other
    number below ten thousand, every other round one, and a uniform sample of the rest, `size` in
    all.
    """
    rng = np.random.default_rng(seed)
    held_out = np.sort(rng.choice(LIMIT, HELD_OUT_COUNT, replace=False))
    chosen = np.setdiff1d(np.concatenate([np.arange(10_000), *ROUND_NUMBERS]), held_out)
    others = np.setdiff1d(np.arange(LIMIT), np.concatenate([chosen, held_out]))
    sample = rng.choice(others, size - len(chosen), replace=False)
    training = np.sort(np.concatenate([chosen, sample]))
    if np.intersect1d(training, held_out).size:
        raise AssertionError("a held-out number is in the training set")
    return write_out(training), write_out(held_out)


def split_into_pieces(text: str, language: str) -> list[str]:
    """Split the text of a number into its words, and German compounds into their parts.

    >>> split_into_pieces("einundzwanzig", "de")
    ['▁ein', 'und', 'zwan', 'zig']
    >>> split_into_pieces("quatre-vingt-un", "fr")
    ['▁quatre', '-', 'vingt', '-', 'un']
    """
    marked = WORD_START + text.replace(" ", WORD_START)
    return _PIECES["de" if language == "de" else "other"].findall(marked)


def all_pieces(corpus: NumberCorpus) -> list[str]:
    """Return each distinct piece of the corpus once, sorted."""
    return sorted(
        {
            piece
            for language in LANGUAGES
            for text in corpus.texts[language]
            for piece in split_into_pieces(text, language)
        }
    )
