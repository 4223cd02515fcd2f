"""Translate a file in a process that is killed in the middle, and go on where it was.

Standard library only; for pandas and datasets see the page on jobs.
"""

from __future__ import annotations

import csv
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoints" / "numbers-m2m100"
WORDS = "one two three four five six seven eight nine ten eleven twelve".split()
ENOUGH = 20
LANGUAGES = ("deu_Latn", "fra_Latn", "spa_Latn")


def command(source: Path, output: Path) -> list[str]:
    """Return the line that is run, each time the same."""
    options = ["--source", "eng_Latn", "--from", "target=language", "--temperature", "0.5", "--seed", "1"]
    return [sys.executable, "-m", "lmkit", "run", "seq2seq", str(CHECKPOINT), str(source), str(output), *options]


def done(journal: Path) -> int:
    """Count the rows that a journal has: a line for each behind the first."""
    return max(journal.read_bytes().count(b"\n") - 1, 0) if journal.exists() else 0


def main() -> None:
    """Write a table, kill a job on it, run it again, and show the last rows."""
    with tempfile.TemporaryDirectory() as where:
        source, output = Path(where, "numbers.csv"), Path(where, "translated.csv")
        with source.open("w", newline="", encoding="utf-8") as file:
            rows = [(f"{first} thousand and {last}", to) for first in WORDS for last in WORDS for to in LANGUAGES]
            csv.writer(file).writerows([("text", "language"), *rows])

        process = subprocess.Popen(command(source, output), stderr=subprocess.DEVNULL)  # noqa: S603 - lmkit itself
        journal = Path(where, "translated.csv.lmkit", "journal")
        while process.poll() is None and done(journal) < ENOUGH:
            time.sleep(0.002)
        process.kill()
        process.wait()
        print(f"killed with {done(journal)} of {len(rows)} rows done; is there an output? {output.exists()}")

        again = subprocess.run(command(source, output), capture_output=True, text=True, check=True)  # noqa: S603
        print(again.stderr.strip())
        with output.open(newline="", encoding="utf-8") as file:
            for row in list(csv.DictReader(file))[-3:]:
                print(f"{row['text']} → {row['answer']} ({row['language']})")


if __name__ == "__main__":
    main()
