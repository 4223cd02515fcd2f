"""Lay what `gpu.py` needs into a folder of at most 60 MiB, for a machine with a card and without a network.

```sh
python benchmarks/travel.py FOLDER          # here, where there is a network
cd FOLDER && sh run.sh                      # there: a Python with torch that sees its card is all that it asks for
```

The folder has lmkit's wheel, those that it needs beside torch, the tests and benchmarks, and the tokenizer and config
of SmolLM2: its weights, which take more, are drawn at random there, in its shape. Wheels of other packages than these
(numpy and what else torch or pytest want) have to be there.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import _models

ROOT = Path(__file__).parent.parent
MOST = 60 * 2**20
WHEELS = ("transformers", "tokenizers", "huggingface_hub", "safetensors", "accelerate", "hypothesis", "pytest")
RUN = """#!/bin/sh
set -e
cd "$(dirname "$0")"
PYTHON=${PYTHON:-python3}
$PYTHON -m venv --system-site-packages there
there/bin/python -m pip install --quiet --no-index --no-deps --upgrade wheels/*.whl
LMKIT_BENCH_CHECKPOINTS=checkpoints there/bin/python benchmarks/gpu.py "$@"
"""


def main() -> int:
    """Lay the folder."""
    parser = argparse.ArgumentParser(description="Lay what benchmarks/gpu.py needs into a folder that can travel.")
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True)
    unwanted = shutil.ignore_patterns("__pycache__", "former", "peers")
    for name in ("benchmarks", "tests", "examples"):
        shutil.copytree(ROOT / name, folder / name, ignore=unwanted)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder / name)
    pip = [sys.executable, "-m", "pip"]
    wheels = ("--no-deps", "--wheel-dir", str(folder / "wheels"))
    subprocess.run([*pip, "wheel", "--quiet", *wheels, str(ROOT)], check=True)
    pins = ("--constraint", str(ROOT / "constraints.txt"))
    subprocess.run([*pip, "wheel", "--quiet", *wheels, *pins, *WHEELS], check=True)
    with tempfile.TemporaryDirectory() as spare:
        saved = _models.smollm2(Path(spare))
        kept = shutil.ignore_patterns("*.safetensors")
        shutil.copytree(saved, folder / "checkpoints" / saved.name, ignore=kept)
    (folder / "run.sh").write_text(RUN, encoding="utf-8")
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{folder}: {size / 2**20:.1f} MiB")
    return int(size > MOST)


if __name__ == "__main__":
    sys.exit(main())
