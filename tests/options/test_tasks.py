import re
from pathlib import Path
from typing import Any

import pytest

import lmkit
from checkpoints import wrapper
from lmkit.options.option import checked, declared
from lmkit.options.per_row import split
from lmkit.options.tasks import TranslationOptions, UnmaskOptions
from option_tables import PAGES, list_options, table

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "keep, words",
    [
        ([3], "keep=[3] is not accepted"),
        ([""], "names among 'emails', 'emoji', 'icu', 'printf', 'tags', 'urls'"),
        (True, "keep=True is not accepted"),
        (re.compile("x"), "of a compiled pattern pass pattern.pattern"),
        ([re.compile("x")], "of a compiled pattern pass pattern.pattern"),
    ],
)
def test_what_is_kept_is_written_as_strings(keep: Any, words: str) -> None:
    """What is no string is an OptionError that says what to pass."""
    with pytest.raises(lmkit.OptionError) as caught:
        checked({"keep": keep}, declared(TranslationOptions))
    assert words in str(caught.value)


@pytest.mark.parametrize("verb", ["__call__", "map", "stream", "astream"])
@pytest.mark.parametrize("value", [True, False])
def test_a_translator_does_not_look_up(verb: str, value: object) -> None:
    """`lookup` is an option of a `Generator` alone: elsewhere it is an error that says so, and what is accepted."""
    words = r"unknown option 'lookup'\. Only a Generator .*: leave it out\. Accepted: 'bad_words', 'early_stopping', "
    with pytest.raises(lmkit.OptionError, match=words):
        getattr(wrapper("m2m100"), verb)(["Birds fly."], source="en", target="fr", lookup=value)


def test_an_option_for_the_whole_call_has_no_value_per_row() -> None:
    """`progress` is taken out before rows get their options; where it is not, it is no option."""
    with pytest.raises(lmkit.UnknownOptionError, match="unknown option 'progress'"):
        split({"progress": True}, 1, declared(UnmaskOptions))


@pytest.mark.parametrize("page", PAGES)
def test_a_page_has_the_options_as_they_are_declared(page: str) -> None:
    """The tables of options on the pages are those that `option_tables` writes; paste them from the failure."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for one in PAGES[page]:
        assert table(*one) in text


@pytest.mark.parametrize("page", ["docs/options.md", "docs/errors.md"])
def test_a_page_names_the_options_that_are_lists(page: str) -> None:
    """The options that take a list, or a list of lists, are the same on all pages as in the code."""
    *others, last = (f"`{name}`" for name in list_options())
    text = (ROOT / page).read_text(encoding="utf-8")
    assert f"{', '.join(others)} and {last}" in " ".join(text.split())
