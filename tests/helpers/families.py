"""Tiny random checkpoints of many model families, saved like any other `save_pretrained` folder.

Widths and vocabularies are tiny; special tokens, their ids, padding, sliding windows, softcaps and
generation settings are those of a well-known checkpoint of the family, named beside each builder.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers

import tokenizers_tiny as tiny

hf: Any = transformers  # Its annotations are narrower than what it accepts.
Task = Literal["causal", "seq2seq", "masked"]
Checkpoint = tuple[Any, Any]  # A model and its tokenizer: transformers types neither closely.
Build = Callable[[Path], Checkpoint]

_TEXTS: dict[Task, tuple[str, ...]] = {
    "causal": (
        "The old sailor",
        "The capital of France is Paris, and the capital of",
        "She",
        "Every morning the baker opens the small shop near the river because the water is",
        "My friend asks where the keys of the house are",
    ),
    "seq2seq": (
        "The train was late again, so we walked home.",
        "Nobody knew why the light in the tower was burning all night, and the old sailor told the children a story.",
        "Birds fly.",
        "A good teacher asks questions and listens.",
        "The price of bread in Paris and London",
    ),
    "masked": (
        "The capital of France is [MASK], and the capital of England is London.",
        "Birds [MASK].",
        "[MASK] morning the baker opens the small shop near the river and sells fresh bread to the children.",
        "My friend plays the [MASK] in the evening.",
        "The train was late, so we walked [MASK]",
    ),
}


@dataclass(frozen=True)
class Family:
    """A kind of checkpoint, and how to make a tiny one.

    Attributes:
        name: What the tests are called after.
        task: Which auto class loads it.
        build: Makes the model and the tokenizer; a tokenizer may need files, written to the folder.
        seed: Chosen so that greedy choices are clear and texts go different ways.
    """

    name: str
    task: Task
    build: Build
    seed: int = 0

    def __str__(self) -> str:
        """Return the name, for pytest to show."""
        return self.name


def texts(task: Task) -> list[str]:
    """Return prompts of clearly different lengths; a masked one has one `[MASK]`."""
    return list(_TEXTS[task])


def save(family: Family, folder: Path) -> Path:
    """Build the family's checkpoint in the folder, always the same, and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(family.seed)
        model, tokenizer = family.build(folder)
        _spread(model, model.config)
        _quieten_specials(model, tokenizer, family.task)
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
def _spread(model: torch.nn.Module, config: Any) -> None:
    """Widen the weights, for the usual tiny ones leave greedy choices to rounding."""
    embeddings = {m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    for name, weight in model.named_parameters():
        # Sinusoidal positions do not require gradients; A_log holds the decay rates of Mamba.
        if not weight.requires_grad or name.endswith("A_log"):
            continue
        if weight.ndim == 1:
            weight.add_(0.1 * torch.randn_like(weight))
        else:
            weight.normal_(std=_std(name, config, is_embedding=weight in embeddings))
            if weight.ndim == 2 and weight not in embeddings:
                # The positive mean of an activation would become the same offset for every text.
                weight.sub_(weight.mean(0)).sub_(weight.mean(1, keepdim=True))


def _std(name: str, config: Any, *, is_embedding: bool) -> float:
    """Choose a spread that keeps the last token, or the source, from settling every choice."""
    if is_embedding:
        scaled = getattr(config, "scale_embedding", False) or config.model_type == "gemma2"
        return 0.4 if scaled and "position" not in name else 1.0
    if config.is_encoder_decoder:
        return 0.13 if "attn" in name or "Attention" in name else 1.0
    return 0.5


@torch.no_grad()
def _quieten_specials(model: Any, tokenizer: Any, task: Task) -> None:
    """Make special and unused tokens unlikely, except the end of a generated sequence."""
    head = model.get_output_embeddings() or model.get_input_embeddings()
    ids = set(tokenizer.all_special_ids) | set(range(len(tokenizer), head.weight.shape[0]))
    loud = set() if task == "masked" else {tokenizer.eos_token_id}
    head.weight[sorted(ids - loud)] *= 0.2


def _made(name: str, tokenizer: Any, generation: dict[str, Any] | None = None, **options: Any) -> Checkpoint:
    """Make a model of the named class, with as many embeddings as tokens unless told otherwise."""
    model_class = getattr(hf, name)
    model = model_class(model_class.config_class(**{"vocab_size": len(tokenizer), **options}))
    if generation:
        model.generation_config = hf.GenerationConfig(**generation)
    return model, tokenizer


def _padded(tokenizer: Any) -> int:
    """Return a size for more embeddings than tokens, as many checkpoints have."""
    return (len(tokenizer) // 64 + 1) * 64


# Causal

_WIDTHS: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
}
_GROUPED: dict[str, Any] = {**_WIDTHS, "num_key_value_heads": 2}


def _gpt2(folder: Path) -> Checkpoint:  # openai-community/gpt2
    tokenizer = tiny.gpt2()
    end = tokenizer.eos_token_id
    return _made(
        "GPT2LMHeadModel", tokenizer, n_positions=128, n_embd=32, n_layer=2, n_head=4,
        bos_token_id=end, eos_token_id=end,
    )  # fmt: skip


def _gpt_neo(folder: Path) -> Checkpoint:  # EleutherAI/gpt-neo-125m
    tokenizer = tiny.gpt2()
    end = tokenizer.eos_token_id
    return _made(
        "GPTNeoForCausalLM", tokenizer, max_position_embeddings=128, hidden_size=32, num_layers=2,
        num_heads=4, attention_types=[[["global", "local"], 1]], window_size=8,
        bos_token_id=end, eos_token_id=end,
    )  # fmt: skip


def _gpt_neox(folder: Path) -> Checkpoint:  # EleutherAI/gpt-neox-20b
    tokenizer = tiny.gpt_neox()
    ids: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0}
    return _made("GPTNeoXForCausalLM", tokenizer, vocab_size=_padded(tokenizer), **ids, **_WIDTHS)


def _llama(folder: Path) -> Checkpoint:  # meta-llama/Llama-2-7b-hf
    return _made("LlamaForCausalLM", tiny.llama(), **_GROUPED)


def _mistral(folder: Path) -> Checkpoint:  # mistralai/Mistral-7B-v0.1
    # Without mistral-common, a folder that names LlamaTokenizer loads as this class too.
    llama = tiny.llama()
    tokenizer = hf.TokenizersBackend(tokenizer_object=llama.backend_tokenizer, **llama.special_tokens_map)
    return _made("MistralForCausalLM", tokenizer, sliding_window=8, **_GROUPED)


def _qwen3(folder: Path) -> Checkpoint:  # Qwen/Qwen3-0.6B
    tokens, merges = tiny.byte_bpe()
    extra = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tokenizer = hf.Qwen2Tokenizer(
        tiny.numbered(tokens, extra), merges, eos_token=extra[2], pad_token=extra[0],
        unk_token=None, extra_special_tokens=[extra[1]],
    )  # fmt: skip
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    pad, _, end = tokenizer.convert_tokens_to_ids(extra)
    sampling = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}
    generation = {"bos_token_id": pad, "eos_token_id": [end, pad], "pad_token_id": pad, **sampling}
    return _made(
        "Qwen3ForCausalLM", tokenizer, generation, vocab_size=_padded(tokenizer), head_dim=8,
        bos_token_id=pad, eos_token_id=end, **_GROUPED,
    )  # fmt: skip


def _gemma2(folder: Path) -> Checkpoint:  # google/gemma-2-2b
    tokens, merges = tiny.word_bpe()
    first = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    vocab = tiny.numbered(first, tiny.byte_fallback(), tokens)
    model, tokenizer = _made(
        "Gemma2ForCausalLM", hf.GemmaTokenizer(vocab, merges, add_bos_token=True), head_dim=8,
        query_pre_attn_scalar=8, sliding_window=8, **_GROUPED,
    )  # fmt: skip
    for name, weight in model.named_parameters():
        if ".post_" in name:  # These norms multiply by 1 + weight; layers must outweigh embeddings.
            torch.nn.init.constant_(weight, 3.0)
    return model, tokenizer


def _phi3(folder: Path) -> Checkpoint:  # microsoft/Phi-3-mini-4k-instruct
    extra = ("<|endoftext|>", "<|assistant|>", "<|end|>")
    tokenizer = hf.TokenizersBackend(
        tokenizer_object=tiny.llama(*extra, add_bos_token=False).backend_tokenizer,
        unk_token="<unk>", bos_token="<s>", eos_token=extra[0], pad_token=extra[0],
        extra_special_tokens=list(extra[1:]),
    )  # fmt: skip
    end = tokenizer.eos_token_id
    ends = {"eos_token_id": [end, end + 1, end + 2], "pad_token_id": end, "bos_token_id": 1}
    return _made(
        "Phi3ForCausalLM", tokenizer, ends, vocab_size=_padded(tokenizer), eos_token_id=end,
        pad_token_id=end, sliding_window=2047, original_max_position_embeddings=128, **_WIDTHS,
    )  # fmt: skip


def _opt(folder: Path) -> Checkpoint:  # facebook/opt-125m
    tokenizer = tiny.gpt2(
        "<s>", "<pad>", "</s>", "<unk>", unk_token="</s>", bos_token="</s>", eos_token="</s>",
        pad_token="<pad>", add_bos_token=True,
    )  # fmt: skip
    return _made(
        "OPTForCausalLM", tokenizer, hidden_size=32, num_hidden_layers=2, ffn_dim=64,
        num_attention_heads=4, max_position_embeddings=128, word_embed_proj_dim=32,
    )  # fmt: skip


def _bloom(folder: Path) -> Checkpoint:  # bigscience/bloom-560m
    tokenizer = tiny.byte_level_backend(
        ("<unk>", "<s>", "</s>", "<pad>"), unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        pad_token="<pad>", padding_side="left",
    )  # fmt: skip
    return _made("BloomForCausalLM", tokenizer, hidden_size=32, n_layer=2, n_head=4, pad_token_id=3)


def _mamba(folder: Path) -> Checkpoint:  # state-spaces/mamba-130m-hf
    tokenizer = tiny.gpt_neox(pad_token="<|endoftext|>")
    return _made(
        "MambaForCausalLM", tokenizer, vocab_size=_padded(tokenizer), hidden_size=32, state_size=8,
        num_hidden_layers=2,
    )  # fmt: skip


# Sequence to sequence

_T5: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
_TWO_STACKS: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "max_position_embeddings": 128,
}
_FAIRSEQ_IDS = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}


def _t5(folder: Path) -> Checkpoint:  # google-t5/t5-small
    tokenizer = tiny.t5(sentinels=100)
    beams = {"early_stopping": True, "num_beams": 4}
    tasks: dict[str, Any] = {
        "summarization": {
            **beams, "length_penalty": 2.0, "max_length": 200, "min_length": 30,
            "no_repeat_ngram_size": 3, "prefix": "summarize: ",
        }
    }  # fmt: skip
    for code, language in {"de": "German", "fr": "French", "ro": "Romanian"}.items():
        prefix = f"translate English to {language}: "
        tasks[f"translation_en_to_{code}"] = {**beams, "max_length": 300, "prefix": prefix}
    return _made(
        "T5ForConditionalGeneration", tokenizer, vocab_size=_padded(tokenizer),
        decoder_start_token_id=0, task_specific_params=tasks, **_T5,
    )  # fmt: skip


def _mt5(folder: Path) -> Checkpoint:  # google/mt5-small
    tokenizer = tiny.t5(sentinels=0)
    return _made("MT5ForConditionalGeneration", tokenizer, vocab_size=_padded(tokenizer), **_T5)


def _bart(folder: Path) -> Checkpoint:  # facebook/bart-large-cnn, its lengths divided by seven
    generation = {
        **_FAIRSEQ_IDS, "decoder_start_token_id": 2, "forced_bos_token_id": 0,
        "forced_eos_token_id": 2, "num_beams": 4, "early_stopping": True, "length_penalty": 2.0,
        "no_repeat_ngram_size": 3, "min_length": 8, "max_length": 20,
    }  # fmt: skip
    return _made("BartForConditionalGeneration", tiny.roberta(), generation, **_TWO_STACKS)


def _mbart_like(tokenizer: Any, start: int) -> Checkpoint:
    generation = {
        **_FAIRSEQ_IDS, "decoder_start_token_id": start, "forced_eos_token_id": 2, "num_beams": 5,
        "early_stopping": True, "max_length": 200,
    }  # fmt: skip
    return _made(
        "MBartForConditionalGeneration", tokenizer, generation, scale_embedding=True,
        decoder_start_token_id=start, **_TWO_STACKS,
    )  # fmt: skip


def _mbart(folder: Path) -> Checkpoint:  # facebook/mbart-large-en-ro
    from transformers.models.mbart.tokenization_mbart import FAIRSEQ_LANGUAGE_CODES as CODES

    tokenizer = hf.MBartTokenizer(tiny.fairseq_pieces(CODES))
    return _mbart_like(tokenizer, tokenizer.convert_tokens_to_ids("ro_RO"))


def _mbart50(folder: Path) -> Checkpoint:  # facebook/mbart-large-50-many-to-many-mmt
    from transformers.models.mbart50.tokenization_mbart50 import FAIRSEQ_LANGUAGE_CODES as CODES

    return _mbart_like(hf.MBart50Tokenizer(tiny.fairseq_pieces(CODES)), 2)


def _m2m100(folder: Path) -> Checkpoint:  # facebook/m2m100_418M
    tokenizer = tiny.m2m100(folder)
    generation = {
        **_FAIRSEQ_IDS, "decoder_start_token_id": 2, "max_length": 200, "num_beams": 5,
        "early_stopping": True,
    }  # fmt: skip
    size = len(tokenizer) + tokenizer.num_madeup_words
    return _made("M2M100ForConditionalGeneration", tokenizer, generation, vocab_size=size, **_TWO_STACKS)


def _nllb(folder: Path) -> Checkpoint:  # facebook/nllb-200-distilled-600M
    from transformers.models.nllb.tokenization_nllb import FAIRSEQ_LANGUAGE_CODES as CODES

    tokens, merges = tiny.word_bpe()
    vocab = tiny.numbered(["<s>", "<pad>", "</s>", "<unk>"], tokens, CODES, ["<mask>"])
    generation = {**_FAIRSEQ_IDS, "decoder_start_token_id": 2, "max_length": 200}
    tokenizer = hf.NllbTokenizer(vocab, merges)
    return _made("M2M100ForConditionalGeneration", tokenizer, generation, **_TWO_STACKS)


def _marian_like(tokenizer: Any) -> Checkpoint:
    pad = tokenizer.pad_token_id
    generation = {
        "pad_token_id": pad, "eos_token_id": 0, "decoder_start_token_id": pad,
        "forced_eos_token_id": 0, "bad_words_ids": [[pad]], "num_beams": 4, "max_length": 512,
    }  # fmt: skip
    return _made(
        "MarianMTModel", tokenizer, generation, pad_token_id=pad, decoder_start_token_id=pad,
        scale_embedding=True, activation_function="swish", **_TWO_STACKS,
    )  # fmt: skip


def _marian(folder: Path) -> Checkpoint:  # Helsinki-NLP/opus-mt-en-fr
    return _marian_like(tiny.marian(folder, target_lang="fr"))


def _marian_group(folder: Path) -> Checkpoint:  # Helsinki-NLP/opus-mt-en-ROMANCE
    codes = [">>fra<<", ">>spa<<", ">>ita<<"]
    return _marian_like(tiny.marian(folder, codes, target_lang="roa"))


def _pegasus(folder: Path) -> Checkpoint:  # google/pegasus-xsum
    first = ["<pad>", "</s>", "<mask_1>", "<mask_2>", *(f"<unk_{i}>" for i in range(2, 103))]
    tokenizer = hf.PegasusTokenizer([*tiny.scored([*first, "<unk>"]), *tiny.unigram()])
    generation = {
        "bos_token_id": 0, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0,
        "forced_eos_token_id": 1, "num_beams": 8, "length_penalty": 0.6, "max_length": 64,
    }  # fmt: skip
    return _made(
        "PegasusForConditionalGeneration", tokenizer, generation, scale_embedding=True,
        activation_function="relu", **_TWO_STACKS,
    )  # fmt: skip


# Masked

_DISENTANGLED: dict[str, Any] = {
    **_WIDTHS,
    "type_vocab_size": 0,
    "relative_attention": True,
    "position_biased_input": False,
    "pos_att_type": ["p2c", "c2p"],
}


def _bert(folder: Path) -> Checkpoint:  # google-bert/bert-base-uncased
    return _made("BertForMaskedLM", tiny.wordpiece(), **_WIDTHS)


def _roberta(folder: Path) -> Checkpoint:  # FacebookAI/roberta-base
    return _made("RobertaForMaskedLM", tiny.roberta(), type_vocab_size=1, **_WIDTHS)


def _xlm(folder: Path) -> Checkpoint:  # FacebookAI/xlm-mlm-en-2048
    shape: dict[str, Any] = {"emb_dim": 32, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 128}
    return _made("XLMWithLMHeadModel", tiny.xlm(folder), **shape)


def _xlm_roberta(folder: Path) -> Checkpoint:  # FacebookAI/xlm-roberta-base
    tokenizer = hf.XLMRobertaTokenizer(tiny.fairseq_pieces(), mask_token=tiny.mask("<mask>"))
    return _made("XLMRobertaForMaskedLM", tokenizer, type_vocab_size=1, **_WIDTHS)


def _deberta(folder: Path) -> Checkpoint:  # microsoft/deberta-base
    tokens, merges = tiny.byte_bpe()
    vocab = tiny.numbered(["[PAD]", "[CLS]", "[SEP]", "[UNK]"], tokens, ["[MASK]"])
    tokenizer = hf.DebertaTokenizer(vocab, merges, mask_token=tiny.mask("[MASK]"))
    return _made("DebertaForMaskedLM", tokenizer, **_DISENTANGLED)


def _deberta_v2(folder: Path) -> Checkpoint:  # microsoft/deberta-v3-base
    first = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    pieces = [*tiny.scored(first), *tiny.unigram(), *tiny.scored(["[MASK]"])]
    return _made(
        "DebertaV2ForMaskedLM", hf.DebertaV2Tokenizer(pieces), norm_rel_ebd="layer_norm",
        share_att_key=True, position_buckets=16, **_DISENTANGLED,
    )  # fmt: skip


def _distilbert(folder: Path) -> Checkpoint:  # distilbert/distilbert-base-uncased
    tokenizer = tiny.wordpiece("DistilBertTokenizer")
    shape: dict[str, Any] = {"n_layers": 2, "n_heads": 4, "dim": 32, "hidden_dim": 64}
    return _made("DistilBertForMaskedLM", tokenizer, max_position_embeddings=128, **shape)


def _albert(folder: Path) -> Checkpoint:  # albert/albert-base-v2
    first = ["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [*tiny.scored(first), *tiny.unigram()]
    tokenizer = hf.AlbertTokenizer(pieces, mask_token=tiny.mask("[MASK]"))
    return _made("AlbertForMaskedLM", tokenizer, embedding_size=16, **_WIDTHS)


def _electra(folder: Path) -> Checkpoint:  # google/electra-small-generator
    return _made("ElectraForMaskedLM", tiny.wordpiece(), embedding_size=16, **_WIDTHS)


def _modernbert(folder: Path) -> Checkpoint:  # answerdotai/ModernBERT-base
    tokenizer = tiny.byte_level_backend(
        ("[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"), "[CLS] $A [SEP]", unk_token="[UNK]",
        cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", mask_token=tiny.mask("[MASK]"),
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
    ids: dict[str, Any] = {
        "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2,
        "pad_token_id": 3,
    }  # fmt: skip
    shape: dict[str, Any] = {**_WIDTHS, "num_hidden_layers": 3, "local_attention": 8}
    return _made("ModernBertForMaskedLM", tokenizer, **ids, **shape)


def _families(task: Task, *members: tuple[Build, int]) -> tuple[Family, ...]:
    return tuple(Family(b.__name__.removeprefix("_"), task, b, seed) for b, seed in members)


# The seed leaves clear choices for 32 tokens; in most of the generating ones a text ends early.
CAUSAL = _families(
    "causal", (_gpt2, 17), (_gpt_neo, 2), (_gpt_neox, 24), (_llama, 23), (_mistral, 10),
    (_qwen3, 25), (_gemma2, 3), (_phi3, 19), (_opt, 10), (_bloom, 4), (_mamba, 17),
)  # fmt: skip
SEQ2SEQ = _families(
    "seq2seq", (_t5, 44), (_mt5, 28), (_bart, 23), (_mbart, 8), (_mbart50, 9), (_m2m100, 23),
    (_nllb, 45), (_marian, 30), (_marian_group, 46), (_pegasus, 46),
)  # fmt: skip
MASKED = _families(
    "masked", (_bert, 3), (_roberta, 1), (_xlm, 0), (_xlm_roberta, 7), (_deberta, 0),
    (_deberta_v2, 1), (_distilbert, 2), (_albert, 5), (_electra, 3), (_modernbert, 2),
)  # fmt: skip
