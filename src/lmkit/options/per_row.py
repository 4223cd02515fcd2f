"""Options per row: one value for all rows of a call, or one for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, TypeVar, get_origin

from lmkit.errors import OptionError, UnknownOptionError, listed, nearest
from lmkit.options.option import Option, checked, unboxed

T = TypeVar("T")
PerRow: TypeAlias = T | Sequence[T | None]
"""One value for all rows of a call, or a sequence with one per row, where None means not given."""

Many: TypeAlias = Sequence[T] | Sequence[Sequence[T] | None]
"""The same for an option that is a list itself: one list for all rows, or a list of lists."""

_ELSEWHERE = {
    "do_sample": "lmkit calls it sample",
    "max_length": "lmkit calls it max_new_tokens, and counts new tokens only",
    "max_tokens": "lmkit calls it max_new_tokens",
    "min_length": "lmkit calls it min_new_tokens, and counts new tokens only",
    "stop_strings": "lmkit calls it stop",
    "n": "lmkit calls it num_return_sequences",
    "max_completion_tokens": "lmkit calls it max_new_tokens",
    "eos_token_id": "lmkit calls it stop_token_ids, which end a text beside the checkpoint's own end tokens",
    "bad_words_ids": "lmkit calls it bad_words, which takes texts too",
    "sequence_bias": "lmkit calls it logit_bias, which is for single tokens",
    "logits_processor": "lmkit calls it processors",
    "response_format": "lmkit calls it output, which takes a type, or a schema in lmkit.JSONSchema",
    "system": "It is the first message of a chat, with the role 'system'",
    **dict.fromkeys(("batch_size", "padding", "pad_token_id"), "Batches are lmkit's business: leave it out"),
    **dict.fromkeys(
        ("return_full_text", "echo"),
        "The result's text is the new part only: result.prompt + result.text is all of a prompt that was continued",
    ),
    **dict.fromkeys(
        ("documents", "chat_template", "reasoning_effort"),
        "What a Generator's chat template reads stands in template=, such as template={'tools': [...]}",
    ),
    "enable_thinking": "lmkit calls it thinking, and other values of a Generator's chat template stand in template=",
    **dict.fromkeys(("tools", "tool_choice", "thinking"), "Only chats with a Generator have it"),
    "add_generation_prompt": "A chat opens the assistant's turn by itself, unless continue_final_message=True",
    "src_lang": "lmkit calls it source",
    "tgt_lang": "lmkit calls it target",
    "lookup": "Only a Generator looks for its next tokens in the text: leave it out",
}
"""What names mean that other libraries or another wrapper have for an option."""


def split(given: Mapping[str, object], rows: int | None, known: Mapping[str, Option]) -> list[dict[str, Any]]:
    """Give each row of a call its own options: those that are given, checked.

    Args:
        given: The call's options: one value for all rows, or a list with one per row; for an option
            that is itself a list (`stop`, `targets`, …) one list, or a list of lists.
        rows: How many rows the call has; None where nobody knows, and options take one value for all.
        known: The options the call accepts; those for a call as a whole have been taken out of `given`.

    Raises:
        UnknownOptionError: A name that is not in `known`.
        OptionError: A list of another length than `rows`, or a value that is not accepted.
    """
    names = sorted(name for name, option in known.items() if not option.call)
    for name in given:
        if name not in names:
            hint = f" {_ELSEWHERE[name]}." if name in _ELSEWHERE else nearest(name, names)
            raise UnknownOptionError(f"unknown option {name!r}.{hint} Accepted: {listed(names)}.")
    columns = {name: _column(name, value, rows, known[name]) for name, value in given.items()}
    numbers = range(1 if rows is None else rows)
    return [checked({name: column[row] for name, column in columns.items()}, known) for row in numbers]


def _column(name: str, value: object, rows: int | None, option: Option) -> Sequence[object]:
    value = _listed(value)
    if not isinstance(value, list) or (option.many and (not _nested(value) or option.test(value))):
        return [value] * (1 if rows is None else rows)
    if rows is None:
        raise OptionError(
            f"{name} has {len(value)} values, and map takes one for all rows: pass one, or call the model with a list."
        )
    if len(value) != rows:
        raise OptionError(f"{name} has {len(value)} values for {rows} rows: pass one value, or one per row.")
    return value


def _listed(value: Any, levels: int = 2) -> object:
    """Return a sequence of any kind as a list: an array too, or a pandas Series, where a missing value is None.

    A Series is no `Sequence`, and what it gives for a number is the row that is labelled so. No option has more levels
    than a list of lists.
    """
    value = unboxed(value)
    sequence = hasattr(value, "__getitem__") and hasattr(value, "__len__") and getattr(value, "shape", None) != ()
    if not levels or not sequence or isinstance(value, (str, bytes, Mapping, type)):
        return value
    if isinstance(value, type) or get_origin(value) is not None:  # an enumeration, list[int]
        return value
    missing = value.isna() if hasattr(value, "isna") else [False] * len(value)
    return [None if absent else _listed(item, levels - 1) for item, absent in zip(value, missing, strict=True)]


def _nested(value: Sequence[object]) -> bool:
    return any(item is None or isinstance(item, list) for item in value)
