"""Which rows begin next, with fakes in place of models, rows and callers."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lmkit.engine import scheduler as module
from lmkit.engine.scheduler import REFILL, Scheduler
from lmkit.planning.keyvalues import KeyValueBytes

MODEL: Any = SimpleNamespace(config=SimpleNamespace(is_encoder_decoder=False), device=torch.device("cpu"))
TOKEN = 192
KEY_VALUES = KeyValueBytes(TOKEN)


@pytest.fixture(autouse=True)
def plenty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let there be a gigabyte free, and room for 1000 tokens."""
    monkeypatch.setattr(module, "_free", lambda _device: 2**30)
    monkeypatch.setattr(module, "BATCH_TOKENS", {"cpu": 1000})


def row(prompt: int, answer: int = 10, name: str = "") -> Any:
    """Make a row of so many tokens."""
    config = SimpleNamespace(max_new_tokens=answer)
    ids = (0,) * prompt
    return SimpleNamespace(
        request=SimpleNamespace(input_ids=ids, config=config),
        input_ids=ids,
        length=prompt,
        name=name,
        width=1,
        behind=0,
    )


class Caller(SimpleNamespace):
    """A ticket, which can be a key."""

    __hash__ = object.__hash__


def ticket(*rows: Any, running: int = 0, lazy: bool = False) -> Any:
    """Make a ticket whose rows wait, those that need most at the end."""
    waiting = sorted(rows, key=lambda one: len(one.input_ids) + one.request.config.max_new_tokens)
    cancelled = SimpleNamespace(is_set=lambda: False)
    return Caller(waiting=waiting, running=running, lazy=lazy, number=object(), left=False, cancelled=cancelled)


def batch(*rows: Any, nbytes: int = 0) -> Any:
    """Make a batch that runs."""
    return SimpleNamespace(rows=list(rows), nbytes=nbytes)


def pick(tickets: list[Any], decoders: tuple[Any, ...] = (), *, joins: bool = True, **more: Any) -> list[Any]:
    """Let a new scheduler, or the one given, choose."""
    chooser = more.pop("scheduler", None) or Scheduler(MODEL, KEY_VALUES)
    found: list[Any] = chooser.pick(tickets, list(decoders), joins=joins, alike=more.pop("alike", lambda _row: None))
    return found


def sizes(rows: list[Any]) -> list[int]:
    """Return the prompts' lengths."""
    return [len(one.input_ids) for one in rows]


def test_nothing_waits_nothing_begins() -> None:
    """Without rows that wait there is no batch."""
    assert pick([]) == []
    assert pick([ticket(running=3)]) == []


def test_rows_begin_by_length() -> None:
    """By prompt and answer together, the shortest row first; the longest where more follow, or none can join."""
    rows = [row(5), row(90), row(40), row(1, 60)]
    assert sizes(pick([ticket(*rows)])) == [5, 40, 1, 90]
    assert sizes(pick([ticket(*rows, lazy=True)])) == [90, 1, 40, 5]
    assert sizes(pick([ticket(*rows)], joins=False)) == [90, 1, 40, 5]


def test_a_batch_is_measured_in_tokens() -> None:
    """Rows times the longest of them stay within the budget: many short ones, or few long ones."""
    assert len(pick([ticket(*[row(90)] * 50)])) == 10
    assert len(pick([ticket(*[row(10)] * 200)])) == 50
    assert sizes(pick([ticket(row(190), *[row(10)] * 50, lazy=True)])) == [190, 10, 10, 10, 10]
    assert sizes(pick([ticket(row(190), *[row(10)] * 49)])) == [10] * 49


def test_a_row_that_needs_more_than_the_budget_begins_alone() -> None:
    """One row always fits, however long; nothing begins beside it."""
    assert sizes(pick([ticket(row(5000), row(5), lazy=True)])) == [5000]
    assert sizes(pick([ticket(row(5000), row(5))])) == [5]
    assert pick([ticket(row(5))], (batch(row(5000)),)) == []


def test_little_memory_makes_small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The budget is no more than half the memory that is free, with what running rows hold."""
    monkeypatch.setattr(module, "_free", lambda _device: 2 * 300 * TOKEN)
    assert len(pick([ticket(*[row(90)] * 50)])) == 3
    monkeypatch.setattr(module, "_free", lambda _device: 0)
    running = batch(*[row(90)] * 2, nbytes=500 * TOKEN)
    assert len(pick([ticket(*[row(90)] * 50)], (running,))) == 3
    assert len(pick([ticket(*[row(90)] * 50)])) == 1


def test_callers_get_rows_by_turns() -> None:
    """A call of many rows does not keep one of a few waiting; who has rows running already comes later."""
    many = ticket(*[row(90, name="many")] * 50)
    few = ticket(*[row(40, name="few")] * 3)
    names = [one.name for one in pick([many, few])]
    assert names == ["many", "few"] * 3 + ["many"] * 4
    busy = ticket(*[row(90, name="busy")] * 50, running=4)
    names = [one.name for one in pick([busy, ticket(*[row(90, name="new")] * 50)])]
    assert names.count("new") == 7
    assert names[:4] == ["new"] * 4


def test_rows_join_those_that_run() -> None:
    """What runs counts towards the budget, by its longest row."""
    running = batch(*[row(90)] * 8)
    assert len(pick([ticket(*[row(10)] * 50)], (running,))) == 2
    assert len(pick([ticket(*[row(10)] * 50)], (batch(*[row(10)] * 8),))) == 42


def test_a_full_batch_waits_until_several_can_join() -> None:
    """One free place among many is not worth a forward pass of its own, but the last rows that wait are."""
    assert REFILL == 8
    waiting = ticket(*[row(10)] * 20)
    running = [row(10)] * 49
    assert pick([waiting], (batch(*running),)) == []
    assert len(pick([waiting], (batch(*running[:44]),))) == 6
    assert len(pick([ticket(row(10))], (batch(*running),))) == 1


def test_prompts_read_together_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that can join later do so once the prompts of a batch are as many tokens as a forward pass reads."""
    monkeypatch.setattr(module, "PROMPT_TOKENS", 100)
    assert len(pick([ticket(*[row(30)] * 20)])) == 4
    assert len(pick([ticket(*[row(30)] * 20)], joins=False)) == 20
    known = [row(30) for _ in range(20)]
    for one in known:
        one.behind = 20  # tokens that it takes over
    assert len(pick([ticket(*known)])) == 11


def test_rows_that_cannot_join_wait_for_a_batch_of_their_own() -> None:
    """An encoder-decoder's rows begin beside a batch once few of their caller's rows are left in it."""
    waiting = [row(10)] * 16
    running = batch(*[row(10)] * 3)
    assert pick([ticket(*waiting, running=3)], (running,), joins=False) == []
    assert len(pick([ticket(*waiting, running=2)], (running,), joins=False)) == 16
    assert len(pick([ticket(*waiting)], (running,), joins=False)) == 16


def test_rows_of_a_batch_are_alike() -> None:
    """Where rows need something in common, those like the first are chosen and the others wait."""
    rows = [row(20), row(30), row(20), row(30), row(10)]
    assert sizes(pick([ticket(*rows)], alike=lambda one: len(one.input_ids))) == [10]
    assert sizes(pick([ticket(*rows, lazy=True)], alike=lambda one: len(one.input_ids))) == [30, 30]


def test_a_failure_halves_and_a_single_one_heals() -> None:
    """After a step of so many rows failed half as many run, until the row that was the reason failed alone."""
    chooser = Scheduler(MODEL, KEY_VALUES)
    waiting = ticket(*[row(10)] * 40)
    for rows, allowed in ((40, 20), (20, 10), (10, 5), (5, 2), (2, 1)):
        chooser.failed(rows, memory=False)
        assert len(pick([waiting], scheduler=chooser)) == allowed
    chooser.failed(1, memory=False)
    assert len(pick([waiting], scheduler=chooser)) == 40


def test_short_memory_stays_short_until_all_is_done() -> None:
    """After running out of memory batches stay small, though a row fails alone, until all rows are done."""
    chooser = Scheduler(MODEL, KEY_VALUES)
    waiting = ticket(*[row(10)] * 40)
    chooser.failed(40, memory=True)
    chooser.failed(1, memory=True)
    chooser.failed(1, memory=False)
    assert len(pick([waiting], scheduler=chooser)) == 20
    chooser.reset()
    assert len(pick([waiting], scheduler=chooser)) == 40


def test_long_prompts_are_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward pass reads a bounded number of prompt tokens over all rows, fewer while other rows wait for it."""
    monkeypatch.setattr(module, "PROMPT_TOKENS", 2048)
    monkeypatch.setattr(module, "PROMPT_TOKENS_BESIDE", 512)
    chooser = Scheduler(MODEL, KEY_VALUES)
    assert [chooser.columns(rows, busy=False) for rows in (1, 8, 5000)] == [2048, 256, 1]
    assert [chooser.columns(rows, busy=True) for rows in (1, 8, 5000)] == [512, 64, 1]


def test_each_card_of_a_divided_model_bounds_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values lie where their layers do: the card with least room for its part decides."""
    places = {"embed": "cuda:0", **{f"layers.{n}": f"cuda:{int(n == 3)}" for n in range(4)}, "head": "cuda:1"}
    model: Any = SimpleNamespace(config=MODEL.config, device=torch.device("meta"), hf_device_map=places)
    free = {"cuda:0": 2**40, "cuda:1": 2 * 25 * TOKEN}
    monkeypatch.setattr(module, "_free", lambda device: free[str(device)])
    monkeypatch.setattr(module, "BATCH_TOKENS", {"cuda": 10**6})
    # A quarter of the layers is on the second card, which has room for a hundred tokens of those: one row.
    assert len(pick([ticket(*[row(80)] * 50)], scheduler=Scheduler(model, KEY_VALUES))) == 1
    free["cuda:1"] = 2 * 100 * TOKEN
    assert len(pick([ticket(*[row(80)] * 50)], scheduler=Scheduler(model, KEY_VALUES))) == 4
    free["cuda:0"] = 2 * 150 * TOKEN
    assert len(pick([ticket(*[row(80)] * 50)], scheduler=Scheduler(model, KEY_VALUES))) == 2


def test_rows_to_come_are_those_that_wait_and_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what waits as many count as a batch has room for beside what runs: by tokens, by memory, after a failure."""
    scheduler = Scheduler(MODEL, KEY_VALUES)
    running = [batch(*[row(90)] * 4)]
    assert scheduler.coming([ticket(*[row(90)] * 3)], running) == 3
    assert scheduler.coming([ticket(*[row(90)] * 50), ticket(row(5))], running) == 6
    gone, search = ticket(*[row(90)] * 50), row(90)
    gone.left, search.width = True, 4
    assert scheduler.coming([gone, ticket(search, row(5))], running) == 1
    monkeypatch.setattr(module, "_free", lambda _device: 2 * 500 * TOKEN)
    assert scheduler.coming([ticket(*[row(90)] * 50)], running) == 1
    scheduler.failed(8, memory=False)
    assert scheduler.coming([ticket(*[row(90)] * 50)], running) == 0
