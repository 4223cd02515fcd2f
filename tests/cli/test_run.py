import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import checkpoints
import lmkit
from lmkit.cli.commands import app

ROWS = 400
SAILOR = "The old sailor"
DRAWN: dict[str, Any] = {"temperature": 0.8, "top_k": 2, "seed": 3, "max_new_tokens": 8}
"""Of two tokens, since the last bit of a sum may move a draw, and which rows are beside one depends on time."""


def run(*arguments: str, given: bytes = b"") -> Result:
    """Run a command in this process, its input and output as pipes."""
    return CliRunner().invoke(app, ["run", *arguments], input=given)


def rows(path: Path, count: int = ROWS) -> Path:
    """Write as many rows."""
    path.write_text("".join(f'{{"n": {n}, "text": "She wrote {n}"}}\n' for n in range(count)))
    return path


def answers(text: str) -> list[str]:
    """Return the answers in JSONL."""
    return [json.loads(line)["answer"] for line in text.splitlines()]


def drawn(*more: str) -> list[str]:
    """Say how rows are drawn, all alike."""
    return [*(f"--{name.replace('_', '-')}={value}" for name, value in DRAWN.items()), *more]


def test_a_file_is_done_as_by_the_library(tmp_path: Path) -> None:
    """Options, columns, schemas and words for other options reach `run_job`; the report is told, or JSON."""
    folder, source = str(checkpoints.folder("gpt2")), tmp_path / "in.jsonl"
    source.write_text('{"p": "The old sailor", "k": 3}\n{"p": "Once", "k": null}\n')
    out, mine = tmp_path / "out.jsonl", tmp_path / "mine.jsonl"
    given = ["--column", "p", "--from", "max_new_tokens=k", "--option", "repetition_penalty=1.5", "--full", "--json"]
    told = run("causal", folder, str(source), str(out), *given)
    report = checkpoints.wrapper("gpt2").run_job(
        source, mine, column="p", columns={"max_new_tokens": "k"}, repetition_penalty=1.5, full=True
    )
    assert told.exit_code == 0, told.stderr
    assert answers(out.read_text()) == answers(mine.read_text())
    assert json.loads(told.stdout)["rows"] == report.rows == 2
    assert "2 rows in" in told.stderr
    assert "none failed" in told.stderr
    schema = tmp_path / "yes.json"
    schema.write_text('{"enum": ["yes", "no"]}')
    told = run("causal", folder, str(source), str(out), "--column", "p", "--schema", str(schema), "--restart")
    assert set(answers(out.read_text())) <= {"yes", "no"}
    assert (told.exit_code, told.stdout) == (0, "")


def test_what_is_refused_is_one_line(tmp_path: Path) -> None:
    """Other options, files of no format before anything is loaded, and words that are written wrongly."""
    folder, source, out = str(checkpoints.folder("gpt2")), rows(tmp_path / "in.jsonl", 2), str(tmp_path / "out.jsonl")
    assert run("causal", folder, str(source), out, "--max-new-tokens", "2").exit_code == 0
    told = run("causal", folder, str(source), out, "--max-new-tokens", "3")
    assert told.exit_code == 1
    assert "--max-new-tokens was 2 and is 3" in told.stderr
    assert "begin anew with --restart." in told.stderr
    told = run("causal", "nowhere", str(source), "out.txt")
    assert (told.exit_code, "'.jsonl'" in told.stderr) == (1, True)
    told = run("causal", folder, str(source), out, "--from", "seed")
    assert (told.exit_code, "--from 'seed' is not written as NAME=VALUE" in told.stderr) == (2, True)


def test_failed_rows_are_counted_and_exit_with_3(tmp_path: Path) -> None:
    """The output is there, and a script can tell."""
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "She"}\n{"text": 5}\n')
    told = run("causal", str(checkpoints.folder("gpt2")), str(source), str(tmp_path / "o.csv"), "--max-new-tokens", "2")
    assert told.exit_code == 3
    assert "1 FAILED, see their errors" in told.stderr
    assert len((tmp_path / "o.csv").read_text().splitlines()) == 3


def test_pipes_have_the_same_rows(tmp_path: Path) -> None:
    """From standard input to standard output, with what is said of them on standard error."""
    folder, source = str(checkpoints.folder("gpt2")), rows(tmp_path / "in.jsonl", 5)
    piped = run("causal", folder, "-", "-", *drawn("--json"), given=source.read_bytes())
    checkpoints.wrapper("gpt2").run_job(source, tmp_path / "o.jsonl", **DRAWN)
    assert piped.stdout == (tmp_path / "o.jsonl").read_text(encoding="utf-8")
    assert "5 rows in standard output" in piped.stderr


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with many rows, and what they are answered when nothing comes between."""
    folder = tmp_path_factory.mktemp("unbroken")
    source = rows(folder / "in.jsonl")
    with lmkit.load("causal", str(checkpoints.folder("gpt2"))) as generator:
        generator.run_job(source, folder / "whole.jsonl", **DRAWN)
    return folder


def started(*arguments: Any, **streams: Any) -> "subprocess.Popen[bytes]":
    """Start the command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "lmkit", "run", "causal", str(checkpoints.folder("gpt2")), *map(str, arguments)],
        stderr=subprocess.PIPE, env={**os.environ, "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1"}, **streams,
    )  # fmt: skip


def wait_for_rows(journal: Path, process: "subprocess.Popen[bytes]") -> None:
    """Wait until some rows are done."""
    until = time.monotonic() + 120
    while process.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") > 40):
        assert time.monotonic() < until
        time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_what_is_done(unbroken: Path, tmp_path: Path, number: signal.Signals) -> None:
    """Ctrl-C says that the same line goes on, and exits with 130; after either signal it does, to the same bytes."""
    out = tmp_path / "out.jsonl"
    with started(unbroken / "in.jsonl", out, *drawn()) as process:
        wait_for_rows(tmp_path / "out.jsonl.lmkit" / "journal", process)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == (130 if number == signal.SIGINT else -signal.SIGTERM)
    assert (b"the same command goes on behind them" in errors) == (number == signal.SIGINT)
    assert b"Traceback" not in errors
    assert not out.exists()
    again = run("causal", str(checkpoints.folder("gpt2")), str(unbroken / "in.jsonl"), str(out), *drawn(), "--json")
    assert out.read_bytes() == (unbroken / "whole.jsonl").read_bytes()
    assert 40 <= json.loads(again.stdout)["kept"] < ROWS


@pytest.mark.slow
def test_a_closed_pipe_ends_it_quietly_and_is_gone_on_with(unbroken: Path, tmp_path: Path) -> None:
    """A reader who has had enough ends the command with 0; with a journal named, all rows are there the next time."""
    given = (unbroken / "in.jsonl").read_bytes()
    with started(
        "-", "-", *drawn("--journal", tmp_path / "kept"), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write(given)
        process.stdin.close()
        first = process.stdout.readline()
        process.stdout.close()
        errors = process.stderr.read()
        code = process.wait(60)
    whole = (unbroken / "whole.jsonl").read_bytes()
    assert whole.startswith(first)
    assert (code, errors) == (0, b"")
    again = run(
        "causal", str(checkpoints.folder("gpt2")), "-", "-", *drawn("--journal", str(tmp_path / "kept")), given=given
    )
    assert again.stdout.encode() == whole
    assert "kept from before" in again.stderr


def test_a_log_line_goes_to_standard_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no terminal shows a bar, how far it is comes now and then as a line."""
    monkeypatch.setattr("lmkit.wrappers.progress.LOG_SECONDS", 0)
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stderr", shown)
    told = run("causal", str(checkpoints.folder("gpt2")), str(rows(tmp_path / "in.jsonl", 3)), str(tmp_path / "o.csv"))
    assert "lmkit: 2 of 3 rows, " in told.stderr
