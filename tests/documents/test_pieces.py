import importlib
import re
import sys
from typing import Any

import pytest
import regex
import sentencex
from hypothesis import given, settings
from hypothesis import strategies as st

import lmkit
from drawn_documents import documents, sentences, splits
from lmkit.documents import Piece, Size, between, joined, kept, patterns, pieces
from lmkit.documents.sentences import sentence_ends

bytewise = Size(lambda text: len(text.encode()) + 1, 64, 42)


def parted(text: str, size: Size = bytewise, split: Any = "paragraph", **options: Any) -> list[str]:
    """Return the texts of a document's pieces."""
    return [text[piece.start : piece.end] for piece in pieces(text, size, split=split, **options)]


def wide(most: int = 10**6) -> Size:
    """Return a size in characters."""
    return Size(len, most, most)


# Nothing lost


@settings(max_examples=150, deadline=None)
@given(documents, splits, st.sampled_from(["en", "ja", None]))
def test_pieces_put_back_are_the_text(text: str, split: Any, language: str | None) -> None:
    """Pieces as they were, put back, are the text, and segments cover both sides once, at the same places."""
    found = pieces(text, bytewise, split=split, language=language)
    back, segments = joined(text, found, [(text[piece.start : piece.end], ()) for piece in found])
    assert back == text
    edges = [0, *(segment.source_end for segment in segments)]
    assert [segment.source_start for segment in segments] == edges[:-1]
    assert edges[-1] == len(text)
    assert [(s.start, s.end) for s in segments] == [(s.source_start, s.source_end) for s in segments]
    gaps = between(text, found)
    whole = "".join(gap + text[piece.start : piece.end] for gap, piece in zip(gaps, found, strict=False)) + gaps[-1]
    assert whole == text


@settings(max_examples=100, deadline=None)
@given(documents, splits, st.lists(st.text(max_size=5)))
def test_segments_cover_whatever_the_pieces_become(text: str, split: Any, outputs: list[str]) -> None:
    """Segments follow each other without gap or overlap in source and text, and say what became of each piece."""
    found = pieces(text, bytewise, split=split)
    given_back = [(outputs[n] if n < len(outputs) else "", ()) for n in range(len(found))]
    whole, segments = joined(text, found, given_back)
    for side in (("source_start", "source_end"), ("start", "end")):
        places = [0, *(place for s in segments for place in (getattr(s, side[0]), getattr(s, side[1])))]
        assert places[::2][: len(segments)] == places[1::2]
    assert (segments[-1].source_end, segments[-1].end) == (len(text), len(whole)) if segments else not text
    copied = [s for s in segments if s.notes == ("copied",)]
    assert all(text[s.source_start : s.source_end] == whole[s.start : s.end] for s in copied)
    rest = [s for s in segments if s.notes != ("copied",)]
    assert [whole[s.start : s.end] for s in rest] == [output for output, _ in given_back]
    assert [(s.source_start, s.source_end) for s in rest] == [(piece.start, piece.end) for piece in found]


@settings(max_examples=150, deadline=None)
@given(documents, splits)
def test_no_piece_is_too_long(text: str, split: Any) -> None:
    """A piece never has more tokens than the model takes, nor several sentences more than their share."""
    for piece in pieces(text, bytewise, split=split):
        inner = text[piece.start : piece.end]
        assert bytewise.count(inner) <= bytewise.most
        assert inner == inner.strip()
        assert not re.search(r"[\n\r\t\v\f\u2028\u2029\x85]", inner)


@settings(max_examples=100, deadline=None)
@given(documents, splits)
def test_what_is_copied_says_nothing(text: str, split: Any) -> None:
    """Between pieces there are no words: white space, marks, markers of lists with their numbers, symbols."""
    markers = re.compile(r"\(?(\d{1,3}[.)]|[A-Za-z]\)|\[[ xX]\])")
    for gap in between(text, pieces(text, bytewise, split=split)):
        assert not any(letter.isalnum() for letter in markers.sub("", gap))


@settings(max_examples=100, deadline=None)
@given(documents, splits, st.sampled_from([["icu"], ["urls", "tags"], [r"\S+ \S+"], [r"\s+\w", "icu"]]))
def test_no_piece_cuts_what_is_kept(text: str, split: Any, keep: list[str]) -> None:
    """A piece holds a match whole or not at all, even where the match is longer than the model takes."""
    spans = kept(text, patterns(keep))
    for piece in pieces(text, Size(len, 12, 8), split=split, kept=spans):
        assert not any(start < place < end for start, end in spans for place in (piece.start, piece.end))
        assert piece.end - piece.start <= 12


def test_a_paragraph_of_ten_thousand_words_has_no_limit() -> None:
    """A long paragraph is split into pieces that are nearly full, with few counts of tokens."""
    text = " ".join("Words." if n % 9 == 0 else "words" for n in range(10_000))
    counted: list[int] = []

    def count(part: str) -> int:
        counted.append(len(part))
        return len(part)

    found = pieces(text, Size(count, 500, 500), split="paragraph", language="en")
    assert "".join(between(text, found)).strip() == ""
    assert len(text) / 500 <= len(found) < len(text) / 430
    assert sum(counted) < 12 * len(text) + 500 * 500


@pytest.mark.parametrize("unit", ["字", "नि", "e\u0301", "x"])
def test_without_spaces_a_sentence_is_split_between_characters(unit: str) -> None:
    """What is read as one character stays whole, and pieces are as full as they can be."""
    found = parted(unit * 100, Size(len, 20, 20))
    assert "".join(found) == unit * 100
    assert all(len(regex.findall(r"\X", part)) == len(part) // len(unit) for part in found)
    assert all(len(part) == 20 // len(unit) * len(unit) for part in found[:-1])


def test_a_character_longer_than_the_model_is_split_at_last_by_code_points() -> None:
    """Marks piled up on one letter are split if nothing else fits; a single code point that does not is an error."""
    pile = "a" + "\u0301" * 30
    assert parted(pile, Size(len, 10, 10))[0] == pile[:10]
    with pytest.raises(lmkit.InputTooLongError, match=r"takes 3 tokens, and '字' alone has more"):
        parted("字", Size(lambda text: len(text.encode()) + 1, 3, 3))


# Where texts are split


def test_lines_tabs_and_markers_stay_outside() -> None:
    """A line is a paragraph; what a list, a quotation or a heading begins with is not translated; nor are columns."""
    text = "# Title\r\n\r\n- First item.\n  * Second (2) item!\n> > quoted\n12) twelve\n[x] done\n"
    text += "name\tvalue\n2024 was. A) b"
    first = ["Title", "First item.", "Second (2) item!", "quoted", "twelve", "done"]
    assert parted(text, wide()) == [*first, "name", "value", "2024 was. A) b"]


@pytest.mark.parametrize(
    "text", ["", " ", "\n\n", "---", "* * *", "😀 👍", "...", "1.", "- \n- ", "{name}", "<br> {x}"]
)
def test_what_has_no_words_is_copied(text: str) -> None:
    """Blank lines, rules, emoji and placeholders alone are no pieces."""
    assert parted(text, kept=kept(text, patterns(["icu", "tags"]))) == []


def test_sentences_alone_or_packed() -> None:
    """`"sentence"` makes each a piece; `"paragraph"` packs them as they fit, and not over a wide space."""
    text = "One is here. Two is Mr. Smith. Three!  Four? Five."
    each = ["One is here.", "Two is Mr. Smith.", "Three!", "Four?", "Five."]
    assert parted(text, wide(), "sentence", language="en") == each
    assert parted(text, wide()) == ["One is here. Two is Mr. Smith. Three!", "Four? Five."]
    assert parted(text, wide(31), language="en") == ["One is here. Two is Mr. Smith.", "Three!", "Four? Five."]
    assert parted(text, Size(len, 31, 15), language="en") == [
        "One is here.",
        "Two is Mr. Smith.",
        "Three!",
        "Four? Five.",
    ]


def test_a_long_sentence_is_split_at_clauses_then_words_and_marked() -> None:
    """Only a sentence that is too long is split, as coarsely as it can be, and its pieces have the note `"split"`."""
    text = "Short one. When it rains, the old man sleeps; reallyverylongword x."
    found = pieces(text, wide(20), split="paragraph", language="en")
    assert [(text[p.start : p.end], p.notes) for p in found] == [
        ("Short one.", ()),
        ("When it rains,", ("split",)),
        ("the old man sleeps;", ("split",)),
        ("reallyverylongword", ("split",)),
        ("x.", ("split",)),
    ]


def test_numbers_are_not_clauses() -> None:
    """A comma within a number is no place to split."""
    assert parted("it is 1,000,000 or more", wide(12)) == ["it is", "1,000,000 or", "more"]


TAGGED = [
    ("<p>seventeen</p>", ["seventeen"]),
    ("<p> seventeen </p>", ["seventeen"]),
    ("<li><b>seventeen</b></li>", ["seventeen"]),
    ("seventeen<br/>", ["seventeen"]),
    ("<!-- c -->seventeen", ["seventeen"]),
    ("&quot;seventeen&quot;&nbsp;", ["seventeen"]),
    ("- <b>x</b>", ["x"]),
    ("<i>One. Two.</i>", ["One.", "Two."]),
    ("<p>One</p><p>- Two</p>", ["One", "Two"]),
    ("One.<br>Two.", ["One.", "Two."]),
    ("<b>Hello</b> world", ["<b>Hello</b> world"]),
    ("Press <kbd>Enter</kbd>", ["Press <kbd>Enter</kbd>"]),
    ("<b>a</b> x <b>b</b>", ["<b>a</b> x <b>b</b>"]),
    ("<i><b>a</b> x</i>", ["<b>a</b> x"]),
    ("🎉 seventeen 🎉", ["seventeen"]),
    ("{name} arrived at {place}", ["{name} arrived at {place}"]),
    ("%s is 100%%", ["%s is 100%%"]),
    ("[b]seventeen[/b] [1]", ["[b]seventeen[/b] [1]"]),
    ("[b]seventeen[/b]", ["seventeen"]),
    ("**seventeen**", ["seventeen"]),
    ("**one** two", ["**one** two"]),
]


@pytest.mark.parametrize("text, expected", TAGGED)
def test_tags_at_the_edge_of_a_piece_stay_outside(text: str, expected: list[str]) -> None:
    """Kept tags and symbols around a piece are not the model's to read; half of a pair and placeholders are."""
    keep = ["tags", "emoji", "icu", "printf", r"\[/?\w+\]", r"\*\*"]
    assert parted(text, wide(), "sentence", language="en", kept=kept(text, patterns(keep))) == expected
    if keep[0] == "tags" and "<p" in text:
        assert parted(text, wide(), "sentence", language="en") != expected


def test_split_begins_where_it_is_told() -> None:
    """What stands before `start` is in no piece and in a segment of its own, with the note `"prefix"`."""
    text = ">>fra<< One. Two."
    found = pieces(text, wide(), split="paragraph", start=8)
    whole, segments = joined(text, found, [("Un. Deux.", ())], 8)
    assert found == [Piece(8, 17)]
    assert whole == "Un. Deux."
    assert [(s.source_start, s.source_end, s.start, s.end, s.notes) for s in segments] == [
        (0, 8, 0, 0, ("prefix",)),
        (8, 17, 0, 9, ()),
    ]


# Sentences


@settings(max_examples=100, deadline=None)
@given(sentences, sentences, st.sampled_from(["en", "de", "fr", "ja", "hi", "ar", "hy", "xx"]))
def test_sentences_cover_their_text(one: str, other: str, language: str) -> None:
    """Ends of sentences go up to the end of the text, and are those of sentencex, which keeps every character."""
    text = f"{one} {other}"
    ends = sentence_ends(text, language)
    assert ends == sorted(set(ends)) or not text
    assert ends[-1] == len(text)
    parts = sentencex.segment(language, text)
    assert len(ends) == 1 or [text[a:b] for a, b in zip([0, *ends], ends, strict=False)] == parts


@pytest.mark.parametrize("code", ["de", "deu", "deu_Latn", "de_DE", "de-AT"])
def test_sentences_know_their_language(code: str) -> None:
    """The abbreviations are those of the language, by whatever code a checkpoint has for it."""
    text = "Das ist Dr. Nowak. Er kam z. B. gestern."
    assert [text[:end] for end in sentence_ends(text, code)] == ["Das ist Dr. Nowak. ", text]
    assert sentence_ends(text, "de") != sentence_ends(text, "fr")


def test_one_sentence_needs_no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text that fits, or cannot be several sentences, is split without sentencex; else the error names the extra."""
    monkeypatch.setitem(sys.modules, "sentencex", None)
    assert parted("Mr. Smith is here. So am I.", wide()) == ["Mr. Smith is here. So am I."]
    assert parted("Only one is here!", wide(), "sentence") == ["Only one is here!"]
    assert parted("only words, and some more", wide(12)) == ["only words,", "and some", "more"]
    for split in ("sentence", "paragraph"):
        with pytest.raises(lmkit.MissingExtraError, match=re.escape('pip install "lmkit[translate]"')):
            parted("One. Two.", wide(8), split)


def test_the_modules_need_no_model() -> None:
    """Documents are text: their modules import neither torch nor transformers."""
    for name in ("pieces", "sentences", "keeping", "joined"):
        module = importlib.import_module(f"lmkit.documents.{name}")
        assert not {"torch", "transformers"} & set(vars(module))
