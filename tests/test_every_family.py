"""Every family of the installed transformers writes, translates or fills the same in lmkit, alone and in a batch.

`LMKIT_FAMILIES` says which: "0/3" is the first of three parts, "1/1" writes docs/fidelity.md as well; `nox -s families`
sets it. Without it a few are tried.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import every_family
from lmkit.engine import batches

PAGE = Path(__file__).parents[1] / "docs" / "fidelity.md"
BEGIN, END = "<!-- families: written by nox -s families -- all -->", "<!-- end of families -->"
FEW = {"causal/gemma4", "causal/reformer", "seq2seq/t5", "masked/bert", "images/qwen3_5", "images/llava"}
PART = os.environ.get("LMKIT_FAMILIES", "")
ALL = [f"{task}/{model_type}" for task, model_type in every_family.model_types()]


def tried() -> list[str]:
    """Return the families of this run."""
    if not PART:
        return [name for name in ALL if name in FEW]
    part, parts = map(int, PART.split("/"))
    return ALL if parts == 1 else ALL[part::parts]


@pytest.fixture(scope="module")
def table() -> Iterator[dict[str, str]]:
    """Collect what was found, and write the page when all families were tried."""
    found: dict[str, str] = {}
    yield found
    if len(found) == len(ALL):
        rows = [f"| {name.partition('/')[0]} | `{name.partition('/')[2]}` | {told} |" for name, told in found.items()]
        before, after = PAGE.read_text(encoding="utf-8").split(BEGIN)[0], PAGE.read_text(encoding="utf-8").split(END)[1]
        lines = [BEGIN, "", "| task | model type | result |", "| --- | --- | --- |", *rows, "", END]
        PAGE.write_text(before + "\n".join(lines) + after, encoding="utf-8")


@pytest.mark.parametrize("name", tried())
def test_a_family_is_that_of_plain_transformers(
    name: str,
    table: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tokens and their likelihood are those of plain transformers one by one, and nothing is printed.

    Where a model reads prompts without padding it does so here, little as there is to read.
    """
    monkeypatch.setattr(batches, "TRIAL", 1)
    task, _, model_type = name.partition("/")
    try:
        every_family.save(every_family.built(task, model_type), tmp_path)
        right = every_family.expected(task, tmp_path)
    except Exception as error:  # noqa: BLE001 - it is transformers' own: there is nothing to compare with
        table[name] = f"not tried: transformers does not run it from sizes alone ({type(error).__name__})"
        pytest.skip(f"plain transformers: {type(error).__name__}: {error}")
    capsys.readouterr()
    table[name] = "differs"
    assert every_family.differs(task, tmp_path, right) is None
    table[name] = "same"
    assert not capsys.readouterr().out
