"""How long `import lmkit` takes in a fresh interpreter, beyond the interpreter's own start.

Exits with 1 if the median is over the budget, or if the import brings torch or transformers in.
"""

import json
import statistics
import subprocess
import sys

BUDGET_SECONDS = 0.050
RUNS = 10
HEAVY = ("torch", "transformers")

# The clock starts when the interpreter is up, so its own start is left out.
MEASURE = """
import json, sys, time
start = time.perf_counter()
import lmkit
print(json.dumps({"seconds": time.perf_counter() - start, "modules": sorted(sys.modules)}))
"""


def measure() -> tuple[float, list[str]]:
    """Import lmkit in a fresh interpreter: how many seconds, and the modules loaded then."""
    command = [sys.executable, "-I", "-c", MEASURE]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    report = json.loads(output)
    return report["seconds"], report["modules"]


def main() -> int:
    """Print the median of ten imports and what they loaded."""
    measure()  # the first run may write the bytecode
    runs = [measure() for _ in range(RUNS)]
    median = statistics.median(seconds for seconds, _ in runs)
    modules = runs[0][1]
    heavy = [name for name in HEAVY if name in modules]
    print(
        f"import lmkit: {median * 1000:.1f} ms, the median of {RUNS} fresh interpreters"
        f" (budget {BUDGET_SECONDS * 1000:.0f} ms)"
    )
    print(f"heavy modules loaded: {', '.join(heavy) or 'none'} of {', '.join(HEAVY)}")
    return int(bool(heavy) or median > BUDGET_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
