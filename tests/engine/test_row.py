"""Why a row ended, where the checkpoint's config forces an end token at the last place of the budget."""

from pathlib import Path
from typing import Any

import pytest
import torch

import checkpoints
from checkpoints import texts

BUDGET = 6
FORCING = ["marian", "bart", "mbart", "mbart50", "pegasus"]
WAYS: dict[str, dict[str, Any]] = {"greedy": {}, "beams": {"num_beams": 3}}


def plainly(name: str, where: Path, text: str, budget: int, **settings: Any) -> list[int]:
    """Return all tokens of `generate`, the end token too."""
    model, _ = checkpoints.plain(checkpoints.FAMILIES[name].task, where)
    ids, mask = checkpoints.inputs(name, [text])
    options = {"do_sample": False, "num_beams": 1, "max_new_tokens": budget} | checkpoints.forced(name) | settings
    with torch.no_grad():
        row = model.generate(ids, attention_mask=mask, **options)[0].tolist()
    return row[ids.shape[1] if checkpoints.FAMILIES[name].task == "causal" else 1 :]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [*FORCING, "llama"])
def test_a_forced_end_is_no_end_of_the_text(name: str, way: str, tmp_path: Path) -> None:
    """Tokens are those of `generate`, whose last one is forced: the text was cut, in a stream too."""
    forced = checkpoints.reference(name)[0].generation_config.forced_eos_token_id or 2
    where = checkpoints.configured(name, tmp_path / name, forced_eos_token_id=forced, eos_token_id=forced, min_length=0)
    text, options = texts(name)[0], {"max_new_tokens": BUDGET, **checkpoints.languages(name), **WAYS[way]}
    with checkpoints.fresh(name, where) as loaded:
        result = loaded(text, **options)
        *_, last = loaded.stream(text, **options)
    written = plainly(name, where, text, BUDGET, **WAYS[way])
    assert len(written) == BUDGET
    assert [*result.token_ids, forced] == written
    assert (result.finish_reason, last.finish_reason, result.generated_tokens) == ("length", "length", BUDGET)


def likeliest(name: str, text: str, written: list[int]) -> int:
    """Return the token that the model itself finds likeliest behind those that are written."""
    model, (ids, _) = checkpoints.reference(name)[0], checkpoints.inputs(name, [text])
    with torch.no_grad():
        if checkpoints.FAMILIES[name].task == "causal":
            return int(model(torch.tensor([[*ids[0].tolist(), *written]])).logits[0, -1].argmax())
        start = model.generation_config.decoder_start_token_id
        return int(model(ids, decoder_input_ids=torch.tensor([[start, *written]])).logits[0, -1].argmax())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["marian", "mbart50", "llama"])
def test_an_end_of_its_own_at_the_last_place_is_one(name: str, way: str, tmp_path: Path) -> None:
    """Where the model itself would end at the last place of the budget, nothing was cut."""
    text, settings = texts(name)[0], WAYS[way]
    before = checkpoints.configured(name, tmp_path / "before", forced_eos_token_id=2, eos_token_id=2)
    written = plainly(name, before, text, BUDGET, **settings)
    own = likeliest(name, text, written[:-1])
    where = checkpoints.configured(name, tmp_path / name, forced_eos_token_id=2, eos_token_id=[2, own])
    assert plainly(name, where, text, BUDGET, **settings) == written
    with checkpoints.fresh(name, where) as loaded:
        whole = loaded(text, max_new_tokens=BUDGET, **checkpoints.languages(name), **settings)
        cut = loaded(text, max_new_tokens=BUDGET - 1, **checkpoints.languages(name), **settings)
    assert [*whole.token_ids, 2] == written
    assert (whole.finish_reason, cut.finish_reason) == ("eos", "length")


def test_a_drawn_text_is_cut_too(tmp_path: Path) -> None:
    """A sampled row draws as it would without the forced token, which takes the place of the last draw."""
    text, options = texts("llama")[0], {"temperature": 1.5, "seed": 3, "max_new_tokens": BUDGET, "logprobs": 0}
    where = checkpoints.configured("llama", tmp_path / "llama", forced_eos_token_id=2, eos_token_id=2)
    free = checkpoints.configured("llama", tmp_path / "free", forced_eos_token_id=None, eos_token_id=2)
    with checkpoints.fresh("llama", where) as loaded, checkpoints.fresh("llama", free) as unforced:
        result, other = loaded(text, **options), unforced(text, **options)
    assert other.finish_reason == "length"
    assert (result.finish_reason, result.token_ids) == ("length", other.token_ids[:-1])
    assert result.logprobs[-1].token_id == 2


@pytest.mark.parametrize("way", WAYS)
def test_a_forced_end_is_told_in_segments_and_with_the_default_budget(way: str, tmp_path: Path) -> None:
    """Each piece of a document is marked; the default budget is what positions leave, and the end is put there."""
    where = checkpoints.configured("marian", tmp_path / "marian", forced_eos_token_id=2, eos_token_id=2)
    most = 127  # of 128 positions
    with checkpoints.fresh("marian", where) as loaded:
        given = loaded(" ".join(texts("marian")[:2]), max_new_tokens=BUDGET, **WAYS[way])
        usual = loaded(texts("marian"), **WAYS[way])
    assert [one.notes for one in given.segments if one.notes != ("copied",)] == [("length",)] * 2
    written = [plainly("marian", where, text, most, **WAYS[way]) for text in texts("marian")]
    cut = [len(until_end(tokens)) == most for tokens in written]
    assert set(cut) == {True, False}
    assert [one.finish_reason == "length" for one in usual] == cut
    assert [any("length" in segment.notes for segment in one.segments) for one in usual] == cut


def until_end(tokens: list[int]) -> list[int]:
    """Return what a row of `generate` has up to the end token, that included."""
    return tokens[: tokens.index(2) + 1]
