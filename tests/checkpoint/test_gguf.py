"""How texts of GGUF files end: as llama.cpp has it, by what the metadata names and by known texts of tokens."""

from pathlib import Path

import pytest

import gguf_tiny
import lmkit
from lmkit.checkpoint.gguf import end_tokens

PROMPT = "The old sailor"


@pytest.mark.parametrize(
    "ends, others",
    [
        (["<stop>"], ["<other>"]),
        (["<|endoftext|>", "<|im_end|>"], ["<|im_start|>"]),
        (["</s>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>"], ["<s>"]),
        (["<|end|>"], ["<|user|>"]),
        (["<|return|>", "<|call|>"], ["<|end|>"]),
        (["<|calls|>", "<|flush|>"], ["<|end|>"]),
        (["<|endoftext|>", "<reponame>", "<|file_sep|>", "<fim_pad>"], ["<fim_prefix>"]),
        (["[EOS]", "[EOT]", "[PAD]"], ["[BOS]"]),
    ],
    ids="+".join,
)
def test_known_texts_are_ends(ends: list[str], others: list[str], tmp_path: Path) -> None:
    """The tokens that llama-vocab.cpp puts into its set of ends of generation, and no others."""
    tokens = gguf_tiny.save(tmp_path / "tiny.gguf", *ends, *others)
    found = end_tokens(tmp_path / "tiny.gguf")
    assert set(found.values()) == {*ends}
    assert all(tokens[number] == text for number, text in found.items())


def test_a_token_that_the_metadata_names_is_an_end(tmp_path: Path) -> None:
    """Keys of the metadata name ends whatever their text is; a named one stands for the texts of its kind."""
    count = len(gguf_tiny.save(tmp_path / "tiny.gguf", "<stop>", "<fim_pad>"))
    named = {"eot": 5, "eom": 6, "fim_pad": 7, "fim_rep": 8, "fim_sep": 9, "padding": 10, "bos": 11}
    gguf_tiny.save(tmp_path / "named.gguf", "<stop>", "<fim_pad>", **named)
    assert set(end_tokens(tmp_path / "named.gguf")) == {5, 6, 7, 8, 9, count - 2}


def test_the_end_of_a_turn_ends_a_text(tmp_path: Path) -> None:
    """A text of a GGUF file stops at its end of turn, which the plan names, where it went on without that key."""
    tokens = gguf_tiny.save(tmp_path / "plain.gguf")
    with lmkit.load("causal", tmp_path / "plain.gguf", "float32", "cpu") as generator:
        free = generator(PROMPT, max_new_tokens=8)
        assert free.finish_reason == "length"
        assert generator.plan.end_token_ids == (len(tokens) - 1,)
    place = next(n for n in range(1, 8) if free.token_ids[n] not in free.token_ids[:n])
    gguf_tiny.save(tmp_path / "turns.gguf", eot=free.token_ids[place])
    with lmkit.load("causal", tmp_path / "turns.gguf", "float32", "cpu") as generator:
        ended = generator(PROMPT, max_new_tokens=8)
        assert (ended.finish_reason, ended.token_ids) == ("eos", free.token_ids[:place])
        told = generator.plan.reasons["ends"]
    assert repr(tokens[free.token_ids[place]]) in told
    assert "as llama.cpp counts" in told
    assert lmkit.plan("causal", tmp_path / "turns.gguf", "float32", "cpu").reasons["ends"] == told
