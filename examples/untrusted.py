"""What somebody else's checkpoint and text can do: nothing that you did not allow."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import lmkit
from lmkit.testing import FakeGenerator

CHECKPOINT = Path(__file__).parent / "checkpoints" / "world-bert"


def main() -> None:
    """Load pickled weights, which is refused, and draw a text with markup, which is escaped."""
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where, "model")
        shutil.copytree(CHECKPOINT, folder)
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        try:
            lmkit.load("masked", folder)
        except lmkit.WeightsError as error:
            print(str(error).replace(str(folder), "model"))
    answer = FakeGenerator({"Say it.": "<script>alert(1)</script>"})("Say it.")
    print("escaped" if "&lt;script&gt;" in answer._repr_html_() else "not escaped")


if __name__ == "__main__":
    main()
