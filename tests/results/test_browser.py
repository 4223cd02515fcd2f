"""Pictures as a real browser lays them out."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import picture_page

CHROMIUM = shutil.which("chromium")
OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking")


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: nox -s pictures installs Debian's")
@pytest.mark.parametrize("width", [1200, 500])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_nothing_reaches_out_of_the_window_and_all_can_be_read(tmp_path: Path, theme: str, width: int) -> None:
    """Hostile texts too; contrasts are at least those of WCAG AA; what a text has as markup does not run."""
    page = tmp_path / "page.html"
    page.write_text(picture_page.page(theme), encoding="utf-8")
    command = [str(CHROMIUM), *OPTIONS, f"--window-size={width},2000", "--dump-dom", page.as_uri()]
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    title = re.search(r"<title>(.*?)</title>", found)
    assert title is not None
    told = json.loads(title[1])
    assert told["out"] == []
    assert told["contrast"] >= 4.5
    assert told["hovers"] is True
