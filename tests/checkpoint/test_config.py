from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import families
from lmkit.checkpoint.config import check_class, context, read_config, saved_quantization
from lmkit.checkpoint.files import Source
from lmkit.errors import OptionError, UnknownTaskError, WeightsError

hf: Any = transformers  # Its annotations are narrower than what it accepts.
ALL = families.CAUSAL + families.SEQ2SEQ + families.MASKED


@pytest.mark.parametrize(
    "config, length",
    [
        (hf.GPT2Config(n_positions=77), 77),
        (hf.GPTNeoConfig(max_position_embeddings=77), 77),
        (hf.GPTNeoXConfig(max_position_embeddings=77), 77),
        (hf.LlamaConfig(max_position_embeddings=77), 77),
        (hf.MistralConfig(max_position_embeddings=77, sliding_window=8), 77),
        (hf.Gemma2Config(max_position_embeddings=77), 77),
        (hf.Phi3Config(max_position_embeddings=77, original_max_position_embeddings=77), 77),
        (hf.OPTConfig(max_position_embeddings=77), 77),
        (hf.BloomConfig(), None),
        (hf.MptConfig(max_seq_len=77), None),
        (hf.FalconConfig(alibi=True, max_position_embeddings=77), None),
        (hf.FalconConfig(alibi=False, max_position_embeddings=77), 77),
        (hf.MambaConfig(), None),
        (hf.Mamba2Config(), None),
        (hf.T5Config(), None),
        (hf.T5Config(n_positions=77), None),
        (hf.MT5Config(), None),
        (hf.BartConfig(max_position_embeddings=77), 77),
        (hf.MBartConfig(max_position_embeddings=77), 77),
        (hf.M2M100Config(max_position_embeddings=77), 77),
        (hf.MarianConfig(max_position_embeddings=77), 77),
        (hf.PegasusConfig(max_position_embeddings=77), 77),
        (hf.BertConfig(max_position_embeddings=77), 77),
        (hf.RobertaConfig(max_position_embeddings=514, pad_token_id=1), 512),
        (hf.XLMRobertaConfig(max_position_embeddings=514, pad_token_id=1), 512),
        (hf.MPNetConfig(max_position_embeddings=514, pad_token_id=1), 512),
        (hf.CamembertConfig(max_position_embeddings=514, pad_token_id=1), 512),
        (hf.XLMConfig(max_position_embeddings=77), 77),
        (hf.DebertaConfig(max_position_embeddings=77), 77),
        (hf.DebertaV2Config(max_position_embeddings=77, position_biased_input=False), None),
        (hf.DistilBertConfig(max_position_embeddings=77), 77),
        (hf.AlbertConfig(max_position_embeddings=77), 77),
        (hf.ElectraConfig(max_position_embeddings=77), 77),
        (hf.ModernBertConfig(max_position_embeddings=77), 77),
        (hf.XLNetConfig(), None),
    ],
    ids=lambda value: getattr(value, "model_type", value),
)
def test_the_context_is_as_long_as_the_family_has_places(config: Any, length: int | None) -> None:
    """What bounds a text is the table of positions, less the places the family leaves free."""
    assert context(config)[0] == length


YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
BEFORE = {"original_max_position_embeddings": 100}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 48, "long_factor": [4.0] * 48, "rope_theta": 1e4}
GEMMA3 = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}


@pytest.mark.parametrize(
    "kind, written, settings, length",
    [
        (hf.Qwen3Config, 100, YARN, 400),
        (hf.Qwen3Config, 400, YARN | BEFORE, 400),
        (hf.LlamaConfig, 100, {"rope_type": "linear", "factor": 2.5}, 250),
        (hf.LlamaConfig, 100, {"rope_type": "dynamic", "factor": 2.0}, 200),
        (hf.LlamaConfig, 100, {"rope_type": "default"}, 100),
        (hf.LlamaConfig, 800, LLAMA3 | BEFORE, 800),
        (hf.LlamaConfig, 800, LONG | BEFORE | {"short_factor": [1.0] * 64, "long_factor": [4.0] * 64}, 800),
        (hf.Gemma3TextConfig, 800, GEMMA3, 800),
    ],
)
def test_scaled_positions_reach_as_far_as_vllm_counts(
    kind: Any, written: int, settings: dict[str, Any], length: int
) -> None:
    """YaRN's original length, linear and dynamic ones, by their factor; where the config has the product, as it is."""
    assert context(kind(max_position_embeddings=written, rope_parameters=settings))[0] == length


def test_the_older_way_of_writing_a_scaling_counts_too() -> None:
    """`rope_scaling` with a `type`, as Qwen's recipe has it, is the same."""
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100}
    assert context(hf.Qwen2Config(max_position_embeddings=100, rope_scaling=scaling))[0] == 400


def test_a_context_that_is_asked_for_overrides_the_config() -> None:
    """`context_length=` is taken up or down, with a reason; tables of positions are not made longer."""
    llama = hf.LlamaConfig(max_position_embeddings=100)
    assert context(llama, 300) == (300, "as asked; the config says 100 tokens")
    assert context(llama, 30)[0] == 30
    assert context(hf.BloomConfig(), 30)[0] == 30
    assert context(hf.GPT2Config(n_positions=77), 70)[0] == 70
    with pytest.raises(OptionError, match="'gpt2' has a table of 77 positions"):
        context(hf.GPT2Config(n_positions=77), 78)


def run(model: Any, length: int) -> Any:
    """Run the plain model on that many tokens."""
    ids = torch.full((1, length), 7)
    more = {"decoder_input_ids": ids[:, :1]} if model.config.is_encoder_decoder else {}
    return model(input_ids=ids, **more)


# These turn or compute their positions, so that a longer text gives worse tokens instead of an error.
ENDLESS = {"gpt_neox", "llama", "mistral", "qwen3", "gemma2", "phi3", "modernbert"}
ENDLESS |= {"m2m100", "nllb", "marian", "marian_group", "pegasus"}


@pytest.mark.parametrize("family", ALL, ids=str)
def test_the_plain_model_takes_as_many_tokens_as_the_plan_says(family: families.Family, tmp_path: Path) -> None:
    """Plain transformers runs a text of exactly the context's length, and no longer one from a table."""
    families.save(family, tmp_path)
    model = {"causal": hf.AutoModelForCausalLM, "seq2seq": hf.AutoModelForSeq2SeqLM, "masked": hf.AutoModelForMaskedLM}[
        family.task
    ].from_pretrained(tmp_path)
    length = context(model.config)[0]
    run(model, length or 300)
    if length is not None and family.name not in ENDLESS:
        with pytest.raises((IndexError, RuntimeError)):
            run(model, length + 1)


@pytest.mark.parametrize("content", ['{"model_type": "brand-new"}', "{}", '{"model_type": null}'])
def test_an_architecture_that_transformers_does_not_know_is_refused(tmp_path: Path, content: str) -> None:
    """A model type of the future, or none, is an `UnknownTaskError` that says what would help."""
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UnknownTaskError) as caught:
        read_config(Source("some/name", tmp_path), trusted=False)
    message = str(caught.value)
    assert "'some/name' has model type" in message
    assert "update transformers" in message
    assert "'causal', 'masked', 'seq2seq'" in message


@pytest.mark.parametrize(
    "content",
    [
        '{"model_type": "llama", "hidden_size": "wide"}',
        '{"model_type": ["llama"]}',
        '{"model_type": "llama", "hidden_size": 30, "num_attention_heads": 4}',
    ],
)
def test_a_config_with_wrong_values_is_named(tmp_path: Path, content: str) -> None:
    """A config that its class refuses is an error of lmkit's that names the checkpoint."""
    (tmp_path / "config.json").write_text(content)
    with pytest.raises((WeightsError, UnknownTaskError)) as caught:
        read_config(Source("some/name", tmp_path), trusted=False)
    assert "some/name" in str(caught.value) or str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    "settings, word",
    [
        (None, None),
        ({"quant_method": "lmkit", "bits": 4}, "int4"),
        ({"quant_method": "lmkit", "bits": 8}, "int8"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"load_in_4bit": True}, None),
    ],
)
def test_a_config_says_how_its_weights_are_quantized(tmp_path: Path, settings: Any, word: str | None) -> None:
    """What quantized a checkpoint is read from its config, as transformers writes it; lmkit's own by its bits."""
    config = hf.LlamaConfig()
    if settings is not None:
        config.quantization_config = settings
    assert saved_quantization(Source("some/name", tmp_path), config) == word
    assert saved_quantization(Source("some/name", tmp_path, "model.gguf"), config) == "gguf"


@pytest.mark.parametrize(
    "content, trusted",
    [
        ({"model_type": "llama"}, False),
        ({"model_type": "llama", "auto_map": {"AutoConfig": "code.Config"}}, False),
        ({"model_type": "new", "auto_map": {"AutoConfig": "code.Config"}}, True),
    ],
)
def test_only_code_that_must_run_is_refused(content: dict[str, Any], *, trusted: bool) -> None:
    """A type that transformers knows needs no code of its own, and code that is trusted may run."""
    check_class(Source("some/name", Path()), content, trusted=trusted)


@pytest.mark.parametrize("code", [{"AutoConfig": "code.Config"}, {"AutoTokenizer": ["code.Slow", None]}, "code.Config"])
def test_code_is_refused_with_its_names(code: Any) -> None:
    """A checkpoint that only its own code can load is refused, whatever its `auto_map` holds."""
    with pytest.raises(WeightsError) as caught:
        check_class(Source("some/name", Path()), {"model_type": "new", "auto_map": code}, trusted=False)
    message = str(caught.value)
    assert "'some/name' needs its own code" in message
    assert "trust_remote_code=True" in message
