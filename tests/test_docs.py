"""The code on the pages runs, and their links lead somewhere."""

import doctest
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]

FENCE = re.compile(
    r"^(?P<indent>[ ]*)```(?P<language>[\w-]+)?[^\n]*\n(?P<code>.*?)^(?P=indent)```[ ]*$", re.DOTALL | re.MULTILINE
)
NO_RUN = re.compile(r"<!-- no-run: \S.*-->\s*\Z")  # as the last thing before a block
LINK = re.compile(r"\]\((?P<target>[^)\s]+)[^)]*\)")
ELSEWHERE = re.compile(r"[a-z]+:|#")
MATCHING = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@dataclass(frozen=True)
class Block:
    """One fenced block of a page; `line` is where its code begins."""

    language: str
    code: str
    line: int
    runs: bool


def blocks(page: Path) -> list[Block]:
    """List the fenced blocks of a page in order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            language=fence["language"] or "",
            code=textwrap.dedent(fence["code"]),
            line=text.count("\n", 0, fence.start("code")) + 1,
            runs=NO_RUN.search(text, 0, fence.start()) is None,
        )
        for fence in FENCE.finditer(text)
    ]


def run(block: Block, page: Path, names: dict[str, Any]) -> None:
    """Run a python block in the namespace of its page; a traceback points into the page."""
    code = compile("\n" * (block.line - 1) + block.code, str(page), "exec")
    if block.runs:
        exec(code, names)


def check_session(block: Block, page: Path, names: dict[str, Any]) -> None:
    """Run a pycon block in the namespace of its page and compare what it prints."""
    parser = doctest.DocTestParser()
    session = parser.get_doctest(block.code, {}, page.name, str(page), block.line - 1)
    session.globs = names  # get_doctest would copy: later blocks see what this one assigns
    report: list[str] = []
    if block.runs:
        doctest.DocTestRunner(optionflags=MATCHING).run(session, out=report.append, clear_globs=False)
    assert not report, "".join(report)


RUNNERS = {"python": run, "pycon": check_session}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader can paste the blocks of a page, top to bottom, into a checkout's interpreter."""
    (tmp_path / "examples").symlink_to(ROOT / "examples", target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.language in RUNNERS:
            RUNNERS[block.language](block, page, names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_links_of_a_page_resolve(page: Path) -> None:
    """A relative link names a file of the checkout."""
    prose = FENCE.sub("", page.read_text(encoding="utf-8"))
    targets = [link["target"] for link in LINK.finditer(prose)]
    relative = [target.partition("#")[0] for target in targets if not ELSEWHERE.match(target)]
    missing = [target for target in relative if not (page.parent / target).exists()]
    assert missing == []


def test_each_promise_has_a_test() -> None:
    """The tests that the page on security names exist."""
    named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", (ROOT / "docs" / "security.md").read_text(encoding="utf-8"))
    assert len(named) > 20
    assert [one for one in named if f"def {one[1]}(" not in (ROOT / one[0]).read_text(encoding="utf-8")] == []
