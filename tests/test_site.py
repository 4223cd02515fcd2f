"""The built site as a real browser lays it out."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import site_page

CHROMIUM = shutil.which("chromium")
OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
    *("--allow-file-access-from-files", "--virtual-time-budget=600000"),
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: nox -s pictures installs Debian's")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the site."""
    folder = tmp_path_factory.mktemp("site")
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", folder], cwd=root, check=True)
    return folder


@pytest.mark.parametrize("width", [1400, 390])
@pytest.mark.parametrize("scheme", ["default", "slate"])
def test_no_page_cuts_code_or_breaks_a_word(tmp_path: Path, site: Path, scheme: str, width: int) -> None:
    """Nor is one wider than the window, nor long without contents, nor a table wider than its page on a wide screen."""
    page = tmp_path / "page.html"
    page.write_text(site_page.driver(site, scheme, width), encoding="utf-8")
    command = [str(CHROMIUM), *OPTIONS, "--window-size=1500,1000", "--dump-dom", page.as_uri()]
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=240).stdout
    title = re.search(r"<title>(.*?)</title>", found)
    assert title is not None, found
    assert json.loads(title[1]) == []
