"""`Mapper`: a model for the actors of Ray Data, for Spark's `mapInPandas`, and for pools of processes."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lmkit.errors import LmkitError, OptionError, PlacementError, listed, shown
from lmkit.jobs.files import Line, json_bytes
from lmkit.loading import LoadOptions, load
from lmkit.loading import plan as plan_of

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

    from lmkit.checkpoint.tasks import TaskWord
    from lmkit.loading import PrecisionArgument
    from lmkit.planning.placement import Devices
    from lmkit.planning.plan import LoadPlan

SAME = ("precision", "kernels", "attention", "engine", "compiled", "context_length", "parameters")
"""What a plan that was made elsewhere has to say of this machine as well."""


class Mapper:
    """Loads a model where it is made, and adds answers to batches of columns.

    ```python
    rows.map_batches(
        lmkit.ray.Mapper,
        fn_constructor_args=("causal", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        fn_constructor_kwargs={"column": "prompt", "max_new_tokens": 64},
        batch_format="pyarrow", concurrency=2, num_cpus=2,
    )
    ```

    Columns, and options of rows, are those of `run_job`. A row that fails has its error in a column, and takes no other
    down. Which devices there are, and how many threads, is what the process sees that makes it.
    """

    def __init__(
        self,
        task: TaskWord,
        name: str | os.PathLike[str],
        precision: PrecisionArgument = "auto",
        devices: Devices = "auto",
        *,
        verb: str | None = None,
        column: str | None = None,
        columns: Mapping[str, str] | None = None,
        prefix: str = "",
        full: bool = False,
        plan: LoadPlan | None = None,
        **options: Any,
    ) -> None:
        """Load the model.

        Args:
            task: As for `load`.
            name: As for `load`.
            precision: As for `load`.
            devices: As for `load`.
            verb: As for `run_job`, as all that follow.
            column: What the model reads.
            columns: Which columns have options of their rows.
            prefix: What the names of the new columns begin with.
            full: Whether rows also have `result`, as JSON.
            plan: One that was made where the job was written: if it does not hold here, nothing is read.
            **options: Those of `load` and of the verb.

        Raises:
            PlacementError: The plan does not hold here.
            LmkitError: As `load` and `run_job` do.
        """
        loading: Any = {option: options.pop(option) for option in LoadOptions.__annotations__ if option in options}
        if plan is not None:
            _check_plan(plan, plan_of(task, name, precision, devices, **loading))
        self._model: Any = load(task, name, precision, devices, **loading)
        self._work = self._model._work(options, verb, column, columns or {}, prefix=prefix, full=full)  # noqa: SLF001
        self._new = {**self._work.columns, self._work.error: "string"}

    def __call__(self, batch: Any) -> Any:
        """Add columns to a batch.

        Args:
            batch: An Arrow table, a pandas `DataFrame`, or a dict of lists or arrays.

        Returns:
            The same kind, with the new columns: texts and numbers, and None (NaN in arrays) where there are none. In
            Arrow tables and frames their types are always the same, whatever the rows of a batch have.

        Raises:
            OptionError: A column is there already, or the batch is something else.
        """
        rows = _rows(batch)
        if taken := [name for name in self._new if rows and name in rows[0]]:
            raise OptionError(f"there is a column {taken[0]!r} already: pass a prefix= for the new ones.")
        found: list[dict[str, Any]] = [{} for _ in rows]

        def asked() -> Iterator[Any]:
            for row, values in enumerate(rows):
                one, problem = self._work.ask(row, Line(values))
                if problem is None:
                    yield one
                else:
                    found[row] = self._columns(problem)

        for row, result in self._work.run(asked()):
            found[row] = self._columns(result)
        return _beside(batch, {name: [row.get(name) for row in found] for name in self._new}, self._new)

    def _columns(self, result: Any) -> dict[str, Any]:
        columns, error = ({}, result) if isinstance(result, LmkitError) else self._work.told(result)
        told = None if error is None else f"{type(error).__name__}: {error}"
        plain = {name: _plain(value, self._new[name]) for name, value in columns.items()}
        return {**plain, self._work.error: told}


def _plain(value: Any, kind: str) -> Any:
    return value if kind or value is None else json_bytes(value).decode()


def _check_plan(before: LoadPlan, now: LoadPlan) -> None:
    pairs = ((name, str(getattr(before, name)), str(getattr(now, name))) for name in SAME)
    if told := [f"{name} was {old} and is {new}" for name, old, new in pairs if old != new]:
        raise PlacementError(f"the plan does not hold on this machine: {'; '.join(told)}. Plan on one like it.")


def _rows(batch: Any) -> list[dict[str, Any]]:
    """Turn a batch into its rows, each a dict of Python's own values."""
    if hasattr(batch, "to_pylist"):
        return list(batch.to_pylist())
    if hasattr(batch, "assign"):
        batch = batch.astype(object).where(batch.notna(), None).to_dict("list")
    if not isinstance(batch, Mapping):
        raise OptionError(f"{shown(batch)} is no batch: pass an Arrow table, a DataFrame or a dict of columns.")
    columns = [_own(list(values)) for values in batch.values()]
    if len({*map(len, columns)}) > 1:
        raise OptionError(f"the columns {listed(batch)} are not equally long.")
    return [dict(zip(batch, values, strict=True)) for values in zip(*columns, strict=True)]


def _own(value: Any) -> Any:
    """Turn arrays into lists, also in each other, and numbers of numpy's into Python's; NaN is a missing value."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, Mapping):
        return {name: _own(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_own(one) for one in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _beside(batch: Any, new: Mapping[str, list[Any]], kinds: Mapping[str, str]) -> Any:
    """Put columns beside those of a batch."""
    if hasattr(batch, "to_pylist"):
        pa = importlib.import_module("pyarrow")
        for name, values in new.items():
            batch = batch.append_column(name, pa.array(values, kinds[name] or "string"))
        return batch
    if hasattr(batch, "assign"):
        pd = importlib.import_module("pandas")
        types = {name: "float64" if kinds[name] == "double" else "string" for name in new}
        return batch.assign(**{name: pd.Series(new[name], batch.index, types[name]) for name in new})
    import numpy as np

    arrays = {name: np.array(new[name], "float64" if kinds[name] == "double" else object) for name in new}
    return {**batch, **arrays}
