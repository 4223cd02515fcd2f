"""The two translators of number words: one told the language by a forced token, one by a prefix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from fitting import Batch, fit
from numbers_corpus import (
    DIRECTIONS,
    ENGLISH_NAMES,
    LANGUAGES,
    NLLB_CODES,
    ROUND_NUMBERS,
    NumberCorpus,
    all_pieces,
    number_corpora,
)
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    M2M100Config,
    M2M100ForConditionalGeneration,
    PreTrainedTokenizerBase,
    T5Config,
    T5ForConditionalGeneration,
)
from vocabularies import nllb_tokenizer, t5_tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MAX_LENGTH = 40
_IGNORED_LABEL = -100
_CHUNKS_PER_DRAW = 8
_SHARE_BY_DIGITS = 0.45
_SHARE_ROUND = 0.15


@dataclass(frozen=True)
class Rows:
    """Padded token ids of every direction: two int16 arrays of *Shape:* (12, numbers, width)."""

    sources: np.ndarray
    targets: np.ndarray
    pad_token_id: int


def prefix(source: str, target: str) -> str:
    """Return the T5 prefix of a direction, in the words of the original T5."""
    return f"translate {ENGLISH_NAMES[source]} to {ENGLISH_NAMES[target]}: "


def _padded_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> np.ndarray:
    encoded = tokenizer(texts, padding="max_length", max_length=MAX_LENGTH)
    return np.array(encoded["input_ids"], dtype=np.int16)


def nllb_rows(tokenizer: PreTrainedTokenizerBase, corpus: NumberCorpus) -> Rows:
    """Tokenise every direction; a text looks the same as a source and as a target."""
    by_language = {}
    for language in LANGUAGES:
        tokenizer.src_lang = NLLB_CODES[language]
        by_language[language] = _padded_ids(tokenizer, corpus.texts[language])
    tokenizer.src_lang = NLLB_CODES["en"]
    return Rows(
        np.stack([by_language[source] for source, _ in DIRECTIONS]),
        np.stack([by_language[target] for _, target in DIRECTIONS]),
        tokenizer.pad_token_id,
    )


def t5_rows(tokenizer: PreTrainedTokenizerBase, corpus: NumberCorpus) -> Rows:
    """Tokenise every direction, with its prefix before the source."""
    by_language = {code: _padded_ids(tokenizer, corpus.texts[code]) for code in LANGUAGES}
    sources = [
        _padded_ids(tokenizer, [prefix(source, target) + text for text in corpus.texts[source]])
        for source, target in DIRECTIONS
    ]
    return Rows(np.stack(sources), np.stack([by_language[target] for _, target in DIRECTIONS]), tokenizer.pad_token_id)


def _draw_numbers(rng: np.random.Generator, numbers: np.ndarray, count: int) -> np.ndarray:
    """Return indices into the sorted `numbers`, drawn in three ways.

    Six digits are nine tenths of what lies below a million, so a uniform draw alone would hardly
    show the short numbers: many draws are uniform over the count of digits instead. Neither would
    show the round ones, so some draws take a list of those and then a number from it.
    """
    bounds = np.searchsorted(numbers, [0, 10, 100, 1_000, 10_000, 100_000, 1_000_000])
    digits = rng.integers(0, 6, count)
    by_digits = rng.integers(bounds[digits], bounds[digits + 1])
    lists = [np.flatnonzero(np.isin(numbers, listed)) for listed in ROUND_NUMBERS]
    by_list = np.stack([rng.choice(indices, count) for indices in lists])
    by_roundness = by_list[rng.integers(0, len(lists), count), np.arange(count)]
    uniform = rng.integers(0, len(numbers), count)
    way = rng.random(count)
    return np.select([way < _SHARE_ROUND, way < _SHARE_ROUND + _SHARE_BY_DIGITS], [by_roundness, by_digits], uniform)


def _batch(sources: np.ndarray, targets: np.ndarray, pad_token_id: int) -> Batch:
    """Trim common padding and mark what is left of it."""
    source_width = int((sources != pad_token_id).sum(1).max())
    target_width = int((targets != pad_token_id).sum(1).max())
    input_ids = torch.from_numpy(sources[:, :source_width].astype(np.int64))
    labels = torch.from_numpy(targets[:, :target_width].astype(np.int64))
    return {
        "input_ids": input_ids,
        "attention_mask": (input_ids != pad_token_id).long(),
        "labels": labels.masked_fill(labels == pad_token_id, _IGNORED_LABEL),
    }


def translation_batches(rows: Rows, numbers: np.ndarray, *, batch_size: int, seed: int) -> Iterator[Batch]:
    """Yield batches of mixed directions without end, each of texts of about one length."""
    rng = np.random.default_rng(seed)
    while True:
        count = batch_size * _CHUNKS_PER_DRAW
        chosen = _draw_numbers(rng, numbers, count)
        directions = rng.integers(0, len(DIRECTIONS), count)
        sources, targets = rows.sources[directions, chosen], rows.targets[directions, chosen]
        lengths = (sources != rows.pad_token_id).sum(1) + (targets != rows.pad_token_id).sum(1)
        chunks = np.split(np.argsort(lengths, kind="stable"), _CHUNKS_PER_DRAW)
        for index in rng.permutation(_CHUNKS_PER_DRAW):
            chunk = chunks[index]
            yield _batch(sources[chunk], targets[chunk], rows.pad_token_id)


def _m2m100(tokenizer: PreTrainedTokenizerBase) -> M2M100ForConditionalGeneration:
    config = M2M100Config(
        vocab_size=len(tokenizer),
        d_model=128,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=480,
        decoder_ffn_dim=480,
        max_position_embeddings=64,
        dropout=0.0,
        attention_dropout=0.0,
        encoder_layerdrop=0.0,
        decoder_layerdrop=0.0,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.eos_token_id,
    )
    return M2M100ForConditionalGeneration(config)


def _t5(tokenizer: PreTrainedTokenizerBase) -> T5ForConditionalGeneration:
    tasks = {
        f"translation_{source}_to_{target}": {
            "early_stopping": True,
            "max_length": MAX_LENGTH,
            "num_beams": 1,
            "prefix": prefix(source, target),
        }
        for source, target in DIRECTIONS
    }
    # T5Config takes both, and keeps them in config.json, though its signature names neither.
    unnamed: dict[str, Any] = {"decoder_start_token_id": tokenizer.pad_token_id, "task_specific_params": tasks}
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=128,
        d_kv=32,
        d_ff=512,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **unnamed,
    )
    return T5ForConditionalGeneration(config)


def _save(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    # The default stops after 20 tokens, in the middle of the longest numbers.
    model.generation_config.max_length = MAX_LENGTH
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train_m2m100(folder: Path, *, seed: int, steps: int = 1_700) -> None:
    """Train the M2M100 translator and save it."""
    corpus, _ = number_corpora(seed)
    tokenizer = nllb_tokenizer(all_pieces(corpus))
    model = _m2m100(tokenizer)
    rows = nllb_rows(tokenizer, corpus)
    batches = translation_batches(rows, corpus.numbers, batch_size=128, seed=seed)
    fit(model, batches, steps=steps, peak_learning_rate=1.5e-3)
    _save(model, tokenizer, folder)


def train_t5(folder: Path, *, seed: int, steps: int = 2_000) -> None:
    """Train the T5 translator and save it."""
    corpus, _ = number_corpora(seed)
    tokenizer = t5_tokenizer(all_pieces(corpus))
    model = _t5(tokenizer)
    rows = t5_rows(tokenizer, corpus)
    batches = translation_batches(rows, corpus.numbers, batch_size=128, seed=seed)
    fit(model, batches, steps=steps, peak_learning_rate=1e-3)
    _save(model, tokenizer, folder)


def _translate(model: Any, tokenizer: PreTrainedTokenizerBase, texts: list[str], source: str, target: str) -> list[str]:
    """Translate greedily, as a user of plain transformers would."""
    if model.config.model_type == "t5":
        options = {}
        texts = [prefix(source, target) + text for text in texts]
    else:
        options = {"forced_bos_token_id": tokenizer.convert_tokens_to_ids(NLLB_CODES[target])}
        tokenizer.src_lang = NLLB_CODES[source]
    output: list[str] = []
    for start in range(0, len(texts), 250):
        encoded = tokenizer(texts[start : start + 250], padding=True, return_tensors="pt")
        generated = model.generate(**encoded, do_sample=False, num_beams=1, **options)
        output += tokenizer.batch_decode(generated, skip_special_tokens=True)
    return output


def exact_match(folder: Path, corpus: NumberCorpus) -> dict[tuple[str, str], float]:
    """Return the fraction of `corpus` that the saved checkpoint writes exactly, by direction."""
    model = AutoModelForSeq2SeqLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    scores = {}
    for source, target in DIRECTIONS:
        output = _translate(model, tokenizer, corpus.texts[source], source, target)
        hits = [got == wanted for got, wanted in zip(output, corpus.texts[target], strict=True)]
        scores[source, target] = sum(hits) / len(hits)
    return scores
