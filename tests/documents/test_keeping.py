import time
from collections import Counter
from typing import Any

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

import lmkit
from lmkit.documents import READY, kept, patterns, restored


def matches(text: str, *keep: str) -> list[str]:
    """Return what the patterns match in a text."""
    return [text[start:end] for start, end in kept(text, patterns(keep))]


def put_right(source: str, text: str, *keep: str) -> tuple[str, tuple[str, ...]]:
    """Restore the placeholders of a translation."""
    compiled = patterns(keep)
    return restored(source, kept(source, compiled), text, compiled)


# What is found

PLURAL = "{n, plural, one {# item} other {{n} items}}"


@pytest.mark.parametrize(
    "name, text, found",
    [
        (
            "urls",
            "See https://a.example/x?y=1&z#f, or (www.b.example/q).",
            "https://a.example/x?y=1&z#f www.b.example/q",
        ),
        ("urls", "詳細はhttps://a.example/日本。次", "https://a.example/日本"),
        ("emails", "Write to jane.doe+x@mail.example.org.", "jane.doe+x@mail.example.org"),
        ("tags", "A <1>link</a>, <br/> 2 < 3 &amp; <b", "</a> <br/> &amp;"),
        ("printf", "%s of %5.2f, %1$s, %(n)s, %-10ld, 50% done, 100%% sure, 5 %cheap", "%s %5.2f %1$s %(n)s %-10ld %%"),
        ("icu", "{name}, {0}, {x.y[0]!r} and {x:>10}; {} {!}", "{name} {0} {x.y[0]!r} {x:>10}"),
        ("icu", "{{name}}, {{{raw}}}, {{#if}}a{{/if}} {{name} {b", "{{name}} {{{raw}}} {{#if}} {{/if}} {name}"),
        ("emoji", "a 🎉🎉 👩‍👩‍👧‍👦, 🇫🇷 5️⃣ 5 #1 ❤️ ❤ © 👍🏽. 🏴‍☠️ 1 ™ ☺!", "🎉🎉 👩‍👩‍👧‍👦 🇫🇷 5️⃣ ❤️ ❤ 👍🏽 🏴‍☠️ ☺"),
    ],
)
def test_ready_patterns_find(name: str, text: str, found: list[str]) -> None:
    """A ready pattern finds whole placeholders and nothing beside them."""
    assert name in READY
    assert matches(text, name) == found.split()


def test_ready_patterns_find_what_has_spaces() -> None:
    """Tags with attributes, comments and nested ICU messages are found as a whole."""
    text = 'A <a href="x>y" b>link</a> <!-- no <b> -->'
    assert matches(text, "tags") == ['<a href="x>y" b>', "</a>", "<!-- no <b> -->"]
    assert matches(f"{PLURAL}, {PLURAL}", "icu") == [PLURAL, PLURAL]
    assert matches("Hi {{ user.name }}!", "icu") == ["{{ user.name }}"]


def test_braces_without_end_are_quick() -> None:
    """What is no placeholder takes a time in proportion to its length, nearly."""
    assert matches("{" * 5000 + "{{a} " * 1000, "icu") == ["{a}"] * 1000


def test_patterns_are_those_of_the_package_regex() -> None:
    """Properties of Unicode, possessive repeats and recursion are understood."""
    assert matches("Größe 大小 size", r"\p{Han}+") == ["大小"]
    assert matches("f(a(b)c) d", r"\w\((?:[^()]++|\((?:[^()])*\))*\)") == ["f(a(b)c)"]


@pytest.mark.parametrize("changed", ["Bonjour {name} !", "Bonjour { { name } } !", "Bonjour {{Name}} !"])
def test_double_braces_stay_double(changed: str) -> None:
    """What a model makes of `{{name}}` is written as in the source."""
    assert put_right("Hello {{name}}!", changed, "icu") == ("Bonjour {{name}} !", ("repaired",))


def test_matches_that_overlap_are_one() -> None:
    """An address in a tag belongs to the tag; matches that only touch stay two."""
    assert matches('<a href="https://a.example">', "urls", "tags") == ['<a href="https://a.example">']
    assert matches("{a}{b}", "icu") == ["{a}", "{b}"]
    assert matches("abcdef", "abcd", "cdef") == ["abcdef"]
    assert matches("abc", "x*") == []


@pytest.mark.parametrize(
    "keep, words",
    [
        (["(["], "keep has '([', which is no regular expression: "),
        (["{name}", "+"], "'+', which is no regular expression: nothing to repeat"),
        (["icu", "url"], "'url'. Did you mean 'urls'? If the word itself is to be kept, write it as '(?:url)'."),
        ("Urls", "keep has 'Urls'. Did you mean 'urls'?"),
        (["URLS"], "Did you mean 'urls'?"),
        (["email"], "Did you mean 'emails'?"),
        (["html"], "Did you mean 'tags'?"),
        (["print"], "Did you mean 'printf'?"),
    ],
)
def test_a_wrong_pattern_is_an_error(keep: Any, words: str) -> None:
    """What is no pattern is an OptionError with the reason."""
    with pytest.raises(lmkit.OptionError) as caught:
        patterns(keep)
    assert words in str(caught.value)
    if "regular expression: " in words:
        assert isinstance(caught.value.__cause__, regex.error)


@pytest.mark.parametrize("word", ["(?:url)", "Lisbon", "HTML", "x", "日本"])
def test_other_words_are_patterns(word: str) -> None:
    """A bare word far from the ready names is a pattern, and a group says that any word is one."""
    assert patterns([word]) == (regex.compile(word),)


# What is put right

ALL = ("icu", "tags", "printf", "urls", "emails")


@pytest.mark.parametrize("text", ["Bonjour {name} !", "{name}, bonjour", "{name}"])
def test_what_is_whole_is_left_alone(text: str) -> None:
    """A translation with its placeholders in any place is not touched, and nothing is noted."""
    assert put_right("Hello {name}!", text, *ALL) == (text, ())
    assert put_right("Hello {name}!", "Salut {name} !", *ALL) == ("Salut {name} !", ())


@pytest.mark.parametrize(
    "source, broken",
    [
        ("{name}", "{ name }"), ("{name}", "{Name}"), ("{name}", "｛name｝"), ("{name}", r"\{name\}"),
        ("{name}", "{nom}"), ("</b>", "</ b>"), ("</b>", "< / B >"), ("</b>", "&lt;/b&gt;"), ("</b>", "‹/b›"),
        ('<a href="x">', "<a href = “x”>"),
        ("%s", "% s"), ("%s", "％s"), ("%(n)d", "% (n) d"), ("&amp;", "& amp;"),
        ("https://a.example/x", "https: / / a.example / x"), ("a@b.example", "a @ b.example"), ("{n:>3}", "{N: > 3}"),
    ],
)  # fmt: skip
def test_a_changed_placeholder_is_repaired(source: str, broken: str) -> None:
    """Spaces, case, quotes, widths, escapes and a translated name are put right, and `"repaired"` is noted."""
    assert put_right(f"Yes {source} now.", f"Oui {broken} là.", *ALL) == (f"Oui {source} là.", ("repaired",))


@pytest.mark.parametrize(
    "source, text, expected",
    [
        ("Hello {name}.", "Bonjour.", "Bonjour {name}."),
        ("{name} is here now", "est là maintenant", "{name} est là maintenant"),
        ("Click <b>here</b> now", "Cliquez ici maintenant", "Cliquez <b> ici</b> maintenant"),
        ("a {x} b {y} c", "a b {y} c", "a {x} b {y} c"),
        ("{a}", "", "{a}"),
        ("日本{x}語の", "漢字文字", "漢字{x}文字"),
    ],
)
def test_a_missing_placeholder_is_put_in(source: str, text: str, expected: str) -> None:
    """What is nowhere is put in at its proportional place, at the border of a word, and `"inserted"` is noted."""
    assert put_right(source, text, *ALL) == (expected, ("inserted",))


def test_copies_too_many_are_taken_out() -> None:
    """A placeholder that comes too often is removed, its white space too, and `"removed"` is noted."""
    assert put_right("Hi {a}", "Salut {a} {a} {a}", *ALL) == ("Salut {a}", ("removed",))
    assert put_right("Hi {a} {a}", "Salut {a} {a} {a}!", *ALL) == ("Salut {a} {a}!", ("removed",))


def test_words_of_the_model_stay_whole() -> None:
    """A match inside a word is no copy too many, and nothing is put in beside a hyphen."""
    assert put_right("seventeen X", "dix-sept", "(?i)x") == ("dix-sept X", ("inserted", "unmatched"))
    assert put_right("one X two", "dix-sept", "X") == ("X dix-sept", ("inserted",))
    assert put_right("日本", "日本は日本", "日本") == ("日本は", ("removed",))


def test_what_the_model_made_up_stays_and_is_noted() -> None:
    """A match that the source lacks is the model's text: it stays, and `"unmatched"` is noted."""
    assert put_right("five {n}", "5 {n}", r"\d+", "icu") == ("5 {n}", ("unmatched",))
    assert put_right("none", "no {n}", "icu") == ("no {n}", ("unmatched",))


def test_a_short_match_is_not_seen_in_a_longer_word() -> None:
    """A kept number is not taken to be there because another number has its digits."""
    assert put_right("12 of them", "1234 là", r"\d+") == ("12 là", ("repaired",))
    assert put_right("take 12", "prends a12b", r"\b\d+\b") == ("prends a12b 12", ("inserted",))


words = st.sampled_from(["mot", "été", "字", "a.", "(b)", "—", "x,y"])
holders = st.sampled_from(
    ["{name}", "{0}", "<b>", "</b>", "%s", "%1$d", "https://a.example/x", "a@b.example", "{n, plural, one {# x}}"]
)
tidy = st.sampled_from([lambda text: text, lambda _: "", str.upper, " ".join, lambda text: f"{text} {text}"])
breaks = st.sampled_from(
    [
        lambda text: text, lambda _: "", str.upper, lambda text: text + text, " ".join, lambda text: f"{text} {text}",
        lambda text: text.replace("{", "\\{"), lambda text: text.replace("<", "&lt;").replace(">", "&gt;"),
        lambda text: text[1:], lambda text: text[:-1],
    ]
)  # fmt: skip


@settings(max_examples=500, deadline=None)
@given(st.lists(st.one_of(words, holders), max_size=8), st.data())
def test_every_placeholder_comes_out_as_often_as_it_went_in(parts: list[str], data: st.DataObject) -> None:
    """Whatever a model does to placeholders: those of the source are in the text, as often, or that is noted.

    It is noted where what the model left of one grows together with another, such as `{a` before `{b}}`.
    """
    source = " ".join(parts)
    compiled = patterns(ALL)
    wanted = Counter(matches(source, *ALL))
    broken = [data.draw(breaks)(part) if part in wanted else part for part in parts]
    text, notes = restored(source, kept(source, compiled), " ".join(data.draw(st.permutations(broken))), compiled)
    found = Counter(matches(text, *ALL))
    assert all(text.count(word) >= count for word, count in wanted.items())
    assert (found == wanted) == ("unmatched" not in notes)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(words, holders), max_size=8), st.data())
def test_whole_changes_are_put_right_exactly(parts: list[str], data: st.DataObject) -> None:
    """Placeholders that are moved, dropped, doubled, spaced or shouted come out exactly as often as they went in."""
    source = " ".join(parts)
    compiled = patterns(ALL)
    wanted = Counter(matches(source, *ALL))
    broken = [data.draw(tidy)(part) if part in wanted else part for part in parts]
    text, notes = restored(source, kept(source, compiled), " ".join(data.draw(st.permutations(broken))), compiled)
    assert Counter(matches(text, *ALL)) == wanted
    assert "unmatched" not in notes


@settings(max_examples=300, deadline=None)
@given(
    st.text(max_size=40),
    st.text(max_size=40),
    st.sampled_from([[r"\w+"], [r"[^a]"], ["."], [r"(?<=a).", "icu"], list(ALL)]),
)
def test_any_text_and_pattern_end_well(source: str, text: str, keep: list[str]) -> None:
    """Odd patterns never fail; where they cannot be put right, that is noted."""
    got, notes = put_right(source, text, *keep)
    assert ("unmatched" in notes) == (Counter(matches(got, *keep)) != Counter(matches(source, *keep)))


@pytest.mark.parametrize("piece", ["{a{", "{a{b}", "{", "{{#", "}{"])
def test_many_braces_take_a_time_that_grows_as_they_do(piece: str) -> None:
    """Braces that nothing closes are not looked at again from each of them: 100,000 take less than a second."""
    begun = time.process_time()
    kept(piece * 100_000, patterns(["icu"]))
    assert time.process_time() - begun < 1
