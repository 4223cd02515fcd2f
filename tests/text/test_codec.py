from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import lmkit
from checkpoints import CAUSAL, MASKED, SEQ2SEQ, reference, texts, wrapper
from lmkit.text.codec import Codec
from lmkit.text.windows import fit


def codec(name: str) -> Codec:
    """Return a codec over the family's tokenizer as transformers loads it."""
    return Codec(reference(name)[1])


@pytest.mark.parametrize("name", [*CAUSAL, *SEQ2SEQ, *MASKED])
def test_encoding_is_the_tokenizers(name: str) -> None:
    """Ids with and without special tokens are the tokenizer's own."""
    tokenizer = reference(name)[1]
    for text in [*texts(name), "", "  two  spaces ", "é 漢字 €"]:
        assert codec(name).encode(text) == tokenizer(text)["input_ids"]
        plain = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert codec(name).encode(text, special=False) == plain


@pytest.mark.parametrize(
    "name, around",
    [
        ("gpt2", (0, 0)), ("llama", (1, 0)), ("opt", (1, 0)), ("t5", (0, 1)), ("bart", (1, 1)),
        ("m2m100", (1, 1)), ("mbart", (0, 2)), ("marian", (0, 1)), ("bert", (1, 1)), ("roberta", (1, 1)),
    ],
)  # fmt: skip
def test_special_tokens_are_counted_at_both_ends(name: str, around: tuple[int, int]) -> None:
    """`around` says how many special tokens stand before and after a text."""
    assert codec(name).around == around


@pytest.mark.parametrize("name", CAUSAL)
def test_decoding_leaves_special_tokens_out(name: str) -> None:
    """Generated text has no special tokens, and a single token shows its name."""
    tokenizer = reference(name)[1]
    ids = tokenizer("Birds fly", add_special_tokens=False)["input_ids"]
    assert codec(name).decode([*ids, tokenizer.eos_token_id]) == tokenizer.decode(ids)
    assert codec(name).token(tokenizer.eos_token_id) == tokenizer.eos_token


def test_an_input_that_fits_is_left_alone() -> None:
    """Up to the limit nothing is cut, whatever `truncate` says; no limit takes everything."""
    for truncate in (None, "left", "right"):
        chosen: Any = truncate
        assert fit([1, 2, 3], 3, truncate=chosen) == ([1, 2, 3], False)
        assert fit([1, 2, 3], None, truncate=chosen) == ([1, 2, 3], False)


@pytest.mark.parametrize(
    "truncate, around, keep, expected",
    [
        ("left", (0, 0), None, [6, 7, 8, 9]),
        ("right", (0, 0), None, [0, 1, 2, 3]),
        ("left", (1, 0), None, [0, 7, 8, 9]),
        ("right", (1, 1), None, [0, 1, 2, 9]),
        ("left", (1, 1), None, [0, 7, 8, 9]),
        ("left", (0, 2), None, [6, 7, 8, 9]),
        ("right", (0, 2), None, [0, 1, 8, 9]),
        ("right", (0, 0), 2, [0, 1]),
        ("left", (1, 0), 2, [0, 9]),
    ],
)
def test_cutting_keeps_the_special_tokens(
    truncate: Any, around: tuple[int, int], keep: int | None, expected: list[int]
) -> None:
    """The side named is cut, between the special tokens, to the limit or to what is kept."""
    assert fit(range(10), 4, keep=keep, around=around, truncate=truncate) == (expected, True)


def test_a_long_input_says_both_lengths() -> None:
    """Without `truncate` the error has the row, its tokens, the limit and what to do."""
    with pytest.raises(lmkit.InputTooLongError) as caught:
        fit(range(10), 4, row=3)
    message = str(caught.value)
    assert message.startswith("row 3 has 10 tokens, the model takes 4: shorten or split the text")
    assert "truncate='left' or truncate='right'" in message


@pytest.mark.parametrize("name", ["gpt2", "t5", "m2m100", "xlm"])
def test_half_a_character_is_refused(name: str) -> None:
    """A lone surrogate is lmkit's own error wherever a text is encoded; what the message proposes can be encoded."""
    text = "a\U0001f600\ud83d b"
    shared = codec(name)
    for encode in (shared.encode, shared.encode_target, *([shared.located] if shared.tokenizer.is_fast else [])):
        with pytest.raises(lmkit.OptionError, match=r"a text has '\\ud83d' at character 2, .* \(a lone surrogate\)"):
            encode(text)
    mended = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert mended == "a\U0001f600\ufffd b"
    assert shared.encode(mended) == reference(name)[1](mended)["input_ids"]


def test_a_row_with_half_a_character_takes_no_other_down() -> None:
    """Every kind of wrapper names the row and the character, and `map` returns the error in the row's place."""
    for name, good, options in (
        ("gpt2", "Birds fly", {"max_new_tokens": 2}),
        ("m2m100", "Birds fly", {"max_new_tokens": 2, "source": "en", "target": "fr"}),
        ("bert", f"Birds {reference('bert')[1].mask_token}", {}),
    ):
        model: Any = wrapper(name)
        found = list(model.map([good, good + "\ud800", good], on_error="return", **options))
        assert isinstance(found[1], lmkit.OptionError)
        assert f"row 1 has '\\ud800' at character {len(good)}" in str(found[1])
        assert not any(isinstance(one, lmkit.LmkitError) for one in (found[0], found[2]))
    with pytest.raises(lmkit.OptionError, match="lone surrogate"):
        wrapper("bert")(f"Birds {reference('bert')[1].mask_token}", targets=["\ud800"])
    with pytest.raises(lmkit.OptionError, match="lone surrogate"):
        wrapper("gpt2").rank("Birds", ["fly", "\ud800"])


def test_threads_share_one_tokenizer() -> None:
    """Eight threads that encode and decode at once get what one gets, from tokenizers in Rust and in Python."""
    for name in ("llama", "m2m100", "xlm"):
        shared = codec(name)
        given = texts(name) * 20
        expected = [shared.encode(text) for text in given]
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(shared.encode, given)) == expected
            assert list(pool.map(shared.decode, expected)) == [shared.decode(ids) for ids in expected]
