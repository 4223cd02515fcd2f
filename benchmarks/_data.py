"""What the models are given: always the same, and long enough to be work."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

Chat = list[dict[str, str]]

SHORTEST, LONGEST = 40, 100
"""How many tokens a chat prompt may have, the template's included."""

BUDGETS = (4, 16, 32, 64, 192)

TEXTS: dict[str, Any] = json.loads(Path(__file__).with_name("texts.json").read_text(encoding="utf-8"))
"""What chats ask about and how, of what a chronicle is put together, and a text to edit.

`steady` has the topic and the question of chats whose greedy answer ends at the same token in float32, in bfloat16 and
in vLLM. Others end where rounding has them end, and then sides that stop by themselves do not do the same work.
"""


def steady_chats() -> list[Chat]:
    """Return the 64 chats of workload A, of one question each, between the shortest and the longest."""
    pairs = ((TEXTS["topics"][topic], TEXTS["questions"][question]) for topic, question in TEXTS["steady"])
    return [[{"role": "user", "content": question.format(topic=topic)}] for topic, question in pairs]


def chats(tokenizer: Any, count: int) -> list[Chat]:
    """Return that many different chats of one question each, between the shortest and the longest."""
    made = [
        [{"role": "user", "content": text.format(topic=topic)}]
        for topic in TEXTS["topics"]
        for text in TEXTS["questions"]
    ]
    fitting = [chat for chat in made if SHORTEST <= len(encode(tokenizer, chat)) <= LONGEST]
    if len(fitting) < count:
        msg = f"only {len(fitting)} prompts have {SHORTEST} to {LONGEST} tokens; {count} are wanted: add topics."
        raise ValueError(msg)
    return rng(0).sample(fitting, count)


def encode(tokenizer: Any, chat: Sequence[dict[str, str]]) -> list[int]:
    """Return the token ids of a chat, as its template writes it for an answer."""
    return list(tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"])


def budgets(count: int) -> list[int]:
    """Draw how many new tokens each row gets."""
    return rng(2).choices(BUDGETS, k=count)


def sentences(count: int, seed: int) -> list[str]:
    """Return that many sentences of a chronicle, in which nothing follows from anything before."""
    draw = rng(seed).choice
    return [f"{' '.join(draw(part) for part in TEXTS['chronicle'])}." for _ in range(count)]


def document(tokenizer: Any, tokens: int, seed: int) -> str:
    """Return a chronicle of at least that many tokens, and at most a sentence more."""
    lines = sentences(tokens // 10, seed)
    text = ""
    for line in lines:
        text = f"{text} {line}".lstrip()
        if len(tokenizer(text)["input_ids"]) >= tokens:
            break
    return text


def documentation() -> str:
    """Return what Python's own `help()` says of its topics: 465,000 characters of English with some code."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def rng(seed: int) -> random.Random:
    """Return a stream of numbers that is the same in every run."""
    return random.Random(seed)  # noqa: S311 - prompts, not secrets
