"""Beam search of encoder-decoders, compared with `model.generate`, with plain transformers and with brute force."""

import itertools
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import checkpoints
from checkpoints import reference, texts, wrapper
from lmkit.engine.beam_search import Search
from lmkit.engine.cache import KeyValues
from lmkit.engine.decoders.beam import BeamDecoder
from lmkit.engine.request import Caller, Request
from lmkit.engine.ticket import Ticket
from lmkit.errors import EngineError

FAMILIES = ["t5", "mt5", "bart", "mbart", "m2m100", "nllb", "marian", "pegasus", "plbart", "longt5", "led"]
SETTINGS: list[dict[str, Any]] = [
    {"num_beams": 4, "num_return_sequences": 4},
    {"num_beams": 2, "length_penalty": 2.0, "early_stopping": True},
    {"num_beams": 3, "length_penalty": 0.4, "early_stopping": "never", "num_return_sequences": 3},
    {"num_beams": 3, "length_penalty": -1.0, "num_return_sequences": 2},
    {"num_beams": 3, "no_repeat_ngram_size": 2, "repetition_penalty": 1.3},
    {"num_beams": 5, "min_new_tokens": 7},
]
TOKENS = 12


def generated(name: str, prompts: list[str], model: Any = None, **settings: Any) -> tuple[list[list[int]], list[float]]:
    """Return what generate() finds: tokens up to the end token, and scores."""
    model = model or reference(name)[0]
    ids, mask = checkpoints.inputs(name, prompts)
    options = {"do_sample": False, "max_new_tokens": TOKENS, **checkpoints.forced(name), **settings}
    found = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, output_scores=True, **options)
    rows = [checkpoints.until_end(row[1:].tolist(), checkpoints.ends(model)) for row in found.sequences]
    return rows, found.sequences_scores.tolist()


def completions(results: list[Any]) -> list[Any]:
    """Return the completions of all results in order."""
    return [completion for result in results for completion in result.completions]


@pytest.mark.parametrize("name", [name for name in FAMILIES if name in checkpoints.FAMILIES])
def test_a_batch_finds_what_generate_finds_for_each_row(name: str) -> None:
    """Length penalties, early stopping, n-best and processors give generate's hypotheses and scores, row by row."""
    assert wrapper(name).plan.engine == "lmkit"
    for settings in SETTINGS:
        results = wrapper(name)(texts(name), max_new_tokens=TOKENS, **settings, **checkpoints.languages(name))
        alone = [generated(name, [text], **settings) for text in texts(name)]
        found = completions(results)
        assert [list(one.token_ids) for one in found] == [row for rows, _ in alone for row in rows], settings
        scores = [score for _, each in alone for score in each]
        assert [one.score for one in found] == pytest.approx(scores, rel=1e-5, abs=1e-5), settings


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_ends_that_are_several_tokens_end_beams(name: str, tmp_path: Path) -> None:
    """A checkpoint with several end tokens, or several forced ones, is searched as generate searches it."""
    likely = checkpoints.generated(name, texts(name)[:1])[0]
    ends = [*checkpoints.ends(reference(name)[0]), likely[1]]
    where = checkpoints.configured(name, tmp_path / name, eos_token_id=ends, forced_eos_token_id=None)
    model, _ = checkpoints.plain("seq2seq", where)
    with checkpoints.fresh(name, where) as loaded:
        found = completions(loaded(texts(name), num_beams=3, num_return_sequences=3, max_new_tokens=TOKENS))
    expected = [
        row for text in texts(name) for row in generated(name, [text], model, num_beams=3, num_return_sequences=3)[0]
    ]
    assert [list(one.token_ids) for one in found] == expected


def test_as_many_beams_as_texts_find_the_likeliest_text() -> None:
    """With beams for all beginnings, the search finds what brute force over all texts of two tokens finds."""
    name = "t5"
    model, _ = reference(name)
    text = texts(name)[0]
    ids, _ = checkpoints.inputs(name, [text])
    (end,) = checkpoints.ends(model)
    with torch.no_grad():
        first = model(input_ids=ids, decoder_input_ids=torch.tensor([[0]])).logits[0, -1].log_softmax(-1)
        begun = torch.tensor([[0, token] for token in range(len(first))])
        second = model(input_ids=ids.expand(len(first), -1), decoder_input_ids=begun).logits[:, -1].log_softmax(-1)
    pairs = {
        (a, b): float(first[a] + second[a, b]) / 2
        for a, b in itertools.product(range(len(first)), repeat=2)
        if a != end
    } | {(end,): float(first[end])}
    best = sorted(pairs, key=lambda pair: -pairs[pair])[:5]
    result = wrapper(name)(text, num_beams=len(first), num_return_sequences=5, max_new_tokens=2, early_stopping="never")
    assert [one.token_ids for one in result.completions] == [tuple(t for t in pair if t != end) for pair in best]
    assert [one.score for one in result.completions] == pytest.approx([pairs[pair] for pair in best], abs=1e-5)


def test_keys_of_a_source_are_held_once_for_all_its_beams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cross-attention keys have a row per source, own keys a row per beam; both shrink when searches end."""
    seen: list[tuple[int, int, int]] = []
    step = BeamDecoder.step

    def noted(decoder: BeamDecoder) -> torch.Tensor:
        hidden = step(decoder)
        across = {len(layer.keys) for layer in decoder._across.layers}
        own = {len(layer.keys) for layer in decoder._own.layers}
        seen.append((len(decoder.rows), *across, *own))
        return hidden

    monkeypatch.setattr(BeamDecoder, "step", noted)
    wrapper("bart")(texts("bart"), num_beams=3, max_new_tokens=[3, 9, 5, 9, 4], early_stopping="never")
    assert all(across == rows and own == 3 * rows for rows, across, own in seen)
    assert seen[0][0] == len(texts("bart")) > seen[-1][0]


def test_attention_of_another_kind_gets_a_copy_per_beam() -> None:
    """A model whose attention lmkit did not take over finds the same, with the source's keys written per beam."""
    model = checkpoints.fresh("bart")
    model.model.set_attn_implementation("eager")
    results = model(texts("bart"), num_beams=3, num_return_sequences=2, max_new_tokens=TOKENS)
    alone = [generated("bart", [text], num_beams=3, num_return_sequences=2)[0] for text in texts("bart")]
    assert [list(one.token_ids) for one in completions(results)] == [row for rows in alone for row in rows]


def test_keys_are_copied_only_where_a_beam_has_several_children(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step copies as many rows of keys as there are beams that lost their slot, and none where none did."""
    copied: list[int] = []
    moved: list[int] = []
    copy, step = KeyValues.copy, BeamDecoder.step

    def noted(cache: KeyValues, places: Any, rows: Any) -> None:
        copied.append(len(places))
        copy(cache, places, rows)

    def counted(decoder: BeamDecoder) -> torch.Tensor:
        moved.append(sum(len(search.moves) for search in decoder._searches))
        return step(decoder)

    monkeypatch.setattr(KeyValues, "copy", noted)
    monkeypatch.setattr(BeamDecoder, "step", counted)
    wrapper("t5")(texts("t5")[0], num_beams=2, max_new_tokens=TOKENS, min_new_tokens=TOKENS)
    assert copied == [count for count in moved if count]
    assert 0 in moved


def request(**config: Any) -> Request:
    """Make a request of a search that reads nothing."""
    from transformers import GenerationConfig

    return Request((5, 6), GenerationConfig(num_beams=2, max_new_tokens=4, eos_token_id=1, **config))


def searching(**config: Any) -> Search:
    """Begin a search by hand."""
    return Search(request(**config), Ticket(threading.Lock(), Caller()), 0, wrapper("t5")._codec)


def test_a_first_child_stays_and_others_take_free_slots() -> None:
    """Both continuations of one beam: the better one stays, the other moves to the slot of the beam that ended."""
    search = searching()
    search.advance([(-0.1, 0, 7), (-0.3, 0, 8), (-1.0, 0, 9), (-1.1, 0, 4)])
    assert (search.beams, search.moves) == ([[7], [8]], [(1, 0)])
    search.advance([(-0.2, 1, 3), (-0.4, 1, 4), (-0.5, 0, 5), (-0.6, 0, 6)])
    assert (search.beams, search.moves) == ([[8, 4], [8, 3]], [(0, 1)])
    assert search.scores == [-0.4, -0.2]


def test_a_search_ends_by_its_own_rule() -> None:
    """`early_stopping=True` ends with the second finished beam; without it one that can still win goes on."""
    steps = [
        [(-0.1, 0, 7), (-0.3, 0, 8), (-1.0, 0, 9), (-1.1, 0, 4)],
        [(-0.2, 0, 1), (-0.5, 0, 5), (-0.6, 1, 1), (-0.7, 1, 6)],
        [(-0.6, 0, 1), (-0.7, 0, 2), (-0.8, 1, 3), (-0.9, 1, 4)],
    ]
    early, late = (
        searching(early_stopping=True, length_penalty=3.0),
        searching(early_stopping="never", length_penalty=3.0),
    )
    for step in steps:
        early.advance(step)
        late.advance(step)
    assert early.done
    assert not late.done
    assert [one.token_ids for one in early.completions()] == [(7, 5)]
    assert early.completions()[0].score == pytest.approx(-0.6 / 3**3)


def test_beams_run_beside_other_rows_and_threads() -> None:
    """Searches of several widths, greedy rows and sampled ones in one call each get what they get alone."""
    options = {"max_new_tokens": 6}
    widths = [4, 1, 2, 1, 4]
    together = wrapper("m2m100")(texts("m2m100"), num_beams=widths, **options, **checkpoints.languages("m2m100"))
    alone = [
        wrapper("m2m100")(text, num_beams=width, **options, **checkpoints.languages("m2m100"))
        for text, width in zip(texts("m2m100"), widths, strict=True)
    ]
    assert [result.token_ids for result in together] == [result.token_ids for result in alone]


def test_a_search_that_fails_alone_fails_alone() -> None:
    """A forward pass that fails for one source is told to its row; the others are searched again without it."""
    model = checkpoints.fresh("t5")
    bad = model._job(texts("t5")[1], {}, 0).requests[0].input_ids

    def fail(_step: int, kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids")
        if ids is not None and any(row[: len(bad)] == list(bad) for row in ids.tolist()):
            msg = "broken"
            raise RuntimeError(msg)

    encoder = model.model.get_encoder()
    with checkpoints.before_forwards(encoder, fail), pytest.raises(EngineError, match=r"row 1.*broken") as caught:
        model(texts("t5"), num_beams=3, max_new_tokens=6)
    expected = [generated("t5", [text], num_beams=3, max_new_tokens=6)[0][0] for text in texts("t5")]
    found = [None if result is None else list(result.token_ids) for result in caught.value.results]
    assert found == [row if place != 1 else None for place, row in enumerate(expected)]


def test_a_stream_of_a_search_is_one_chunk_and_can_be_left() -> None:
    """A search knows its text at the end; a stream that is closed before takes its searches out of the engine."""
    model = wrapper("t5")
    chunks = list(model.stream(texts("t5")[0], num_beams=3, max_new_tokens=6))
    assert [chunk.text for chunk in chunks if chunk.text] == [chunks[-1].result.text]
    stream = model.stream(texts("t5"), num_beams=3, max_new_tokens=6)
    next(stream)
    stream.close()
    assert model.stats.running == model.stats.waiting == 0


@pytest.mark.parametrize("stopping", [True, False])
def test_beams_that_were_never_born_do_not_end_a_search(stopping: bool) -> None:  # noqa: FBT001 - pytest passes it
    """Where few tokens are allowed, and slots are empty at first, a search goes on until real beams have ended."""
    size = len(reference("t5")[1])
    settings = {"num_beams": 4, "num_return_sequences": 3, "max_new_tokens": 5, "length_penalty": 2.0}
    settings |= {"early_stopping": stopping, "suppress_tokens": [n for n in range(size) if n not in {1, 115}]}
    model, _ = reference("t5")
    for text in texts("t5"):
        result = wrapper("t5")(text, **settings)
        rows, scores = generated("t5", [text], model, **settings)
        found = [(list(one.token_ids), one.score) for one in result.completions if one.score > -1e6]
        expected = [(row, score) for row, score in zip(rows, scores, strict=True) if score > -1e6]
        assert [row for row, _ in found] == [row for row, _ in expected]
        assert [score for _, score in found] == pytest.approx([score for _, score in expected], rel=1e-5)


def test_a_failure_before_the_first_batch_of_beams_is_its_rows_alone() -> None:
    """The trial run that finds the model's head belongs to a forward pass: if it fails once, it is made again."""
    model = checkpoints.fresh("t5")
    failed: list[int] = []

    def fail(step: int, _kwargs: dict[str, Any]) -> None:
        if not step:
            failed.append(step)
            msg = "can't allocate memory"
            raise RuntimeError(msg)

    with checkpoints.before_forwards(model.model, fail):
        results = model(texts("t5"), num_beams=3, max_new_tokens=6)
    assert failed
    expected = [generated("t5", [text], num_beams=3, max_new_tokens=6)[0][0] for text in texts("t5")]
    assert [list(result.token_ids) for result in results] == expected


def test_a_search_cancelled_early_gives_only_what_it_followed() -> None:
    """Slots that hold no beam yet are not given as completions."""
    search = searching(num_return_sequences=2)
    search.cancel()
    assert [one.token_ids for one in search.completions()] == [()]
    assert search.completions()[0].finish_reason == "cancelled"
