"""Serve a model by the interface of OpenAI: `python openai_server.py MODEL [--port 8000]`.

`/v1/chat/completions` and `/v1/completions` (streams, tools, response_format, logprobs, stop), `/v1/models`, `/health`.
All requests share one engine and its batches. A client that hangs up ends its row. It needs starlette and uvicorn.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import time
import uuid
from typing import TYPE_CHECKING, Any

import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

import lmkit

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine

    from starlette.requests import Request

SAME = "temperature top_p seed stop frequency_penalty presence_penalty tools tool_choice thinking".split()
"""What is called the same by both, and `thinking`, which is lmkit's (`extra_body` in the client)."""

RENAMED = {"max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens", "n": "num_return_sequences"}
UNUSED = "model messages prompt stream stream_options user metadata store service_tier parallel_tool_calls".split()
ENDED = {"eos": "stop", "stop": "stop", "length": "length", "cancelled": "stop"}
USERS = (lmkit.OptionError, lmkit.InputTooLongError, lmkit.OutputError, KeyError, TypeError, ValueError)
"""Errors that are the client's: the others are the server's."""


def options(asked: dict[str, Any]) -> dict[str, Any]:
    """Turn what a client asks for into lmkit's options; what there is no word for is an error."""
    left = {name: value for name, value in asked.items() if value is not None and name not in UNUSED}
    found = {name: left.pop(name) for name in SAME if name in left}
    found |= {RENAMED[name]: left.pop(name) for name in RENAMED if name in left}
    if bias := left.pop("logit_bias", None):
        found["logit_bias"] = {int(token_id): value for token_id, value in bias.items()}
    top, wanted = left.pop("top_logprobs", None), left.pop("logprobs", None)
    if wanted not in (None, False):
        found["logprobs"] = top or (0 if wanted is True else int(wanted))
    if isinstance(choice := found.get("tool_choice"), dict):
        found["tool_choice"] = choice["function"]["name"]
    form: dict[str, Any] = left.pop("response_format", None) or {"type": "text"}
    if form["type"] != "text":
        schema = form["json_schema"]["schema"] if form["type"] == "json_schema" else {"type": "object"}
        found["output"] = lmkit.JSONSchema(schema)
    if left:
        raise lmkit.OptionError(f"unknown or not supported here: {', '.join(left)}")
    return found


def prompt(asked: dict[str, Any], *, chat: bool) -> Any:
    """Return the messages of a chat, or the text to continue."""
    given = asked["messages" if chat else "prompt"]
    if not isinstance(given, list if chat else str):
        raise lmkit.OptionError(f"{given!r:.60} is not accepted: pass {'messages' if chat else 'a text'}.")
    return given


def logprobs(one: lmkit.Completion) -> dict[str, Any] | None:
    """Write log-probabilities as OpenAI does."""

    def entry(token: lmkit.TokenLogprob) -> dict[str, Any]:
        return {"token": token.token, "logprob": token.logprob, "bytes": list(token.token.encode())}

    if one.logprobs is None:
        return None
    return {"content": [{**entry(it), "top_logprobs": [entry(other) for other in it.top]} for it in one.logprobs]}


def calls(message: dict[str, Any]) -> list[dict[str, Any]]:
    """Write calls of tools as OpenAI does: arguments are a text, and a stream numbers them."""
    return [
        {**call, "index": n, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
        for n, call in enumerate(message.get("tool_calls", ()))
    ]


def choice(number: int, one: lmkit.Completion, *, chat: bool) -> dict[str, Any]:
    """Write one completion."""
    if not chat:
        return {"index": number, "text": one.text, "finish_reason": ENDED[one.finish_reason], "logprobs": logprobs(one)}
    message = {**one.message, **({"tool_calls": calls(one.message)} if one.tool_calls else {})}
    why = "tool_calls" if message.get("tool_calls") else ENDED[one.finish_reason]
    return {"index": number, "message": message, "finish_reason": why, "logprobs": logprobs(one)}


def usage(result: lmkit.Generation) -> dict[str, int]:
    """Count tokens."""
    read, new = result.prompt_tokens, sum(one.generated_tokens for one in result.completions)
    return {"prompt_tokens": read, "completion_tokens": new, "total_tokens": read + new}


def refused(error: Exception) -> JSONResponse:
    """Write an error: 400 for the client's, 500 for the server's."""
    kind, status = ("invalid_request_error", 400) if isinstance(error, USERS) else ("server_error", 500)
    content = {"message": str(error) or repr(error), "type": kind, "param": None, "code": None}
    return JSONResponse({"error": content}, status)


async def unless_gone(request: Request, work: Coroutine[Any, Any, Any]) -> Any:
    """Await work; cancel it, which ends its row at the next step, when the client hangs up."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
        return await task
    finally:
        gone.cancel()


class Server:
    """The routes of one model."""

    def __init__(self, generator: lmkit.Generator, name: str) -> None:
        """Serve `generator` as `name`."""
        self._generator, self._name = generator, name

    def app(self) -> Starlette:
        """Return the application."""
        posts = ("/v1/chat/completions", "/v1/completions")
        routes = [Route(path, self.answer, methods=["POST"]) for path in posts]
        return Starlette(routes=[*routes, Route("/v1/models", self.models), Route("/health", self.health)])

    async def models(self, _request: Request) -> Response:
        """Say which model there is."""
        model = {"id": self._name, "object": "model", "created": 0, "owned_by": "lmkit"}
        return JSONResponse({"object": "list", "data": [model]})

    async def health(self, _request: Request) -> Response:
        """Say how many rows run and wait."""
        stats = self._generator.stats
        return JSONResponse({"status": "ok", "running": stats.running, "waiting": stats.waiting})

    async def answer(self, request: Request) -> Response:
        """Answer a chat, or continue a text."""
        chat = request.url.path.endswith("chat/completions")
        try:
            asked = await request.json()
            given, how = prompt(asked, chat=chat), options(asked)
            head = {"id": uuid.uuid4().hex, "created": int(time.time()), "model": self._name}
            if asked.get("stream"):
                chunks = self._generator.astream(given, **how)
                first = await anext(chunks)  # what is wrong shows here, before the answer has begun
                return StreamingResponse(self._stream(first, chunks, head, chat=chat), media_type="text/event-stream")
            result: Any = await unless_gone(request, self._generator.acall(given, **how))
        except asyncio.CancelledError:
            return Response(status_code=499)  # nobody reads it
        except Exception as error:  # noqa: BLE001 - each has its answer
            return refused(error)
        choices = [choice(number, one, chat=chat) for number, one in enumerate(result.completions)]
        kind = "chat.completion" if chat else "text_completion"
        return JSONResponse({**head, "object": kind, "choices": choices, "usage": usage(result)})

    async def _stream(
        self, first: lmkit.TextChunk, chunks: AsyncIterator[lmkit.TextChunk], head: dict[str, Any], *, chat: bool
    ) -> AsyncIterator[str]:
        """Write server-sent events; leaving the loop, as when the client hangs up, ends the row."""
        head["object"] = "chat.completion.chunk" if chat else "text_completion"
        async with contextlib.aclosing(chunks):  # type: ignore[type-var]  # a generator
            chunk: lmkit.TextChunk | None = first
            while chunk is not None:
                text = {"content": chunk.text} if chunk.kind == "content" else {"reasoning_content": chunk.text}
                delta: dict[str, Any] = {} if chunk.kind == "tool_call" else {**text}
                part = {"delta": delta} if chat else {"text": chunk.text}
                event: dict[str, Any] = {"index": chunk.index, "finish_reason": None, "logprobs": None, **part}
                last: dict[str, Any] = {}
                if chunk.result is not None:
                    whole = choice(0, chunk.result.completions[0], chat=chat)
                    event |= {"finish_reason": whole["finish_reason"], "logprobs": whole["logprobs"]}
                    if chat and chunk.result.tool_calls:
                        delta["tool_calls"] = calls(chunk.result.message)
                    last = {"usage": usage(chunk.result)}
                yield f"data: {json.dumps({**head, 'choices': [event], **last})}\n\n"
                chunk = await anext(chunks, None)
        yield "data: [DONE]\n\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    with lmkit.load("causal", arguments.model) as loaded:
        uvicorn.run(Server(loaded, arguments.model).app(), host="127.0.0.1", port=arguments.port, log_level="warning")
