"""lmkit as a user's code sees it: checked by mypy and basedpyright, never run."""

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict, assert_type

import torch

import lmkit

# load: the word decides the class.

assert_type(lmkit.load("causal", "any/name"), lmkit.Generator)
assert_type(lmkit.load("text-generation", "any/name", "bfloat16", "cuda:0"), lmkit.Generator)
assert_type(lmkit.load("seq2seq", "any/name"), lmkit.Translator)
assert_type(lmkit.load("translation", Path("folder"), "int8"), lmkit.Translator)
assert_type(lmkit.load("summarization", "any/name", devices=["cuda:0", "cuda:1"]), lmkit.Translator)
assert_type(lmkit.load("text2text-generation", "any/name", devices={"cuda:0": "20GiB"}), lmkit.Translator)
assert_type(lmkit.load("masked", "any/name", devices=torch.device("cpu")), lmkit.Unmasker)
assert_type(lmkit.load("fill-mask", "any/name", "fp32", 0, local_files_only=True), lmkit.Unmasker)


def by_word(word: str, known: lmkit.TaskWord) -> None:
    assert_type(lmkit.load(word, "any/name"), lmkit.Generator | lmkit.Translator | lmkit.Unmasker)
    assert_type(lmkit.load(known, "any/name"), lmkit.Generator | lmkit.Translator | lmkit.Unmasker)
    assert_type(lmkit.plan(word, "any/name"), lmkit.LoadPlan)
    assert_type(lmkit.run_job(word, "any/name", "in.jsonl", "out.jsonl"), lmkit.JobReport)


def annotated(devices: lmkit.Devices, precision: lmkit.PrecisionWord) -> lmkit.FinishReason:
    return lmkit.load("causal", "any/name", precision, devices)("Level up!").finish_reason


def by_hand() -> None:
    assert_type(lmkit.Generation("Level up!", (lmkit.Completion("Yes."),)).text, str)
    assert_type(
        lmkit.Translation("Hi.", (lmkit.Completion("Hallo."),), source="Hi.", target_language="de").seed, int | None
    )
    assert_type(lmkit.Ranking((lmkit.Choice("a", 0, -1.0, 1.0, lmkit.Score("a")),)).normalize, str)
    way = lmkit.Candidate("The sea.", ("sea",), ("sea",), (7,), (-0.5,))
    assert_type(lmkit.Unmasking("The [MASK].", (lmkit.MaskSlot(4, 10, (way,), 0, 11),), (way,)), lmkit.Unmasking)
    assert_type(lmkit.Results([lmkit.ToolCall("f", {}), lmkit.ToolCall("g", None)]), lmkit.Results[lmkit.ToolCall])
    assert_type(lmkit.TextChunk("Yes").index, int)


# plan: the arguments of load, and one class for all tasks.

assert_type(lmkit.plan("causal", "any/name"), lmkit.LoadPlan)
assert_type(
    lmkit.plan("fill-mask", Path("folder"), "int4", {"cuda:0": "24GiB", "cpu": 0.8, "disk": "off/"}), lmkit.LoadPlan
)
assert_type(lmkit.plan("seq2seq", "any/name", devices={0: 20 * 2**30}, reserve_tokens=4096), lmkit.LoadPlan)
assert_type(lmkit.plan("causal", "any/name", devices=lmkit.Placement({"": "cpu"})), lmkit.LoadPlan)
assert_type(lmkit.plan("causal", "any/name", adapter={"one": "any/lora", "two": Path("lora")}), lmkit.LoadPlan)
assert_type(lmkit.load("causal", "any/name", adapter="any/lora", reserve_tokens=10), lmkit.Generator)
assert_type(lmkit.load("masked", "any/name", "auto", lmkit.Placement("auto", {"cpu": 0.5}, "off/")), lmkit.Unmasker)

generator = lmkit.load("causal", "any/name")
translator = lmkit.load("seq2seq", "any/name")
unmasker = lmkit.load("masked", "any/name")

# Jobs: a report, whatever the model; the languages of a translator beside the files.

assert_type(lmkit.run_job("causal", "any/name", "in.jsonl", Path("out.parquet"), devices="cpu"), lmkit.JobReport)
assert_type(translator.run_job("in.csv", "out.csv", source="en", columns={"target": "to"}), lmkit.JobReport)


def prompts() -> Iterator[str]:
    yield "Level up!"


# Calls: a text gives one result, anything else a list.


def generate() -> None:
    result = generator("Level up!", max_new_tokens=50, temperature=0.7, stop=["\n"], seed=1)
    assert_type(result, lmkit.Generation)
    assert_type(result.text, str)
    assert_type(result.token_ids, tuple[int, ...])
    assert_type(result.finish_reason, Literal["eos", "stop", "length", "cancelled"])
    assert_type(result.stop_reason, str | None)
    assert_type(result.completions[0].score, float | None)
    assert_type(result.logprobs, tuple[lmkit.TokenLogprob, ...] | None)
    assert_type(result.timing.tokens_per_second, float)
    assert_type(generator(["a", "b"], temperature=[0, 0.5], stop=[["x"], ["y"]]), list[lmkit.Generation])
    assert_type(
        generator(["a", "b"], stop=[["x"], None], suppress_tokens=[[1], [2]], lookup=True), list[lmkit.Generation]
    )
    assert_type(generator(("a", "b"), mode=lmkit.Beam(num_beams=4)), list[lmkit.Generation])
    assert_type(generator(prompts(), mode=[lmkit.Greedy(), lmkit.Sample(top_p=0.9)]), list[lmkit.Generation])


def steered() -> None:
    def halved(_token_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores / 2

    by_text = {" up": -1.0}
    both: dict[int | str, float] = {5: 1, " up": -2.5}
    assert_type(generator("a", processors=[halved], logit_bias={" up": -2.5}), lmkit.Generation)
    assert_type(generator("a", processors=[halved], logit_bias=both), lmkit.Generation)
    assert_type(generator(["a", "b"], processors=[[halved], None], logit_bias=[by_text, None]), list[lmkit.Generation])
    assert_type(generator("a", bad_words=["up"], frequency_penalty=0.5), lmkit.Generation)
    assert_type(generator("a", bad_words=[[3, 4], [5]]), lmkit.Generation)
    assert_type(translator(["a", "b"], bad_words=[["up"], None], presence_penalty=[1.0, 2]), list[lmkit.Translation])


def chat() -> None:
    messages = [{"role": "user", "content": "Hello!"}]
    assert_type(generator.chat(messages), lmkit.Generation)
    assert_type(generator.chat([messages, messages], seed=[1, 2]), list[lmkit.Generation])
    assert_type(generator(messages), lmkit.Generation)
    assert_type(generator.chat([{"role": "user", "content": "Hello!"}], template={"a": 1}), lmkit.Generation)


def translate() -> None:
    result = translator("How are you?", source="en", target="de", num_beams=4)
    assert_type(result, lmkit.Translation)
    assert_type(result.source_language, str | None)
    assert_type(result.segments, tuple[lmkit.Segment, ...])
    assert_type(translator(["a", "b"], target=["de", "fr"], source="en"), list[lmkit.Translation])
    assert_type(translator("A long text.", preset="summarization"), lmkit.Translation)
    assert_type(translator("A {n}.", split="sentence", keep=[r"\{\w+\}", "urls"]), lmkit.Translation)
    assert_type(translator(["a", "b"], split=["none", None], keep=[["icu"], []])[0].segments, tuple[lmkit.Segment, ...])
    assert_type(translator.languages, Mapping[str, str])
    assert_type(translator.presets, tuple[str, ...])


def score() -> None:
    messages = [{"role": "user", "content": "Hello!"}]
    assert_type(generator.score("A text."), lmkit.Score)
    assert_type(generator.score(["a b", "c d"]), list[lmkit.Score])
    assert_type(generator.score("A prompt", " and more"), lmkit.Score)
    assert_type(generator.score(messages, "Hi."), lmkit.Score)
    assert_type(generator.score("A prompt", [" a", " b"]), list[lmkit.Score])
    assert_type(generator.score(["a", "b"], " c"), list[lmkit.Score])
    assert_type(generator.score([messages, messages], ["a", "b"]), list[lmkit.Score])
    assert_type(generator.rank("A prompt", [" a", " b"], normalize="bytes"), lmkit.Ranking)
    assert_type(generator.rank(messages, (" a", " b")), lmkit.Ranking)
    assert_type(generator.rank(["a", "b"], [" a", " b"], normalize="prior", neutral="A:"), list[lmkit.Ranking])
    assert_type(generator.rank(["a", "b"], [[" a"], [" b", " c"]]), list[lmkit.Ranking])
    assert_type(translator.score("a", "b", source="en", target="de"), lmkit.Score)
    assert_type(translator.score(["a", "b"], ["c", "d"], target=["de", "fr"]), list[lmkit.Score])
    assert_type(translator.rank("a", ["b", "c"], target="de", normalize="tokens"), lmkit.Ranking)
    assert_type(translator.rank(["a", "b"], [["c"], ["d"]], preset="summarization"), list[lmkit.Ranking])
    assert_type(generator.score(["a"], " b", on_error="return"), list[lmkit.Score | lmkit.LmkitError])
    assert_type(translator.rank(["a"], [["b"]], on_error="return"), list[lmkit.Ranking | lmkit.LmkitError])
    scored = generator.score("A text.")
    assert_type(scored.unknown, tuple[int, ...])
    assert_type(scored.token_logprobs, tuple[float, ...])
    assert_type(scored.greedy, bool | None)
    assert_type(scored.perplexity, float)
    assert_type(generator.rank("a", ["b"]).choices[0].probability, float)


def unmask() -> None:
    result = unmasker("I love [MASK].", top_k=3)
    assert_type(result, lmkit.Unmasking)
    assert_type(result.candidates[0].token, str)
    assert_type(result.masks[0].candidates[0].score, float)
    assert_type(unmasker(["a [MASK]", "b [MASK]"], targets=[["x"], ["y"]]), list[lmkit.Unmasking])
    assert_type(unmasker(prompts(), targets=["x", "y"]), list[lmkit.Unmasking])
    assert_type(unmasker("[MASK]", order="most_certain", num_beams=4).candidates[0].fills, tuple[str, ...])
    assert_type(
        unmasker(["[MASK]"], order=["independent"], mode=[lmkit.Sample(top_p=0.9)], seed=[1])[0].seed, int | None
    )
    assert_type(unmasker(["[MASK]"], text_pair=["b", None])[0].text_pair, str | None)
    assert_type(unmasker.score("a", metric="within_word_l2r"), lmkit.Score)
    assert_type(unmasker.score(prompts()), list[lmkit.Score])
    assert_type(unmasker.rank(["a", "b"], normalize="tokens"), lmkit.Ranking)
    assert_type(unmasker.rank([["a", "b"], ["c"]]), list[lmkit.Ranking])
    assert_type(unmasker.score(["a"], on_error="return", progress=False), list[lmkit.Score | lmkit.LmkitError])


# map: errors are in the type only where they are returned.


def map_lazily() -> None:
    assert_type(generator.map(prompts(), seed=1), Iterator[lmkit.Generation])
    assert_type(generator.map(prompts(), on_error="raise"), Iterator[lmkit.Generation])
    assert_type(generator.map(prompts(), on_error="return"), Iterator[lmkit.Generation | lmkit.LmkitError])
    assert_type(translator.map(prompts(), source="en", target="de"), Iterator[lmkit.Translation])
    assert_type(translator.map(prompts(), on_error="return"), Iterator[lmkit.Translation | lmkit.LmkitError])
    assert_type(unmasker.map(prompts(), top_k=1), Iterator[lmkit.Unmasking])
    assert_type(unmasker.map(prompts(), on_error="return"), Iterator[lmkit.Unmasking | lmkit.LmkitError])
    for found in generator.map(prompts(), on_error="return"):
        if isinstance(found, lmkit.LmkitError):
            assert_type(found, lmkit.LmkitError)
        else:
            assert_type(found, lmkit.Generation)


# stream, and the same for asyncio.


def stream() -> None:
    assert_type(generator.stream("Level up!", top_k=5), Iterator[lmkit.TextChunk])
    assert_type(translator.stream(["a", "b"], source="en", target="de"), Iterator[lmkit.TextChunk])
    assert_type(unmasker.stream(["a [MASK]"]), Iterator[lmkit.Unmasking])
    for chunk in generator.stream(["a", "b"]):
        assert_type(chunk.index, int)
        assert_type(chunk.finish_reason, Literal["eos", "stop", "length", "cancelled"] | None)


async def run_async() -> None:
    assert_type(await generator.acall("Level up!"), lmkit.Generation)
    assert_type(await generator.acall(["a", "b"], max_new_tokens=[1, 2]), list[lmkit.Generation])
    assert_type(await translator.acall("a", source="en", target="de"), lmkit.Translation)
    assert_type(await unmasker.acall(["a [MASK]"]), list[lmkit.Unmasking])
    assert_type(await generator.ascore("a", " b"), lmkit.Score)
    assert_type(await unmasker.arank([["a", "b"]]), list[lmkit.Ranking])
    assert_type(generator.astream("Level up!"), AsyncIterator[lmkit.TextChunk])
    assert_type(unmasker.astream("a [MASK]"), AsyncIterator[lmkit.Unmasking])
    async for chunk in translator.astream("a", source="en", target="de"):
        assert_type(chunk, lmkit.TextChunk)


# Attributes, closing, errors.


def attributes() -> None:
    with lmkit.load("masked", "any/name") as opened:
        assert_type(opened, lmkit.Unmasker)
    assert_type(generator.name, str)
    assert_type(generator.plan, lmkit.LoadPlan)
    assert_type(generator.precision, str)
    assert_type(generator.device, torch.device)
    assert_type(generator.memory_bytes, int)
    assert_type(generator.modules, tuple[lmkit.ModulePlan, ...])
    assert_type(generator.modules[0].bytes, int)
    generator.close()


def planning(plan: lmkit.LoadPlan) -> None:
    assert_type(plan.task, Literal["causal", "seq2seq", "masked"])
    assert_type(plan.parameters, int)
    assert_type(plan.precision.name, str)
    assert_type(plan.precision.dtype, torch.dtype)
    assert_type(plan.device_map, Mapping[str, str])
    assert_type(plan.modules[0].device, str)
    assert_type(plan.modules[0].dtype, str)
    assert_type(plan.weights_bytes, int)
    assert_type(plan.bytes_per_device, dict[str, int])
    assert_type(plan.kv_bytes_per_token, int | None)
    assert_type(plan.context_length, int | None)
    assert_type(plan.max_rows(4096), int | None)
    assert_type(plan.max_rows(4096, source_tokens=100), int | None)
    assert_type(plan.fits, bool)
    assert_type(plan.reasons, Mapping[str, str])
    assert_type(plan.to_dict(), dict[str, Any])
    assert_type(str(plan), str)


def catch() -> None:
    try:
        generator("Level up!")
    except (lmkit.InputTooLongError, lmkit.EngineError) as error:
        assert_type(error.results, Sequence[object])


# What a checker must refuse; an ignore that is not needed is an error itself.


def refused() -> None:
    lmkit.plan("causal", "any/name", load_in_8bit=True)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    lmkit.plan("causal", "any/name", devices={"cpu": None})  # type: ignore[dict-item]  # pyright: ignore[reportArgumentType]
    generator("Level up!", max_new_token=5)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    generator("Level up!", temperature="hot")  # type: ignore[arg-type]  # pyright: ignore[reportCallIssue, reportArgumentType]
    translator("a", truncate="middle")  # type: ignore[arg-type]  # pyright: ignore[reportCallIssue, reportArgumentType]
    translator("a", lookup=True)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    unmasker.map(prompts(), on_error="skip")  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue, reportArgumentType]


# output: the value's type is that of what was asked for.


class Person(TypedDict):
    """What is asked for."""

    name: str


async def structured() -> None:
    messages = [{"role": "user", "content": "Hello!"}]
    assert_type(generator("a", output=Person).value, Person)
    assert_type(generator("a", output=list[int], max_new_tokens=5), lmkit.Generation[list[int]])
    assert_type(generator(["a", "b"], output=int)[0].completions[0].value, int)
    assert_type(generator("a", output=lmkit.OneOf("yes", "no")).value, str)
    assert_type(generator("a", output=lmkit.Regex(r"\d")).value, str)
    assert_type(generator("a", output=lmkit.Grammar("start: /a/")).value, str)
    assert_type(generator("a", output=lmkit.JSONSchema({"type": "object"})).value, Any)
    assert_type(generator("a", output=Literal["a", "b"]), lmkit.Generation)
    assert_type(generator(["a", "b"], output=[Person, None]), list[lmkit.Generation])
    assert_type(generator.chat(messages, output=Person).value, Person)
    assert_type(generator.chat([messages], output=Person)[0].value, Person)
    assert_type(next(generator.map(prompts(), output=Person)).value, Person)
    assert_type(
        generator.map(prompts(), output=Person, on_error="return"),
        Iterator[lmkit.Generation[Person] | lmkit.LmkitError],
    )
    assert_type((await generator.acall("a", output=Person)).value, Person)
    assert_type(next(generator.stream("a", output=Person)).value, Any)
    assert_type(translator("a", output=Person).value, Person)
    assert_type(next(translator.map(prompts(), output=Person)).value, Person)
    assert_type(generator("a").value_error, str | None)
    answer = generator.chat(messages, tools=[print], tool_choice="auto", thinking=False)
    assert_type(answer.tool_calls, tuple[lmkit.ToolCall, ...])
    assert_type((answer.content, answer.reasoning), tuple[str, str])
    assert_type(lmkit.call_tools(answer, [print]), list[dict[str, Any]])
    assert_type(next(generator.stream("a")).kind, Literal["content", "reasoning", "tool_call"])
    assert_type(lmkit.schema_prompt(Person), str)
