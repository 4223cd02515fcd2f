"""Answer two chats at once in an asyncio program, with a limit on how long it may take.

`acall` and `astream` are the asyncio forms of a call and of `stream`; cancelling a task ends its rows.
"""

from __future__ import annotations

import asyncio

import lmkit
import smollm2

LIMIT_SECONDS = 120


async def answer(generator: lmkit.Generator, question: str) -> str:
    """Answer one question; two of these at the same time share a batch."""
    result = await generator.acall([{"role": "user", "content": question}], max_new_tokens=16)
    return f"{question} {result.text}  (ended: {result.finish_reason})"


async def main() -> None:
    """Ask two questions at the same time, then stream a continuation."""
    with lmkit.load("causal", smollm2.path()) as generator:
        questions = ("What is the capital of France?", "What is two plus two?")
        async with asyncio.timeout(LIMIT_SECONDS):
            for text in await asyncio.gather(*(answer(generator, question) for question in questions)):
                print(text)
            async for chunk in generator.astream("One, two, three,", max_new_tokens=6):
                print(chunk.text, end="", flush=True)
    print()


if __name__ == "__main__":
    asyncio.run(main())
