"""How rows will run is in the plan, with its reason, and it is how they run."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import checkpoints
import lmkit
from lmkit.kernels import attention
from lmkit.planning import running
from lmkit.planning.machine import Device, Machine
from lmkit.planning.running import OWN, PADDING_SENSITIVE, how_rows_run, unexpected
from machines import CPU, GIB, planned

hf: Any = transformers
CUDA = Machine({"cuda:0": Device(24 * GIB, 23 * GIB, bfloat16=True), "cpu": Device(64 * GIB, 40 * GIB, bfloat16=True)})


def classes(model_type: str) -> list[tuple[Any, Any]]:
    """Return the tasks for which transformers can build a model type, and the class that it builds."""
    found = []
    for task, auto in (("causal", hf.AutoModelForCausalLM), ("seq2seq", hf.AutoModelForSeq2SeqLM)):
        if model_type in auto._model_mapping._model_mapping:
            kind = auto._model_mapping[type(CONFIG_MAPPING[model_type]())]
            found.append((task, kind[0] if isinstance(kind, tuple) else kind))
    return found


@pytest.mark.parametrize("model_type", sorted(OWN))
def test_families_that_must_run_on_the_own_loop_do(model_type: str) -> None:
    """A family that was known to run on lmkit's own loop still does, whatever transformers calls things by now."""
    ways = []
    for task, kind in classes(model_type):
        config: Any = CONFIG_MAPPING[model_type]()
        model = SimpleNamespace(
            config=config,
            forward=kind.forward,
            _supports_default_dynamic_cache=kind._supports_default_dynamic_cache,
            modules=list,
            dtype=torch.float32,
        )
        config._attn_implementation, config.is_encoder_decoder = "eager", task == "seq2seq"
        ways.append((task, how_rows_run(task, model, "cuda", compiled=False).engine))
    expected = "generate" if model_type in PADDING_SENSITIVE else "lmkit"
    assert ways
    assert all(engine == (expected if task == "causal" else "lmkit") for task, engine in ways), ways


@pytest.mark.parametrize("name", checkpoints.CAUSAL + checkpoints.SEQ2SEQ + checkpoints.MASKED)
def test_a_load_runs_as_planned(name: str) -> None:
    """The attention that a loaded model calls, and what its engine holds, are those of its plan."""
    wrapper = checkpoints.wrapper(name)
    plan = wrapper.plan
    assert wrapper.model.config._attn_implementation == plan.attention
    assert (plan.attention == attention.NAME) == ("lmkit's" in plan.reasons.get("attention", ""))
    assert ("engine" in plan.reasons) == (checkpoints.FAMILIES[name].task != "masked")
    assert not plan.compiled
    if plan.engine == "generate":
        assert "since" in plan.reasons["engine"]
        assert plan.prefix_cache_bytes == 0


@pytest.mark.parametrize("name", ["llama", "gemma2", "mamba", "t5", "bart"])
def test_the_engine_counts_by_the_plan(name: str) -> None:
    """Batches are bounded, and prefixes kept, by the plan's own keys and values."""
    wrapper = checkpoints.wrapper(name)
    batches = wrapper._opened_engine._batches
    assert batches._scheduler._key_values is wrapper.plan.key_values
    assert batches._prefixes.limit == wrapper.plan.prefix_cache_bytes


def test_an_accelerator_has_torchs_attention_with_lmkits_mask() -> None:
    """Products of lmkit's own are for a CPU; elsewhere the mask is, and the reason says so."""
    folder = checkpoints.folder("llama")
    assert planned("causal", folder, CPU).attention == "lmkit"
    found = planned("causal", folder, CUDA, devices="cuda:0")
    assert (found.attention, "one mask for all layers" in found.reasons["attention"]) == ("lmkit", True)


def test_why_generate_prepares_steps() -> None:
    """The reason names what keeps a family from lmkit's own loop."""
    mamba = planned("causal", checkpoints.folder("mamba"), CPU)
    assert mamba.engine == "generate"
    assert "LinearAttentionLayer" in mamba.reasons["engine"] or "takes no cache" in mamba.reasons["engine"]


def test_prefixes_that_cannot_be_kept_are_told() -> None:
    """What was asked for and is not to be had has a reason; what nobody asked for has none."""
    folder = checkpoints.folder("mamba")
    assert "prefixes" not in planned("causal", folder, CPU).reasons
    found = planned("causal", folder, CPU, prefix_cache_bytes=10**6)
    assert (found.prefix_cache_bytes, "none are kept" in found.reasons["prefixes"]) == (0, True)
    assert planned("causal", checkpoints.folder("llama"), CPU, prefix_cache_bytes=10**6).prefix_cache_bytes == 10**6


@pytest.mark.parametrize("verb", [lmkit.load, lmkit.plan])
@pytest.mark.parametrize("task, name", [("causal", "mamba"), ("causal", "gpt_neo"), ("causal", "bloom")])
def test_steps_that_cannot_be_compiled_are_refused(verb: Any, task: str, name: str) -> None:
    """A plan refuses it as a load does, before a weight is read, and says why."""
    with pytest.raises(lmkit.OptionError, match=r"compile=True .*: leave it out\.$"):
        verb(task, checkpoints.folder(name), compile=True)
    assert lmkit.plan("causal", checkpoints.folder("llama"), compile=True).compiled


def test_a_renamed_cache_is_loud(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Where `forward` takes its cache by a name that nobody knows, the slow path is a warning, and right."""
    monkeypatch.setattr(running, "cache_name", lambda _model: None)
    with caplog.at_level(logging.WARNING, "lmkit"), checkpoints.fresh("llama") as generator:
        prompt = checkpoints.texts("llama")[0]
        found = generator(prompt, max_new_tokens=6)
        assert generator.plan.engine == "generate"
    assert list(found.token_ids) == checkpoints.generated("llama", [prompt], max_new_tokens=6)[0]
    (told,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert "takes no cache by a name that lmkit knows" in told
    assert "which lmkit was tested with" in told


def test_an_unknown_kind_of_cache_goes_to_generate() -> None:
    """A model that does not say which cache it keeps, as transformers may one day, is prepared by generate()."""
    config: Any = CONFIG_MAPPING["llama"]()
    kind = hf.LlamaForCausalLM
    model = SimpleNamespace(config=config, forward=kind.forward, modules=list, dtype=torch.float32)
    found = how_rows_run("causal", model, "cpu", compiled=False)
    assert found.engine == "generate"
    assert "does not say any more which cache it keeps" in found.reasons["engine"]


def test_a_family_that_runs_as_known_is_no_surprise() -> None:
    """There is no warning for the own loop, for a family that never ran on it, nor for one that padding changes."""
    assert unexpected("causal", "lmkit", "llama") is None
    assert unexpected("causal", "generate", "mamba") is None
    assert unexpected("causal", "generate", "bart") is None
    assert unexpected("seq2seq", "generate", "bart")
