"""Text while it grows, in rows of hundreds of tokens."""

from typing import Any

import pytest
import torch

import tokenizers_tiny as tiny
from checkpoints import CAUSAL, SEQ2SEQ, reference
from lmkit.engine.stream_text import WINDOW, TextFeed
from lmkit.text.codec import Codec

LENGTH = 400


class Counting(Codec):
    """A codec that counts the tokens it decodes."""

    def __init__(self, tokenizer: Any) -> None:
        """Begin at none."""
        super().__init__(tokenizer)
        self.decoded = 0

    def decode(self, token_ids: Any) -> str:
        """Count, and decode."""
        self.decoded += len(token_ids)
        return super().decode(token_ids)


def drawn(tokenizer: Any, seed: int, *, special: bool) -> list[int]:
    """Draw hundreds of tokens, with special ones among them or not."""
    draws = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(len(tokenizer), (2 * LENGTH,), generator=draws).tolist()
    return [token for token in ids if special or token not in set(tokenizer.all_special_ids)][:LENGTH]


def released(feed: TextFeed, *, final: bool) -> str:
    """Return the new text that can be shown, and take note that it was."""
    text, feed.released = feed.unreleased(final=final)
    return text


def fed(codec: Any, ids: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], TextFeed, list[int]]:
    """Feed tokens one by one; return what each released, the feed, and how many tokens each made it decode."""
    feed, pieces, costs = TextFeed(codec, stop), [], []
    before = 0
    for count in range(1, len(ids) + 1):
        feed.read(ids[:count], final=count == len(ids))
        ended = feed.stop_reason is not None
        pieces.append(released(feed, final=ended or count == len(ids)))
        costs.append(getattr(codec, "decoded", 0) - before)
        before += costs[-1]
        if ended:
            break
    return pieces, feed, costs


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("name", [*CAUSAL, *SEQ2SEQ])
def test_the_pieces_of_a_long_row_are_its_text(name: str, *, special: bool) -> None:
    """Of whatever hundreds of tokens, the released pieces joined are what the tokenizer decodes at the end."""
    tokenizer = reference(name)[1]
    for seed in range(2):
        ids = drawn(tokenizer, seed, special=special)
        pieces, feed, _ = fed(Codec(tokenizer), ids)
        assert "".join(pieces) == feed.text == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("name", [*CAUSAL, *SEQ2SEQ])
def test_a_long_row_costs_no_more_per_token_than_a_short_one(name: str) -> None:
    """A step decodes a bounded number of tokens however long the row is; only the last reads all once more."""
    codec = Counting(reference(name)[1])
    words = reference(name)[1](
        "The old sailor told the children a story. Every morning the baker opens the small shop near the river. " * 30,
        add_special_tokens=False,
    )["input_ids"][:LENGTH]
    assert len(words) == LENGTH
    _, _, costs = fed(codec, words)
    early, late = sum(costs[100:200]), sum(costs[299:399])
    assert late <= 1.5 * early
    assert late <= 100 * 3 * 2 * WINDOW
    assert costs[-1] <= LENGTH + 6 * WINDOW


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "bloom", "t5"])
def test_a_stop_string_late_in_a_row_cuts_where_it_begins(name: str) -> None:
    """A stop string that only comes after hundreds of tokens is found at the first token that completes it."""
    tokenizer = reference(name)[1]
    for seed in range(3):
        ids = drawn(tokenizer, seed, special=False)
        text = tokenizer.decode(ids, skip_special_tokens=True).replace("\N{REPLACEMENT CHARACTER}", " ")
        stop = text[len(text) * 9 // 10 :][:6]
        pieces, feed, _ = fed(Codec(tokenizer), ids, (stop,))
        whole = [tokenizer.decode(ids[:count], skip_special_tokens=True) for count in range(len(pieces) + 1)]
        if stop not in whole[-1]:  # made of half characters, which never show
            assert feed.stop_reason is None
            continue
        assert feed.stop_reason == stop
        assert "".join(pieces) == feed.text == whole[-1][: whole[-1].index(stop)]
        assert not any(stop in text for text in whole[:-1])


@pytest.mark.parametrize("prompt", ["the 你好吗", "the 你好吗谢谢", "the 😀😀😀", "bad \ufffd", "the 你", "the ééééé"])
@pytest.mark.parametrize("answer", [" hello", "中国", "é a"])
@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
def test_an_answer_behind_characters_in_bytes_is_that_answer(make: Any, answer: str, prompt: str) -> None:
    """A prompt that ends in single bytes is decoded as a whole; what stands in it does not come again in the answer."""
    tokenizer = make()
    codec = Codec(tokenizer)
    ids, whole = codec.encode(prompt), codec.encode(prompt + answer)
    assert whole[: len(ids)] == ids
    feed, shown = TextFeed(codec, (), context=codec.visible(ids)), ""
    for count in range(1, len(whole) - len(ids) + 1):
        feed.read(whole[len(ids) :][:count], final=count == len(whole) - len(ids))
        shown += released(feed, final=count == len(whole) - len(ids))
    assert (shown, feed.text) == (answer, answer)
