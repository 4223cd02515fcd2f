from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import families
import lmkit

LLAMA = next(family for family in families.CAUSAL if family.name == "llama")
PROMPT = "The old sailor"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny Llama."""
    return families.save(LLAMA, tmp_path_factory.mktemp("adapter") / "llama")


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter with random weights that change the answer."""
    folder = tmp_path_factory.mktemp("adapter") / "lora"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.save_pretrained(folder)
    return folder


def test_an_adapter_gives_the_tokens_that_peft_gives(base: Path, adapter: Path) -> None:
    """`adapter=` puts a LoRA adapter on the model, with the tokens of peft's own model."""
    from peft import PeftModel

    with lmkit.load("causal", base, adapter=str(adapter)) as generator:
        result = generator(PROMPT, max_new_tokens=8)
        encoded = generator.tokenizer(PROMPT, return_tensors="pt")
    reference = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter))
    expected = reference.generate(**encoded, do_sample=False, max_new_tokens=8)[0]
    assert list(result.token_ids) == expected[encoded["input_ids"].shape[1] :].tolist()
    with lmkit.load("causal", base) as plain:
        assert plain(PROMPT, max_new_tokens=8).token_ids != result.token_ids


def test_an_adapter_that_is_not_there_says_where_lmkit_looked(base: Path) -> None:
    """A wrong adapter name is a ModelNotFoundError with the folder that was looked for."""
    with pytest.raises(lmkit.ModelNotFoundError, match=r"no folder .*/nowhere/lora"):
        lmkit.load("causal", base, adapter="/nowhere/lora")


def test_a_truncated_adapter_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    """A truncated adapter file is a WeightsError that names it."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((adapter / name).read_bytes()[: -1 if "model" in name else None])
    with pytest.raises(lmkit.WeightsError, match=r"adapter_model\.safetensors is truncated"):
        lmkit.load("causal", base, adapter=str(tmp_path))
