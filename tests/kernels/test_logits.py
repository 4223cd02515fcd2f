"""The likeliest tokens and their probabilities: against torch's own max, topk and log_softmax."""

from typing import Any

import pytest
import torch

from lmkit.kernels import logits
from lmkit.kernels.logits import BLOCKS, COLUMNS, highest, logprobs, top

SIZES = [7, BLOCKS**2 - 1, BLOCKS**2, 5000, 58101]
DTYPES = [torch.float32, torch.bfloat16]


def drawn(rows: int, vocabulary: int, dtype: Any, *, levels: int | None = None) -> torch.Tensor:
    """Draw scores; with few levels, many of them are equal."""
    random = torch.Generator().manual_seed(vocabulary)
    scores = torch.randn(rows, vocabulary, generator=random) * 3
    return (scores if levels is None else (scores * levels).round()).to(dtype)


@pytest.mark.parametrize("levels", [None, 1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", SIZES)
@pytest.mark.parametrize("rows", [1, 5])
def test_the_highest_score_is_the_first_one_that_max_finds(
    rows: int, vocabulary: int, dtype: Any, levels: int | None
) -> None:
    """The value and its first place, where several places have it too."""
    scores = drawn(rows, vocabulary, dtype, levels=levels)
    values, places = highest(scores)
    for row, (value, place) in enumerate(zip(values.tolist(), places.tolist(), strict=True)):
        assert value == max(scores[row].tolist())
        assert place == scores[row].tolist().index(value)


@pytest.mark.parametrize("place", [0, 63, 64, 4999])
def test_the_highest_score_may_be_anywhere(place: int) -> None:
    """At the ends of blocks, and in the last one, which is shorter."""
    scores = torch.zeros(3, 5000)
    scores[:, place] = 1
    assert highest(scores)[1].tolist() == [place] * 3


def test_scores_that_are_no_numbers_show() -> None:
    """NaN wins over all others, and a row of nothing but -inf has that as its highest."""
    scores = drawn(3, 5000, torch.float32)
    scores[1, 4321], scores[2] = torch.nan, -torch.inf
    values, _ = highest(scores)
    assert values[1].isnan()
    assert values[2] == -torch.inf
    assert logprobs(scores, top(scores, 2)).isnan().all(-1).tolist() == [False, True, True]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", SIZES)
@pytest.mark.parametrize("count", [1, 6])
def test_the_likeliest_tokens_are_those_of_topk(count: int, vocabulary: int, dtype: Any) -> None:
    """The best first, each once; where scores are equal any of them may be taken."""
    scores = drawn(5, vocabulary, dtype)
    found = top(scores, count)
    assert torch.equal(scores.gather(1, found), scores.topk(count).values)
    assert all(len(set(row)) == count for row in found.tolist())


def test_all_of_them_may_lie_in_one_column() -> None:
    """Tokens whose places leave the same rest, and those at the end that fill no row of columns."""
    scores = torch.zeros(1, 40 * COLUMNS + 3)
    wanted = [40 * COLUMNS + 2, 3 + 5 * COLUMNS, 3, 3 + 39 * COLUMNS]
    for rank, place in enumerate(wanted):
        scores[0, place] = 9 - rank
    assert top(scores, 4).tolist() == [wanted]


@pytest.mark.parametrize("ask", [highest, lambda scores: top(scores, 4)], ids=["highest", "top"])
def test_a_large_vocabulary_is_not_read_a_number_at_a_time(ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch itself searches is a small part of the scores: that is what makes these faster."""
    seen: list[int] = []

    def spied(name: str) -> Any:
        own = getattr(torch.Tensor, name)

        def method(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            seen.append(self.shape[-1])
            return own(self, *args, **kwargs)

        return method

    for name in ("max", "topk"):
        monkeypatch.setattr(torch.Tensor, name, spied(name))
    ask(drawn(2, 58101, torch.bfloat16))
    assert 0 < max(seen) < 58101 // 20


@pytest.mark.parametrize("dtype", DTYPES)
def test_probabilities_are_those_of_log_softmax(dtype: Any) -> None:
    """More rows than are widened at a time, in float32 from scores of either dtype."""
    scores = drawn(2 * logits.WIDENED + 3, 777, dtype)
    token_ids = torch.randint(777, (len(scores), 4), generator=torch.Generator().manual_seed(0))
    found = logprobs(scores, token_ids)
    assert found.dtype is torch.float32
    torch.testing.assert_close(found.double(), scores.double().log_softmax(-1).gather(1, token_ids), rtol=0, atol=1e-5)
