"""Tokenizers of a few hundred pieces, trained in process, each of its family's own class.

No trainer here uses a word prefix or suffix, for `tokenizers` orders those pieces by a random hash.
"""

import io
import json
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import sentencepiece
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

hf: Any = transformers  # Its annotations are narrower than what it accepts.

ENGLISH = (
    "The old sailor told the children a long story about the sea and the stars.",
    "Every morning the baker opens the small shop near the river and sells fresh bread.",
    "She wrote a letter to her brother, who was living in another country at the time.",
    "The capital of France is Paris, and the capital of England is London.",
    "Some birds fly south in the winter because the water is warmer there.",
    "He could not remember where he had left the keys of the house.",
    "The train was late again, so we walked home through the cold rain.",
    "A good teacher asks questions and listens to what the students say.",
    "They found a new way to make paper from the leaves of the tree.",
    "The doctor said that the best medicine for him was rest and clean air.",
    "My friend plays the piano in the evening while the cat sleeps on the chair.",
    "Nobody knew why the light in the tower was burning all night.",
    "When the market opened, the price of wheat had already fallen twice.",
    "It was a bright cold day in April, and the clocks were striking.",
)
FRENCH = (
    "Le vieux marin raconte une longue histoire aux enfants.",
    "La capitale de la France est Paris et la ville est belle.",
    "Chaque matin le boulanger ouvre sa petite boutique au bord de la rivière.",
    "Mon amie joue du piano le soir et le chat dort sur la chaise.",
    "Le train est encore en retard, alors nous rentrons sous la pluie.",
    "Il ne sait pas où il a mis les clés de la maison.",
)
Pieces = list[tuple[str, float]]
Merges = list[tuple[str, str]]


@cache
def sentencepiece_model(lines: tuple[str, ...], size: int = 220) -> bytes:
    """Return a serialized unigram model; ids 0 to 2 are `<unk>`, `<s>` and `</s>`."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=size,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def unigram(lines: tuple[str, ...] = ENGLISH + FRENCH) -> Pieces:
    """Return the ordinary pieces of a unigram model with their log probabilities."""
    model = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model(lines))
    ids = range(3, model.get_piece_size())
    return [(model.id_to_piece(i), model.get_score(i)) for i in ids]


def scored(tokens: Iterable[str]) -> Pieces:
    """Return special tokens as unigram pieces."""
    return [(token, 0.0) for token in tokens]


def numbered(*groups: Iterable[str]) -> dict[str, int]:
    """Return the tokens of all groups, numbered in order, equal ones once."""
    tokens = dict.fromkeys(token for group in groups for token in group)
    return {token: i for i, token in enumerate(tokens)}


def _train_bpe(pre_tokenizer: pre_tokenizers.PreTokenizer, alphabet: list[str], size: int) -> tuple[list[str], Merges]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(ENGLISH + FRENCH, trainer)
    state = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(state["vocab"], key=state["vocab"].__getitem__)
    return tokens, [(left, right) for left, right in state["merges"]]


@cache
def byte_bpe() -> tuple[list[str], Merges]:
    """Return tokens and merges of a GPT-2-like byte-level BPE."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return _train_bpe(pre_tokenizers.ByteLevel(add_prefix_space=False), alphabet, 400)


@cache
def word_bpe() -> tuple[list[str], Merges]:
    """Return tokens and merges of a Llama-like BPE, in which `▁` marks a space."""
    return _train_bpe(pre_tokenizers.Metaspace(), [], 220)


def byte_fallback() -> list[str]:
    """Return the 256 tokens that stand for single bytes in Llama-like vocabularies."""
    return [f"<0x{byte:02X}>" for byte in range(256)]


def word_pieces() -> list[str]:
    """Return letters, their `##` continuations, then the words of the corpus, lower-cased."""
    text = " ".join(ENGLISH).lower()
    words = pre_tokenizers.BertPreTokenizer().pre_tokenize_str(text)
    letters = sorted(set(text) - {" "})
    return [*letters, *("##" + x for x in letters), *dict.fromkeys(word for word, _ in words)]


def xlm_bpe() -> tuple[list[str], Merges]:
    """Return tokens and merges of an XLM-like BPE, in which `</w>` ends a word."""
    letters = sorted(set(" ".join(ENGLISH + FRENCH).lower()) - {" "})
    merges: dict[tuple[str, str], None] = {}
    for word in word_pieces():
        if len(word) > 1 and not word.startswith("##"):
            parts = [*word[:-1], word[-1] + "</w>"]
            for end in range(1, len(parts)):
                merges["".join(parts[:end]), parts[end]] = None
    joined = [left + right for left, right in merges]
    return [*letters, *(x + "</w>" for x in letters), *joined], list(merges)


def byte_level_backend(specials: Sequence[str], template: str = "$A", **options: Any) -> Any:
    """Build a byte-level tokenizer of no class of its own, as BLOOM and ModernBERT have.

    Args:
        specials: Tokens that come first in the vocabulary.
        template: How a text is surrounded by special tokens, `"[CLS] $A [SEP]"` for instance.
        options: Named special tokens and other options of the class.
    """
    tokens, merges = byte_bpe()
    vocab = numbered(specials, tokens)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(x, vocab[x]) for x in template.split() if x != "$A"]
    )
    return hf.TokenizersBackend(tokenizer_object=tokenizer, **options)


def mask(token: str) -> AddedToken:
    """Return a mask token that swallows the space before it, as byte-level vocabularies need."""
    return AddedToken(token, lstrip=True, special=True)


# Tokenizers that several families share, each of the family's own class.


def gpt2(*first: str, **options: Any) -> Any:
    """Build a GPT-2 tokenizer; its vocabulary starts with `first`, or ends in `<|endoftext|>`."""
    tokens, merges = byte_bpe()
    last = [] if first else ["<|endoftext|>"]
    return hf.GPT2Tokenizer(numbered(first, tokens, last), merges, **options)


def gpt_neox(**options: Any) -> Any:
    """Build a GPT-NeoX tokenizer."""
    tokens, merges = byte_bpe()
    vocab = numbered(["<|endoftext|>", "<|padding|>"], tokens)
    return hf.GPTNeoXTokenizer(vocab, merges, **options)


def llama(*last: str, add_bos_token: bool = True) -> Any:
    """Build a Llama tokenizer, whose vocabulary ends with the given tokens."""
    tokens, merges = word_bpe()
    vocab = numbered(["<unk>", "<s>", "</s>"], byte_fallback(), tokens, last)
    return hf.LlamaTokenizer(vocab, merges, add_bos_token=add_bos_token)


def roberta() -> Any:
    """Build a RoBERTa tokenizer, which BART uses too."""
    tokens, merges = byte_bpe()
    vocab = numbered(["<s>", "<pad>", "</s>", "<unk>"], tokens, ["<mask>"])
    return hf.RobertaTokenizer(vocab, merges, mask_token=mask("<mask>"))


def t5(sentinels: int) -> Any:
    """Build a T5 tokenizer with that many `<extra_id_…>` tokens."""
    extra = [f"<extra_id_{i}>" for i in reversed(range(sentinels))]
    pieces = [*scored(["<pad>", "</s>", "<unk>"]), *unigram(), *scored(extra)]
    return hf.T5Tokenizer(pieces, extra_ids=sentinels)


def fairseq_pieces(codes: Sequence[str] = ()) -> Pieces:
    """Return unigram pieces in fairseq's order: specials, pieces, language codes, mask."""
    first = ["<s>", "<pad>", "</s>", "<unk>"]
    return [*scored(first), *unigram(), *scored([*codes, "<mask>"])]


def m2m100(folder: Path) -> Any:
    """Build an M2M100 tokenizer, whose vocabulary files are written to the folder."""
    from transformers.models.m2m_100.tokenization_m2m_100 import FAIRSEQ_LANGUAGE_CODES as CODES

    vocab, model = folder / "vocab.json", folder / "sentencepiece.bpe.model"
    pieces = [piece for piece, _ in unigram()]
    vocab.write_text(json.dumps(numbered(["<s>", "<pad>", "</s>", "<unk>"], pieces)))
    model.write_bytes(sentencepiece_model(ENGLISH + FRENCH))
    # The class does not register the language codes, so real checkpoints list them.
    codes = [f"__{code}__" for code in CODES["m2m100"]]
    return hf.M2M100Tokenizer(str(vocab), str(model), extra_special_tokens=codes)


def marian(folder: Path, codes: Sequence[str] = (), **options: Any) -> Any:
    """Build a Marian tokenizer, whose vocabulary files are written to the folder."""
    pieces = [piece for lines in (ENGLISH, FRENCH) for piece, _ in unigram(lines)]
    files = [folder / name for name in ("source.spm", "target.spm", "vocab.json")]
    files[0].write_bytes(sentencepiece_model(ENGLISH))
    files[1].write_bytes(sentencepiece_model(FRENCH))
    files[2].write_text(json.dumps(numbered(["</s>", "<unk>"], pieces, codes, ["<pad>"])))
    return hf.MarianTokenizer(*map(str, files), source_lang="en", **options)


def xlm(folder: Path) -> Any:
    """Build an XLM tokenizer, whose vocabulary files are written to the folder."""
    tokens, merges = xlm_bpe()
    first = ["<s>", "</s>", "<pad>", "<unk>", *(f"<special{i}>" for i in range(10))]
    vocab, rules = folder / "vocab.json", folder / "merges.txt"
    vocab.write_text(json.dumps(numbered(first, tokens)))
    rules.write_text("".join(f"{left} {right}\n" for left, right in merges))
    return hf.XLMTokenizer(str(vocab), str(rules))


def wordpiece(name: str = "BertTokenizer") -> Any:
    """Build a WordPiece tokenizer of the named class."""
    first = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    return getattr(hf, name)(numbered(first, word_pieces()))
