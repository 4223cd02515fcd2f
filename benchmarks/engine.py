"""The engine against transformers and, with `--peers`, against vLLM, llama.cpp and CTranslate2.

```sh
python benchmarks/engine.py                     # every workload
python benchmarks/engine.py A B --peers         # two of them, with the peers
python benchmarks/engine.py D --repeats 5 --json d.json
LMKIT_BENCH_WIDE=float32 python benchmarks/engine.py J --peers  # what is not quantized, on all sides
```

A processor without instructions for bfloat16 (AVX2 alone) takes many rows of it several times as long as of float32:
`lmkit.load` takes float32 there, so measure that.

Prints a Markdown table to stdout. Exits with 1 if a target is missed or a workload fails.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import _batches
import _machine
import _masks
import _precisions
import _scores
import _shared
import _streams
import _structured
from _context import DEVICE, Bench, device
from _harness import Finding, Report, say, table
from _peers import Peers

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parent.parent

WORKLOADS: dict[str, tuple[Callable[[Bench], Report], str | None]] = {
    "A": (_batches.chat_prompts, "vllm"),
    "B": (_batches.ragged_budgets, "vllm"),
    "C": (_shared.threads, None),
    "D": (_streams.one_stream, "llama"),
    "E": (_streams.starts, None),
    "F": (_streams.chat_turns, None),
    "G": (_streams.editing, None),
    "H": (_shared.host_overhead, None),
    "I": (_shared.memory, None),
    "J": (_batches.encoder_decoder, "ctranslate2"),
    "K": (_precisions.perplexity, None),
    "L": (_precisions.one_stream, "llama"),
    "M": (_precisions.rows, None),
    "N": (_precisions.loading, None),
    "O": (_precisions.billion, "llama"),
    "P": (_precisions.grids, None),
    "Q": (_scores.texts_alone, None),
    "R": (_scores.shared_prompts, None),
    "S": (_masks.mini, None),
    "T": (_masks.base, None),
    "U": (_batches.beams, "ctranslate2"),
    "V": (_batches.few_sentences, None),
    "W": (_structured.filled_schemas, None),
    "X": (_streams.long_prompts, None),
}
"""Each workload, and which peer it is compared with."""


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Measure lmkit's engine against transformers and its peers.")
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD", help=f"of {' '.join(WORKLOADS)}; all by default")
    parser.add_argument("--repeats", type=int, default=3, help="how often each side runs (default: 3)")
    parser.add_argument("--peers", action="store_true", help="measure the peers too")
    parser.add_argument(
        "--peers-folder",
        type=Path,
        default=Path(os.environ.get("LMKIT_BENCH_PEERS", ROOT / ".nox" / "peers")),
        help="where their environments are: vllm, llama, ctranslate2 (default: LMKIT_BENCH_PEERS, else .nox/peers)",
    )
    parser.add_argument(
        "--checkpoints",
        type=Path,
        default=os.environ.get("LMKIT_BENCH_CHECKPOINTS"),
        help="where the models made for this are kept (default: LMKIT_BENCH_CHECKPOINTS, else a temporary folder)",
    )
    parser.add_argument("--device", default=device(), help="where models are put, such as cuda (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write everything that was measured to this file")
    given = parser.parse_args()
    if unknown := [name for name in given.workloads if name not in WORKLOADS]:
        parser.error(f"there is no workload {' '.join(unknown)}: choose from {' '.join(WORKLOADS)}")
    return given


def main() -> int:
    """Measure what the command line asks for."""
    given = arguments()
    os.environ[DEVICE] = given.device
    warning = _machine.load_warning()
    machine = {**_machine.facts(), "load before": " ".join(f"{load:.2f}" for load in os.getloadavg())}
    say("\n".join(f"{name}: {value}" for name, value in machine.items()))
    if warning:
        say(warning)
    with tempfile.TemporaryDirectory() as spare, Peers(given.peers_folder if given.peers else None) as peers:
        bench = Bench(Path(given.checkpoints or spare), given.repeats, peers)
        reports = [measure(name, bench) for name in given.workloads or WORKLOADS]
    findings = [finding for report in reports for finding in report.findings]
    print(page(machine, reports, peers, given.repeats, warning))
    if given.json is not None:
        given.json.write_text(document(machine, reports, peers), encoding="utf-8")
    return int(any(finding.met is False for finding in findings))


def measure(name: str, bench: Bench) -> Report:
    """Run one workload; one that fails is a line of the table."""
    workload, peer = WORKLOADS[name]
    bench.peers.only(peer)
    say(f"{workload.__doc__}")
    begun = time.perf_counter()
    try:
        report = workload(bench)
    except Exception as error:  # noqa: BLE001 - the other workloads are still worth measuring
        traceback.print_exc()
        told = f"{type(error).__name__}: {error}".splitlines()[0]
        report = Report(name, [Finding(name, "failed", "", "", told, met=False)])
    say(f"  {name} took {time.perf_counter() - begun:.0f} s\n{table(report.findings)}")
    return report


def page(machine: dict[str, str], reports: list[Report], peers: Peers, repeats: int, warning: str | None) -> str:
    """Write the table, with what has to be known of it, for the documentation."""
    lines = [f"{warning}\n"] if warning else []
    lines.append(f"Medians of {repeats} repeats, all sides in turns.\n")
    lines.append(table([finding for report in reports for finding in report.findings]))
    lines.append("")
    lines += [f"- {report.workload}: {note}" for report in reports for note in report.notes]
    lines += [f"- {name}: {value}" for name, value in machine.items()]
    lines += [
        f"- {name} {facts['version']}: {facts['settings']}; {facts['seconds_to_start']:.1f} s to start, not counted"
        for name, facts in peers.facts.items()
    ]
    return "\n".join(lines)


def document(machine: dict[str, str], reports: list[Report], peers: Peers) -> str:
    """Write everything as JSON."""
    content: dict[str, Any] = {
        "machine": machine,
        "peers": peers.facts,
        "reports": [dataclasses.asdict(report) for report in reports],
    }
    return json.dumps(content, indent=2)


if __name__ == "__main__":
    sys.exit(main())
