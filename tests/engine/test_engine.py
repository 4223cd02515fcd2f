import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import checkpoints
import lmkit
from checkpoints import CAUSAL, SEQ2SEQ, reference, texts, wrapper
from lmkit.engine.stream_text import TextFeed
from lmkit.text.codec import Codec

PREPARED = {"mamba"}  # families with a cache that lmkit's own loop does not drive
UNPADDED = {"gpt2", "gpt_neo", "llama", "mistral"}  # tokenizers without a padding token
LOGPROBS = ["llama", "gemma2", "bloom", "mamba", "bart", "m2m100", "t5"]
BEAMS = ["gpt2", "llama", "mistral", "bloom", "mamba", "t5", "bart", "m2m100", "mbart", "marian"]


def token_rows(results: list[Any]) -> list[list[int]]:
    """Return the tokens of results as lists."""
    return [list(result.token_ids) for result in results]


# Greedy


@pytest.mark.parametrize("name", [*CAUSAL, *SEQ2SEQ])
def test_single_greedy_rows_are_those_of_generate(name: str) -> None:
    """One prompt, greedy, in float32, gives the tokens of `model.generate`, one for one."""
    options = checkpoints.languages(name)
    for text in texts(name):
        result = wrapper(name)(text, max_new_tokens=24, **options)
        assert list(result.token_ids) == checkpoints.generated(name, [text])[0]


@pytest.mark.parametrize("name", [*CAUSAL, *SEQ2SEQ])
def test_greedy_batches_are_those_of_generate(name: str) -> None:
    """Prompts of many lengths in one call give the tokens that `model.generate` gives the padded batch."""
    results = wrapper(name)(texts(name), max_new_tokens=24, **checkpoints.languages(name))
    assert token_rows(results) == checkpoints.generated(name, texts(name))


@pytest.mark.parametrize("name", [n for n in [*CAUSAL, *SEQ2SEQ] if n not in UNPADDED])
def test_batches_padded_by_the_tokenizer_give_the_same(name: str) -> None:
    """The padded batch of a tokenizer that has padding gives generate() the same tokens as lmkit's rows."""
    model, tokenizer = reference(name)
    causal = checkpoints.FAMILIES[name].task == "causal"
    prompts = [f">>fra<< {t}" if name == "marian_group" else t for t in texts(name)]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left" if causal else "right")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    found = model.generate(
        ids, attention_mask=mask, do_sample=False, num_beams=1, max_new_tokens=16, **checkpoints.forced(name)
    )
    skip = ids.shape[1] if causal else 1
    expected = [checkpoints.until_end(row[skip:].tolist(), checkpoints.ends(model)) for row in found]
    results = wrapper(name)(texts(name), max_new_tokens=16, **checkpoints.languages(name))
    assert token_rows(results) == expected


@pytest.mark.parametrize("name", [*CAUSAL, *SEQ2SEQ])
def test_only_families_with_a_cache_of_their_own_go_through_generate(name: str) -> None:
    """Lmkit's loop drives every family whose cache is transformers' usual one, and leaves the others out."""
    assert wrapper(name).plan.engine == ("generate" if name in PREPARED else "lmkit")


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "mamba", "bart", "m2m100"])
def test_a_batch_of_more_rows_than_run_together_keeps_order(name: str) -> None:
    """Forty rows, more than run together, come back in the order given, each as its single run."""
    prompts = [text[: 8 + n] for n in range(8) for text in texts(name)]
    options = {"max_new_tokens": 6} | checkpoints.languages(name)
    together = wrapper(name)(prompts, **options)
    alone = [wrapper(name)(prompt, **options) for prompt in prompts]
    assert token_rows(together) == token_rows(alone)
    assert [r.prompt for r in together] == [r.prompt for r in alone]


@pytest.mark.parametrize("num_beams", [1, 2])
def test_sources_of_unlike_lengths_are_encoded_apart(num_beams: int) -> None:
    """Short sources are not padded to a long one beside them: those of like lengths are read together."""
    short, long = texts("t5")[2], texts("t5")[1] * 4
    sources = [short, long, short, short, long]
    options = {"max_new_tokens": 4, "num_beams": num_beams}
    wrapper("t5")(short, **options)  # what is tried out once is read now
    with checkpoints.forwards(wrapper("t5").model.get_encoder()) as seen:
        results = wrapper("t5")(sources, **options)
    lengths = [len(checkpoints.encoded("t5", source)) for source in (short, long)]
    assert sorted(tuple(kwargs["input_ids"].shape) for kwargs in seen) == [(2, lengths[1]), (3, lengths[0])]
    expected = [checkpoints.generated("t5", [source], **options)[0] for source in sources]
    assert token_rows(results) == expected


@pytest.mark.parametrize("name", ["llama", "mamba", "t5"])
def test_rows_that_end_early_leave_the_others_alone(name: str) -> None:
    """Rows with budgets of their own end at them, and the rest go on as if they were alone."""
    budgets = [1, 20, 3, 12, 7]
    results = wrapper(name)(texts(name), max_new_tokens=budgets)
    expected = [
        checkpoints.generated(name, [text], max_new_tokens=budget)[0]
        for text, budget in zip(texts(name), budgets, strict=True)
    ]
    assert token_rows(results) == expected


@pytest.mark.parametrize("name", ["llama", "mamba"])
def test_ended_rows_are_not_computed_again(name: str) -> None:
    """A call takes as many forward passes as its longest row has tokens, and no more."""
    with checkpoints.forwards(wrapper(name).model) as seen:
        results = wrapper(name)(texts(name), max_new_tokens=[1, 2, 3, 4, 2])
    assert len(seen) == max(result.generated_tokens for result in results)


@pytest.mark.parametrize("field", ["num_beams", "num_return_sequences"])
def test_a_prepared_family_is_greedy_whatever_its_checkpoint_searches(field: str, tmp_path: Path) -> None:
    """A family that generate() prepares decodes greedily though its checkpoint asks for beams or copies."""
    extra = {"num_beams": 4} if field == "num_beams" else {"num_beams": 2, field: 2}
    where = checkpoints.configured("mamba", tmp_path / "mamba", **extra)
    results = checkpoints.fresh("mamba", where)(texts("mamba"), max_new_tokens=8)
    expected = checkpoints.generated("mamba", texts("mamba"), max_new_tokens=8)
    assert token_rows(results) == expected


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_end_token_is_counted_but_not_shown(name: str) -> None:
    """A row that ends by itself says "eos", leaves the end token out and counts it; the others say "length"."""
    model = reference(name)[0]
    results = wrapper(name)(texts(name), max_new_tokens=24)
    assert {"eos"} <= {result.finish_reason for result in results}
    for result, expected in zip(results, checkpoints.generated(name, texts(name), max_new_tokens=24), strict=True):
        ended = len(expected) < 24
        assert result.finish_reason == ("eos" if ended else "length")
        assert result.generated_tokens == len(expected) + ended
        assert not set(result.token_ids) & checkpoints.ends(model)


def test_a_family_that_padding_changes_runs_in_groups_of_equal_length() -> None:
    """XLM as a causal model, wrong under left padding, gives each row of a batch what generate() gives it alone."""
    generator = lmkit.load("causal", str(checkpoints.folder("xlm")), "float32", "cpu")
    model, tokenizer = checkpoints.plain("causal", checkpoints.folder("xlm"))
    prompts = ["The old sailor", "She", "The train was late", "He", "Birds fly south"]
    for prompt, result in zip(prompts, generator(prompts, max_new_tokens=6), strict=True):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        found = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6)
        expected = checkpoints.until_end(found[0, ids.shape[1] :].tolist(), checkpoints.ends(model))
        assert list(result.token_ids) == expected


@pytest.mark.parametrize("name", ["llama", "mamba", "t5", "bert"])
def test_no_gradients_are_kept(name: str) -> None:
    """The forward passes of a call build no graph, though gradients are enabled around it."""
    tracked: list[bool] = []

    def note(_step: int, logits: torch.Tensor) -> None:
        tracked.append(logits.requires_grad)

    assert torch.is_grad_enabled()
    with checkpoints.on_logits(wrapper(name).model, note):
        wrapper(name)("Birds [MASK].", **({} if name == "bert" else {"max_new_tokens": 3}))
    assert tracked
    assert not any(tracked)


# Log-probabilities


@pytest.mark.parametrize("name", LOGPROBS)
def test_logprobs_are_the_models_own(name: str) -> None:
    """`logprobs=` gives the log-softmax of the raw scores: those of one forward pass over the whole text."""
    model, _ = reference(name)
    text = texts(name)[1]
    options = checkpoints.languages(name)
    result = wrapper(name)(text, max_new_tokens=12, logprobs=3, repetition_penalty=1.5, **options)
    ids, _ = checkpoints.inputs(name, [text])
    produced = [entry.token_id for entry in result.logprobs]
    new = torch.tensor([produced])
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            start = torch.tensor([[model.generation_config.decoder_start_token_id]])
            logits = model(input_ids=ids, decoder_input_ids=torch.cat([start, new], 1)).logits[0]
            rows = logits[: len(produced)]
        else:
            logits = model(input_ids=torch.cat([ids, new], 1)).logits[0]
            rows = logits[ids.shape[1] - 1 : -1]
    expected = rows.log_softmax(-1)
    assert len(result.logprobs) == result.generated_tokens
    assert tuple(produced[: len(result.token_ids)]) == result.token_ids
    for place, entry in enumerate(result.logprobs):
        best = expected[place].topk(3)
        assert entry.logprob == pytest.approx(float(expected[place, entry.token_id]), abs=1e-4)
        assert [other.token_id for other in entry.top] == best.indices.tolist()
        assert [other.logprob for other in entry.top] == pytest.approx(best.values.tolist(), abs=1e-4)
    tokenizer, prompt = reference(name)[1], [] if model.config.is_encoder_decoder else ids[0].tolist()
    whole = [tokenizer.decode(prompt + produced[:n], skip_special_tokens=True) for n in range(len(produced) + 1)]
    for n, entry in enumerate(result.logprobs):
        if entry.token_id in tokenizer.all_special_ids:
            assert entry.token == tokenizer.decode([entry.token_id])
        elif "\N{REPLACEMENT CHARACTER}" not in whole[n] + whole[n + 1]:
            assert whole[n] + entry.token == whole[n + 1]
        assert "\N{REPLACEMENT CHARACTER}" not in entry.token


def test_logprobs_of_batches_are_those_of_single_rows() -> None:
    """A row's log-probabilities do not depend on the rows beside it, and rows may ask for different numbers."""
    together = wrapper("llama")(texts("llama"), max_new_tokens=5, logprobs=[0, 1, 2, 3, 4])
    for count, (text, result) in enumerate(zip(texts("llama"), together, strict=True)):
        alone = wrapper("llama")(text, max_new_tokens=5, logprobs=count)
        assert [len(entry.top) for entry in result.logprobs] == [count] * len(result.logprobs)
        assert [entry.logprob for entry in result.logprobs] == pytest.approx(
            [entry.logprob for entry in alone.logprobs], abs=1e-4
        )


def test_no_logprobs_unless_asked() -> None:
    """Without `logprobs=` nothing is recorded."""
    assert wrapper("llama")("She", max_new_tokens=2).logprobs is None


# Beams


def searched(name: str, prompts: list[str], **settings: Any) -> tuple[list[list[int]], list[float]]:
    """Return what generate() finds with beams: tokens up to the end token, and scores."""
    model = reference(name)[0]
    ids, mask = checkpoints.inputs(name, prompts)
    neutral = {"do_sample": False}
    found = model.generate(
        ids,
        attention_mask=mask,
        return_dict_in_generate=True,
        output_scores=True,
        **(neutral | checkpoints.forced(name) | settings),
    )
    skip = ids.shape[1] if checkpoints.FAMILIES[name].task == "causal" else 1
    rows = [checkpoints.until_end(s[skip:].tolist(), checkpoints.ends(model)) for s in found.sequences]
    return rows, found.sequences_scores.tolist()


@pytest.mark.parametrize("name", BEAMS)
def test_beams_are_those_of_generate(name: str) -> None:
    """`num_beams` with `num_return_sequences` gives the texts and scores of `model.generate`, best first."""
    settings = {"num_beams": 4, "num_return_sequences": 3, "max_new_tokens": 10}
    text = texts(name)[1]
    result = wrapper(name)(text, **settings, **checkpoints.languages(name))
    rows, scores = searched(name, [text], **settings)
    assert token_rows(result.completions) == rows
    assert [c.score for c in result.completions] == pytest.approx(scores, abs=1e-4)
    assert scores == sorted(scores, reverse=True)
    assert result.text == result.completions[0].text


@pytest.mark.parametrize("name", ["llama", "t5", "m2m100"])
def test_beams_take_their_settings_and_batches(name: str) -> None:
    """Length penalty and early stopping reach the search, and a batch gives each row its single result."""
    settings = {"num_beams": 3, "max_new_tokens": 12, "length_penalty": 2.5, "early_stopping": True}
    results = wrapper(name)(texts(name), **settings, **checkpoints.languages(name))
    singles = [searched(name, [text], **settings)[0][0] for text in texts(name)]
    assert token_rows(results) == singles


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_beams_beside_penalties_are_those_of_generate(name: str) -> None:
    """In a batch of beams a repetition penalty sees each row's own text and no padding."""
    settings = {"num_beams": 3, "max_new_tokens": 8, "repetition_penalty": 1.8}
    results = wrapper(name)(texts(name), **settings)
    assert token_rows(results) == [searched(name, [t], **settings)[0][0] for t in texts(name)]


def test_beams_are_cut_before_a_stop_string() -> None:
    """A beam's text ends before its stop string, which is named; other rows keep theirs."""
    prompts = texts("llama")[:2]
    plain = wrapper("llama")(prompts, num_beams=3, max_new_tokens=10)
    stop = plain[0].text[4:6]
    cut = wrapper("llama")(prompts, num_beams=3, max_new_tokens=10, stop=[[stop], []])
    assert cut[0].text == plain[0].text.partition(stop)[0]
    assert (cut[0].finish_reason, cut[0].stop_reason) == ("stop", stop)
    assert cut[1].text == plain[1].text
    assert cut[1].stop_reason is None


def test_rows_of_one_call_may_decode_in_different_modes() -> None:
    """A greedy row, a sampled one and a beam in one call each give their single results."""
    modes = [lmkit.Greedy(), lmkit.Sample(temperature=0.9), lmkit.Beam(num_beams=3)]
    prompts = texts("llama")[:3]
    together = wrapper("llama")(prompts, mode=modes, seed=5, max_new_tokens=8)
    alone = [wrapper("llama")(p, mode=m, seed=5, max_new_tokens=8) for p, m in zip(prompts, modes, strict=True)]
    assert token_rows(together) == token_rows(alone)
    assert [r.seed for r in together] == [None, 5, None]
    assert [r.completions[0].score is None for r in together] == [True, True, False]


# Failing rows and errors


@pytest.mark.parametrize("name", ["llama", "mamba", "t5"])
def test_a_row_without_finite_scores_fails_alone(name: str) -> None:
    """A row whose scores become NaN is an EngineError that carries the other rows' results."""
    prompts = texts(name)[:3]
    expected = wrapper(name)(prompts, max_new_tokens=5)
    by_length = sorted(range(3), key=lambda n: len(checkpoints.encoded(name, prompts[n])))
    failed = by_length[0 if name == "llama" else -1]  # the shortest where rows join a batch, else the longest

    def spoil(step: int, logits: torch.Tensor) -> None:
        if step == 1:
            logits[0] = torch.nan

    with (
        checkpoints.on_logits(wrapper(name).model, spoil),
        pytest.raises(lmkit.EngineError, match=r"row \d: the model gave no finite score at token 2"),
    ):
        wrapper(name)(prompts, max_new_tokens=5)
    with checkpoints.on_logits(wrapper(name).model, spoil), pytest.raises(lmkit.EngineError) as caught:
        wrapper(name)(prompts, max_new_tokens=5)
    assert f"row {failed}" in str(caught.value)
    kept = [None if r is None else r.text for r in caught.value.results]
    assert kept == [None if n == failed else r.text for n, r in enumerate(expected)]


def test_map_gives_a_failed_row_its_error_and_goes_on() -> None:
    """With `on_error="return"` a row that fails while it runs is its error, in its place."""
    prompts = texts("llama")[:3]
    expected = wrapper("llama")(prompts, max_new_tokens=4)

    def spoil(step: int, logits: torch.Tensor) -> None:
        if step == 1:
            logits[0] = torch.nan

    with checkpoints.on_logits(wrapper("llama").model, spoil):
        results = list(wrapper("llama").map(prompts, on_error="return", max_new_tokens=4))
    assert isinstance(results[1], lmkit.EngineError)  # the longest prompt is the first of its batch
    assert [results[0].text, results[2].text] == [expected[0].text, expected[2].text]


def test_one_nan_among_the_scores_is_not_chosen() -> None:
    """A single NaN score never becomes the chosen token: the row fails, or goes on without it."""

    def spoil(_step: int, logits: torch.Tensor) -> None:
        logits[..., 7] = torch.nan

    with checkpoints.on_logits(wrapper("llama").model, spoil):
        try:
            result = wrapper("llama")("She", max_new_tokens=4)
        except lmkit.EngineError:
            return
    assert 7 not in result.token_ids


def test_an_error_in_the_model_reaches_the_caller_and_leaves_it_usable() -> None:
    """What the model raises comes out of the call and of the stream, and the next call works."""

    def fail(step: int, _logits: torch.Tensor) -> None:
        if step >= 2:
            msg = "out of order"
            raise RuntimeError(msg)

    generator = wrapper("llama")
    with checkpoints.on_logits(generator.model, fail), pytest.raises(RuntimeError, match="out of order"):
        generator(texts("llama"), max_new_tokens=6)
    chunks = []
    with checkpoints.on_logits(generator.model, fail), pytest.raises(RuntimeError, match="out of order"):
        chunks.extend(generator.stream(texts("llama"), max_new_tokens=6))
    assert chunks
    assert (
        token_rows([generator("She", max_new_tokens=6)])[0]
        == checkpoints.generated("llama", ["She"], max_new_tokens=6)[0]
    )


# Threads


@pytest.mark.parametrize("name", ["llama", "mamba", "m2m100"])
def test_eight_threads_get_what_one_gets(name: str) -> None:
    """Calls from eight threads, with options of their own, give the results of the same calls in turn."""
    options = checkpoints.languages(name)
    work = [
        ([text, texts(name)[0]], {"max_new_tokens": 3 + n % 4, "seed": n, "temperature": 0.5 * n})
        for n, text in enumerate(texts(name) * 4)
    ]

    def call(given: tuple[list[str], dict[str, Any]]) -> list[list[int]]:
        return token_rows(wrapper(name)(given[0], **given[1], **options))

    serial = [call(given) for given in work]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(call, work)) == serial


def test_streams_of_several_threads_do_not_mix() -> None:
    """Streams consumed in turns by one thread, and calls of another in between, each give their own text."""
    generator = wrapper("gpt2")
    expected = [r.text for r in generator(texts("gpt2"), max_new_tokens=10)]
    streams = [generator.stream(text, max_new_tokens=10) for text in texts("gpt2")]
    found = [""] * len(streams)
    during: list[Any] = []
    caller = threading.Thread(target=lambda: during.extend(generator(texts("gpt2"), max_new_tokens=10)))
    caller.start()
    running = set(range(len(streams)))
    while running:
        for n in sorted(running):
            chunk = next(streams[n], None)
            if chunk is None:
                running.discard(n)
            else:
                found[n] += chunk.text
    caller.join()
    assert found == expected
    assert [r.text for r in during] == expected


# Text while it grows


def from_bytes(token_ids: Any) -> str:
    """Decode tokens that are bytes of UTF-8."""
    return bytes(token_ids).decode("utf-8", errors="replace")


BYTES: Any = SimpleNamespace(decode=from_bytes, whole_tokens=len)
"""A codec whose tokens are bytes."""


def shown(feed: TextFeed, *, final: bool) -> str:
    """Return the new text that can be shown, and take note that it was."""
    text, feed.released = feed.unreleased(final=final)
    return text


def released(data: bytes, stop: tuple[str, ...] = ()) -> tuple[list[str], TextFeed]:
    """Feed bytes one by one; return what each released, and the feed."""
    feed = TextFeed(BYTES, stop)
    pieces = []
    for n in range(1, len(data) + 1):
        feed.read(list(data[:n]))
        final = n == len(data) or feed.stop_reason is not None
        pieces.append(shown(feed, final=final))
        if final:
            break
    return pieces, feed


def test_half_a_character_is_held_back() -> None:
    """Bytes of an unfinished character release nothing until the last one is there."""
    assert released("a€é!".encode())[0] == ["a", "", "", "€", "", "é", "!"]


def test_a_half_character_at_the_very_end_is_shown() -> None:
    """What stays incomplete to the end is released with the last token, as the whole text has it."""
    pieces, feed = released("a€".encode()[:-1])
    assert pieces[:2] == ["a", ""]
    assert "".join(pieces) == feed.text == "a\N{REPLACEMENT CHARACTER}"


def test_a_possible_stop_string_is_held_back() -> None:
    """The beginning of a stop string is released only once it cannot become one."""
    assert released(b"xENxENDy", ("END",))[0] == ["x", "", "", "ENx", "", "", ""]
    assert released(b"aab", ("aac",))[0] == ["", "", "aab"]


def test_a_stop_string_may_go_on_in_a_half_character() -> None:
    """The beginning of a stop string is held back while the next character is still in pieces."""
    assert released("xE€".encode(), ("E€",))[0] == ["x", "", "", "", ""]


def test_the_earliest_stop_string_wins() -> None:
    """Of several stop strings the one that begins first cuts, and the longer of two that begin together."""
    feed = TextFeed(BYTES, ("world", "lo w", "lo"))
    feed.read(list(b"hello world"))
    assert (feed.text, feed.stop_reason) == ("hel", "lo w")


@pytest.mark.parametrize("name", CAUSAL)
def test_tokens_of_any_bytes_stream_to_the_whole_text(name: str) -> None:
    """Whatever tokens come, the released pieces joined are the text the tokenizer decodes at the end."""
    tokenizer = reference(name)[1]
    draws = torch.Generator().manual_seed(3)
    for _ in range(40):
        ids = torch.randint(len(tokenizer), (12,), generator=draws).tolist()
        feed = TextFeed(Codec(tokenizer), ())
        pieces = []
        for n in range(1, len(ids) + 1):
            feed.read(ids[:n])
            pieces.append(shown(feed, final=n == len(ids)))
        assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)


def test_outcomes_can_be_pickled() -> None:
    """A result goes through pickle and comes back equal."""
    result = wrapper("llama")("She", max_new_tokens=3, logprobs=2)
    assert pickle.loads(pickle.dumps(result)) == result  # noqa: S301 - written in the line itself
