from collections.abc import Iterator
from typing import Any

import pytest
import torch

import lmkit
import smollm2

pytestmark = pytest.mark.slow
QUESTION = {"role": "user", "content": "What is the capital of France?"}


@pytest.fixture(scope="session")
def generator() -> Iterator[lmkit.Generator]:
    """Load SmolLM2-135M-Instruct in float32, once."""
    with lmkit.load("causal", smollm2.path(), "float32", "cpu") as loaded:
        yield loaded


def test_the_capital_of_france_is_paris(generator: lmkit.Generator) -> None:
    """A real chat model answers a question, and ends its answer by itself."""
    answer = generator.chat([QUESTION], max_new_tokens=40)
    assert "Paris" in answer.text
    assert answer.finish_reason == "eos"


def test_the_chat_reaches_the_model_as_its_template_writes_it(generator: lmkit.Generator) -> None:
    """The prompt is the checkpoint's own template, with the turn of the assistant opened."""
    answer = generator.chat([QUESTION], max_new_tokens=1)
    tokenizer: Any = generator.tokenizer
    written = tokenizer.apply_chat_template([QUESTION], tokenize=False, add_generation_prompt=True)
    assert answer.prompt == written
    assert answer.prompt_tokens == len(tokenizer(written, add_special_tokens=False)["input_ids"])


def test_the_plan_says_what_becomes_of_gguf(generator: lmkit.Generator) -> None:
    """The plan tells that packed weights are widened, to what, and what the model is."""
    plan = generator.plan
    assert plan.model_class == "LlamaForCausalLM"
    assert plan.context_length == 8192
    assert "GGUF" in plan.reasons["format"]
    assert "float32" in plan.reasons["format"]
    assert (generator.precision, generator.model.dtype) == ("float32", torch.float32)
    assert 500_000_000 < generator.memory_bytes < 700_000_000


def test_a_batch_equals_plain_transformers(generator: lmkit.Generator) -> None:
    """Two prompts of different lengths get the tokens that `model.generate` gives, in float32."""
    prompts = ["The three primary colors are", "Water boils at a temperature of one hundred degrees, and it freezes"]
    results = generator(prompts, max_new_tokens=12)
    model: Any = generator.model
    for prompt, result in zip(prompts, results, strict=True):
        inputs = generator.tokenizer(prompt, return_tensors="pt")
        expected = model.generate(**inputs, max_new_tokens=12, do_sample=False, pad_token_id=0)
        assert list(result.token_ids) == expected[0, inputs["input_ids"].shape[1] :].tolist()[: len(result.token_ids)]
        assert len(result.token_ids) == 12 or result.finish_reason == "eos"


def test_packed_weights_are_not_packed_again() -> None:
    """A GGUF file with a quantized precision is refused before its weights are read."""
    with pytest.raises(lmkit.PrecisionError, match=r"quantized already \(gguf\)"):
        lmkit.load("causal", smollm2.path(), "int4", "cpu")


def test_the_wrong_task_is_refused_for_gguf() -> None:
    """A GGUF file holds a causal model, and another task is told so."""
    with pytest.raises(lmkit.UnknownTaskError, match=r"made for 'causal', not 'masked': load\('causal'"):
        lmkit.load("masked", smollm2.path())
