"""Text to token ids and back: one tokenizer, shared by threads, never changed by a call."""

from __future__ import annotations

import itertools
import re
import threading
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

from lmkit._forks import renew, share
from lmkit._interrupts import locked
from lmkit.errors import OptionError
from lmkit.text.meter import Meter
from lmkit.text.sandbox import written

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import PreTrainedTokenizerBase


Typed: TypeAlias = tuple[int, int | None]
"""A token, and its type (BERT's first or second text); None where the tokenizer gives no types."""

WORD_STARTS = ("Ġ", "▁")
"""How byte-level and sentencepiece tokenizers mark the pieces that begin a word."""


_PRINTED = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = {
    **{chr(byte): byte for byte in _PRINTED},
    **{chr(256 + n): byte for n, byte in enumerate(sorted({*range(256)} - {*_PRINTED}))},
}
"""How byte-level tokenizers write bytes: as GPT-2's, those that cannot be printed as letters from 256 on."""


SHOWN = 8
"""How many tokens of a prompt say how the text behind it begins."""


def checked(text: str, what: str = "a text") -> str:
    """Return a text that has only characters; `what` names it in the message.

    Raises:
        OptionError: It has a lone surrogate, which no tokenizer can read.
    """
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise OptionError(
                f"{what} has {text[error.start]!r} at character {error.start}, which is half of a character (a lone "
                "surrogate): mend or remove it, for example with text.encode('utf-16', 'surrogatepass')"
                ".decode('utf-16', 'replace')."
            ) from error
    return text


def turn_end(tokenizer: Any) -> int | None:
    """Return a tokenizer's end token, if its chat template writes it behind what an assistant says; else None."""
    turns = [{"role": "user", "content": "Go on."}, {"role": "assistant", "content": "It ends."}]
    try:
        text = written(tokenizer, turns, Meter())
    except Exception:  # noqa: BLE001 - of a template, which may be any program; a chat tells what is wrong with it
        return None
    behind = text.rpartition(turns[1]["content"])[2].lstrip()
    ends: int | None = tokenizer.eos_token_id
    return ends if tokenizer.eos_token and behind.startswith(tokenizer.eos_token) else None


def alike(first: Sequence[int], second: Sequence[int]) -> int:
    """Count the tokens that two texts begin with in common."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


class Codec:
    """Encodes and decodes with a transformers tokenizer.

    Padding and truncation are settings of the tokenizer that its callers share, so lmkit never uses
    them: it encodes texts one by one and pads and cuts the ids itself. A lock keeps tokenizers written in
    Python, and those that compile a template, from two callers at a time.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Wrap `tokenizer`, which is not changed."""
        self.tokenizer: Any = tokenizer
        self._lock = threading.RLock()
        share(self)

    def forked(self) -> bool:
        """Make ready for a process that was forked; see `lmkit._forks`."""
        return renew(self._lock)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Return the text's token ids, with the checkpoint's special tokens around them if `special`."""
        token_ids: list[int] = self._called(checked(text), add_special_tokens=special)["input_ids"]
        return token_ids[self._doubled(token_ids) :] if special else token_ids

    def typed(self, text: str, *pair: str) -> list[Typed]:
        """Encode as `encode` does, a second text behind the first too, and say of which type each token is."""
        found = self._called(*map(checked, (text, *pair)))
        token_ids: list[int] = found["input_ids"]
        types = found.get("token_type_ids", [None] * len(token_ids))
        return list(zip(token_ids, types, strict=True))[self._doubled(token_ids) :]

    @cached_property
    def pairs(self) -> bool:
        """Whether special tokens of its own hold a second text apart from the first."""
        single, pair = (self._called(*texts)["input_ids"] for texts in (("a",), ("a", "a")))
        return len(pair) > 2 * len(single) - sum(self.around)

    @locked
    def _called(self, *text: str, **how: Any) -> Any:
        return self.tokenizer(*text, **how, verbose=False)

    def _doubled(self, token_ids: list[int]) -> bool:
        """Say whether a text that a template has already given its BOS got the tokenizer's as well."""
        bos = self.tokenizer.bos_token_id
        return bool(bos is not None and token_ids[:2] == [bos, bos] and self.around[0])

    def located(self, text: str) -> tuple[list[int], list[tuple[int, int]], list[int | None]] | None:
        """Encode as `encode` does, and say where in the text each token is, and in which of its words.

        Returns:
            Token ids, characters and numbers of words; None of a tokenizer that is written in Python and cannot tell.
        """
        if not self.tokenizer.is_fast:
            return None
        found = self._called(checked(text), return_offsets_mapping=True)
        columns = found["input_ids"], found["offset_mapping"], found.word_ids()
        first = self._doubled(columns[0])
        return columns[0][first:], columns[1][first:], columns[2][first:]

    @cached_property
    def special(self) -> frozenset[int]:
        """The tokens that texts are shown without."""
        added = self.tokenizer.added_tokens_decoder.items()
        return frozenset(token_id for token_id, token in added if token.special) | set(self.tokenizer.all_special_ids)

    @cached_property
    def unknown(self) -> int | None:
        """The token of what the vocabulary lacks; None if there is none, or it has another meaning too."""
        tokenizer = self.tokenizer
        number: int | None = tokenizer.unk_token_id
        return None if number in (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) else number

    def unknown_in(self, token_ids: Sequence[int]) -> tuple[int, ...]:
        """Say which tokens, as indices, stand for what the vocabulary lacks."""
        return tuple(n for n, token_id in enumerate(token_ids) if token_id == self.unknown)

    def encode_target(self, text: str, *, special: bool = True) -> list[int]:
        """Return the token ids of an answer, which some encoder-decoders write with another vocabulary."""
        return list(self._called(text_target=checked(text), add_special_tokens=special)["input_ids"])

    def written(self, messages: Sequence[Mapping[str, Any]], meter: Meter, **template: Any) -> str:
        """Return a chat as the checkpoint's template writes it; see `sandbox.written`. Nobody waits for a template."""
        return written(self.tokenizer, messages, meter, **template)

    def inside(self, text: str, start: int) -> list[tuple[int, int, int]]:
        """Encode what begins at a character of a longer text, and say from where to where in that each token is.

        Behind a line end, for some tokenizers put a space before what begins a text. A tokenizer that is written in
        Python cannot tell places: those of its added tokens are found, others are empty.
        """
        lead = "\n" if start else ""
        token_ids, places = self._placed(lead + text)
        first = self._placed(lead)[0] if lead else []
        if token_ids[: len(first)] != first:
            lead, first, (token_ids, places) = "", [], self._placed(text)
        shift, skipped = start - len(lead), len(first)
        pairs = zip(token_ids[skipped:], places[skipped:], strict=True)
        return [(token_id, begins + shift, ends + shift) for token_id, (begins, ends) in pairs]

    def _placed(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        fast = self.tokenizer.is_fast
        found = self._called(text, add_special_tokens=False, return_offsets_mapping=fast)
        if fast:
            return found["input_ids"], found["offset_mapping"]
        places, end, added = [], 0, self.tokenizer.added_tokens_decoder
        for token_id in found["input_ids"]:
            start = text.find(added[token_id].content, end) if token_id in added else -1
            end = start + len(added[token_id].content) if start >= 0 else end
            places.append((start if start >= 0 else end, end))
        return found["input_ids"], places

    @locked
    def decode(self, token_ids: Sequence[int], *, special: bool = False) -> str:
        """Return the text of generated tokens, with the names of special ones in it if `special`."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=not special))

    def token(self, token_id: int) -> str:
        """Return the text of one token, a special one's name included."""
        return self.decode([token_id], special=True)

    def shown(self, token_id: int, *, first: bool = False) -> str:
        """Return the text that a token adds to a text, or begins one with if `first`; half a character as its bytes."""
        key = token_id, first
        if key not in self._shown:
            self._shown[key] = self._text_of(token_id, [] if first or token_id in self.special else self._letter)
        return self._shown[key]

    def _text_of(self, token_id: int, behind: list[int]) -> str:
        before, text = self.decode(behind), self.decode([*behind, token_id], special=True)
        text = text[len(before) :] if text.startswith(before) else self.token(token_id)
        written = self._bytes(token_id) if "\N{REPLACEMENT CHARACTER}" in text else None
        return text if written is None else written.decode("utf-8", "backslashreplace")

    def _bytes(self, token_id: int) -> bytes | None:
        """Return what a token stands for, of a tokenizer that writes bytes."""
        piece = str(self.tokenizer.convert_ids_to_tokens(token_id))
        if byte := re.fullmatch("<0x([0-9A-F]{2})>", piece):
            return bytes.fromhex(byte[1])
        return bytes(map(BYTES.__getitem__, piece)) if BYTES.keys() >= set(piece) else None

    @cached_property
    def _letter(self) -> list[int]:
        return list(self._called("a", add_special_tokens=False)["input_ids"][-1:])

    @cached_property
    def _shown(self) -> dict[tuple[int, bool], str]:
        return {}

    def visible(self, token_ids: Sequence[int]) -> tuple[int, ...]:
        """Return the last few tokens that are shown as text: what goes on behind them begins as it does behind all."""
        last: list[int] = []
        for token_id in reversed(token_ids):
            if len(last) >= SHOWN and last[-1] not in self._byte_tokens:  # a run of bytes is decoded as a whole
                break
            last += [token_id] if token_id not in self.special else []
        return tuple(reversed(last))

    def named(self, texts: Sequence[str]) -> dict[int, str]:
        """Return the special tokens whose names are in texts."""
        names = self._names.items() if texts else ()
        return {one: name for one, name in names if any(name in text for text in texts)}

    @cached_property
    def _names(self) -> dict[int, str]:
        return {one: name for one in self.special if (name := self.token(one))}

    def whole_tokens(self, token_ids: Sequence[int]) -> int:
        """Count the tokens before a last run of single bytes, whose text later bytes can still change.

        Tokenizers with byte fallback write what they have no token for as bytes, and decode a run of them only as a
        whole: one that is not UTF-8 turns into replacement characters, a line break in it too.
        """
        count = len(token_ids)
        while count and token_ids[count - 1] in self._byte_tokens:
            count -= 1
        return count

    @cached_property
    def _byte_tokens(self) -> frozenset[int]:
        vocabulary = self.tokenizer.get_vocab()
        found = {vocabulary[name] for n in range(256) if (name := f"<0x{n:02X}>") in vocabulary}
        # Special tokens are not written, so they do not end a run.
        return frozenset(found | self.special if found else ())

    @cached_property
    def around(self) -> tuple[int, int]:
        """How many special tokens `encode` puts before and after a text."""
        inner, whole = (self._called("a", add_special_tokens=special)["input_ids"] for special in (False, True))
        starts = range(len(whole) - len(inner) + 1)
        before = next((n for n in starts if whole[n : n + len(inner)] == inner), 0)
        return before, len(whole) - len(inner) - before
