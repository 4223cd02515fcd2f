"""Biases and words that are never written: those of `generate`, with the tokens that the tokenizer gives."""

from pathlib import Path
from typing import Any

import pytest

import checkpoints
import lmkit
from checkpoints import reference, texts, wrapper
from lmkit.options.generation import GeneratorOptions
from lmkit.options.option import declared
from lmkit.options.per_row import split

TOKENS = 8


def forms(name: str, word: str) -> list[list[int]]:
    """Return the tokens of a word without and with a space before it, as plain transformers encodes an answer."""
    tokenizer = reference(name)[1]
    key = "text_target" if name == "marian" else "text"
    return [tokenizer(**{key: text}, add_special_tokens=False)["input_ids"] for text in (word, f" {word}")]


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ["llama", "mamba", "t5", "m2m100"])
def test_a_bias_is_added_as_generate_adds_it(name: str, beams: int) -> None:
    """Rows of a batch have the tokens of single runs with a `sequence_bias` of the same tokens."""
    rows, asked = texts(name)[:3], {"max_new_tokens": TOKENS, "num_beams": beams}
    plain = [checkpoints.generated(name, [text], **asked)[0] for text in rows]
    biases = {plain[0][1]: -4.5, plain[1][0] + 1: 3, plain[2][2]: -100.0}
    pairs = [[[token_id], float(bias)] for token_id, bias in biases.items()]
    expected = [checkpoints.generated(name, [text], **asked, sequence_bias=pairs)[0] for text in rows]
    results = wrapper(name)(rows, logit_bias=[biases, biases, None], **asked, **checkpoints.languages(name))
    assert [list(result.token_ids) for result in results] == [*expected[:2], plain[2]]
    assert expected != plain


@pytest.mark.parametrize("own", [[[[160], 4.0], [[161, 162], 2.0]], [[[40], -3.0], [[160], 4.0]]], ids=str)
def test_a_bias_is_beside_the_checkpoints_own(own: list[Any], tmp_path: Path) -> None:
    """The checkpoint's biases stay, but for a token that the caller says another one of."""
    where = checkpoints.configured("llama", tmp_path / "llama", sequence_bias=own)
    model, _ = checkpoints.plain("causal", where)
    merged = [*(pair for pair in own if pair[0] != [40]), [[40], 9.0]]
    with checkpoints.fresh("llama", where) as loaded:
        for text in texts("llama")[:3]:
            expected = checkpoints.generated("llama", [text], model, max_new_tokens=TOKENS, sequence_bias=merged)[0]
            assert list(loaded(text, max_new_tokens=TOKENS, logit_bias={40: 9}).token_ids) == expected


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "marian", "m2m100"])
def test_a_text_of_one_token_stands_for_it(name: str) -> None:
    """A text is encoded as a part of an answer, without special tokens; one token is biased, as by its id."""
    codec, options = wrapper(name)._codec, {"max_new_tokens": 3, **checkpoints.languages(name)}
    words = {token: ids[0] for token in map(codec.token, range(20, 180)) if len(ids := forms(name, token)[0]) == 1}
    word = next(iter(words))
    by_text = wrapper(name)(texts(name)[0], logit_bias={word: 90.0}, **options)
    assert words[word] in by_text.token_ids
    assert by_text.token_ids == wrapper(name)(texts(name)[0], logit_bias={words[word]: 90.0}, **options).token_ids


def test_a_text_of_several_tokens_is_an_error_that_shows_them() -> None:
    """So is one that the vocabulary lacks, and a number beyond it."""
    several = forms("gpt2", "Level up!")[0]
    with pytest.raises(lmkit.OptionError, match=r"'Level up!', which is not one token but 'L") as caught:
        wrapper("gpt2")("She", logit_bias={"Level up!": 1.0})
    assert all(f"({token_id})" in str(caught.value) for token_id in several)
    with pytest.raises(lmkit.OptionError, match="which is not one token but"):
        wrapper("t5")("She", logit_bias={"🙂": 1.0})
    with pytest.raises(lmkit.OptionError, match="logit_bias has the token id 479: the model has those from 0 to 478"):
        wrapper("llama")("She", logit_bias={479: 1.0})
    with pytest.raises(lmkit.OptionError, match="bad_words has the token id 479: the model has those from 0 to 478"):
        wrapper("llama")("She", bad_words=[[4, 479]])


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ["gpt2", "llama", "mamba", "t5", "marian"])
def test_bad_words_are_never_written(name: str, beams: int) -> None:
    """They are `bad_words_ids` of both forms of each text, and of token ids; the text they are taken from changes."""
    rows, asked = texts(name)[:3], {"max_new_tokens": TOKENS, "num_beams": beams}
    own = reference(name)[0].generation_config.bad_words_ids or []
    codec = wrapper(name)._codec
    before = [list(result.token_ids) for result in wrapper(name)(rows, **asked)]
    word, tokens = codec.decode(before[0][1:3]).strip(), before[1][:2]
    ids = [form for form in forms(name, word) if codec.unknown not in form] + [tokens]
    results = wrapper(name)(rows, **asked, bad_words=[word, tokens])
    for text, result in zip(rows, results, strict=True):
        expected = checkpoints.generated(name, [text], **asked, bad_words_ids=[*own, *ids])[0]
        assert list(result.token_ids) == expected
    assert list(results[1].token_ids) != before[1]


def test_bad_words_are_beside_the_checkpoints_own(tmp_path: Path) -> None:
    """What the checkpoint forbids stays forbidden."""
    first = checkpoints.generated("llama", texts("llama")[:1], max_new_tokens=1)[0]
    where = checkpoints.configured("llama", tmp_path / "llama", bad_words_ids=[first])
    with checkpoints.fresh("llama", where) as loaded:
        second = loaded(texts("llama")[0], max_new_tokens=1).token_ids
        third = loaded(texts("llama")[0], max_new_tokens=1, bad_words=[list(second)]).token_ids
    assert len({*first, *second, *third}) == 3


@pytest.mark.parametrize(
    "given, each",
    [
        ("up", ["up", "up"]),
        (["up", [3, 4]], [["up", [3, 4]]] * 2),
        ([[3, 4], [5]], [[[3, 4], [5]]] * 2),
        ([["up"], ["down"]], [["up"], ["down"]]),
        ([[[3, 4]], [[5]]], [[[3, 4]], [[5]]]),
        ([["up"], None], [["up"], None]),
    ],
    ids=str,
)
def test_lists_of_words_are_told_from_lists_of_rows(given: Any, each: list[Any]) -> None:
    """Lists of token ids are words for all rows; lists of texts, or of lists of token ids, are one per row."""
    rows = split({"bad_words": given}, 2, declared(GeneratorOptions))
    assert [row.get("bad_words") for row in rows] == each


@pytest.mark.parametrize(
    "given",
    [
        {"logit_bias": [3, 4]},
        {"logit_bias": {"": 1.0}},
        {"logit_bias": {-1: 1.0}},
        {"logit_bias": {3: "1"}},
        {"logit_bias": {"up": float("inf")}},
        {"logit_bias": {True: 1.0}},
        {"bad_words": [""]},
        {"bad_words": [3]},
        {"bad_words": [["up", 3]]},
        {"frequency_penalty": 2.1},
        {"presence_penalty": -3},
    ],
    ids=str,
)
def test_what_is_no_bias_or_word_is_refused(given: dict[str, Any]) -> None:
    """The error says what is accepted."""
    name = next(iter(given))
    with pytest.raises(lmkit.OptionError, match=f"{name} (takes a |has 2 values)"):
        wrapper("llama")("She", **given)
