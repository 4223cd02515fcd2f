from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import families
from lmkit.configs import context_length, packing, read_config
from lmkit.errors import UnknownTaskError, WeightsError
from lmkit.weights import Source

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
    assert context_length(config) == length


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
    model = {
        "causal": hf.AutoModelForCausalLM,
        "seq2seq": hf.AutoModelForSeq2SeqLM,
        "masked": hf.AutoModelForMaskedLM,
    }[family.task].from_pretrained(tmp_path)
    length = context_length(model.config)
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
    assert packing(Source("some/name", tmp_path), config) == word
    assert packing(Source("some/name", tmp_path, "model.gguf"), config) == "gguf"
