"""Models in the actors of Ray Data, in Spark's frames, and in pools of processes."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import checkpoints
import lmkit
import lmkit.ray
from lmkit.errors import OptionError, PlacementError
from pool_work import answered

pd = pytest.importorskip("pandas", reason="the extra ray is not installed")
pa = pytest.importorskip("pyarrow", reason="the extra ray is not installed")

ROWS = 1000
OPTIONS = {"max_new_tokens": 4}


def texts(count: int) -> list[str | None]:
    """Make texts, none of them alike; the eighth is missing."""
    return [None if number == 7 else f"She {'old ' * (number % 5)}sailor {number}" for number in range(count)]


@pytest.fixture(scope="module")
def mapper() -> lmkit.ray.Mapper:
    """Load the tiny Llama."""
    return lmkit.ray.Mapper("causal", checkpoints.folder("llama"), "float32", "cpu", **OPTIONS)


@pytest.mark.parametrize("kind", ["table", "frame", "lists", "arrays"])
def test_answers_come_beside_the_columns_of_a_batch(mapper: lmkit.ray.Mapper, kind: str) -> None:
    """What goes in comes out unchanged with new columns, in the kind of batch that it was; a bad row has its error."""
    given = texts(9)
    table = pa.table({"id": range(9), "text": given})
    batch: Any = {
        "table": table,
        "frame": table.to_pandas(),
        "lists": {"id": list(range(9)), "text": given},
        "arrays": {"id": np.arange(9), "text": np.array(given, object)},
    }[kind]
    found = mapper(batch)
    assert isinstance(found, type(batch))
    columns = {
        name: list(found[name].to_pylist() if kind == "table" else found[name])
        for name in ("id", "text", "answer", "error")
    }
    expected = checkpoints.wrapper("llama")([text for text in given if text], **OPTIONS)
    assert columns["id"] == list(range(9))
    assert [text for text in columns["answer"] if not pd.isna(text)] == [result.text for result in expected]
    assert [pd.isna(text) for text in columns["error"]] == [number != 7 for number in range(9)]
    assert "OptionError: row 7 has " in columns["error"][7]


@pytest.mark.parametrize("kind", ["frame", "arrays"])
def test_cells_that_are_arrays_and_missing_numbers_are_read(kind: str) -> None:
    """Lists come as arrays from Ray and Spark, and None among numbers as NaN."""
    batch: Any = {
        "choices": np.array([np.array(["old", "cold"], object), np.array(["sailor"], object)], object),
        "text": np.array(["She", np.nan], object),
    }
    options: Any = {"verb": "rank", "columns": {"choices": "choices"}}
    ranks = lmkit.ray.Mapper("causal", checkpoints.folder("llama"), "float32", "cpu", **options)
    found = ranks(pd.DataFrame(batch) if kind == "frame" else batch)
    assert found["answer"][0] == str(checkpoints.wrapper("llama").rank("She", ["old", "cold"]))
    assert "row 1 has nothing in the column 'text'" in found["error"][1]
    made = lmkit.ray.Mapper(
        "causal", checkpoints.folder("llama"), "float32", "cpu", columns={"max_new_tokens": "limit"}
    )
    limits: Any = {"text": ["She", "The"], "limit": np.array([3, np.nan])}
    found = made(pd.DataFrame(limits) if kind == "frame" else limits)
    assert found["answer"][0] == checkpoints.wrapper("llama")("She", max_new_tokens=3).text
    assert found["answer"][1] == checkpoints.wrapper("llama")("The").text


@pytest.mark.parametrize("task, name, options, kinds", [
    ("causal", "llama", {"verb": "score"}, ["double", "double", "string"]),
    ("causal", "llama", {"verb": "rank", "columns": {"choices": "them"}}, ["string", "double", "string"]),
    ("causal", "llama", {"output": lmkit.OneOf("yes", "no"), "full": True}, ["string", "string", "string", "string"]),
    ("seq2seq", "t5", OPTIONS, ["string", "string", "string"]),
    ("masked", "bert", {}, ["string", "double", "string"]),
])  # fmt: skip
def test_types_are_the_same_whatever_a_batch_has(task: Any, name: str, options: Any, kinds: list[str]) -> None:
    """A batch with nothing but errors has the types of one without: Arrow would not put them together else."""
    made = lmkit.ray.Mapper(task, checkpoints.folder(name), "float32", "cpu", **options)
    good = {"text": ["She [MASK]." if task == "masked" else "She"], "them": [["old", "cold"]]}
    found = [made(pa.table(good)), made(pa.table({"text": pa.array([None], "string"), "them": good["them"]}))]
    for table in found:
        assert [str(field.type) for field in table.schema][2:] == kinds
    assert found[0]["error"].to_pylist() == [None]
    assert found[1]["error"].to_pylist() != [None]


def test_what_cannot_be_a_batch_is_said(mapper: lmkit.ray.Mapper) -> None:
    """A column that would be written over, columns of several lengths, and anything else."""
    with pytest.raises(OptionError, match=r"there is a column 'answer' already: pass a prefix= for the new ones\."):
        mapper({"text": ["She"], "answer": ["no"]})
    with pytest.raises(OptionError, match=r"the columns 'text', 'id' are not equally long\."):
        mapper({"text": ["She"], "id": [1, 2]})
    with pytest.raises(OptionError, match=r"'She' is no batch: pass an Arrow table, a DataFrame or a dict"):
        mapper("She")
    assert mapper({"text": []})["answer"].tolist() == []


def test_a_plan_of_another_machine_is_refused() -> None:
    """Before anything is read, with what differs."""
    folder = checkpoints.folder("llama")
    made = lmkit.plan("causal", folder, "float32", "cpu")
    assert lmkit.ray.Mapper("causal", folder, "float32", "cpu", plan=made)({"text": ["She"]})["error"][0] is None
    with pytest.raises(PlacementError, match=r"^the plan does not hold .*: precision was float32 .* is int8"):
        lmkit.ray.Mapper("causal", folder, "int8", "cpu", plan=made)


def test_a_pool_of_processes_does_it_too(mapper: lmkit.ray.Mapper) -> None:
    """The object can be made in any process."""
    batch = {"text": ["She", "The old"]}
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        there = pool.apply(answered, (checkpoints.folder("llama"), batch), OPTIONS)
    assert there == mapper(batch)["answer"].tolist()


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Start Ray with two cores."""
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    folder = Path("/tmp") / f"lmkit-ray-{os.getpid()}"  # noqa: S108 - the path of a socket has 107 letters at most
    ray.init(num_cpus=2, include_dashboard=False, _temp_dir=str(folder), logging_level="ERROR", log_to_driver=False)
    yield ray
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_a_thousand_rows_on_two_actors_one_of_which_is_killed(
    cluster: Any, mapper: lmkit.ray.Mapper, tmp_path: Path
) -> None:
    """All rows arrive, in order, with the answers of one process; each actor has the threads that Ray gives it."""

    class Told(lmkit.ray.Mapper):
        def __call__(self, batch: Any) -> Any:
            (tmp_path / f"{os.getpid()}").touch()
            threads = pa.array([torch.get_num_threads()] * len(batch))
            return super().__call__(batch).append_column("threads", threads)

    killed: list[int] = []

    def kill() -> None:
        while len(found := sorted(tmp_path.iterdir())) < 2:
            time.sleep(0.05)
        killed.append(int(found[0].name))
        os.kill(killed[0], signal.SIGKILL)

    data = cluster.data
    data.DataContext.get_current().execution_options.preserve_order = True
    given = texts(ROWS)
    items = [{"id": row, "text": text} for row, text in enumerate(given)]
    rows = data.from_items(items, override_num_blocks=50)
    threading.Thread(target=kill, daemon=True).start()
    found = rows.map_batches(
        Told,
        fn_constructor_args=("causal", str(checkpoints.folder("llama")), "float32", "cpu"),
        fn_constructor_kwargs=OPTIONS,
        batch_format="pyarrow",
        batch_size=20,
        compute=data.ActorPoolStrategy(size=2),
        num_cpus=1,
    ).take_all()
    assert killed
    assert [row["id"] for row in found] == list(range(ROWS))
    expected = mapper({"text": given})
    assert [row["answer"] for row in found] == expected["answer"].tolist()
    assert [row["id"] for row in found if row["error"]] == [7]
    assert {row["threads"] for row in found} == {1}
