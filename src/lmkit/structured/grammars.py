"""Which tokens a row may take next, by llguidance: a model's grammars, and the state of each row in one."""

from __future__ import annotations

import json
from functools import cached_property, lru_cache, partial
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from lmkit.errors import OptionError
from lmkit.structured.outputs import SPACES, JSONSchema, library
from lmkit.structured.vocabulary import spelled

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from lmkit.structured.outputs import Output
    from lmkit.text.codec import Codec

MOST_KEPT = 64
"""How many compiled grammars are kept; to compile one takes 1 to 30 ms."""


class Matcher:
    """Where one row is in its grammar.

    An error, of llguidance's bounds, leaves nothing but the end allowed, so it has to be looked for.

    Attributes:
        words: How many numbers of 32 bits a mask has.
    """

    def __init__(self, compiled: Any, size: int, forced: int | None) -> None:
        """Begin, with `size` tokens; a first one `forced` by the model's config is no part of the answer."""
        self._state = compiled.deep_copy()
        self._size = size
        self.words = -(-size // 32)
        self._forced = forced
        self._count = 0

    def read(self, token_ids: Sequence[int]) -> None:
        """Take in what the row has written since the last time."""
        new = list(token_ids[self._count :])
        if self._count == 0 and new[:1] == [self._forced]:
            del new[0]
        self._count = len(token_ids)
        self._state.consume_tokens(new)
        self._heed()

    def _heed(self) -> None:
        """Raise an interrupt that came while llguidance asked the tokenizer: it makes an error of its own of it."""
        if self._state.is_error() and "KeyboardInterrupt" in self._state.get_error():
            raise KeyboardInterrupt

    @property
    def error(self) -> str:
        """What is wrong, or nothing."""
        return str(self._state.get_error()).partition("\n")[0] if self._state.is_error() else ""

    @property
    def complete(self) -> bool:
        """Whether nothing but the end fits any more."""
        return bool(self._state.is_stopped() and not self._state.is_error())

    def fitting(self, guesses: list[int]) -> list[int]:
        """Return the first of some tokens, as far as they fit."""
        known = list(takewhile(lambda token_id: token_id < self._size, guesses))
        return known[: self._state.validate_tokens(known)]

    def write(self, address: int) -> None:
        """Write the mask of what may come next to an address in memory."""
        self._state.unsafe_compute_mask_ptr(address, 4 * self.words)
        self._heed()


def masks(matchers: Sequence[Matcher]) -> torch.Tensor:
    """Return a bit for each token, the lowest of a byte first, set where it may come next.

    Returns:
        *Shape:* `(matchers, vocabulary / 8)`, uint8.
    """
    import torch

    found = torch.zeros(len(matchers), matchers[0].words, dtype=torch.int32, device="cpu")
    for number, matcher in enumerate(matchers):
        matcher.write(found[number].data_ptr())
    return found.view(torch.uint8)


class Grammars:
    """The grammars of a model's answers, compiled when they are first asked for."""

    def __init__(self, codec: Codec, ends: Sequence[int], *, encodes: bool) -> None:
        """Serve a model whose answers end with one of `ends`; one that `encodes` begins a text of its own."""
        self._codec = codec
        self._ends = list(ends)
        self._encodes = encodes
        self._compiled = lru_cache(maxsize=MOST_KEPT)(self._compile)

    def of(self, output: Output[Any], before: str = "", forced: int | None = None) -> Callable[[], Matcher]:
        """Return what begins an answer, for each row anew.

        Args:
            output: What the answer must be.
            before: What may stand before it, as a rule of Lark's whose name is `before`.
            forced: A first token that the model's config puts there.

        Raises:
            OptionError: There is no such grammar, or the tokenizer cannot write it.
            MissingExtraError: The packages of the extra are not installed.
        """
        return partial(Matcher, self._compiled(output, before), self._tokens.vocab_size, forced)

    @cached_property
    def _spelled(self) -> _Spelled:
        return _Spelled(self._codec, self._ends)

    @cached_property
    def _tokens(self) -> Any:
        return _tokenizer(self._spelled)

    def _compile(self, output: Output[Any], before: str) -> Any:
        spaces = f"/{SPACES}/" if output.spaced or before else "/ ?/" if self._encodes else ""
        start = f"start: {'before' if before else ''} {spaces} @answer\n{before}"
        try:
            form = output.form()
        except (TypeError, ValueError) as error:
            raise OptionError(_refused(output, str(error))) from error
        compiled = self._parsed(output, [{"lark_grammar": start}, {**form, "name": "answer"}])
        if not self._begins(compiled) and not self._begins(self._parsed(output, [form]), blank=True):
            raise OptionError(
                f"output={output!r:.80}: no token of this checkpoint's vocabulary can begin such an answer."
            )
        return compiled

    def _begins(self, compiled: Any, *, blank: bool = False) -> bool:
        """Say whether something may come first, of more than white space if not `blank`.

        Where nothing fits, llguidance's mask has a token that it does not take.
        """
        mask, ends = compiled.compute_bitmask(), self._spelled.ends
        tokens = (n for n, token in enumerate(self._spelled.tokens) if n not in ends and (blank or token.strip()))
        return any(mask[n // 8] >> n % 8 & 1 and compiled.validate_tokens([n]) for n in tokens)

    def _parsed(self, output: Output[Any], grammars: Sequence[Any]) -> Any:
        compiled = library().LLMatcher(self._tokens, json.dumps({"grammars": grammars}), log_level=0)
        if error := compiled.get_error():
            raise OptionError(_refused(output, error))
        return compiled


def _refused(output: Output[Any], error: str) -> str:
    told = " ".join(error.partition(" Enable ")[0].split())[:300]  # behind that come options of llguidance's own
    hint = " Leave it out, or pass a Python type: pydantic checks it." if isinstance(output, JSONSchema) else ""
    return f"output={output!r:.80} cannot be held to: {told}.{hint}"


class _Spelled:
    """What llguidance asks of a tokenizer.

    Where a grammar leaves only one way to go on, it lets the tokens come that the tokenizer makes of that text, not all
    of which the text can be put together.
    """

    def __init__(self, codec: Codec, ends: list[int]) -> None:
        if not ends:
            raise OptionError("output= needs a token that ends a text, and this checkpoint has none: leave it out.")
        self.tokens, self.special_token_ids = spelled(codec)
        self.bos_token_id = codec.tokenizer.bos_token_id
        self.eos_token_id, self.ends = ends[0], ends
        self._codec = codec
        no_text = {*self.special_token_ids, *ends}  # what ends an answer is not a part of it
        self.special_token_ids = sorted(no_text)
        self._numbers = {token: number for number, token in enumerate(self.tokens) if number not in no_text}
        self._longest = max(map(len, self.tokens))

    def __call__(self, text: str) -> list[int]:
        """Return the tokens of a part of a text, whose bytes they have to be."""
        token_ids = self._codec.encode(text, special=False)
        whole = b"".join(self.tokens[token_id] for token_id in token_ids) == text.encode()
        whole = whole and not set(token_ids).intersection(self.special_token_ids)  # the name of one is a text here
        return token_ids if whole else self._greedy(text.encode())  # sentencepiece puts a space before what it is given

    def _greedy(self, text: bytes) -> list[int]:
        found: list[int] = []
        while text:
            sizes = range(min(self._longest, len(text)), 0, -1)
            size = next((size for size in sizes if text[:size] in self._numbers), 0)
            if not size:
                break  # the vocabulary lacks it
            found.append(self._numbers[text[:size]])
            text = text[size:]
        return found


def _tokenizer(spelled: _Spelled) -> Any:
    try:
        return library().LLTokenizer(library().TokenizerWrapper(spelled), eos_token=spelled.ends)
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # of Rust; it is not public
            raise
        raise OptionError(f"output= cannot be had with this checkpoint's tokenizer: {error!s:.300}") from None
