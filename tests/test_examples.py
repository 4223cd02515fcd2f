"""The scripts in examples/ run from any folder; what needs the large model is slow, and a kernel runs the notebook."""

import doctest
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
PAGES = sorted((EXAMPLES.parent / "docs").glob("*.md"))
SHOWN = re.compile(r"<!-- example: (?P<name>\w+)\.py -->\n+```text\n(?P<output>.*?)^```$", re.DOTALL | re.MULTILINE)
TAKES_LONG = {"async_chat", "call_a_tool", "choose_answers", "extract_people"}  # they read a chat model's GGUF file
MATCHING = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
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
def test_a_script_prints_what_its_page_shows(path: Path, tmp_path: Path) -> None:
    """An example works without a network, without warnings and from any folder."""
    (shown,) = [found for page in PAGES for found in SHOWN.finditer(page.read_text("utf-8")) if found[1] == path.stem]
    printed = run(path, tmp_path)
    assert doctest.OutputChecker().check_output(shown["output"], printed, MATCHING), printed


def test_examples_are_short() -> None:
    """They have at most 60 lines; the server, which is a whole service, 200."""
    lengths = {path.stem: len(path.read_text("utf-8").splitlines()) for path in EXAMPLES.glob("*.py")}
    assert {name for name, lines in lengths.items() if lines > 60} == {"openai_server"}
    assert lengths["openai_server"] <= 200


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
