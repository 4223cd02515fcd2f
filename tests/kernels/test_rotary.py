"""Rows of models whose rotary positions follow the length of a text are read as they are alone."""

import inspect
import shutil
import threading
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import checkpoints
import lmkit
from lmkit.kernels import rotary

hf: Any = transformers
ORIGINAL = 32
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0, 8.0, 16.0, 32.0]}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "phi3-longrope": ("phi3", LONG | {"original_max_position_embeddings": ORIGINAL}),
    "llama-longrope": ("llama", LONG | {"factor": 4.0, "original_max_position_embeddings": ORIGINAL}),
    "llama-dynamic": ("llama", {"rope_type": "dynamic", "factor": 4.0}),
    "gemma2-dynamic": ("gemma2", {"rope_type": "dynamic", "factor": 4.0}),
}
TEXTS = (
    "She",
    "The old sailor told the children a long story about the sea and the stars. Every morning the baker opens it.",
    "Every morning the baker opens the small shop near the",
    "My friend asks where the keys of the house are, for he could not remember where he had left the keys",
)


@cache
def folder(kind: str) -> Path:
    """Return a checkpoint whose positions are scaled beyond 32 tokens."""
    name, scaling = KINDS[kind]
    where = checkpoints.ROOT / kind
    shutil.copytree(checkpoints.folder(name), where)
    config = hf.AutoConfig.from_pretrained(where)
    config.rope_parameters = {"rope_theta": 10_000.0, "partial_rotary_factor": 1.0, **scaling}
    if name == "phi3":
        config.original_max_position_embeddings = ORIGINAL
        config.sliding_window = None
    if scaling["rope_type"] == "dynamic":
        config.max_position_embeddings = ORIGINAL
    config.save_pretrained(where)
    return where


@cache
def reference(kind: str) -> tuple[Any, Any]:
    """Return plain transformers' model and tokenizer."""
    return checkpoints.plain("causal", folder(kind))


def fresh(kind: str) -> Any:
    """Return transformers' model as it is before its first pass: dynamic scaling remembers the longest one."""
    model = reference(kind)[0]
    for part in model.modules():
        if hasattr(part, "original_max_seq_len"):
            part.max_seq_len_cached = part.original_max_seq_len
            part.inv_freq = part.original_inv_freq.clone()
    return model


@cache
def loaded(kind: str) -> Any:
    """Return lmkit's wrapper; room is made for rows beyond the original length."""
    return lmkit.load("causal", folder(kind), "float32", "cpu", context_length=256)


def expected(kind: str, text: str, new: int) -> list[int]:
    """Return what a single `generate` writes."""
    encoded = reference(kind)[1](text, return_tensors="pt")
    model = fresh(kind)
    with torch.no_grad():
        found = model.generate(**encoded, do_sample=False, max_new_tokens=new)[0]
    return checkpoints.until_end(found[encoded["input_ids"].shape[1] :].tolist(), checkpoints.ends(model))


each_kind = pytest.mark.parametrize("kind", KINDS)


@each_kind
def test_rows_beside_longer_ones_are_those_of_a_single_generate(kind: str) -> None:
    """Short and long rows of one call, and rows that grow past the original length, get their own tokens."""
    lengths = [len(reference(kind)[1](text)["input_ids"]) for text in TEXTS]
    assert min(lengths) < 8 < ORIGINAL < max(lengths)
    new = [50, 30, 50, 20]
    for _ in range(2):  # the second time, behind prefixes that were kept
        results = loaded(kind)(list(TEXTS), max_new_tokens=new)
        found = [list(result.token_ids) for result in results]
        assert found == [expected(kind, text, many) for text, many in zip(TEXTS, new, strict=True)]


@each_kind
def test_texts_are_scored_as_one_by_one(kind: str) -> None:
    """The score of a text, short or long, with a context that others share or alone, is that of a pass of its own."""
    tokenizer = reference(kind)[1]
    texts = [*TEXTS, *(TEXTS[1][:end] for end in (50, 60, 70, 80, 90, 110))]
    for result in loaded(kind).score(texts):
        token_ids = tokenizer(result.text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            found = fresh(kind)(token_ids).logits[0, :-1].log_softmax(-1).gather(-1, token_ids[0, 1:, None])[:, 0]
        assert result.token_logprobs == pytest.approx(found[-len(result.token_ids) :].tolist(), abs=1e-4)


@each_kind
def test_answers_behind_one_prompt_are_ranked_by_passes_of_their_own(kind: str) -> None:
    """Answers that share a prompt are scored as texts of their own, though some end beyond the original length."""
    tokenizer = reference(kind)[1]
    prompt = TEXTS[2]
    answers = [" was", " was late again, so we walked", " who was living in another country", " is"]
    length = len(tokenizer(prompt)["input_ids"])
    for choice in loaded(kind).rank(prompt, answers).choices:
        token_ids = tokenizer(prompt + choice.text, return_tensors="pt")["input_ids"]
        assert tokenizer(prompt)["input_ids"] == token_ids[0, :length].tolist()
        with torch.no_grad():
            found = fresh(kind)(token_ids).logits[0, :-1].log_softmax(-1).gather(-1, token_ids[0, 1:, None])[:, 0]
        assert choice.score.logprob == pytest.approx(found[length - 1 :].sum().item(), abs=1e-3)


@each_kind
def test_a_stream_is_its_own_beside_another_threads_rows(kind: str) -> None:
    """A short stream that is open while another thread writes a long row keeps its own tokens, and so does that row."""
    found: list[list[int]] = []
    beside = threading.Thread(
        target=lambda: found.append(list(loaded(kind)(TEXTS[1], max_new_tokens=40).token_ids)), daemon=True
    )
    stream = loaded(kind).stream(TEXTS[0], max_new_tokens=45)
    first = next(stream)
    beside.start()
    *_, last = [first, *stream]
    beside.join()
    assert last.result is not None
    assert list(last.result.token_ids) == expected(kind, TEXTS[0], 45)
    assert found == [expected(kind, TEXTS[1], 40)]


@each_kind
def test_guesses_do_not_cross_the_original_length(kind: str) -> None:
    """With `lookup`, a row that repeats itself past the original length gets the tokens of a single `generate`."""
    text = "the cat the cat the cat the cat the"
    assert len(reference(kind)[1](text)["input_ids"]) < ORIGINAL
    assert list(loaded(kind)(text, max_new_tokens=40, lookup=True).token_ids) == expected(kind, text, 40)


@each_kind
def test_beams_are_those_of_a_single_generate(kind: str) -> None:
    """A beam search beside others, past the original length, finds what `generate` does alone."""
    texts = [TEXTS[0], TEXTS[2]]
    for text, result in zip(texts, loaded(kind)(texts, num_beams=2, max_new_tokens=40), strict=True):
        encoded = reference(kind)[1](text, return_tensors="pt")
        model = fresh(kind)
        found = model.generate(**encoded, num_beams=2, do_sample=False, max_new_tokens=40)[0]
        right = checkpoints.until_end(found[encoded["input_ids"].shape[1] :].tolist(), checkpoints.ends(model))
        assert list(result.token_ids) == right


@pytest.mark.slow
def test_compiled_steps_are_those_of_a_single_generate() -> None:
    """Compiled, too, each row follows its own length."""
    kind = "phi3-longrope"
    with lmkit.load("causal", folder(kind), "float32", "cpu", compile=True, context_length=256) as compiled:
        results = compiled([TEXTS[0], TEXTS[1]], max_new_tokens=45)
    assert [list(r.token_ids) for r in results] == [expected(kind, text, 45) for text in TEXTS[:2]]


def test_a_context_that_is_asked_for_bounds_prompts() -> None:
    """`context_length=` in `load` is what a prompt has to fit into."""
    generator = lmkit.load("causal", folder("llama-dynamic"), "float32", "cpu", context_length=9)
    with pytest.raises(lmkit.InputTooLongError):
        generator(TEXTS[1], max_new_tokens=1)


def test_what_cannot_be_compiled_says_why() -> None:
    """Frequencies that follow each length are not compiled, and the error says so."""
    with pytest.raises(lmkit.OptionError, match="scaled by the length of each text"):
        lmkit.plan("causal", folder("llama-dynamic"), compile=True)


def test_the_plan_says_how_positions_are_scaled() -> None:
    """The reason names the kind of scaling, and where rows are read anew."""
    told = lmkit.plan("causal", folder("phi3-longrope")).reasons["rotary"]
    assert "longrope" in told
    assert "read anew" in told
    assert "read anew" not in lmkit.plan("causal", folder("llama-dynamic")).reasons["rotary"]
    assert "rotary" not in lmkit.plan("causal", checkpoints.folder("llama")).reasons


def test_the_families_that_generate_reads_anew_are_known() -> None:
    """`READ_ANEW` names the families whose code lets the cache go at the original length."""
    names = hf.AutoModelForCausalLM._model_mapping._model_mapping
    found = set()
    for model_type, name in names.items():
        prepare = inspect.getsource(getattr(hf, name).prepare_inputs_for_generation)
        if "original_max_position_embeddings" in prepare:
            found.add(model_type)
    assert found == rotary.READ_ANEW


@pytest.mark.parametrize(
    "scaling", [LONG | {"factor": 4.0}, {"rope_type": "dynamic", "factor": 4.0}], ids=["long", "ntk"]
)
def test_positions_in_three_directions_follow_each_row_too(scaling: dict[str, Any]) -> None:
    """Qwen2-VL's kind counts a text in three directions; each row has the factors that it has alone."""
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen

    settings = {"rope_theta": 10_000.0, "mrope_section": [1, 1, 2], "original_max_position_embeddings": 12, **scaling}
    config = hf.Qwen2_5_VLTextConfig(
        hidden_size=32, num_attention_heads=4, max_position_embeddings=12, rope_parameters=settings
    )
    part: Any = qwen.Qwen2_5_VLRotaryEmbedding(config)
    whole: Any = torch.nn.Module()
    whole.part, whole.config = part, config
    x = torch.zeros(1)
    lengths = [5, 30, 12]
    alone = []
    for length in lengths:
        fresh_part: Any = qwen.Qwen2_5_VLRotaryEmbedding(config)
        alone.append(fresh_part(x, torch.arange(length).expand(3, 1, length)))
    rotary.put_on(whole)
    rows = torch.stack([torch.arange(30).clamp(max=length - 1) for length in lengths])
    cos, sin = part(x, rows.expand(3, 3, 30))
    for row, length in enumerate(lengths):
        for found, right in zip((cos, sin), alone[row], strict=True):
            torch.testing.assert_close(found[row, :length], right[0])
