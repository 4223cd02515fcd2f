from pathlib import Path
from typing import Any

import pytest
import torch

import checkpoints
import lmkit
from checkpoints import texts
from lmkit.engine.prefixes import SHORTEST, PrefixStore, shared

LAYERS, HEADS, SIZE = 2, 2, 3
PER_TOKEN = LAYERS * 2 * HEADS * SIZE * 4


def kept(tokens: int) -> Any:
    """Make the keys and values of so many tokens."""
    return [(torch.ones(HEADS, tokens, SIZE), torch.ones(HEADS, tokens, SIZE)) for _ in range(LAYERS)]


def text(start: int, tokens: int = 100) -> list[int]:
    """Make token ids that begin like no other number's."""
    return [start, *range(1, tokens)]


# The store


def test_the_longest_beginning_is_found() -> None:
    """Of what is kept that which shares most is found, a part of it too; the last token is left to be read."""
    store = PrefixStore(10**6)
    short, long = kept(40), kept(100)
    store.put([*text(0, 40)[:39], 77], short)
    store.put(text(0, 100), long)
    assert store.find([*text(0, 60), 5, 5]) == (long, 60)
    assert store.find([*text(0, 39), 77, 5]) == (short, 40)
    assert store.find(text(0, 100)) == (long, 99)
    assert store.find(text(1)) == (None, 0)


def test_too_little_in_common_is_nothing() -> None:
    """Fewer shared tokens than are worth a copy are not found."""
    store = PrefixStore(10**6)
    store.put(text(0), kept(100))
    assert store.find([*text(0, SHORTEST - 1), 7, 7])[1] == 0
    assert store.find([*text(0, SHORTEST), 7, 7])[1] == SHORTEST
    assert store.find([]) == (None, 0)


def test_what_was_not_used_for_longest_goes_first() -> None:
    """The bytes held never exceed the limit, and what was found last stays longest."""
    store = PrefixStore(300 * PER_TOKEN)
    for number in range(3):
        store.put(text(number), kept(100))
    assert store.nbytes == 300 * PER_TOKEN
    assert store.find(text(0))[1] == 99  # used again
    store.put(text(3), kept(100))
    assert [store.find(text(number))[1] for number in range(4)] == [99, 0, 99, 99]
    store.put(text(4, 250), kept(250))
    assert [store.find(text(number))[1] > 0 for number in range(5)] == [False] * 4 + [True]
    assert store.nbytes == 250 * PER_TOKEN


def test_what_is_larger_than_the_limit_is_not_kept() -> None:
    """A text that does not fit at all drives out nothing."""
    store = PrefixStore(150 * PER_TOKEN)
    store.put(text(0), kept(100))
    store.put(text(1, 200), kept(200))
    assert store.nbytes == 100 * PER_TOKEN
    assert store.find(text(0))[1] == 99


def test_a_longer_text_takes_the_place_of_its_beginning() -> None:
    """A conversation that goes on is kept once, and is known to be there."""
    store = PrefixStore(10**6)
    store.put(text(0, 50), kept(50))
    assert not store.holds(text(0, 80))
    store.put(text(0, 80), kept(80))
    assert store.nbytes == 80 * PER_TOKEN
    assert store.holds(text(0, 80))
    assert store.holds(text(0, 50))
    assert not store.holds(text(1, 50))
    store.clear()
    assert (store.nbytes, store.holds(text(0, 50))) == (0, False)


@pytest.mark.parametrize(
    "first, second, count", [("", "abc", 0), ("abc", "abd", 2), ("abc", "abc", 3), ("ab", "abc", 2)]
)
def test_shared_counts_to_the_first_difference(first: str, second: str, count: int) -> None:
    """Two texts share the tokens before the first that differs."""
    import numpy as np

    pair = [np.array([ord(letter) for letter in word], dtype=int) for word in (first, second)]
    assert shared(*pair) == shared(*reversed(pair)) == count


# The generator


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a chat model with a context of 2,000 tokens."""

    def lengthen(model: Any, _tokenizer: Any) -> None:
        model.config.max_position_embeddings = 2000

    return checkpoints.changed("qwen3", tmp_path_factory.mktemp("prefixes") / "qwen3", lengthen)


def opened(folder: Path, **options: Any) -> Any:
    """Load the model for one test."""
    return lmkit.load("causal", str(folder), "float32", "cpu", **options)


def columns(seen: list[dict[str, Any]]) -> list[tuple[int, ...]]:
    """Return the shapes of the forward passes that read more than one token per row."""
    return [tuple(kwargs["input_ids"].shape) for kwargs in seen if kwargs["input_ids"].shape[1] > 1]


def tokens(results: list[Any]) -> list[tuple[int, ...]]:
    """Return the tokens of results."""
    return [result.token_ids for result in results]


DOCUMENT = " ".join(texts("qwen3") * 6)
QUESTIONS = [
    f"{DOCUMENT} {word}" for word in ("She", "The old sailor", "My friend", "Every morning the baker", "where")
]


def test_rows_of_a_call_read_what_they_share_once(folder: Path) -> None:
    """Five questions about one document: it is read for one of them, and the results are those without reuse."""
    with opened(folder, prefix_cache_bytes=0) as plain:
        expected = tokens(plain(QUESTIONS, max_new_tokens=8))
        assert (plain.stats.reused_tokens, plain.stats.prefix_bytes) == (0, 0)
        ids = [plain.tokenizer(question)["input_ids"] for question in QUESTIONS]
    with opened(folder) as generator:
        with checkpoints.forwards(generator.model) as seen:
            assert tokens(generator(QUESTIONS, max_new_tokens=8)) == expected
        document = next(n for n in range(min(map(len, ids))) if len({row[n] for row in ids}) > 1)
        # Rows of a batch read the same number of columns, so that those with short endings read a bit more.
        ending = max(map(len, ids)) - document
        assert document > 400
        assert generator.stats.reused_tokens >= 4 * (document - ending)
        assert generator.stats.reused_tokens + generator.stats.prompt_tokens == sum(map(len, ids))
        assert sum(rows * width for rows, width in columns(seen)) <= max(map(len, ids)) + 4 * ending


@pytest.mark.parametrize("rows, common, shares", [(12, 12, True), (12, 7, False), (3, 12, False), (3, 33, True)])
def test_a_short_beginning_is_shared_if_rows_and_tokens_are_enough(
    folder: Path, rows: int, common: int, *, shares: bool
) -> None:
    """What rows of a call begin with is read once if that saves 64 tokens in all, and 8 of each; results stay."""
    with opened(folder) as generator, opened(folder, prefix_cache_bytes=0) as plain:
        ids = generator.tokenizer(DOCUMENT)["input_ids"]
        apart = [token for token in dict.fromkeys(ids) if token not in ids[:common]][:rows]
        assert len(apart) == rows
        prompts = [generator.tokenizer.decode([*ids[:common], token, *ids[60:80]]) for token in apart]
        read = [tuple(generator.tokenizer(prompt)["input_ids"]) for prompt in prompts]
        assert len({row[:common] for row in read}) == 1
        assert len({row[: common + 1] for row in read}) == rows
        with checkpoints.forwards(generator.model) as seen:
            assert tokens(generator(prompts, max_new_tokens=3)) == tokens(plain(prompts, max_new_tokens=3))
        assert generator.stats.reused_tokens == (common * (rows - 1) if shares else 0)
        assert len(columns(seen)) == 1 + shares
        again = generator([*reversed(prompts)], max_new_tokens=3)
        assert tokens(again) == tokens(plain([*reversed(prompts)], max_new_tokens=3))


def test_a_chat_in_a_loop_reads_only_the_new_turn(folder: Path) -> None:
    """From the second turn on, what is read is what the earlier turns' prompts and answers do not hold."""
    questions = [DOCUMENT, "She", "The old sailor", "Birds"]
    with opened(folder) as generator, opened(folder, prefix_cache_bytes=0) as plain:
        messages: list[dict[str, str]] = []
        known: list[int] = []
        for turn, question in enumerate(questions):
            messages.append({"role": "user", "content": question})
            template = generator.tokenizer.apply_chat_template
            prompt = list(template(messages, add_generation_prompt=True)["input_ids"])
            common = next((n for n, (a, b) in enumerate(zip(prompt, known, strict=False)) if a != b), len(known))
            with checkpoints.forwards(generator.model) as seen:
                answer = generator.chat(messages, max_new_tokens=6)
            assert answer.token_ids == plain.chat(messages, max_new_tokens=6).token_ids
            assert columns(seen)[0] == (1, len(prompt) - common)
            assert turn == 0 or columns(seen)[0][1] < len(prompt) / 5
            messages.append({"role": "assistant", "content": answer.text})
            known = [*prompt, *answer.token_ids]
            if answer.finish_reason == "length":
                known = known[:-1]  # the last token was chosen, but never read
        assert generator.stats.reused_tokens > 3 * len(generator.tokenizer(DOCUMENT)["input_ids"])


@pytest.mark.parametrize("options", [{}, {"temperature": 1.1, "seed": 7}, {"repetition_penalty": 1.3, "logprobs": 2}])
def test_reuse_changes_no_result(folder: Path, options: dict[str, Any]) -> None:
    """The same prompts again, longer and shorter ones, in any order: results are those without reuse."""
    prompts = [QUESTIONS[0], QUESTIONS[0], DOCUMENT, f"{QUESTIONS[2]} plays", DOCUMENT[:-40], "She", QUESTIONS[1]]
    with opened(folder) as generator, opened(folder, prefix_cache_bytes=0) as plain:
        for prompt in prompts:
            mine, expected = (model(prompt, max_new_tokens=6, **options) for model in (generator, plain))
            assert (mine.token_ids, mine.text) == (expected.token_ids, expected.text)
            if mine.logprobs:
                found = [entry.logprob for entry in mine.logprobs]
                assert found == pytest.approx([entry.logprob for entry in expected.logprobs], abs=1e-3)
        together = generator(prompts, max_new_tokens=6, **options)
        assert tokens(together) == tokens(plain(prompts, max_new_tokens=6, **options))
        assert generator.stats.reused_tokens > 1000


def test_the_budget_holds(folder: Path) -> None:
    """What is kept stays within `prefix_cache_bytes` whatever is asked, and goes when the generator is closed."""
    budget = 700 * 2 * 2 * 2 * 8 * 4  # 700 tokens: two layers, keys and values, two heads of 8, float32
    with opened(folder, prefix_cache_bytes=budget) as generator:
        for number in range(6):
            generator(f"{number} {DOCUMENT}"[: 300 + 200 * number], max_new_tokens=4)
            assert 0 < generator.stats.prefix_bytes <= budget
        before = generator.stats.reused_tokens
        generator(f"5 {DOCUMENT}"[:1300], max_new_tokens=4)
        assert generator.stats.reused_tokens > before
        store = generator._engine._batches._prefixes
    assert store.nbytes == 0


@pytest.mark.parametrize("rows, kept", [(8, True), (9, False)])
def test_of_a_large_call_nothing_is_kept_but_what_its_rows_share(folder: Path, rows: int, *, kept: bool) -> None:
    """Eight rows of a call are kept with all they have read; of more, only the prompt that others began behind is."""
    per_token = 2 * 2 * 2 * 8 * 4  # two layers, keys and values, two heads of 8, float32
    apart = [f"{chr(ord('A') + number)} {DOCUMENT}"[:200] for number in range(rows)]
    with opened(folder) as generator:
        results = generator(apart, max_new_tokens=3)
        ids = [generator.tokenizer(prompt)["input_ids"] for prompt in apart]
        assert min(map(len, ids)) >= SHORTEST
        assert generator.stats.reused_tokens == 0
        read = sum(len(row) + result.generated_tokens - 1 for row, result in zip(ids, results, strict=True))
        assert generator.stats.prefix_bytes == (read * per_token if kept else 0)
    with opened(folder) as generator:
        questions = [f"{DOCUMENT} {number}" for number in range(rows)]
        results = generator(questions, max_new_tokens=3)
        ids = [generator.tokenizer(question)["input_ids"] for question in questions]
        read = sum(len(row) + result.generated_tokens - 1 for row, result in zip(ids, results, strict=True))
        assert generator.stats.reused_tokens > (rows - 1) * SHORTEST
        assert generator.stats.prefix_bytes == (read if kept else len(ids[0])) * per_token


def test_a_model_whose_cache_cannot_be_taken_apart_lets_no_row_wait() -> None:
    """Gemma 2's sliding windows keep no prefix, so rows that begin alike are read together."""
    with checkpoints.fresh("gemma2") as generator:
        prompts = [f"{' '.join(texts('gemma2')[3:])} {word}" for word in ("She", "the", "where", "shop")]
        with checkpoints.forwards(generator.model) as seen:
            generator(prompts, max_new_tokens=2, min_new_tokens=2)
        assert generator.stats.prefix_bytes == 0
        assert len(columns(seen)) == 1
