"""A page that lays out the built site's pages, one after the other, in a frame of a width, and says what is wrong."""

import json
from pathlib import Path

CHECK = """<!doctype html><meta charset="utf-8"><iframe style="height:900px;border:0;width:WIDTHpx"></iframe><script>
const frame = document.querySelector("iframe"), wrong = [];
const loaded = page => new Promise(done => { frame.onload = done; frame.src = page; });
const pause = () => new Promise(done => setTimeout(done, 100));
const rows = (node, from, to) => {
  const range = node.ownerDocument.createRange();
  range.setStart(node, from); range.setEnd(node, to);
  return new Set([...range.getClientRects()].filter(one => one.width).map(one => Math.round(one.top))).size;
};
const check = (page, body) => {
  const say = (what, one) => wrong.push([page, what, (one.textContent || one.alt).trim().slice(0, 60)]);
  const root = body.ownerDocument.documentElement, article = body.querySelector("article");
  if (root.scrollWidth > root.clientWidth) say("is wider than the window", article);
  for (const one of article.querySelectorAll("pre > code" + (WIDE ? ", .md-typeset__scrollwrap" : "")))
    if (one.scrollWidth > one.clientWidth + 1) say("is cut", one);
  const texts = body.ownerDocument.createTreeWalker(article, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const node = texts.currentNode;
    if (node.parentElement.closest("pre, .md-clipboard, script, style")) continue;
    for (const run of node.data.matchAll(/(?<!\\S)\\S{1,40}(?!\\S)/g)) // a longer run has to break
      for (const word of run[0].matchAll(/\\w+/g))
        if (rows(node, run.index + word.index, run.index + word.index + word[0].length) > 1)
          say("has a broken word: " + word[0], node.parentElement);
  }
  const contents = [...body.querySelectorAll(".md-sidebar--secondary a.md-nav__link")].filter(one => one.offsetHeight);
  if (WIDE && article.scrollHeight > 2 * 900 && contents.length < 2) say("is long and has no contents", article);
};
(async () => {
  for (const page of PAGES) {
    await loaded(page);
    const body = frame.contentDocument.body;
    body.setAttribute("data-md-color-scheme", "SCHEME");
    for (const one of body.querySelectorAll("details")) one.open = true;
    await pause();
    check(page, body);
  }
  document.body.innerHTML = ""; // what is printed is short
  document.title = JSON.stringify(wrong);
})();
</script>"""
"""Says in its title, once it is done, what is wrong where."""


def driver(site: Path, scheme: str, width: int) -> str:
    """Write the page that checks a built site in one of the theme's colour schemes."""
    pages = sorted(page.as_uri() for page in site.rglob("*.html") if page.name != "404.html")
    told = CHECK.replace("SCHEME", scheme).replace("WIDTH", str(width)).replace("WIDE", str(width > 1000).lower())
    return told.replace("PAGES", json.dumps(pages))
