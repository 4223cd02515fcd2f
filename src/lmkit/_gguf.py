"""What transformers does badly with GGUF files, put right for the duration of a load."""

from __future__ import annotations

import contextlib
import functools
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

_one_at_a_time = threading.Lock()


@contextlib.contextmanager
def gguf_read_once() -> Iterator[None]:
    """Let transformers parse a GGUF file once, and without the bar it draws past its own switch for bars.

    It parses the whole header, in Python, for the config, for the tokenizer and for the weights again: with a
    vocabulary of 49,152 that is four seconds each time. Loads of GGUF files take turns while this is open.
    """
    import gguf
    from transformers import modeling_gguf_pytorch_utils

    package: Any = gguf
    utilities: Any = modeling_gguf_pytorch_utils
    with _one_at_a_time:
        reader, bar = package.GGUFReader, utilities.tqdm
        package.GGUFReader = functools.cache(reader)
        utilities.tqdm = functools.partial(bar, disable=True)
        try:
            yield
        finally:
            package.GGUFReader, utilities.tqdm = reader, bar
