"""The scripts in examples/ run from any folder; what needs the large model is slow, and a kernel runs the notebook."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
TAKES_LONG = {"async_chat", "choose_answers", "extract_people"}  # they read the GGUF file of a chat model
NOT_HERE = {"demo", "openai_server", "smollm2"}  # nox -s demo runs the first, test_openai_server the second
SCRIPTS = [
    pytest.param(path, marks=pytest.mark.slow if path.stem in TAKES_LONG else (), id=path.stem)
    for path in sorted(EXAMPLES.glob("*.py"))
    if path.stem not in NOT_HERE
]


def run(path: Path, folder: Path) -> str:
    """Run a script the way a reader does, from another folder; return what it printed."""
    done = subprocess.run(
        [sys.executable, "-W", "error", path],
        cwd=folder,
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=environment(),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def environment() -> dict[str, str]:
    """Return this process's environment, with the Hub out of reach."""
    return os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONUTF8": "1"}


@pytest.mark.parametrize("path", SCRIPTS)
def test_a_script_runs_and_prints(path: Path, tmp_path: Path) -> None:
    """An example works without a network, without warnings and from any folder."""
    assert run(path, tmp_path).strip()


def test_map_loses_no_line(tmp_path: Path) -> None:
    """The line that is too long prints its error, and the lines around it their translations."""
    printed = run(EXAMPLES / "batch_with_map.py", tmp_path).splitlines()
    assert [line.split()[0] for line in printed] == list("123456")
    assert "failed" in printed[3]
    assert printed[1] == "2  twenty-two → veintidós"


def test_the_notebook_is_saved_without_outputs() -> None:
    """A diff of the notebook shows what was written, not what a machine answered."""
    cells = json.loads((EXAMPLES / "tour.ipynb").read_text(encoding="utf-8"))["cells"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells if "outputs" in cell)
