import random
from typing import Any

import pytest
import transformers
from tokenizers import AddedToken

import chat_templates
import checkpoints
import lmkit
from lmkit.structured.vocabulary import LONGEST, spelled
from lmkit.text.codec import Codec

hf: Any = transformers
ALPHABET = 'abc ABC 0189 {}[]":,._-\n'
SPELLING = [
    "gpt2",
    "gpt_neox",
    "llama",
    "mistral",
    "qwen3",
    "gemma2",
    "phi3",
    "opt",
    "bloom",
    "bart",
    "t5",
    "mt5",
    "m2m100",
]


def texts(count: int) -> list[str]:
    """Draw texts of characters that JSON has."""
    draw = random.Random(1)  # noqa: S311 - texts
    return ["".join(draw.choices(ALPHABET, k=draw.randint(1, 30))).strip() for _ in range(count)]


@pytest.mark.parametrize("name", SPELLING)
def test_tokens_spell_texts(name: str) -> None:
    """The bytes of a text's tokens are the text's, as far as the vocabulary has its characters."""
    codec = Codec(checkpoints.reference(name)[1])
    tokens, no_text = spelled(codec)
    assert len(tokens) == len(codec.tokenizer)
    assert codec.special <= set(no_text)
    known = 0
    for text in texts(300):
        token_ids = codec.encode(text, special=False)
        if codec.unknown_in(token_ids) or codec.special & set(token_ids):
            continue
        known += 1
        spelt = b"".join(tokens[token_id] for token_id in token_ids).decode()
        assert spelt.split() == text.split()
        assert codec.decode(token_ids).split() == spelt.split()
    assert known > 20 or name in ("t5", "mt5", "m2m100")  # these lack most marks of JSON


def test_bytes_are_spelt() -> None:
    """A tokenizer of bytes, which is written in Python, writes what it reads."""
    codec = Codec(hf.ByT5Tokenizer())
    tokens, _ = spelled(codec)
    text = '{"ä": "日本"}'
    assert b"".join(tokens[token_id] for token_id in codec.encode(text, special=False)) == text.encode()


def test_tokens_that_are_no_text_are_named() -> None:
    """Words of word pieces have no spaces, so that there is no telling what tokens write."""
    with pytest.raises(lmkit.OptionError, match=r"output= cannot be had with this checkpoint's tokenizer \(Bert"):
        spelled(Codec(checkpoints.reference("bert")[1]))


def test_very_long_tokens_are_never_written() -> None:
    """What llguidance breaks down over a token of thousands of characters, it does not get."""
    tokenizer = chat_templates.byte_level()
    tokenizer.add_tokens([AddedToken("x" * 3500)])
    tokens, no_text = spelled(Codec(tokenizer))
    number = tokenizer.convert_tokens_to_ids("x" * 3500)
    assert number in no_text
    assert max(map(len, tokens)) <= LONGEST
