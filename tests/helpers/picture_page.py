"""A page with a picture of each kind, for a browser; `python picture_page.py FOLDER` photographs it for the docs."""

import dataclasses
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from lmkit import results

CHECK = """<script>
const all = [...document.querySelectorAll("body *")];
const beyond = one => one.getBoundingClientRect().right > innerWidth + 1;
const out = all.filter(beyond).map(one => one.outerHTML.slice(0, 99));
const numbers = colour => (colour.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
const light = part => (part /= 255) <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
const luminance = ([r, g, b]) => 0.2126 * light(r) + 0.7152 * light(g) + 0.0722 * light(b);
const page = numbers(getComputedStyle(document.body).backgroundColor);
const over = (top, below, alpha) => below.map((part, n) => top[n] * alpha + part * (1 - alpha)).slice(0, 3);
const contrast = one => {
  const style = getComputedStyle(one), back = numbers(style.backgroundColor), alpha = back.length < 4 ? 1 : back[3];
  const behind = over(back, page, alpha), front = over(numbers(style.color), behind, Number(style.opacity));
  const [a, b] = [luminance(front), luminance(behind)];
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
};
const texts = all.filter(one => [...one.childNodes].some(node => node.nodeType === 3 && node.data.trim()));
const shown = {out, contrast: Math.min(...texts.filter(one => one.tagName !== "STYLE").map(contrast))};
shown.hovers = CSS.supports("selector(:has(a))");
document.title = JSON.stringify(shown);
</script>"""
"""Says in the page's title what reaches out of the window, and the least contrast of a text with what is behind it."""

THEMES = {"light": "background:#fff;color:#111", "dark": "background:#111;color:#ddd"}

TIMING = results.Timing(2.0, 0.5, 48.0)
WORDS = "The old sailor looked at the sea and said that it would rain before the evening came .".split()


def token(word: str, share: float) -> results.TokenLogprob:
    """Make a token with two alternatives."""
    others = (results.TokenLogprob("night", 1, math.log(0.2)), results.TokenLogprob("<b>", 2, math.log(0.1)))
    return results.TokenLogprob(f"{word} ", 3, math.log(share), others)


def completion(text: str, **more: Any) -> results.Completion:
    """Make a completion."""
    return results.Completion(text, (1,), None, "eos", None, more.pop("logprobs", None), 12, **more)


def generation(*completions: results.Completion, prompt: str = "What did he say?") -> results.Generation:
    """Make a generation."""
    return results.Generation(prompt, completions, 9, None, False, TIMING)  # noqa: FBT003


def translation() -> results.Translation:
    """Make a translation of three sentences, one of them noted."""
    source, text = "It rains. The sea is wide. He said so.", "Es regnet. Das Meer ist weit. Er sagte es."
    ends = [(0, 9, 0, 10), (9, 26, 10, 29), (26, 38, 29, 42)]
    segments = tuple(results.Segment(*one, notes=("unknown",) if n == 2 else ()) for n, one in enumerate(ends))
    plain = generation(completion(text), prompt=source)
    fields = {field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)}
    return results.Translation(**fields, source=source, source_language="en", target_language="de", segments=segments)


def unmasking() -> results.Unmasking:
    """Make a text with two masks."""

    def way(*fills: str, share: float) -> results.Candidate:
        text = f"The {fills[0]} is {fills[-1]}."
        return results.Candidate(text, fills, fills, (1,) * len(fills), (math.log(share),) * len(fills), (0,))

    slots = tuple(
        results.MaskSlot(4, 10, tuple(way(word, share=share) for word, share in guesses), 0, 21)
        for guesses in ([("sea", 0.61), ("sky", 0.22), ("road", 0.05)], [("wide", 0.5), ("cold", 0.31)])
    )
    return results.Unmasking(
        "The [MASK] is [MASK].", slots, (way("sea", "wide", share=0.6), way("sky", "cold", share=0.3))
    )


def score() -> results.Score:
    """Make a score of a sentence."""
    logprobs = tuple(-((7 * n) % 11) / 4 for n in range(len(WORDS)))
    return results.Score(" ".join(WORDS), tuple(f"{word} " for word in WORDS), (1,) * len(WORDS), logprobs)


def ranking() -> results.Ranking:
    """Make a ranking."""
    choices = [("It would rain.", 0.7), ("It would snow, and not stop before the spring.", 0.2), ("Nothing.", 0.1)]
    return results.Ranking(
        tuple(results.Choice(t, n, math.log(p), p, score()) for n, (t, p) in enumerate(choices)), "sum"
    )


def pictures() -> dict[str, Any]:
    """Make one of each, hostile ones among them."""
    call = results.ToolCall("weather", {"place": "Lisbon", "days": [1, 2]}, "weather(…)")
    answer = completion(
        "Let me look.", content="Let me look.", reasoning="He asks for the weather.", tool_calls=(call,)
    )
    valued = completion('{"name": "Ada"}', _value={"name": "Ada", "born": 1815, "words": ["a", "b"]}, _value_error=None)
    tinted = completion(
        " ".join(WORDS), logprobs=tuple(token(word, 0.05 + (n * 5 % 11) / 12) for n, word in enumerate(WORDS))
    )
    hostile = [
        "<script>document.title = 'run'</script>",
        "\u202eleft\u202c",
        "ש" * 50,
        "👩\u200d👩\u200d👧" * 40,
        "x" * 3000,
        "",
    ]
    return {
        "A generation": generation(tinted),
        "A chat's answer": generation(answer),
        "A value": generation(valued),
        "A translation": translation(),
        "Masks": unmasking(),
        "A score": score(),
        "A ranking": ranking(),
        "Several": results.Results([generation(completion(text)) for text in ("Yes.", "No, it would not. " * 20)]),
        "Hostile": results.Results([generation(completion(text)) for text in hostile]),
        "10,000 tokens": generation(completion("word " * 10_000)),
        **{f"Hostile {n}": generation(completion(text)) for n, text in enumerate(hostile)},
    }


def page(theme: str, most: int | None = None) -> str:
    """Write the page in a theme, with all pictures or the first."""
    shown = list(pictures().items())[:most]
    parts = "".join(f"<h3>{name}</h3>{one._repr_html_()}" for name, one in shown)
    style = f"font:15px system-ui,sans-serif;margin:1em;{THEMES[theme]}"
    return f'<!doctype html><meta charset="utf-8"><body style="{style}">{parts}{CHECK}'


CHROMIUM = "chromium --headless --no-sandbox --disable-gpu --disable-background-networking --hide-scrollbars".split()

if __name__ == "__main__":
    for theme in THEMES:
        with tempfile.NamedTemporaryFile("w", suffix=".html", encoding="utf-8") as file:
            file.write(page(theme, most=7))
            file.flush()
            photo = Path(sys.argv[1]) / f"results-{theme}.png"
            options = ["--window-size=900,1400", f"--screenshot={photo}", Path(file.name).as_uri()]
            subprocess.run([*CHROMIUM, *options], check=True)
