"""What transformers does badly with GGUF files, put right for the duration of a load."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, TypeVar

from lmkit._interrupts import surely
from lmkit.checkpoint.files import Source, reading

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

ResultT = TypeVar("ResultT")


def gguf_read_once(source: Source, do: Callable[[], ResultT]) -> ResultT:
    """Call `do`, and let transformers parse a GGUF file once, with the bar of tensors that its switch for bars knows.

    It parses the whole header, in Python, for the config, for the tokenizer and for the weights again: with a
    vocabulary of 49,152 that is four seconds each time. Loads take turns, so that nobody else is reading meanwhile.
    """
    if source.gguf_file is None:
        return do()
    with reading(source.name):  # a missing package is an error that says so
        import gguf
    from transformers import modeling_gguf_pytorch_utils
    from transformers.utils import logging

    package: Any = gguf
    utilities: Any = modeling_gguf_pytorch_utils
    reader, bar = package.GGUFReader, utilities.tqdm

    def once() -> ResultT:
        package.GGUFReader = functools.cache(reader)
        utilities.tqdm = logging.tqdm
        return do()

    def undo() -> None:
        package.GGUFReader, utilities.tqdm = reader, bar

    return surely(once, undo)


def end_tokens(file: Path) -> dict[int, str]:
    """Return every token that ends a text of a GGUF file: those that llama.cpp counts as the end of generation.

    They are the tokens that the file's metadata names for it, and those of a known text, since files do not name all.
    Source: `llama_vocab::impl::load` in llama.cpp's llama-vocab.cpp.
    """
    import gguf

    fields = gguf.GGUFReader(str(file)).fields  # written as transformers does, so that it is the one that was parsed
    vocabulary = {text: number for number, text in enumerate(fields["tokenizer.ggml.tokens"].contents())}
    found = {vocabulary[text]: text for text in _ENDS & vocabulary.keys()}
    for name, texts in _NAMED_ENDS.items():
        field = fields.get(f"tokenizer.ggml.{name}_token_id")
        number = None if field is None else field.contents()
        found |= {at: text for text, at in vocabulary.items() if (text in texts if field is None else at == number)}
    if any(pair <= vocabulary.keys() for pair in _WITHOUT_END):
        found.pop(vocabulary.get("<|end|>", -1), None)
    return dict(sorted(found.items()))


_ENDS = frozenset(
    "<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <|endoftext|> </s> <|eom_id|> "
    "<EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> <eos> <turn|> <|tool_response>".split()
)
_NAMED_ENDS = {
    "eos": frozenset(),
    "eot": frozenset(),
    "eom": frozenset(),
    "fim_pad": frozenset("<|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD]".split()),
    "fim_rep": frozenset("<|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame>".split()),
    "fim_sep": frozenset({"<|file_sep|>"}),
}
"""Keys of the metadata, and the texts that stand for a key which is not there."""

_WITHOUT_END = (frozenset({"<|return|>", "<|call|>"}), frozenset({"<|calls|>", "<|flush|>"}))
"""Vocabularies in which `<|end|>` ends a part of an answer only: those of gpt-oss and Solar Open."""
