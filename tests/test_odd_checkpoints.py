"""Checkpoints that ask for something out of the ordinary, and options that once crashed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import checkpoints
import lmkit
from checkpoints import fresh, reference, texts, wrapper
from lmkit.masked.fill import Fill

hf: Any = transformers


def tokens(result: Any) -> list[int]:
    """Return the first completion's tokens."""
    return list(result.token_ids)


@pytest.mark.parametrize("penalty", [-4.0, 0.0, 6.0])
def test_beams_take_the_checkpoints_length_penalty(tmp_path: Path, penalty: float) -> None:
    """A beam search keeps the length penalty of the checkpoint's generation config, as generate() does."""
    where = checkpoints.configured("gpt2", tmp_path / "gpt2", length_penalty=penalty, early_stopping=True)
    model, tokenizer = checkpoints.plain("causal", where)
    text = texts("gpt2")[0]
    encoded = tokenizer(text, return_tensors="pt")
    found = model.generate(**encoded, num_beams=4, do_sample=False, max_new_tokens=12)[0]
    expected = checkpoints.until_end(found[encoded["input_ids"].shape[1] :].tolist(), checkpoints.ends(model))
    assert tokens(fresh("gpt2", where)(text, num_beams=4, max_new_tokens=12)) == expected


@pytest.mark.parametrize(
    "asked",
    [
        {"prompt_lookup_num_tokens": 3},
        {"max_time": 1e-9},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"num_beam_groups": 2, "diversity_penalty": 0.5},
    ],
    ids=lambda asked: next(iter(asked)),
)
@pytest.mark.parametrize("name", ["llama", "mamba"])
def test_other_ways_of_decoding_that_a_checkpoint_asks_for_are_left_out(
    name: str, asked: dict[str, Any], tmp_path: Path
) -> None:
    """Greedy and beams are the same whatever way of decoding the checkpoint's generation config names."""
    where = checkpoints.configured(name, tmp_path / name)
    settings = where / "generation_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | asked))
    changed = fresh(name, where)
    for options in ({}, {"num_beams": 2}):
        expected = [tokens(r) for r in wrapper(name)(texts(name), max_new_tokens=8, **options)]
        assert [tokens(r) for r in changed(texts(name), max_new_tokens=8, **options)] == expected


def test_the_checkpoints_stop_strings_stop(tmp_path: Path) -> None:
    """Stop strings in a generation config end a row, unless the call names others."""
    whole = wrapper("gpt2")(texts("gpt2")[0], max_new_tokens=8)
    stop = whole.text[3:5]
    generator = fresh("gpt2", checkpoints.configured("gpt2", tmp_path / "gpt2", stop_strings=[stop]))
    result = generator(texts("gpt2")[0], max_new_tokens=8)
    assert (result.finish_reason, result.stop_reason) == ("stop", stop)
    assert result.text == whole.text[: whole.text.index(stop)]
    assert generator(texts("gpt2")[0], max_new_tokens=8, stop="\0never").text == whole.text


def test_rows_of_roformer_equal_their_single_runs(tmp_path: Path) -> None:
    """A family that left padding changes runs rows of one length at a time."""
    config = hf.RoFormerConfig(
        vocab_size=len(reference("bert")[1]),
        hidden_size=32,
        embedding_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        is_decoder=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = hf.RoFormerForCausalLM(config)
        for weight in model.parameters():
            weight.data.normal_(std=0.4)
    model.save_pretrained(tmp_path)
    reference("bert")[1].save_pretrained(tmp_path)
    prompts = ["the train", "the old sailor told the children a story", "birds fly to the water"]
    with lmkit.load("causal", tmp_path) as generator:
        together = [tokens(r) for r in generator(prompts, max_new_tokens=8)]
        assert together == [tokens(generator(prompt, max_new_tokens=8)) for prompt in prompts]
        encoded = generator.tokenizer(prompts[1], return_tensors="pt")
        expected = generator.model.generate(encoded["input_ids"], do_sample=False, max_new_tokens=8)[0]
    assert together[1] == expected[encoded["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("start", [None, [2, 2]])
def test_an_encoder_decoder_without_one_start_token_is_refused(tmp_path: Path, start: object) -> None:
    """Without a single decoder_start_token_id there is no telling how an answer begins: a WeightsError."""
    where = checkpoints.configured("t5", tmp_path / "t5")
    for file in (where / "generation_config.json", where / "config.json"):
        content = json.loads(file.read_text()) | {"decoder_start_token_id": start, "bos_token_id": None}
        file.write_text(json.dumps(content))
    with pytest.raises(lmkit.WeightsError, match="decoder_start_token_id is"):
        fresh("t5", where)


def test_a_whole_number_is_a_penalty() -> None:
    """A repetition penalty of 2 is one of 2.0."""
    text = texts("llama")[0]
    two = wrapper("llama")(text, repetition_penalty=2, max_new_tokens=8)
    assert tokens(two) == checkpoints.generated("llama", [text], repetition_penalty=2.0, max_new_tokens=8)[0]


def test_a_temperature_too_small_to_divide_by_fails_its_row_alone() -> None:
    """Scores that overflow leave nothing to draw from: an EngineError, with the other row's result."""
    with pytest.raises(lmkit.EngineError, match="row 0: the options leave no token to draw") as caught:
        wrapper("llama")(texts("llama")[:2], temperature=[1e-40, 1.0], seed=1, max_new_tokens=3)
    assert caught.value.results[0] is None
    assert isinstance(caught.value.results[1], lmkit.Generation)


def test_a_failing_step_keeps_the_results_that_were_there() -> None:
    """A row that no step can be made with is an EngineError with its cause, and holds what the others gave."""
    generator = wrapper("llama")
    prompts = [" ".join(["water"] * length) for length in range(1, 36)]
    prompts[20] = "The old sailor"
    only = next(iter(set(checkpoints.encoded("llama", prompts[20])) - set(checkpoints.encoded("llama", prompts[34]))))

    def fail(_step: int, kwargs: dict[str, Any]) -> None:
        if (kwargs["input_ids"] == only).any():
            msg = "no such thing"
            raise ValueError(msg)

    with (
        checkpoints.before_forwards(generator.model, fail),
        pytest.raises(lmkit.EngineError, match="row 20: a step of the model failed: ValueError: no such") as caught,
    ):
        generator(prompts, max_new_tokens=1)
    assert isinstance(caught.value.__cause__, ValueError)
    assert [number for number, result in enumerate(caught.value.results) if result is None] == [20]
    for prompt, result in zip(prompts, caught.value.results, strict=True):
        assert result is None or tokens(result) == checkpoints.generated("llama", [prompt], max_new_tokens=1)[0]


@pytest.mark.parametrize("name", ["bert", "roberta", "albert", "xlm_roberta"])
def test_a_word_is_not_glued_to_the_text_before_it(name: str) -> None:
    """A token that begins a word gets a space where the text has none; line breaks of the text stay."""
    unmasker = wrapper(name)
    tokenizer = unmasker.tokenizer
    begins = next(
        token_id
        for token_id in range(len(tokenizer))
        if (token := tokenizer.convert_ids_to_tokens(token_id)).lstrip("Ġ▁").isalpha()
        and (token[0] in "Ġ▁" if name != "bert" else not token.startswith("##"))
        and len(token) > 3
    )
    job = unmasker._job("the[MASK] house\n\n[MASK]", {}, 0)
    word = tokenizer.decode([begins]).strip()
    candidate = unmasker._texts._candidate(job, tuple(Fill(mask, (begins,), (0.0,)) for mask in range(2)))
    assert candidate.text == f"the {word} house\n\n{word}"


def test_a_config_that_names_other_weights_is_refused(tmp_path: Path) -> None:
    """`transformers_weights` would read a file that was not checked, even a pickle: a WeightsError."""
    where = checkpoints.configured("llama", tmp_path / "llama")
    config = json.loads((where / "config.json").read_text())
    (where / "config.json").write_text(json.dumps(config | {"transformers_weights": "adapter_model.bin"}))
    with pytest.raises(lmkit.WeightsError, match=r"names other weights, 'adapter_model\.bin'"):
        fresh("llama", where)


def test_a_shard_outside_the_folder_is_refused(tmp_path: Path) -> None:
    """An index may only name safetensors files beside it."""
    where = checkpoints.configured("llama", tmp_path / "llama")
    weights = load_file(where / "model.safetensors")
    (where / "model.safetensors").unlink()
    save_file(weights, tmp_path / "outside.safetensors", metadata={"format": "pt"})
    index = {"weight_map": dict.fromkeys(weights, "../outside.safetensors")}
    (where / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(lmkit.WeightsError, match="which is no shard beside it"):
        fresh("llama", where)


def test_a_plan_is_plain_json_and_draws_itself() -> None:
    """A LoadPlan can be written as JSON and shown in a notebook, as results can."""
    plan = wrapper("llama").plan
    content = json.loads(json.dumps(plan.to_dict()))
    assert content["precision"]["dtype"] == "torch.float32"
    assert "LlamaForCausalLM" in plan._repr_html_()


def test_a_chat_is_not_cut() -> None:
    """`truncate=` would cut a chat's template, so it is refused for chats."""
    with pytest.raises(lmkit.OptionError, match="would cut its template"):
        wrapper("qwen3").chat([{"role": "user", "content": "water"}], truncate="left")
