"""The masked model of countries: BERT's family, trained to fill the last word of a fact."""

from __future__ import annotations

import random
import re
import string
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from fitting import Batch, fit
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertConfig, BertForMaskedLM, PreTrainedTokenizerBase
from vocabularies import bert_tokenizer
from world_facts import PHRASINGS, Fact, load_facts, plain

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_IGNORED_LABEL = -100
_TRAINED, _HELD_OUT = 0, 1
_DROPPED, _INSERTED = 0.1, 0.1
_DISTURBED_COPIES = 2
_CHUNKS_PER_DRAW = 8


@dataclass(frozen=True)
class Question:
    """A sentence with `{mask}` in the place of its answer."""

    relation: str
    text: str
    answer: str


def _question(fact: Fact, phrasing: str) -> Question:
    return Question(fact.relation, phrasing.format(c=fact.country, a="[MASK]"), fact.answer)


def _questions(facts: list[Fact], part: int) -> list[Question]:
    return [_question(fact, text) for fact in facts for text in PHRASINGS[fact.relation][part]]


def clean_questions(facts: list[Fact]) -> list[Question]:
    """Return each fact in each training phrasing."""
    return _questions(facts, _TRAINED)


def held_out_questions(facts: list[Fact]) -> list[Question]:
    """Return each fact in each phrasing that training never shows."""
    for trained, held_out in PHRASINGS.values():
        if set(trained) & set(held_out):
            raise AssertionError("a held-out phrasing is trained on")
    return _questions(facts, _HELD_OUT)


def _disturbed(phrasing: str, rng: random.Random) -> str:
    """Drop some words of a phrasing and put in some made-up ones, so that none can be relied on.

    A made-up word comes out in single letters, as an unknown word does in a question.
    """
    words = []
    for word in phrasing.split():
        if "{" in word or rng.random() > _DROPPED:
            words.append(word)
        if rng.random() < _INSERTED:
            words.append("".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 5))))
    return " ".join(words)


def training_questions(facts: list[Fact], seed: int) -> list[Question]:
    """Return the clean questions, and twice as many disturbed ones."""
    rng = random.Random(seed)  # noqa: S311  # no secret
    disturbed = [
        _question(fact, _disturbed(phrasing, rng))
        for fact in facts
        for phrasing in PHRASINGS[fact.relation][_TRAINED]
        for _ in range(_DISTURBED_COPIES)
    ]
    return clean_questions(facts) + disturbed


def _words(questions: list[Question]) -> list[str]:
    """Return the distinct words of the questions and their answers."""
    texts = " ".join(f"{plain(q.text)} {q.answer}" for q in questions).replace("[mask]", " ")
    return sorted(set(re.findall(r"\w+", texts)))


def _draw_rows(lengths: torch.Tensor, batch_size: int) -> Iterator[torch.Tensor]:
    """Yield the rows of one batch after another, each of about one length."""
    while True:
        drawn = torch.randint(len(lengths), (batch_size * _CHUNKS_PER_DRAW,))
        ordered = drawn[lengths[drawn].argsort(stable=True)]
        chunks = ordered.reshape(_CHUNKS_PER_DRAW, batch_size)
        for index in torch.randperm(_CHUNKS_PER_DRAW).tolist():
            yield chunks[index]


def masked_batches(
    tokenizer: PreTrainedTokenizerBase, questions: list[Question], *, batch_size: int
) -> Iterator[Batch]:
    """Yield batches without end: the answer is masked nearly always, any other token seldom.

    Masking other tokens as well keeps this a masked model of whole sentences.
    """
    encoded = tokenizer([q.text for q in questions], padding=True, return_tensors="pt")
    ids, mask = encoded["input_ids"], encoded["attention_mask"]
    answers = torch.tensor(tokenizer.convert_tokens_to_ids([q.answer for q in questions]))
    is_answer = ids == tokenizer.mask_token_id
    is_edge = (ids == tokenizer.cls_token_id) | (ids == tokenizer.sep_token_id) | (mask == 0)
    full = torch.where(is_answer, answers[:, None], ids)
    chance = torch.where(is_answer, 0.95, 0.05).masked_fill(is_edge, 0.0)
    for rows in _draw_rows(mask.sum(1), batch_size):
        width = int(mask[rows].sum(1).max())
        tokens = full[rows, :width]
        hidden = torch.rand(tokens.shape) < chance[rows, :width]
        yield {
            "input_ids": tokens.masked_fill(hidden, tokenizer.mask_token_id),
            "attention_mask": mask[rows, :width],
            "labels": tokens.masked_fill(~hidden, _IGNORED_LABEL),
        }


def train_bert(folder: Path, *, seed: int, steps: int = 4_000) -> None:
    """Train the masked model on every fact and save it."""
    facts = load_facts()
    tokenizer = bert_tokenizer(_words(clean_questions(facts)))
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=tokenizer.model_max_length,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = BertForMaskedLM(config)
    questions = training_questions(facts, seed)
    batches = masked_batches(tokenizer, questions, batch_size=128)
    fit(model, batches, steps=steps, peak_learning_rate=1e-3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@torch.inference_mode()
def top_one(folder: Path, questions: list[Question]) -> dict[str, float]:
    """Return how often the saved model's first choice is the answer, by relation."""
    model = AutoModelForMaskedLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    hits: dict[str, list[bool]] = {relation: [] for relation in PHRASINGS}
    for start in range(0, len(questions), 500):
        chunk = questions[start : start + 500]
        encoded = tokenizer([q.text for q in chunk], padding=True, return_tensors="pt")
        logits = model(**encoded).logits[encoded["input_ids"] == tokenizer.mask_token_id]
        for question, token_id in zip(chunk, logits.argmax(-1).tolist(), strict=True):
            token = tokenizer.convert_ids_to_tokens(token_id)
            hits[question.relation].append(token == question.answer)
    hits["all"] = [hit for right in hits.values() for hit in right]
    return {relation: sum(right) / len(right) for relation, right in hits.items()}
