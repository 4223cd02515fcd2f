"""What stands between the translations of two pieces that follow each other."""

import pytest

from lmkit.documents import Piece, joined
from lmkit.documents.joined import gap, spacing

SCRIPTS = {
    "Latn": " ", "Cyrl": " ", "Arab": " ", "Kore": " ", "Hang": " ", "Deva": " ", "Hebr": " ",
    "Hans": "", "Hant": "", "Jpan": "",
    "Thai": None, "Laoo": None, "Khmr": None, "Mymr": None, "Tibt": None,
}  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_says_what_is_between_sentences(script: str) -> None:
    """A space, nothing in Chinese and Japanese, and what the source has where spaces separate phrases only."""
    assert spacing(script, "whatever is written") == SCRIPTS[script]


@pytest.mark.parametrize(
    "output, expected",
    [
        ("Bonjour.", " "), ("Привет!", " "), ("안녕하세요.", " "), ("12", " "), ("", " "),
        ("你好。", ""), ("こんにちは", ""), ("我用AI。", ""), ("他说 12。", ""), ("สวัสดี", None), ("မင်္ဂလာပါ။", None),
    ],
)  # fmt: skip
def test_a_script_that_nobody_names_is_that_of_the_text(output: str, expected: str | None) -> None:
    """The last letter tells, or a mark that only some scripts have."""
    assert spacing("Zzzz", output) == expected


@pytest.mark.parametrize(
    "source, script, expected",
    [
        ("One.|Two.", "Latn", " "), ("一。|二。", "Latn", " "), ("一。|二。", "Jpan", ""), ("一。|二。", "Thai", ""),
        ("One.| |Two.", "Latn", " "), ("One.| |Two.", "Hans", ""), ("One.| |Two.", "Thai", " "),
        ("One.|\n|Two.", "Hans", "\n"), ("One.|\n\n- |Two.", "Latn", "\n\n- "),
        ("一。|\u3000|二。", "Latn", "\u3000"), ("A.|<b>|B.", "Latn", "<b>"), ("one |  |two", "Hans", "  "),
    ],
)  # fmt: skip
def test_only_a_space_is_put_in_or_left_out(source: str, script: str, expected: str) -> None:
    """A space where the target's script writes one and nothing stands there, none where it has none."""
    left, *_, right = source.split("|")
    whole = source.replace("|", "")
    first, second = Piece(0, len(left)), Piece(len(whole) - len(right), len(whole))
    assert gap(whole, first, second, script, "") == expected


@pytest.mark.parametrize("source, expected", [("xxxxxx", ""), ("字字字字字字", " "), ("ไทยไทย", " ")])
def test_a_word_that_was_cut_is_put_together(source: str, expected: str) -> None:
    """Halves of a word get no space, parts of a text without spaces do, in a script that has them."""
    halves = Piece(0, 3, ("split",)), Piece(3, 6, ("split",))
    assert gap(source, *halves, "Latn", "") == expected


def test_a_space_that_was_put_in_is_a_segment() -> None:
    """Segments cover source and text, and what is not the source's is noted."""
    found = [Piece(0, 2), Piece(2, 4), Piece(5, 7)]
    text, segments = joined("一。二。 三。", found, [("One.", ()), ("Two.", ()), ("Three.", ())], gaps=["", " ", ""])
    assert text == "One. Two.Three."
    assert [(s.source_start, s.source_end, s.start, s.end, s.notes) for s in segments] == [
        (0, 2, 0, 4, ()), (2, 2, 4, 5, ("spaced",)), (2, 4, 5, 9, ()), (4, 5, 9, 9, ("spaced",)), (5, 7, 9, 15, ()),
    ]  # fmt: skip
