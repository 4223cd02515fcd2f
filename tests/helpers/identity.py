"""An encoder-decoder whose weights copy: its greedy output is its input, byte by byte.

A BART of one layer each side. A token is a vector of ±1 in the first half of the width, a position one in the second;
both have as many of each sign, so that layer normalisation leaves their sum as it is. All sublayers add nothing but
the cross-attention, which looks for its own position in the encoder's output and brings the token that stands there.
"""

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

hf: Any = transformers

HALF = 64
START, PAD, END = 0, 1, 2
SPECIAL = ("\ue000start", "\ue000pad", "\ue000end")  # no text has them
LOUD = 10.0


def tokenizer() -> Any:
    """Return a tokenizer of bytes that only adds an end token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *letters])}
    bytewise = Tokenizer(models.BPE(vocabulary, []))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytewise.decoder = decoders.ByteLevel()
    bytewise.post_processor = processors.TemplateProcessing(
        single=f"$A {SPECIAL[END]}", special_tokens=[(SPECIAL[END], END)]
    )
    bytewise.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=bytewise,
        bos_token=SPECIAL[START],
        pad_token=SPECIAL[PAD],
        eos_token=SPECIAL[END],
        clean_up_tokenization_spaces=False,
    )


def codes(count: int) -> torch.Tensor:
    """Return vectors of ±1 with as many of each, shape [count, HALF], nearly orthogonal."""
    signs = torch.ones(count, HALF)
    order = torch.rand(count, HALF).argsort(-1)
    return signs.scatter_(1, order[:, : HALF // 2], -1.0)


@torch.no_grad()
def save(folder: Path, positions: int, **config: Any) -> Path:
    """Write a checkpoint that takes as many tokens, the end token included."""
    words = tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokens, places = codes(len(words)), codes(positions)
        model = hf.BartForConditionalGeneration(
            hf.BartConfig(
                vocab_size=len(words), d_model=2 * HALF, encoder_layers=1, decoder_layers=1, encoder_attention_heads=1,
                decoder_attention_heads=1, encoder_ffn_dim=4, decoder_ffn_dim=4, max_position_embeddings=positions,
                bos_token_id=START, pad_token_id=PAD, eos_token_id=END, decoder_start_token_id=START,
                forced_eos_token_id=None, **config,
            )
        )  # fmt: skip
    for name, weight in model.named_parameters():
        weight.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    model.model.shared.weight[:, :HALF] = tokens
    for side in (model.model.encoder, model.model.decoder):
        side.embed_positions.weight[side.embed_positions.offset :, HALF:] = places
    cross = model.model.decoder.layers[0].encoder_attn
    half = torch.eye(2 * HALF)[:, HALF:]
    cross.q_proj.weight[:, HALF:] = 10 * half
    cross.k_proj.weight[:, HALF:] = half
    cross.v_proj.weight[:HALF, :HALF] = torch.eye(HALF)
    cross.out_proj.weight[:HALF, :HALF] = LOUD * torch.eye(HALF)
    model.generation_config = hf.GenerationConfig(
        bos_token_id=START, pad_token_id=PAD, eos_token_id=END, decoder_start_token_id=START
    )
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder
