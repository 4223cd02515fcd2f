"""examples/openai_server.py, asked by OpenAI's own client."""

import asyncio
import gc
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
import uvicorn

import chat_templates
import checkpoints
import lmkit
import openai_server

CHAT: Any = [{"role": "user", "content": "She is old."}]
SERVED = "qwen3"


@contextmanager
def served(generator: Any) -> Iterator[str]:
    """Serve a model on loopback."""
    server = uvicorn.Server(uvicorn.Config(openai_server.Server(generator, SERVED).app(), port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Serve a tiny chat model."""
    with served(checkpoints.wrapper(SERVED)) as address:
        yield address


@pytest.fixture
def client(address: str) -> Iterator[openai.OpenAI]:
    """Make a client."""
    with openai.OpenAI(base_url=address, api_key="none", max_retries=0) as made:
        yield made


def test_a_chat_is_answered_as_a_call_answers_it(client: openai.OpenAI) -> None:
    """Text, why it ended, tokens and log-probabilities are those of the generator; a stream has the same text."""
    own = checkpoints.wrapper(SERVED).chat(CHAT, max_new_tokens=8, temperature=0.7, seed=3, logprobs=2)
    options: Any = {"model": SERVED, "messages": CHAT, "max_tokens": 8, "temperature": 0.7, "seed": 3}
    found = client.chat.completions.create(**options, logprobs=True, top_logprobs=2)
    (choice,) = found.choices
    assert choice.message.content == own.content
    assert choice.finish_reason == openai_server.ENDED[own.finish_reason]
    assert found.usage is not None
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (own.prompt_tokens, own.generated_tokens)
    assert own.logprobs is not None
    assert choice.logprobs is not None
    found_logprobs = [one.logprob for one in choice.logprobs.content or ()]
    assert found_logprobs == pytest.approx([one.logprob for one in own.logprobs], abs=1e-4)  # kept prefixes round apart
    chunks = list(client.chat.completions.create(**options, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == own.content
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == choice.finish_reason


def test_a_text_is_continued(client: openai.OpenAI) -> None:
    """By the older interface, whole and as a stream, with a stop string and several of it."""
    own = checkpoints.wrapper(SERVED)("She", max_new_tokens=6)
    options: Any = {"model": SERVED, "prompt": "She", "max_tokens": 6}
    assert client.completions.create(**options).choices[0].text == own.text
    assert "".join(chunk.choices[0].text for chunk in client.completions.create(**options, stream=True)) == own.text
    stop = own.text[len(own.text) // 2 :][:2]
    assert client.completions.create(**options, stop=stop).choices[0].text == own.text.partition(stop)[0]
    several = client.completions.create(**options, n=3, temperature=1.5, seed=1)
    assert [one.index for one in several.choices] == [0, 1, 2]


def test_an_answer_has_the_form_that_was_asked_for(client: openai.OpenAI) -> None:
    """A schema holds, and what is no schema of lmkit's is the client's error."""
    schema: Any = {"type": "object", "properties": {"old": {"type": "boolean"}}, "required": ["old"]}
    form: Any = {
        "type": "json_schema",
        "json_schema": {"name": "it", "schema": {**schema, "additionalProperties": False}},
    }
    found = client.chat.completions.create(model=SERVED, messages=CHAT, response_format=form, max_tokens=60)
    assert isinstance(json.loads(found.choices[0].message.content or "")["old"], bool)
    form["json_schema"]["schema"] = {"not": {"type": "string"}}
    with pytest.raises(openai.BadRequestError, match="not"):
        client.chat.completions.create(model=SERVED, messages=CHAT, response_format=form)


def test_a_call_of_a_tool_comes_as_one(tmp_path: Path) -> None:
    """With its arguments as a text, at once and at the end of a stream."""

    def edit(model: Any, tokenizer: Any) -> None:
        tokenizer.chat_template = chat_templates.TEMPLATES["thinking"]
        tokenizer.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])
        model.resize_token_embeddings(len(tokenizer))
        model.config.max_position_embeddings = tokenizer.model_max_length = 4096

    schema = {"type": "object", "properties": {"old": {"type": "boolean"}}, "required": ["old"]}
    function = {"name": "weather", "description": "Say it.", "parameters": schema | {"additionalProperties": False}}
    options: Any = {"messages": CHAT, "tools": [{"type": "function", "function": function}], "model": SERVED}
    options |= {"tool_choice": "required", "max_tokens": 200, "extra_body": {"thinking": False}}
    folder = checkpoints.changed(SERVED, tmp_path / SERVED, edit)
    with lmkit.load("causal", folder, "float32") as generator, served(generator) as address:
        client = openai.OpenAI(base_url=address, api_key="none", max_retries=0)
        found = client.chat.completions.create(**options).choices[0]
        last = list(client.chat.completions.create(**options, stream=True))[-1].choices[0]
    assert found.message.tool_calls is not None
    call: Any = found.message.tool_calls[0]
    assert (call.function.name, found.finish_reason) == ("weather", "tool_calls")
    assert isinstance(json.loads(call.function.arguments)["old"], bool)
    assert last.delta.tool_calls is not None
    streamed: Any = last.delta.tool_calls[0]
    assert (streamed.id, streamed.function.arguments) == (call.id, call.function.arguments)


@pytest.mark.parametrize(
    "wrong, told",
    [
        ({"temperature": -1}, "temperature=-1"),
        ({"messages": [{"role": "user", "content": "old " * 1000}]}, "tokens"),
        ({"messages": "She"}, "'She'"),
        ({"extra_body": {"best_of": 3}}, "best_of"),
        ({"stream": True, "top_p": 7}, "top_p=7"),
    ],
    ids=str,
)
def test_what_is_wrong_with_a_request_is_a_400(client: openai.OpenAI, wrong: dict[str, Any], told: str) -> None:
    """With lmkit's own words, before a stream begins."""
    asked: Any = {"model": SERVED, "messages": CHAT, **wrong}
    with pytest.raises(openai.BadRequestError, match=told):
        client.chat.completions.create(**asked)


def test_models_and_health(client: openai.OpenAI) -> None:
    """The model is listed, and whoever watches sees the rows."""
    assert [one.id for one in client.models.list()] == [SERVED]
    health = client._client.get(str(client.base_url).replace("/v1/", "/health")).json()
    assert health == {"status": "ok", "running": 0, "waiting": 0}


def test_fifty_clients_a_third_of_which_hang_up(address: str) -> None:
    """The others' answers are those of serial calls, and the engine is as it was."""
    generator: lmkit.Generator = checkpoints.wrapper(SERVED)
    chats: list[Any] = [[{"role": "user", "content": f"She is {n}."}] for n in range(50)]
    expected = [generator.chat(chat, max_new_tokens=8).content for chat in chats]

    async def ask(made: openai.AsyncOpenAI, number: int) -> str | None:
        options: Any = {"model": SERVED, "messages": chats[number], "max_tokens": 8}
        if number % 3 == 0:
            stream = await made.chat.completions.create(**options, stream=True)
            async for _ in stream:
                break
            await stream.close()
            return None
        if number % 3 == 1:
            chunks = [chunk async for chunk in await made.chat.completions.create(**options, stream=True)]
            return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        return (await made.chat.completions.create(**options)).choices[0].message.content

    async def all_of_them() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=address, api_key="none", max_retries=0) as made:
            return await asyncio.gather(*(ask(made, number) for number in range(50)))

    found = asyncio.run(all_of_them())
    assert [text for n, text in enumerate(found) if n % 3] == [text for n, text in enumerate(expected) if n % 3]
    until = time.monotonic() + 20
    while (generator.stats.running or generator.stats.waiting) and time.monotonic() < until:
        time.sleep(0.05)
    gc.collect()
    assert (generator.stats.running, generator.stats.waiting, generator.stats.cache_bytes) == (0, 0, 0)
