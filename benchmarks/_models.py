"""The checkpoints that are measured: SmolLM2-135M-Instruct in bfloat16, a Marian and two BERTs of the usual sizes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import _data

BERT_VOCABULARY = 30522
EXAMPLES = Path(__file__).parent.parent / "examples"
MARIAN_VOCABULARY = 58101
"""As many tokens as Helsinki-NLP/opus-mt-en-de has; the last one is padding."""


def smollm2_gguf() -> Path:
    """Return the path of the GGUF file."""
    sys.path.append(str(EXAMPLES))
    import smollm2

    return smollm2.path()


def smollm2(folder: Path) -> Path:
    """Save the model of the GGUF file as any other checkpoint in bfloat16, and return where; once per folder."""
    saved = folder / "smollm2-135m-instruct-bfloat16"
    if (saved / "tokenizer_config.json").is_file():
        if not list(saved.glob("*.safetensors")):  # it has travelled (`travel.py`): weights of its shape are drawn
            import torch
            from transformers import AutoConfig, AutoModelForCausalLM

            torch.manual_seed(0)
            auto: Any = AutoModelForCausalLM
            drawn = auto.from_config(AutoConfig.from_pretrained(saved), dtype=torch.bfloat16)
            drawn.save_pretrained(saved)
        return saved
    import lmkit

    with lmkit.load("causal", smollm2_gguf(), "bfloat16", "cpu") as generator:
        model: Any = generator.model
        # transformers refuses to save what it calls quantized, though it has been dequantized.
        del model.config.quantization_config
        model.hf_quantizer = None
        model.save_pretrained(saved)
        generator.tokenizer.save_pretrained(saved)
    return saved


def marian(folder: Path) -> Path:
    """Save a Marian of random weights with the shape of opus-mt-en-de, and return where; once per folder."""
    saved = folder / "marian-random-bfloat16"
    if (saved / "tokenizer_config.json").is_file():
        return saved
    import torch
    import transformers

    saved.mkdir(parents=True, exist_ok=True)
    pad = MARIAN_VOCABULARY - 1
    sizes: dict[str, Any] = {
        "d_model": 512,
        **dict.fromkeys(("encoder_layers", "decoder_layers"), 6),
        **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 8),
        **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 2048),
    }
    hf: Any = transformers  # its annotations are narrower than what it accepts
    config = hf.MarianConfig(
        **sizes,
        vocab_size=MARIAN_VOCABULARY,
        decoder_vocab_size=MARIAN_VOCABULARY,
        max_position_embeddings=512,
        activation_function="swish",
        scale_embedding=True,
        pad_token_id=pad,
        eos_token_id=0,
        decoder_start_token_id=pad,
        forced_eos_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = hf.MarianMTModel(config)
    model.generation_config = hf.GenerationConfig(
        pad_token_id=pad, eos_token_id=0, decoder_start_token_id=pad, forced_eos_token_id=0, bad_words_ids=[[pad]]
    )
    model.to(torch.bfloat16).save_pretrained(saved)
    marian_tokenizer(saved).save_pretrained(saved)
    return saved


def bert(folder: Path, name: str, *, hidden: int, layers: int) -> Path:
    """Save a BERT of random weights in float32, with as many tokens as bert-base-uncased; once per folder."""
    saved = folder / f"bert-random-{name}"
    if (saved / "tokenizer_config.json").is_file():
        return saved
    import torch
    import transformers

    saved.mkdir(parents=True, exist_ok=True)
    hf: Any = transformers
    config = hf.BertConfig(
        vocab_size=BERT_VOCABULARY,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=12,
        intermediate_size=4 * hidden,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = hf.BertForMaskedLM(config)
    model.save_pretrained(saved)
    words = sorted({word for text in _data.sentences(2000, seed=1) for word in text.lower().strip(".").split()})
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", ",", *words]
    tokens += [f"filler{number}" for number in range(BERT_VOCABULARY - len(tokens))]
    hf.BertTokenizer(vocab={token: number for number, token in enumerate(tokens)}).save_pretrained(saved)
    return saved


def marian_tokenizer(folder: Path) -> Any:
    """Train a small tokenizer on the benchmark's own sentences, and fill its vocabulary up."""
    import sentencepiece
    import transformers

    prefix = folder / "pieces"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_data.sentences(2000, seed=1)),
        model_prefix=str(prefix),
        vocab_size=1000,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    trained = sentencepiece.SentencePieceProcessor(model_file=f"{prefix}.model")
    pieces = [trained.id_to_piece(number) for number in range(3, trained.get_piece_size())]
    first = ["</s>", "<unk>", *pieces]
    filler = [f"filler{number}" for number in range(MARIAN_VOCABULARY - 1 - len(first))]
    vocabulary = {piece: number for number, piece in enumerate([*first, *filler, "<pad>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    model = prefix.with_suffix(".model").read_bytes()
    for name in ("source.spm", "target.spm"):
        (folder / name).write_bytes(model)
    files = [str(folder / name) for name in ("source.spm", "target.spm", "vocab.json")]
    hf: Any = transformers
    return hf.MarianTokenizer(*files, source_lang="en", target_lang="de")
