"""What a job returns."""

from __future__ import annotations

from dataclasses import dataclass

from lmkit.results.base import Result


@dataclass(frozen=True, slots=True)
class JobReport(Result):
    """What became of the rows of a file.

    Attributes:
        output: Where they are.
        rows: How many there are.
        done: How many of them this run has answered, those that failed included.
        kept: How many were done by earlier runs.
        changed: How many were done again, since what they are asked has changed.
        failed: How many have an error in place of an answer, those of earlier runs included.
        generated_tokens: How many tokens this run has generated.
        seconds: How long this run took.
    """

    output: str
    rows: int
    done: int
    kept: int
    changed: int
    failed: int
    generated_tokens: int
    seconds: float

    def __str__(self) -> str:
        """Say it in a sentence."""
        parts = [f"{self.done:,} done in {self.seconds:.1f} s"]
        parts += [f"{self.changed:,} of them again, since they have changed"] if self.changed else []
        parts += [f"{self.kept:,} kept from before"] if self.kept else []
        parts += [f"{self.failed:,} FAILED, see their errors"] if self.failed else ["none failed"]
        return f"{self.rows:,} rows in {self.output}: {', '.join(parts)}"
