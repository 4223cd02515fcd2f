"""What people see of results: in a notebook, in a terminal, and in a line."""

import dataclasses
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import checkpoints
import lmkit
from html_page import Page
from lmkit import results
from lmkit.results.pictures import Bars, Facts, Fold, Span, Text, Tree, as_it_is, to_html, to_text, visible

HOSTILE = [
    "<script>alert(1)</script>",
    "\u202eevil\u2066",
    "\x1b[31mred",
    "a\n\nb",
    "",
    "👩\u200d👩\u200d👧",
    "x" * 500,
]


@given(st.text())
def test_every_text_is_shown_as_it_is(text: str) -> None:
    """Whatever block has it, a browser shows the characters, those that would steer it as escapes."""
    blocks = [
        as_it_is(text), Text(((Span(text, 0.5, text, 1),),) * 2), Bars(text, ((text, 0.5, text),)),
        Fold(text, (as_it_is(text),)), Tree({text: [text]}), Facts({"name": text}),
    ]  # fmt: skip
    page = Page(to_html(blocks))
    assert page.open == []
    assert set(page.tags) <= {"div", "span", "details", "summary", "ul", "li", "style"}
    expected = visible(text).replace("\r", "\n")
    assert not text or "".join(page.texts).count(expected) >= 5
    assert [found["title"] for found in page.attributes if "title" in found] == [visible(text)] * 2 * bool(text)
    assert "\x1b" not in to_text(blocks)


def test_tokens_are_tinted_by_how_unlikely_they_were() -> None:
    """The likelier one has the weaker tint; the mouse finds the probability and the alternatives."""
    generator = checkpoints.wrapper("llama")
    result = generator("She", max_new_tokens=4, temperature=2.0, seed=1, logprobs=2)
    page = Page(result._repr_html_())
    shown = [one for one in page.attributes if "title" in one]
    assert result.logprobs is not None
    for one, entry in zip(shown, result.logprobs, strict=True):
        share = math.exp(entry.logprob)
        assert f"rgba(255,140,0,{0.4 * (1 - share):.2f})" in str(one["style"])
        assert str(one["title"]).startswith(f"{share:.3f}\n")
        assert all(repr(other.token) in str(one["title"]) for other in entry.top)


def test_a_translation_lights_up_on_both_sides() -> None:
    """Each segment has a piece of the source and one of the text, which a rule joins; what is noted is tinted."""
    result = checkpoints.wrapper("t5")("Birds fly. She is old.", source="en", target="de", max_new_tokens=4)
    html = result._repr_html_()
    groups = [one["data-n"] for one in Page(html).attributes if "data-n" in one]
    assert groups == [*map(str, range(len(result.segments)))] * 2
    assert all(f':has([data-n="{n}"]:hover) [data-n="{n}"]' in html for n in groups)
    assert html.count("background:rgba(255,140,0,0.40)") == 2 * sum(bool(one.notes) for one in result.segments)


def test_masks_scores_and_rankings_are_bars_and_tints() -> None:
    """Each slot has its guesses, then the ways; a score is a text; a ranking has a bar for each choice."""
    filled: Any = checkpoints.wrapper("bert")("She [MASK] [MASK].")
    words = Page(filled._repr_html_()).texts
    assert [word for word in words if word.startswith("mask ") or word == "ways"] == ["mask 1", "mask 2", "ways"]
    assert all(one.fills[0] in words for slot in filled.masks for one in slot.candidates)
    generator = checkpoints.wrapper("llama")
    assert "".join(Page(generator.score("She is old")._repr_html_()).texts).startswith("She is old")
    ranking = generator.rank("She", ["is", "was"])
    assert f"width:{100 * ranking.choices[0].probability:.1f}%" in ranking._repr_html_()


def test_a_line_says_the_text_and_why_it_ended() -> None:
    """`repr` of a result is a line, whatever its text; of a list a line for each row, for some of many."""
    generator = checkpoints.wrapper("llama")
    result = generator("She", max_new_tokens=2)
    assert repr(result) == f"Generation({result.text!r}, finish_reason='length')"
    long = dataclasses.replace(result, completions=(dataclasses.replace(result.completions[0], text="a\n" * 5000),))
    assert len(repr(long)) < 600
    assert "\n" not in repr(long)
    assert "… (10,000 characters)" in repr(long)
    rows = generator(["She"] * 3, max_new_tokens=2)
    assert rows == [result] * 3 or [row.text for row in rows] == [result.text] * 3
    assert repr(rows).splitlines() == [
        "3 results",
        *(f"   {n}  {result.text!r}  finish_reason='length'" for n in range(3)),
    ]
    assert "… 90 more" in repr(results.Results([result] * 100))
    assert [tag for tag in Page(rows._repr_html_()).tags if tag == "tr"] == ["tr"] * 4
    many = Page(results.Results([result] * 1000)._repr_html_())
    assert (many.tags.count("tr"), "… 800 more" in many.texts) == (202, True)


def test_results_are_made_by_hand() -> None:
    """With what matters to a test of what is built on lmkit; all else has a default, and what is made shows itself."""
    made = results.Generation("Go on?", (results.Completion("Yes."),))
    assert repr(made) == "Generation('Yes.', finish_reason='eos')"
    assert results.Generation.from_dict(made.to_dict()) == made
    way = results.Candidate("The sea.", ("sea",), ("sea",), (7,), (-0.5,))
    slot = results.MaskSlot(4, 10, (way,), 0, 11)
    score = results.Score("Yes.")
    for one in (
        *(made, way, score, results.ToolCall("f", {}), results.TextChunk("Yes.")),
        results.Translation("Hi.", made.completions),
        results.Unmasking("The [MASK].", (slot,), (way,)),
        results.Ranking((results.Choice("Yes.", 0, 0.0, 1.0, score),)),
    ):
        assert type(one).from_dict(one.to_dict()) == one
        assert Page(one._repr_html_()).open == []


def test_errors_have_their_place_in_a_list() -> None:
    """A row that failed says so in its line."""
    rows: Any = checkpoints.wrapper("llama").score(["She is", ""], on_error="return")
    assert isinstance(rows[1], lmkit.OptionError)
    assert f"OptionError: {rows[1]}"[:40] in repr(rows)
    assert f"OptionError: {rows[1]}" in Page(rows._repr_html_()).texts


@pytest.mark.parametrize("text", HOSTILE, ids=repr)
def test_a_terminal_is_not_steered(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`show` prints the same as the picture has, with control characters as escapes."""
    result = checkpoints.wrapper("llama")("She", max_new_tokens=1)
    dataclasses.replace(result, completions=(dataclasses.replace(result.completions[0], text=text),)).show()
    told = capsys.readouterr().out
    assert visible(text) in told
    assert not set(told) & set("\x1b\u202e\u2066")


def test_in_a_notebook_show_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where IPython has a kernel, `show` displays the result itself."""
    shown: list[object] = []

    class IPython:
        """Stands in for IPython in a notebook."""

        @staticmethod
        def get_ipython() -> object:
            return type("Shell", (), {"kernel": None})()

        class display:  # noqa: N801 - a module's name
            """Its module of this name."""

            display = staticmethod(shown.append)

    monkeypatch.setitem(__import__("sys").modules, "IPython", IPython)  # type: ignore[arg-type]
    result = checkpoints.wrapper("llama")("She", max_new_tokens=1)
    result.show()
    assert shown == [result]
