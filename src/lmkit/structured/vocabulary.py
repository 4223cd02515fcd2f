"""A tokenizer's tokens as the bytes that they write, of any tokenizer whose text is its tokens in a row."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from lmkit.errors import OptionError
from lmkit.text.codec import BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lmkit.text.codec import Codec

SAMPLES = ("a b", '{"key": [1, 2.5], "a": "x y"}\n', "é", "日本", "😀")
"""What is encoded to see whether the bytes of tokens are the text's; the vocabulary may lack some of it."""

LONGEST = 1000
"""How many bytes a token may have to be written in an answer: llguidance breaks down over some with thousands."""


def spelled(codec: Codec) -> tuple[list[bytes], list[int]]:
    """Return the bytes of every token, and which tokens are no text.

    Raises:
        OptionError: The tokenizer's text is not its tokens in a row, as WordPiece's is not.
    """
    tokenizer = codec.tokenizer
    names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    added = {number: token.content.encode() for number, token in tokenizer.added_tokens_decoder.items()}
    for write in (_byte_level, _sentencepiece, _bytes):
        tokens = [added[n] if n in added else _written(write, name) for n, name in enumerate(names)]
        if all(_holds(codec, tokens, sample) for sample in SAMPLES):
            none = {n for n, token in enumerate(tokens) if not token or len(token) > LONGEST}
            for number in none:
                tokens[number] = b"<no text: %d>" % number
            return tokens, sorted(none | codec.special)
    raise OptionError(
        f"output= cannot be had with this checkpoint's tokenizer ({type(tokenizer).__name__}): its text is not its "
        "tokens one after the other, so there is no telling which of them an answer may have. Leave output= out."
    )


def _written(write: Callable[[str], bytes], name: Any) -> bytes:
    try:
        return write(name) if isinstance(name, str) else b""
    except (KeyError, UnicodeEncodeError):
        return b""


def _byte_level(name: str) -> bytes:
    return bytes(map(BYTES.__getitem__, name))


def _sentencepiece(name: str) -> bytes:
    byte = re.fullmatch("<0x([0-9A-F]{2})>", name)
    return bytes.fromhex(byte[1]) if byte else name.replace("▁", " ").encode()


def _bytes(name: str) -> bytes:
    return name.encode("latin-1")


def _holds(codec: Codec, tokens: Sequence[bytes], sample: str) -> bool:
    """Say whether the bytes of a text's tokens are the text's; a first space may be there."""
    token_ids = codec.encode(sample, special=False)
    if codec.unknown_in(token_ids):
        return True  # it says nothing
    found = b"".join(tokens[token_id] for token_id in token_ids)
    return found.removeprefix(b" ") == sample.encode()
