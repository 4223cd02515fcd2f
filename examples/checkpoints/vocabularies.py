"""The three tokenizers, each laid out from the words its checkpoint needs; no sentencepiece."""

from __future__ import annotations

import itertools
import string
from graphlib import TopologicalSorter

from numbers_corpus import ENGLISH_NAMES, NLLB_CODES, WORD_START
from transformers import BertTokenizer, NllbTokenizer, T5Tokenizer

_PUNCTUATION = string.punctuation + "\N{RIGHT SINGLE QUOTATION MARK}"
_LETTERS = string.ascii_letters + string.digits + "äöüßéèêíóúñáç" + _PUNCTUATION


def _assembly_order(pieces: list[str]) -> list[str]:
    """Order pieces so that byte-pair merges never start one piece inside another.

    A piece comes before every piece whose first two letters occur further inside it: "neun"
    before "und", or the merge of u and n would break up "neun".
    """
    sorter = TopologicalSorter({piece: set[str]() for piece in pieces})
    for piece in pieces:
        for other in pieces:
            if other != piece and other[:2] in piece[1:]:
                sorter.add(other, piece)
    # Where two parts of a compound meet: hundert-acht has "ta", tausend-eins has "de".
    sorter.add("tausend", "hundert")
    sorter.add("deux", "tausend")
    return list(sorter.static_order())


def _merges(pieces: list[str]) -> list[tuple[str, str]]:
    """Return the merges that build each piece from its letters, left to right."""
    initial = [piece for piece in pieces if piece.startswith(WORD_START)]
    inner = _assembly_order([p for p in pieces if len(p) > 1 and not p.startswith(WORD_START)])
    chains = ([(p[:end], p[end]) for end in range(1, len(p))] for p in initial + inner)
    return list(dict.fromkeys(itertools.chain.from_iterable(chains)))


def nllb_tokenizer(pieces: list[str]) -> NllbTokenizer:
    """Return an NLLB tokenizer of these pieces with four language codes, not the usual 202."""
    merges = _merges(pieces)
    tokens = ["<s>", "<pad>", "</s>", "<unk>", WORD_START, *_LETTERS]
    tokens += [left + right for left, right in merges]
    return NllbTokenizer(
        vocab={token: index for index, token in enumerate(dict.fromkeys(tokens))},
        merges=merges,  # type: ignore[arg-type]  # annotated as strings, read as pairs
        src_lang="eng_Latn",
        extra_special_tokens=list(NLLB_CODES.values()),
        model_max_length=64,
    )


def t5_tokenizer(pieces: list[str]) -> T5Tokenizer:
    """Return a T5 tokenizer that splits a text into as few of these pieces as it can.

    It has none of T5's sentinels, which serve pretraining only.
    """
    prefix_words = ["translate", "to", *ENGLISH_NAMES.values()]
    whole = [*pieces, *(WORD_START + word for word in prefix_words)]
    scores = dict.fromkeys([WORD_START, *_LETTERS], -10.0) | dict.fromkeys(whole, -1.0)
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return T5Tokenizer(vocab=[*special, *scores.items()], extra_ids=0, model_max_length=64)


def bert_tokenizer(words: list[str]) -> BertTokenizer:
    """Return an uncased BERT tokenizer that keeps each of these lower-case words whole."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = string.ascii_lowercase + string.digits + _PUNCTUATION
    tokens = [*special, *letters, *("##" + letter for letter in letters), *sorted(words)]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return BertTokenizer(vocab=vocab, model_max_length=64)
