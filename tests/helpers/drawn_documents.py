"""Documents for Hypothesis to draw: of many scripts, with every kind of break and of space."""

from hypothesis import strategies as st

WORDS = (
    "word", "Ein", "l'été", "naïve", "e\u0301le\u0301", "日本語", "你好", "ไทย", "שלום", "مرحبا", "हिन्दी",
    "👩‍👩‍👧‍👦", "🇫🇷", "👍🏽",
    "{name}", "https://a.example/x?y=1", "<b>", "</b>", "3.14", "1,000", "U.S.", "Mr.", "\ufeff", "\u200b",
    "a\u0300\u0301\u0302", "x" * 40,
)  # fmt: skip
BETWEEN = (" ", " ", " ", "  ", "\u00a0", "\u3000", "", ", ", "; ", " — ", "\t")
ENDS = (".", "!", "?", "。", "！", "؟", "।", "…", '."', "?!", "")
MARKERS = ("", "- ", "* ", "1. ", "> ", "> > ", "# ", "\t- ", "    ", "a) ", "• ", "- [ ] ")
BREAKS = ("\n", "\r\n", "\r", "\n\n", "\r\n\r\n", "\u2028", "\x0b", "\n \t\n")
sentences = st.builds(
    lambda words, end: "".join(word + gap for word, gap in words) + end,
    st.lists(st.tuples(st.sampled_from(WORDS), st.sampled_from(BETWEEN)), max_size=12),
    st.sampled_from(ENDS),
)
lines = st.builds(
    lambda marker, parts: marker + "".join(part + gap for part, gap in parts),
    st.sampled_from(MARKERS),
    st.lists(st.tuples(sentences, st.sampled_from((" ", "  ", ""))), max_size=5),
)
documents = st.one_of(
    st.builds(
        lambda parts: "".join(line + end for line, end in parts),
        st.lists(st.tuples(lines, st.sampled_from(BREAKS)), max_size=6),
    ),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=80),
)
splits = st.sampled_from(["sentence", "paragraph"])
