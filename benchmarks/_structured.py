"""W: rows that fill a schema, against the same rows without one."""

from __future__ import annotations

import contextlib
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal
from unittest import mock

import _data
import pydantic
from _harness import Finding, Report, Run, Side, interleave
from _sides import lmkit_side

if TYPE_CHECKING:
    from _context import Bench

ROWS, NEW_TOKENS, SHARE = 64, 200, 0.95
FIRST_MS, PROPERTIES, NEW_SCHEMAS = 30, 60, 5
PEERS = ("vllm", "outlines")
ASKED = "Describe a person in JSON with the keys name, age, city, job, happy and words."


@dataclass
class Person:
    """Six fields, of bounded length."""

    name: Annotated[str, pydantic.Field(max_length=20)]
    age: Annotated[int, pydantic.Field(ge=0, le=150)]
    city: Annotated[str, pydantic.Field(max_length=20)]
    job: Literal["doctor", "teacher", "farmer", "other"]
    happy: bool
    words: Annotated[list[Annotated[str, pydantic.Field(max_length=10)]], pydantic.Field(max_length=3)]


def filled_schemas(bench: Bench) -> Report:
    """W: 64 rows that fill a schema of six fields; the same tokens without it; the time to a first token."""
    chats = [[{"role": "user", "content": f"{ASKED} Her name has {n} letters."}] for n in range(3, 3 + ROWS)]
    prompts = [_data.encode(bench.tokenizer, chat) for chat in chats]
    results = bench.generator(chats, output=Person, max_new_tokens=NEW_TOKENS)
    budgets = [result.generated_tokens for result in results]
    held = {"output": Person, "max_new_tokens": budgets}  # the same for both: it decides how many rows run together
    free = {"max_new_tokens": budgets, "suppress_tokens": bench.ends}  # as many tokens, whatever they are
    masks: list[float] = []
    with_schema = lmkit_side(bench.generator, chats, prompts, "with a schema", **held)
    sides = [with_masks(with_schema, masks), lmkit_side(bench.generator, chats, prompts, "without", **free)]
    sides[1].run()
    report = Report("W", runs=interleave(sides, bench.repeats))
    report.faster(sides[0].name, sides[1].name, SHARE)
    for name in PEERS:
        beside(bench, report, with_schema, name, (prompts, budgets))
    whole = sum(result.value_error is None for result in results)
    report.notes.append(f"{whole} of {ROWS} rows are whole after {NEW_TOKENS} tokens, {sum(budgets)} tokens in all")
    seconds = statistics.median(run.seconds for run in report.runs[sides[0].name])
    report.notes.append(f"masks took {statistics.median(masks):.3f} of {seconds:.2f} s")
    first_token(bench, report)
    return report


def beside(bench: Bench, report: Report, own: Side, name: str, work: tuple[list[list[int]], list[int]]) -> None:
    """Have a peer fill the schema, and write as much without it; each engine writes its own tokens."""
    peer = bench.peers.get(name, model=str(bench.checkpoint), rows=ROWS)
    if peer is None:
        return
    schema = pydantic.TypeAdapter(Person).json_schema()
    held = peer.side(*work, f"{name} with a schema", forced=False, schema=schema)
    sides = [held, peer.side(*work, f"{name} without", forced=True)]
    for side in sides:
        side.run()
    runs = interleave([own, *sides], bench.repeats)
    ours, theirs, plain = (statistics.median(run.speed for run in found) for found in runs.values())
    shown = f"{ours:.0f} tokens/s", f"{theirs:.0f} tokens/s"
    report.findings.append(Finding("W", f"with a schema : {name}", *shown, f"{ours / theirs:.2f}x"))
    report.notes.append(f"{name} with a schema : {name} without, in tokens/s: {theirs / plain:.2f}x")


def with_masks(side: Side, seconds: list[float]) -> Side:
    """Note for each run of a side how long its masks took."""
    from lmkit.engine import choice

    places = (choice.Chooser, "_to_mask"), (choice, "_within")

    def timed(plain: Any) -> Any:
        def call(*given: Any) -> Any:
            begun = time.perf_counter()
            found = plain(*given)
            seconds[-1] += time.perf_counter() - begun
            return found

        return call

    def run() -> Run:
        seconds.append(0.0)
        with contextlib.ExitStack() as patched:
            for place, name in places:
                patched.enter_context(mock.patch.object(place, name, timed(getattr(place, name))))
            return side.run()

    return Side(side.name, run)


def first_token(bench: Bench, report: Report) -> None:
    """Compare the time of a first token with a new schema of 60 properties with that without one."""
    prompt = "Fill in: "
    times: dict[bool, list[float]] = {True: [], False: []}
    bench.generator(prompt, output=new_schema(-1), max_new_tokens=1)
    for number in range(NEW_SCHEMAS):
        for held in (True, False):
            output = new_schema(number) if held else None
            begun = time.perf_counter()
            bench.generator(prompt, output=output, max_new_tokens=1)
            times[held].append(1000 * (time.perf_counter() - begun))
    ours, plain = (statistics.median(times[held]) for held in (True, False))
    more = ours - plain
    report.findings.append(
        Finding(
            "W",
            "first token, a new schema of 60 properties : without",
            f"{ours:.0f} ms",
            f"{plain:.0f} ms",
            f"{more:.0f} ms more",
            f"≤ {FIRST_MS} ms",
            more <= FIRST_MS,
        )
    )


def new_schema(number: int) -> Any:
    """Return a schema that was not there before."""
    import lmkit

    kinds = [{"type": "integer"}, {"type": "string", "maxLength": 10 + number % 7}, {"type": "array", "items": {}}]
    properties = {f"p{number}_{n}": kinds[n % 3] for n in range(PROPERTIES)}
    return lmkit.JSONSchema({"type": "object", "properties": properties, "required": list(properties)[::2]})
