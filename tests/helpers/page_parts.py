"""A hook of MkDocs: puts tables of declared options, and the examples' code, where a page has a comment for them."""

import re
from pathlib import Path
from textwrap import indent

from lmkit.options import generation, tasks
from option_tables import table

ROOT = Path(__file__).parents[2]
BESIDE = {"GeneratorOptions", "TranslationOptions"}  # the page shows those of GenerationOptions above
EXAMPLE = re.compile(r"<!-- example: (?P<name>[\w.]+) -->")


def on_page_markdown(markdown: str, **_: object) -> str:
    """Return a page with its parts."""

    def options(found: re.Match[str]) -> str:
        kind = getattr(generation, found[1], None) or getattr(tasks, found[1])
        return table(kind, generation.GenerationOptions if found[1] in BESIDE else None)

    def code(found: re.Match[str]) -> str:
        text = (ROOT / "examples" / found["name"]).read_text(encoding="utf-8")
        return f'??? example "examples/{found["name"]}"\n\n' + indent(f"```python\n{text}```\n", "    ")

    return EXAMPLE.sub(code, re.sub(r"<!-- options: (\w+) -->", options, markdown))
