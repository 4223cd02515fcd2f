import contextlib
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import checkpoints
from checkpoints import texts, wrapper
from lmkit.engine.speculative import GUESSES, guess

NAMES = ["llama", "gpt2", "qwen3", "bloom", "gemma2", "mistral", "mamba"]


def row(text: str, remaining: int = 100) -> Any:
    """Make a row whose tokens are letters."""
    return SimpleNamespace(input_ids=tuple(text), remaining=remaining)


@pytest.mark.parametrize(
    "text, found",
    [
        ("", ""),
        ("a", ""),
        ("abcd", ""),
        ("abcdXab", "cdXab"),
        ("abcXdabcYeabc", "Yeabc"),  # the last time
        ("bcXabcdYdbcZabc", "dYdbcZabc"),  # three tokens are surer than two
        ("aaaa", "a"),
    ],
)
def test_what_followed_the_last_time_is_guessed(text: str, found: str) -> None:
    """The guess is what followed the latest place where the longest of the last few tokens were before."""
    assert "".join(map(str, guess(row(text)))) == found


def test_no_more_is_guessed_than_can_be_used() -> None:
    """A guess is at most a dozen tokens, and leaves one of the row's budget to the model."""
    text = "abcdefghijklmnopqrstuvwxyz" * 2
    assert len(guess(row(text))) == GUESSES == 12
    assert len(guess(row(text, remaining=5))) == 4
    assert guess(row(text, remaining=1)) == []


@pytest.mark.parametrize("name", NAMES)
def test_greedy_results_are_unchanged(name: str) -> None:
    """With `lookup=True` a greedy row has the tokens of `model.generate`, whatever was guessed."""
    for text in [*texts(name), f"{texts(name)[1]} {texts(name)[1]}"]:
        result = wrapper(name)(text, max_new_tokens=40, lookup=True)
        assert list(result.token_ids) == checkpoints.generated(name, [text], max_new_tokens=40)[0]


@contextlib.contextmanager
def following(model: Any, pairs: Mapping[int, int]) -> Iterator[None]:
    """Let a model continue each token with one certain other, for as long as the block lasts."""
    size = model.config.vocab_size
    table = torch.tensor([pairs.get(token_id, token_id) for token_id in range(size)])

    def hook(_module: Any, _args: Any, kwargs: dict[str, Any], output: Any) -> None:
        read = kwargs["input_ids"][:, -output.logits.shape[1] :]
        output.logits.fill_(0.0).scatter_(2, table[read][..., None], 9.0)

    handle = model.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def circle(name: str, words: list[str]) -> tuple[dict[int, int], list[int]]:
    """Return pairs of tokens that lead around in a circle, and the circle; no token is in it twice."""
    ids = [token for token in dict.fromkeys(checkpoints.encoded(name, " ".join(words))) if token > 2]
    return dict(zip(ids, [*ids[1:], ids[0]], strict=True)), ids


WORDS = ["The", "capital", "of", "France", "is", "Paris", "where", "keys"]


def twice(**options: Any) -> tuple[Any, Any, int, int]:
    """Run a row without and with lookup; return both results, and their forward passes."""
    generator = wrapper("llama")
    prompt = " ".join(WORDS)
    results, counts = [], []
    for lookup in (False, True):
        before = generator.stats.forwards
        results.append(generator(prompt, lookup=lookup, **options))
        counts.append(generator.stats.forwards - before)
    return results[0], results[1], counts[0], counts[1]


def test_repetitive_text_takes_fewer_forwards() -> None:
    """A text that repeats itself is written in less than half the forward passes, token for token the same."""
    pairs, _ = circle("llama", WORDS)
    with following(wrapper("llama").model, pairs):
        plain, looked, slow, fast = twice(max_new_tokens=60)
    assert looked.completions == plain.completions
    assert slow == 60
    assert fast < 30


@pytest.mark.parametrize("budget", range(20, 48, 3))
def test_a_budget_ends_a_row_inside_a_guess(budget: int) -> None:
    """A row never has more tokens than its budget, though more were guessed."""
    pairs, _ = circle("llama", WORDS)
    with following(wrapper("llama").model, pairs):
        plain, looked, _, _ = twice(max_new_tokens=budget, logprobs=1)
    assert looked.completions == plain.completions
    assert (looked.generated_tokens, looked.finish_reason) == (budget, "length")


def test_a_stop_string_ends_a_row_inside_a_guess() -> None:
    """A stop string among accepted guesses cuts the row there."""
    pairs, ids = circle("llama", WORDS)
    with following(wrapper("llama").model, pairs):
        tokenizer = wrapper("llama").tokenizer
        text = wrapper("llama")(" ".join(WORDS), max_new_tokens=60).text
        stop = text[: 2 * len(tokenizer.decode(ids)) + 7]  # two and a bit rounds: lookup guesses by then
        plain, looked, slow, fast = twice(max_new_tokens=60, stop=[stop[-len(stop) // 2 :]])
    assert plain.finish_reason == "stop"
    assert looked.completions == plain.completions
    assert fast < slow


def test_an_end_token_ends_a_row_inside_a_guess() -> None:
    """An end token that the prompt has, and so the guess, ends the row when the model chooses it."""
    generator = wrapper("llama")
    end = generator.tokenizer.eos_token_id
    ids = [token for token in dict.fromkeys(checkpoints.encoded("llama", " ".join(WORDS))) if token > 2]
    line = [*ids, end]
    pairs = dict(zip(line, [*ids[1:], end, end], strict=True))
    prompt = "x" * 3  # the ids are put in place of those of this text
    with pytest.MonkeyPatch.context() as patch, following(generator.model, pairs):
        patch.setattr(generator._codec, "encode", lambda _text: [*line, *ids[:3]])
        results, counts = [], []
        for lookup in (False, True):
            before = generator.stats.forwards
            results.append(generator(prompt, max_new_tokens=60, lookup=lookup))
            counts.append(generator.stats.forwards - before)
    assert results[0].completions == results[1].completions
    assert results[1].finish_reason == "eos"
    assert list(results[1].token_ids) == ids[3:]
    assert counts[0] == len(ids) - 2
    assert counts[1] < counts[0]


def test_a_stream_with_lookup_shows_the_same_text() -> None:
    """Several tokens at a time come as one chunk; the chunks joined are the text."""
    pairs, _ = circle("llama", WORDS)
    with following(wrapper("llama").model, pairs):
        plain = wrapper("llama")(" ".join(WORDS), max_new_tokens=50)
        chunks = list(wrapper("llama").stream(" ".join(WORDS), max_new_tokens=50, lookup=True))
    assert "".join(chunk.text for chunk in chunks) == plain.text
    assert len(chunks) < 40


@pytest.mark.parametrize("options", [{"temperature": 1.2, "seed": 3}, {"repetition_penalty": 1.5}, {"num_beams": 2}])
def test_other_modes_are_unaffected(options: dict[str, Any]) -> None:
    """Sampling, penalties and beams give with `lookup=True` what they give without it."""
    text = f"{texts('llama')[1]} {texts('llama')[1]}"
    plain, looked = (wrapper("llama")(text, max_new_tokens=30, lookup=lookup, **options) for lookup in (False, True))
    assert looked.completions == plain.completions


def test_rows_together_do_not_guess() -> None:
    """Lookup is for a row that runs alone; several at a time give their single results."""
    results = wrapper("llama")(texts("llama"), max_new_tokens=[3, 30, 12, 30, 7], lookup=True)
    for budget, text, result in zip([3, 30, 12, 30, 7], texts("llama"), results, strict=True):
        assert list(result.token_ids) == checkpoints.generated("llama", [text], max_new_tokens=budget)[0]
