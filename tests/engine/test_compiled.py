import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import checkpoints
import every_family
import lmkit
from checkpoints import texts, wrapper
from lmkit._borrowed import cache_name
from lmkit.engine.compiled import CompiledDecoderStep, CompiledPass, CompiledStep
from lmkit.engine.graph import LARGEST, compiled_for
from lmkit.kernels.native.operators import refusal
from native_kernels import NEEDED, kernels

pytestmark = pytest.mark.slow


def both(*native: str, plain: str) -> list[Any]:
    """Name what is compiled with lmkit's kernels and what with torch's: each takes seconds, so not all with both."""
    own = [pytest.param(name, True, marks=NEEDED, id=f"{name}-native") for name in native]
    return [*own, *(pytest.param(name, False, id=f"{name}-torch") for name in plain.split())]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep compiled steps in a folder of the tests' own."""
    if refusal() is None:
        kernels()  # else each cache has its own
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


def compiled(name: str) -> Any:
    """Load a family's tiny model with a compiled step."""
    return lmkit.load("causal", str(checkpoints.folder(name)), "float32", "cpu", compile=True)


def test_a_compiled_step_gives_the_tokens_of_generate(cache: Path) -> None:
    """Single rows, batches and rows left over from a batch get the tokens of `model.generate`; one step serves all."""
    generator = compiled("llama")
    prompts = texts("llama")
    for prompt in prompts:
        found = list(generator(prompt, max_new_tokens=24).token_ids)
        assert found == checkpoints.generated("llama", [prompt])[0]
    budgets = [2, 3, 24, 2, 3]
    for prompt, budget, result in zip(prompts, budgets, generator(prompts, max_new_tokens=budgets), strict=True):
        assert list(result.token_ids) == checkpoints.generated("llama", [prompt], max_new_tokens=budget)[0]
    lower = [lambda _token_ids, scores: scores.sub_(torch.arange(scores.shape[-1]) * 0.1)]
    expected = checkpoints.generated("llama", prompts[:1], logits_processor=lower)[0]
    assert list(generator(prompts[0], max_new_tokens=24, processors=lower).token_ids) == expected
    one = {"output": lmkit.OneOf("yes", "no"), "max_new_tokens": 24}
    assert generator(prompts[0], **one).token_ids == wrapper("llama")(prompts[0], **one).token_ids
    assert len(list(cache.rglob("calls.json"))) == 1


def test_a_compiled_step_is_kept_for_the_next_load(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A second load finds the step on disk, and a damaged file is compiled again, with a word in the log.

    What killed compilers left is removed then, a day later: until then somebody may compile there. Whole graphs stay.
    """
    compiled("llama").close()
    *_, kept = cache.rglob("*.part")
    before = kept.stat().st_mtime_ns
    compiled("llama").close()
    assert kept.stat().st_mtime_ns == before
    assert "does not load" not in caplog.text
    kept.write_bytes(b"damaged")
    whole, new, old = (cache / "lmkit" / "compiled" / name for name in ("0" * 32, "unfinished-new", "unfinished-old"))
    for folder in (whole, new, old):
        (folder / "kernels").mkdir(parents=True)
    for folder in (whole, old):
        os.utime(folder, (0, 0))
    generator = compiled("llama")
    assert (whole.exists(), new.exists(), old.exists()) == (True, True, False)
    assert list(generator("She", max_new_tokens=6).token_ids) == list(
        wrapper("llama")("She", max_new_tokens=6).token_ids
    )
    assert kept.stat().st_mtime_ns != before
    assert "does not load, and is compiled again" in caplog.text


def test_what_is_compiled_for_one_card_is_not_run_on_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """The name of a graph has the card, its capability and the versions that made it: two cards share a home folder."""
    names = iter(["NVIDIA A100", "NVIDIA H100", "NVIDIA H100"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: next(names))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    one, other, same = (compiled_for(torch.device("cuda", 0)) for _ in range(3))
    assert one != other == same
    assert "NVIDIA H100" in other
    assert "(9, 0)" in other


def test_a_card_is_not_given_more_numbers_than_its_kernels_count() -> None:
    """On a card steps beyond 2**31 numbers in a tensor are not compiled ones; a CPU counts on."""
    model = checkpoints.reference("llama")[0]
    step: Any = object.__new__(CompiledStep)
    step._model, step._cached, step.most_rows, step._device = model, cache_name(model), 2**40, torch.device("cpu")
    layer: Any = type("Layer", (), {"columns": 2**10})()
    size = step._sample.layers[0].keys.shape[3] * model.config.num_attention_heads
    most = LARGEST // (size * 2 * 2**10)
    assert step.fits(most + 1, [layer])
    step._device = torch.device("cuda", 0)
    assert step.fits(most, [layer])
    assert not step.fits(most + 1, [layer])


def noisy(scores: torch.Tensor) -> torch.Tensor:
    """Put each score off by some fifth of their spread."""
    draws = torch.Generator().manual_seed(0)
    return scores + 0.2 * scores.std(-1, keepdim=True) * torch.randn(scores.shape, generator=draws)


@pytest.mark.usefixtures("cache")
def test_kernels_are_compiled_by_threads_that_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """On two threads inductor hands its kernels to a pool, of which nothing is left when the graph is there."""
    from torch._inductor.async_compile import AsyncCompile

    pools, pool = [], AsyncCompile.pool
    submit = AsyncCompile.submit
    monkeypatch.setattr(AsyncCompile, "submit", lambda _self, task: (pools.append(pool()), submit(task))[1])
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        compiled("gpt2").close()
    finally:
        torch.set_num_threads(threads)
    assert len(pools) > 1
    assert not pool.cache_info().currsize
    with pytest.raises(RuntimeError, match="after shutdown"):
        pools[0].submit(int)


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(
    "spoil", [noisy, lambda scores: scores.roll(1, -1), lambda scores: scores * torch.nan], ids=["near", "far", "nan"]
)
def test_a_compiled_step_that_gives_other_scores_is_refused(spoil: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step whose scores are not the model's own, beyond what rounding does, is an EngineError with what to do."""
    compiled("llama").close()  # as it is, it is none
    artifact = CompiledStep._artifact

    def spoilt(self: CompiledStep, *places: Path) -> Any:
        run = artifact(self, *places)
        return lambda values: spoil(run(values))

    monkeypatch.setattr(CompiledStep, "_artifact", spoilt)
    with pytest.raises(lmkit.EngineError, match=r"load it without compile=True \(its compiled step gave other scores"):
        compiled("llama")


@pytest.mark.parametrize("word, native", both("int8", "int4", plain="int4"))
def test_a_quantized_model_is_compiled(
    word: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, native: bool
) -> None:
    """On lmkit's own kernels any number of rows goes through the step, on torch's one; the tokens are the model's."""
    if native:
        kernels()
    else:
        monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder, prompts, steps = str(checkpoints.folder("llama")), texts("llama")[:3], []
    with lmkit.load("causal", folder, word, "cpu", compile="kernels") as plain:
        assert plain.plan.kernels == ("native" if native else "torch")
        expected = [plain(prompt, max_new_tokens=12).token_ids for prompt in prompts]
    run = CompiledStep.__call__
    monkeypatch.setattr(CompiledStep, "__call__", lambda self, *args: (steps.append(len(args[0])), run(self, *args))[1])
    with lmkit.load("causal", folder, word, "cpu", compile=True) as generator:
        assert ("for one row at a time" in generator.plan.reasons["compiled"]) is not native
        steps.clear()
        assert [generator(prompt, max_new_tokens=12).token_ids for prompt in prompts] == expected
        assert set(steps) == {1}
        together = generator(prompts, max_new_tokens=12)
    assert [result.token_ids for result in together] == expected
    assert max(steps) == (3 if native else 1)


@pytest.mark.usefixtures("cache")
def test_adapters_that_weigh_differently_have_graphs_of_their_own(tmp_path: Path) -> None:
    """Of two adapters that differ in `lora_alpha` alone, a number in their layers, each gives its own scores."""
    config: Any = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    model: Any = get_peft_model(checkpoints.plain("causal", checkpoints.folder("llama"))[0], LoraConfig(**config))
    for name, weight in model.named_parameters():
        weight.data.mul_(0.3 if "lora_" in name else 1)  # so little that the check of a new graph cannot tell
    for alpha in (1, 4):
        model.peft_config["default"].lora_alpha = alpha
        model.save_pretrained(tmp_path)
        given: Any = {"adapter": tmp_path, "precision": "float32", "devices": "cpu"}
        with lmkit.load("causal", checkpoints.folder("llama"), **given) as plain:
            expected = plain("She", max_new_tokens=6, logprobs=1).logprobs
        with lmkit.load("causal", checkpoints.folder("llama"), compile=True, **given) as generator:
            found = generator("She", max_new_tokens=6, logprobs=1).logprobs
        assert expected
        assert found
        assert [one.logprob for one in found] == pytest.approx([one.logprob for one in expected], abs=1e-4)


def test_without_a_home_a_load_says_where_to_keep_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no folder for what is compiled, that is an EngineError with what to do."""

    def homeless(_kind: type[Path]) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", classmethod(homeless))
    with pytest.raises(lmkit.EngineError, match=r"load it without compile=True .*set XDG_CACHE_HOME"):
        compiled("llama")


@pytest.mark.parametrize(
    "name, why",
    [
        ("mamba", "(takes no cache|beside plain keys and values)"),  # with transformers 5.23, and since 5.24
        ("gpt_neo", "takes no mask that is not made for it"),
    ],
)
def test_a_family_without_a_compiled_step_is_refused(name: str, why: str) -> None:
    """A model whose cache or attention no graph is made for is refused, by name."""
    with pytest.raises(lmkit.OptionError, match=f"compile=True is not to be had for .*{why}"):
        compiled(name)


def windowed(model: Any, _tokenizer: Any) -> None:
    """Give one of two layers a window."""
    model.config.use_sliding_window, model.config.sliding_window = True, 8
    model.config.layer_types = ["full_attention", "sliding_attention"]


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("name, native", both("qwen3", "gemma2", plain="mistral gemma2"))
def test_a_compiled_step_sees_a_window(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, native: bool
) -> None:
    """Rows that outgrow the window of all layers, or of one, get the tokens of `generate`, whoever leaves or joins.

    Gemma 2 has soft caps beside.
    """
    if not native:
        monkeypatch.setenv("CXX", "no-such-compiler")
    where = checkpoints.changed(name, tmp_path, windowed) if name == "qwen3" else checkpoints.folder(name)
    model, _ = checkpoints.plain("causal", where)
    prompts = texts(name)
    with lmkit.load("causal", str(where), "float32", "cpu", compile=True) as generator:
        for budgets in ([40] * 5, [2, 30, 40, 5, 3]):
            results = [generator(prompts[0], max_new_tokens=40), *generator(prompts, max_new_tokens=budgets)]
            for prompt, budget, result in zip([prompts[0], *prompts], [40, *budgets], results, strict=True):
                expected = checkpoints.generated(name, [prompt], model, max_new_tokens=budget)[0]
                assert list(result.token_ids) == expected
        first, others = generator.stream(prompts[1], max_new_tokens=40), prompts[2:]
        begun = [next(first).text for _ in range(3)]
        joined = generator(others, max_new_tokens=12)  # beside the stream
        rest = [chunk.text for chunk in first]
        assert "".join(begun + rest) == generator(prompts[1], max_new_tokens=40).text
        for prompt, result in zip(others, joined, strict=True):
            assert list(result.token_ids) == checkpoints.generated(name, [prompt], model, max_new_tokens=12)[0]


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_a_compiled_pass_fills_masks_as_the_pipeline_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One text and batches with padding get the tokens and scores of transformers' pipeline, from one graph."""
    model, tokenizer = checkpoints.reference(name)
    pipeline = checkpoints.hf.pipeline("fill-mask", model=model, tokenizer=tokenizer, device="cpu")
    read = []
    run = CompiledPass.__call__
    monkeypatch.setattr(
        CompiledPass, "__call__", lambda self, *args: (read.append(len(args[0]["input_ids"])), run(self, *args))[1]
    )
    unmasker = lmkit.load("masked", str(checkpoints.folder(name)), "float32", "cpu", compile=True)
    read.clear()
    assert re.search(r"a pass of all layers .*, for up to [\d,]+ tokens", unmasker.plan.reasons["compiled"])
    prompts = texts(name)
    results = [*map(unmasker, prompts), *unmasker(prompts)]
    assert set(read) == {1, len(prompts)}
    for text, result in zip(prompts * 2, results, strict=True):
        expected = pipeline(text.replace("[MASK]", tokenizer.mask_token), top_k=5)
        assert [one.token_id for one in result.candidates] == [one["token"] for one in expected]
        assert [one.score for one in result.candidates] == pytest.approx([one["score"] for one in expected], abs=1e-5)


@pytest.mark.usefixtures("cache")
def test_a_pass_on_torchs_quantized_kernels_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch multiplies what is quantized, masked models run as they are, and the plan says why."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    folder = str(checkpoints.folder("bert"))
    with lmkit.load("masked", folder, "int8", "cpu", compile=True) as unmasker:
        found = unmasker(texts("bert"))
    assert not unmasker.plan.compiled
    assert unmasker.plan.reasons["compiled"] == "not compiled, since torch's kernels multiply what is quantized"
    with lmkit.load("masked", folder, "int8", "cpu") as plain:
        assert [str(one) for one in found] == [str(one) for one in plain(texts("bert"))]


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("name, native", both("t5", "m2m100", plain="marian t5"))
def test_a_compiled_decoder_step_gives_the_tokens_of_generate(
    name: str, monkeypatch: pytest.MonkeyPatch, *, native: bool
) -> None:
    """Single rows, batches, rows left over and beams get the tokens of `model.generate`; one step serves all."""
    if not native:
        monkeypatch.setenv("CXX", "no-such-compiler")
    steps: list[int] = []
    run = CompiledDecoderStep.__call__
    monkeypatch.setattr(
        CompiledDecoderStep, "__call__", lambda self, *args: (steps.append(len(args[0])), run(self, *args))[1]
    )
    prompts, langs = texts(name), checkpoints.languages(name)
    with lmkit.load("seq2seq", str(checkpoints.folder(name)), "float32", "cpu", compile=True) as translator:
        assert "a step of the decoder" in translator.plan.reasons["compiled"]
        steps.clear()
        for prompt in prompts[:2]:
            found = translator(prompt, max_new_tokens=24, **langs)
            assert list(found.token_ids) == checkpoints.generated(name, [prompt], max_new_tokens=24)[0]
        assert set(steps) == {1}
        budgets = [9, 10, 24, 9, 10]
        for beams in (1, 3):
            steps.clear()
            results = translator(prompts, max_new_tokens=budgets, num_beams=beams, **langs)
            assert max(steps) == len(prompts) * beams
            for prompt, budget, result in zip(prompts, budgets, results, strict=True):
                expected = checkpoints.generated(name, [prompt], max_new_tokens=budget, num_beams=beams)[0]
                assert list(result.token_ids) == expected


@pytest.mark.usefixtures("cache")
def test_a_size_that_a_models_code_fixes_is_refused() -> None:
    """DeBERTa turns the length of its texts into a number: a graph for that length alone is an EngineError."""
    with pytest.raises(lmkit.EngineError, match="takes a size for a constant"):
        lmkit.load("masked", str(checkpoints.folder("deberta")), "float32", "cpu", compile=True)


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("keeps", [100, 300], ids=["fewer than are traced", "more"])
def test_a_model_that_reads_long_texts_otherwise_is_refused(keeps: int) -> None:
    """Doge hides columns once there are more than it keeps: a graph of some length would always, or never."""
    model = every_family.built("causal", "doge").eval()
    model.config.max_position_embeddings = 1000
    for module in model.modules():
        if hasattr(module, "keep_window_size"):
            module.keep_window_size = keeps
    with pytest.raises(lmkit.EngineError, match="reads long texts otherwise than short ones"):
        CompiledStep(model)
