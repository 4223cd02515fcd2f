"""Which tokens options mean that name them by their texts."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from lmkit.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from lmkit.text.codec import Codec

MOST_KNOWN = 4096
"""How many texts' tokens are kept: as a rule, the rows of a call have the same."""


class Words:
    """Tokens of answers, by number or text; safe for threads."""

    def __init__(self, codec: Codec, encode: Callable[[str], Sequence[int]], vocabulary: int) -> None:
        """Serve a model that chooses among `vocabulary` tokens; `encode` gives those of an answer, no special ones."""
        self._codec, self._vocabulary = codec, vocabulary
        self._encode = lru_cache(MOST_KNOWN)(encode)

    def biases(self, given: Mapping[int, float] | Mapping[str, float] | Mapping[int | str, float]) -> dict[int, float]:
        """Return what is added to which token.

        Raises:
            OptionError: A text is not one token, or a number is none.
        """
        return {self._one(word): float(bias) for word, bias in given.items()}

    def forbidden(self, given: Iterable[str | Sequence[int]]) -> list[list[int]]:
        """Return the sequences of tokens that stand for words: for a text, those with and without a space before it.

        Raises:
            OptionError: A number is no token.
        """
        texts = [form for word in given if isinstance(word, str) for form in (word, f" {word}")]
        # A form with the token of what the vocabulary lacks cannot be written, and would forbid others.
        written = [ids for ids in map(self._encode, texts) if ids and self._codec.unknown not in ids]
        numbers = [self._checked("bad_words", word) for word in given if not isinstance(word, str)]
        return [list(ids) for ids in dict.fromkeys(map(tuple, [*written, *numbers]))]

    def _one(self, word: int | str) -> int:
        token_ids = self._encode(word) if isinstance(word, str) else self._checked("logit_bias", [word])
        if len(token_ids) == 1 and (token_ids[0] != self._codec.unknown or not isinstance(word, str)):
            return token_ids[0]
        shown = ", ".join(f"{self._codec.token(one)!r} ({one})" for one in token_ids)
        raise OptionError(
            f"logit_bias has the text {word!r}, which is not one token but {shown or 'none'}: give token ids as whole "
            "numbers, or a text that is one token; with a space before it, it may be."
        )

    def _checked(self, name: str, token_ids: Sequence[int]) -> Sequence[int]:
        if (beyond := max(token_ids)) >= self._vocabulary:
            raise OptionError(
                f"{name} has the token id {beyond}: the model has those from 0 to {self._vocabulary - 1}."
            )
        return token_ids
