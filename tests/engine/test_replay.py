"""When compiled steps are recorded and replayed, on a CPU whose records are made by hand; tests/gpu has CUDA's own."""

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import checkpoints
import lmkit
from checkpoints import texts
from lmkit.engine import graph, replay
from lmkit.engine.replay import FEWEST, Replay


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record on a CPU as CUDA does: what is replayed reads and writes the tensors of the record, whatever is given."""
    found: list[str] = []

    def recorded(run: Callable[[], torch.Tensor], _device: torch.device) -> tuple[Callable[[], None], torch.Tensor]:
        found.append("recorded")
        result = run().clone()

        def again() -> None:
            found.append("replayed")
            result.copy_(run())

        return again, result

    monkeypatch.setattr(replay, "recorded", recorded)
    return found


def step(small: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
    """Write into a buffer, and return a sum of what is in it: the same when it is done twice, as by records by hand."""
    buffer[:, 0] = small
    return buffer.sum(1)


def test_a_step_is_recorded_once_its_buffers_stay(records: list[str]) -> None:
    """Steps run as they are first; then each takes its own small inputs, until a buffer or a shape is another one."""
    replayed, buffer = Replay(), torch.ones(2, 3)
    for number in range(6):
        found = replayed(step, [torch.full((2,), float(number)), buffer], range(1, 2))
        assert found.tolist() == [number + 2.0] * 2
        assert buffer[:, 0].tolist() == [number] * 2
    assert records == ["recorded", *["replayed"] * (6 - FEWEST)]
    other = torch.zeros(2, 3)
    for _ in range(FEWEST):
        replayed(step, [torch.ones(2), other], range(1, 2))
    assert records.count("recorded") == 1
    replayed(step, [torch.ones(2), other], range(1, 2))
    assert records.count("recorded") == 2


def test_a_result_outlives_the_next_replay(records: list[str]) -> None:
    """What a replay gives is the caller's own."""
    replayed, buffer = Replay(), torch.zeros(2, 3)
    results = [replayed(step, [torch.ones(2), buffer], range(1, 2)) for _ in range(6)]
    assert "replayed" in records
    assert len({result.data_ptr() for result in results}) == len(results)


def test_a_record_holds_no_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values that a batch lets go are free, whether or not their step was recorded."""
    monkeypatch.setattr(replay, "recorded", lambda _run, _device: (lambda: None, torch.zeros(2)))
    replayed, buffer = Replay(), torch.zeros(2, 3)
    for _ in range(FEWEST + 2):
        replayed(step, [torch.ones(2), buffer], range(1, 2))
    held = weakref.ref(buffer)
    del buffer
    assert held() is None


def test_what_cannot_be_recorded_runs_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A refusal is told once, with the reason."""

    def refuse(*_: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(replay, "recorded", refuse)
    replayed, buffer = Replay(), torch.zeros(2, 3)
    for number in range(5):
        found = replayed(step, [torch.full((2,), float(number)), buffer], range(1, 2))
        assert found.tolist() == [number] * 2
    (told,) = [record.getMessage() for record in caplog.records if "CUDA graphs" in record.getMessage()]
    assert "not permitted when stream is capturing" in told


@pytest.mark.slow
def test_replayed_steps_have_the_tokens_of_generate(
    records: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of several budgets leave a batch whose steps are replayed, and all have their tokens."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(graph, "REPLAYED_ON", ("cuda", "cpu"))
    prompts, budgets = texts("llama"), [5, 12, 24, 9, 24]
    with lmkit.load("causal", str(checkpoints.folder("llama")), "float32", "cpu", compile=True) as generator:
        found = generator(prompts, max_new_tokens=budgets[: len(prompts)])
        for prompt, budget, result in zip(prompts, budgets, found, strict=False):
            assert list(result.token_ids) == checkpoints.generated("llama", [prompt], max_new_tokens=budget)[0]
        assert records.count("recorded") > 1
        assert records.count("replayed") > 10
