"""Pictures as a real browser lays them out: on a page of their own, and in a notebook that a kernel has run."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import notebooks
import picture_page
from browser import CHROMIUM, Browser

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: nox -s pictures installs Debian's")

CHECK = """(() => {
const numbers = colour => (colour.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
const light = part => (part /= 255) <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
const luminance = ([r, g, b]) => 0.2126 * light(r) + 0.7152 * light(g) + 0.0722 * light(b);
const over = (top, below, alpha) => below.map((part, n) => top[n] * alpha + part * (1 - alpha)).slice(0, 3);
const behind = one => {
  if (!one) return [255, 255, 255];
  const back = numbers(getComputedStyle(one).backgroundColor);
  return over(back, behind(one.parentElement), back.length < 4 ? 1 : back[3]);
};
const contrast = one => {
  const style = getComputedStyle(one), back = behind(one);
  const [a, b] = [over(numbers(style.color), back, Number(style.opacity)), back].map(luminance);
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
};
const roots = [...document.querySelectorAll("ROOT")];
const all = roots.flatMap(root => [...root.querySelectorAll("*")].map(one => [one, root]));
const right = one => one.getBoundingClientRect().right;
const beyond = ([one, root]) => right(one) > Math.min(right(root), innerWidth) + 1;
const texts = all.map(([one]) => one).filter(one => one.tagName !== "STYLE" &&
  [...one.childNodes].some(node => node.nodeType === 3 && node.data.trim()));
const words = one => [one.innerText.slice(0, 30), contrast(one)];
return {out: all.filter(beyond).map(([one]) => one.outerHTML.slice(0, 99)),
  faint: texts.map(words).filter(([, share]) => share < 4.5), texts: texts.length};
})()"""
"""Says what reaches out of its place or the window, and which texts are too faint before what is behind them."""

ROOTS = {"page": "body", "notebook": ".jp-RenderedHTMLCommon.jp-OutputArea-output"}
CELLS = ("from picture_page import pictures", *(f"pictures()[{name!r}]" for name in picture_page.pictures()))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Start a browser."""
    with Browser() as found:
        yield found


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Write a page of all pictures, and the tour with all of them behind it, in each theme."""
    from nbconvert import HTMLExporter

    helpers = f"import sys\nsys.path.insert(0, {str(Path(picture_page.__file__).parent)!r})"
    notebook: Any = notebooks.executed(helpers, *CELLS)
    found = {}
    for theme in picture_page.THEMES:
        shown = HTMLExporter(template_name="lab", theme=theme).from_notebook_node(notebook)[0]
        for kind, text in (("page", picture_page.page(theme)), ("notebook", shown)):
            found[kind, theme] = tmp_path_factory.mktemp("pages") / f"{kind}-{theme}.html"
            found[kind, theme].write_text(text, encoding="utf-8")
    return found


@pytest.fixture(params=[1200, 500], ids="{} wide".format)
def width(request: pytest.FixtureRequest) -> int:
    """Take a wide window and a narrow one."""
    return int(request.param)


@pytest.mark.parametrize("theme", picture_page.THEMES)
@pytest.mark.parametrize("kind", ROOTS)
def test_all_is_within_its_place_and_can_be_read(
    browser: Browser, pages: dict[tuple[str, str], Path], kind: str, theme: str, width: int
) -> None:
    """Hostile texts too; contrasts are at least those of WCAG AA; what a text has as markup does not run."""
    browser.open(pages[kind, theme], width)
    told = browser.run(CHECK.replace("ROOT", ROOTS[kind]))
    assert told["texts"] > 150
    assert told["out"] == []
    assert told["faint"] == []
    assert browser.run("document.title") != "run"
    assert browser.run("document.querySelectorAll('.jp-RenderedText[data-mime-type*=stderr]').length") == 0
    if folder := os.environ.get("LMKIT_PICTURES"):
        browser.photograph(Path(folder) / f"{kind}-{theme}-{width}.png")


BLUE = "getComputedStyle(one).backgroundColor.includes('76, 120')"
LIT = f"[...document.querySelectorAll('[data-n]')].filter(one => {BLUE})"


@pytest.mark.parametrize("kind", ROOTS)
def test_a_segment_lights_up_with_its_translation(
    browser: Browser, pages: dict[tuple[str, str], Path], kind: str, width: int
) -> None:
    """While the mouse is on either of them both are lit, and no other; elsewhere none is."""
    browser.open(pages[kind, "light"], width)
    texts = f"{LIT}.map(one => one.innerText.trim())"
    segment = "[...document.querySelectorAll('[data-n=\"1\"]')].at({})"
    assert browser.run(texts) == []
    for side in (-2, -1):
        browser.point(segment.format(side))
        assert browser.run(texts) == ["The sea is wide.", "Das Meer ist weit."]
    browser.point("document.querySelector('h1, h3')")
    assert browser.run(texts) == []


@pytest.mark.parametrize("kind", ROOTS)
def test_the_mouse_finds_alternatives_and_opens_folds(
    browser: Browser, pages: dict[tuple[str, str], Path], kind: str, width: int
) -> None:
    """A token has its probability and what else might have come; reasoning and calls are hidden until asked for."""
    browser.open(pages[kind, "dark"], width)
    browser.point("[...document.querySelectorAll('[title]')].find(one => one.innerText.trim() === 'sailor')")
    found = browser.run("[...document.querySelectorAll(':hover')].at(-1).title")
    assert found.split("\n")[1:] == ["  0.200  'night'", "  0.100  '<b>'"]
    for title, inside in (("reasoning", "He asks for the weather."), ("call of weather", "Lisbon")):
        fold = f"[...document.querySelectorAll('details')].find(one => one.innerText.startsWith({title!r}))"
        assert inside not in browser.run(f"{fold}.innerText")
        browser.point(f"{fold}.querySelector('summary')", press=True)
        assert inside in browser.run(f"{fold}.innerText")
