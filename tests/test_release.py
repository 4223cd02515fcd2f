"""Files that name the version agree; what has no address names none."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_citation_names_the_version() -> None:
    """It is the version of the package, and the licence is its licence."""
    told = dict(re.findall(r"^([\w-]+): (.+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE))
    assert (told["version"], told["license"]) == (PROJECT["version"], PROJECT["license"])


def test_a_changelog_has_a_section_for_what_is_next() -> None:
    """The top section is either unreleased or the version of the package, with a day."""
    (top, *_) = re.findall(r"^## \[(.+?)\](.*)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert top == ("Unreleased", "") or (top[0] == PROJECT["version"] and re.fullmatch(r" - \d{4}-\d\d-\d\d", top[1]))
