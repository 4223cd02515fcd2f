import gc
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import checkpoints
import lmkit
from lmkit.errors import LmkitError, PlacementError
from lmkit.planning.layout import ModulePlan, size, summed_names
from lmkit.planning.machine import Device, Machine
from lmkit.planning.placement import Placement
from machines import CPU, GIB, planned

hf: Any = transformers
load: Any = lmkit.load  # What these tests pass is often not what is accepted.

SPLITS = {
    "llama": {"": "cpu", "model.layers.1": "disk", "lm_head": "disk"},
    "gpt2": {"": "cpu", "transformer.h.0": "disk", "transformer.h.1": "disk"},
    "t5": {"": "cpu", "encoder.block.0": "disk", "decoder.block.1": "disk"},
    "m2m100": {"": "cpu", "model.encoder.layers.1": "disk", "model.decoder.layers": "disk"},
    "bert": {"": "cpu", "bert.encoder.layer.0": "disk"},
    "modernbert": {"": "cpu", "model.layers": "disk"},
}
"""Maps across the CPU and a disk, two for each task."""


def of(name: str, precision: str = "float32", devices: Any = "cpu", **options: Any) -> lmkit.LoadPlan:
    """Plan to load a family's tiny checkpoint."""
    plan: Any = lmkit.plan
    found: lmkit.LoadPlan = plan(
        checkpoints.FAMILIES[name].task, checkpoints.folder(name), precision, devices, **options
    )
    return found


def opened(name: str, precision: str = "float32", devices: Any = "cpu", **options: Any) -> Any:
    """Load a family's tiny checkpoint."""
    return load(checkpoints.FAMILIES[name].task, checkpoints.folder(name), precision, devices, **options)


def answers(wrapper: Any, name: str) -> list[Any]:
    """Answer the family's texts: tokens, or for a masked model tokens and their probabilities."""
    if checkpoints.FAMILIES[name].task == "masked":
        results = wrapper(checkpoints.texts(name)[:3])
        return [[(c.token, pytest.approx(c.score, rel=1e-5)) for c in result.candidates] for result in results]
    options: dict[str, Any] = {"max_new_tokens": 8, **checkpoints.languages(name)}
    return [result.token_ids for result in wrapper(checkpoints.texts(name)[:3], **options)]


def bytes_below(name: str, modules: list[str]) -> int:
    """Sum what the weights of some modules of plain transformers' model take in float32."""
    parameters = checkpoints.reference(name)[0].named_parameters()
    return sum(tensor.nbytes for key, tensor in parameters if any(f"{key}.".startswith(f"{m}.") for m in modules))


def written(count: float) -> str:
    """Write bytes in kB or MB."""
    return f"{count / 1e3:.1f} kB" if count < 1e6 else f"{count / 1e6:.1f} MB"


# Divided models give the same results -------------------------------------------------------------


@pytest.mark.parametrize("name", SPLITS)
def test_a_model_across_cpu_and_disk_answers_as_a_whole_one(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By an explicit map parts lie on disk, the results are those of the undivided model, and the log warns."""
    devices = Placement(SPLITS[name], offload_folder=str(tmp_path / "off"))
    with caplog.at_level("WARNING", "lmkit"), opened(name, devices=devices) as wrapper:
        assert set(wrapper.plan.bytes_per_device) == {"cpu", "disk"}
        on_disk = [module.name for module in wrapper.plan.modules if module.device == "disk"]
        assert all(any(f"{part}.".startswith(f"{key}.") for key in SPLITS[name] if key) for part in on_disk)
        assert answers(wrapper, name) == answers(checkpoints.wrapper(name), name)
        (record,) = [record for record in caplog.records if "offload" in record.getMessage()]
        assert record.getMessage() == f"{wrapper.name}: offload: {wrapper.plan.reasons['offload']}"


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "m2m100", "bert", "modernbert"])
def test_a_small_budget_with_a_folder_answers_as_a_whole_model(name: str, tmp_path: Path) -> None:
    """With a folder for the disk what does not fit the CPU's budget is offloaded, and the results are the same."""
    whole = of(name).weights_bytes
    budgets = {"cpu": int(whole * 0.9), "disk": str(tmp_path / "off")}
    before = dict(budgets)
    with opened(name, devices=budgets) as wrapper:
        used = wrapper.plan.bytes_per_device
        assert 0 < used["cpu"] <= budgets["cpu"]
        assert used["cpu"] + used["disk"] == whole
        assert "disk" in wrapper.model.hf_device_map.values()
        assert answers(wrapper, name) == answers(checkpoints.wrapper(name), name)
        held = {module.name: module for module in wrapper.modules}
        for module in wrapper.plan.modules:
            if module.device == "cpu":
                assert (held[module.name].device, held[module.name].dtype.split(", ")[0]) == ("cpu", module.dtype)
    assert budgets == before


@pytest.mark.parametrize("name", ["llama", "t5", "bert"])
def test_a_whole_model_on_disk_answers(name: str, tmp_path: Path) -> None:
    """A model of which every part is on disk gives the same results, and computes on the CPU."""
    with opened(name, devices=Placement({"": "disk"}, offload_folder=str(tmp_path / "off"))) as wrapper:
        assert set(wrapper.plan.bytes_per_device) == {"disk"}
        assert wrapper.device == torch.device("cpu")
        assert answers(wrapper, name) == answers(checkpoints.wrapper(name), name)


# What offloading costs ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPLITS)
def test_offloading_is_stated_with_what_crosses_per_token(name: str, tmp_path: Path) -> None:
    """The plan counts the parts on disk, their bytes, and the seconds at the speed that is given."""
    where = [key for key, device in SPLITS[name].items() if device == "disk"]
    crossing = bytes_below(name, where)
    for speeds, speed in (({}, 2e9), ({"disk": 5e6}, 5e6)):
        plan = of(name, devices=Placement(SPLITS[name], {}, str(tmp_path), speeds))
        parts = [module for module in plan.modules if module.device == "disk"]
        assert plan.bytes_per_device["disk"] == crossing == sum(part.bytes for part in parts)
        assert plan.reasons["offload"] == (
            f"{len(parts)} of {len(plan.modules)} parts are on disk: {written(crossing)} cross to cpu for each token, "
            f"{crossing / speed:.2g} s at {'2.0 GB' if speed == 2e9 else '5.0 MB'}/s"
        )


def test_offloading_from_a_card_is_stated_for_both_places(tmp_path: Path) -> None:
    """Beside an accelerator, parts on the CPU cross as those on disk do, each at its own speed."""
    where = {"": "cuda:0", "model.layers.1": "cpu", "lm_head": "disk"}
    speeds = {"cpu": 1e6, "disk": 1e5}
    plan = of("llama", devices=Placement(where, {"cuda:0": "1GiB"}, str(tmp_path), speeds))
    block, head = (bytes_below("llama", [name]) for name in ("model.layers.1", "lm_head"))
    assert plan.reasons["offload"] == (
        f"1 of 5 parts are on cpu: {written(block)} cross to cuda:0 for each token, {block / 1e6:.2g} s at 1.0 MB/s; "
        f"1 of 5 parts are on disk: {written(head)} cross to cuda:0 for each token, {head / 1e5:.2g} s at 100.0 kB/s"
    )


@pytest.mark.parametrize("devices", ["cpu", {"cpu": "1GiB"}, {"cpu": "1GiB", "disk": "off/"}])
def test_what_fits_is_not_offloaded(devices: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Where all of it fits nothing is offloaded, nor said to be, and no folder is made."""
    with caplog.at_level("WARNING", "lmkit"), opened("llama", devices=devices) as wrapper:
        assert "offload" not in wrapper.plan.reasons
        assert wrapper.plan.device_map == {"": "cpu"}
    assert caplog.records == []
    assert not Path("off").exists()


@pytest.mark.parametrize(
    "devices", [{"cpu": 0.5}, Placement("auto", {"cpu": 0.5}), Placement({"": "cpu"}, {"cpu": 0.5})], ids=repr
)
@pytest.mark.parametrize("name", ["llama", "t5", "bert"])
def test_nothing_goes_to_disk_without_a_folder(name: str, devices: Any) -> None:
    """Without a folder what does not fit does not go to disk: the plan says that it does not fit."""
    tight = Machine({"cpu": Device(2 * 60_000, 60_000, bfloat16=False)})
    task = checkpoints.FAMILIES[name].task
    plan = planned(task, checkpoints.folder(name), tight, "float32", devices)
    assert not plan.fits
    assert "offload" not in plan.reasons
    with pytest.raises(PlacementError):
        opened(name, devices={"cpu": 60_000})


# What does not fit --------------------------------------------------------------------------------


def test_what_does_not_fit_says_all_that_helps() -> None:
    """The error names the device, what is needed and there, the largest part, and what would fit instead."""
    whole = of("llama").weights_bytes
    largest = max(of("llama").modules, key=lambda module: module.bytes)
    budget = whole * 7 // 10
    with pytest.raises(PlacementError) as caught:
        opened("llama", devices={"cpu": budget})
    message = str(caught.value)
    assert message.startswith(f"the devices cannot hold {str(checkpoints.folder('llama'))!r}: cpu has room for ")
    assert f"cpu has room for {written(budget)}, and {written(whole)} are needed there" in message
    assert f"the largest part is {largest.name!r} with {written(largest.bytes)}" in message
    assert re.search(r"precision='bfloat16' would fit: .*, with up to [\d,]+ tokens in one row\.$", message)
    plan = of("llama", devices={"cpu": budget})
    assert not plan.fits
    assert message.endswith(plan.reasons["fits"])


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "qwen3", "t5", "bart", "bert"])
@pytest.mark.parametrize("word", ["bfloat16", "int8", "int4"])
def test_the_precision_and_the_context_that_are_named_fit(name: str, word: str) -> None:
    """What an error says would fit does: the precision loads into the same budget, with the tokens that it names."""
    roomy = {"cpu": "1GiB"}
    smaller = of(name, word, roomy)
    row = 0 if smaller.key_values is None else smaller.key_values.of(9, 9)
    budget = {"cpu": smaller.weights_bytes + row}
    for wider in ("float32", "bfloat16", "int8"):
        if of(name, wider, budget).fits:
            pytest.skip(f"{wider} takes no more than {word} in this tiny model")
        if wider == "float32":
            break
    reason = of(name, "float32", budget).reasons["fits"]
    found = re.search(r"precision='(\w+)' would fit: .*?(?:, with up to ([\d,]+) tokens in one row)?\.$", reason)
    if found is None:  # the layers for the processor's kernel may leave nothing that fits
        assert "No precision makes it fit" in reason
        assert not any(of(name, other, budget).fits for other in ("bfloat16", "int8", "int4"))
        return
    named, tokens = found[1], int((found[2] or "0").replace(",", ""))
    assert of(name, named, budget).fits
    with opened(name, named, budget, reserve_tokens=tokens) as wrapper:
        assert wrapper.precision == named
        wrapper(checkpoints.texts(name)[0], **checkpoints.languages(name))
    longest = smaller.context_length
    if smaller.key_values is not None and (longest is None or tokens < longest):
        with pytest.raises(PlacementError):
            opened(name, named, budget, reserve_tokens=tokens + 1)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "t5", "bart"])
def test_the_context_that_is_named_fits(name: str) -> None:
    """Where the weights fit and the reserved tokens do not, the error names the most that do."""
    plan = of(name, devices={"cpu": "1GiB"})
    assert plan.key_values is not None
    budget = {"cpu": plan.weights_bytes + plan.beside_bytes + plan.key_values.of(50, 50)}
    assert of(name, devices=budget, reserve_tokens=50).fits
    with pytest.raises(PlacementError) as caught:
        opened(name, devices=budget, reserve_tokens=51)
    message = str(caught.value)
    assert f", {written(plan.key_values.of(51, 51))} of it for keys and values" in message
    assert message.endswith(" In float32, up to 50 tokens fit.")
    with opened(name, devices=budget, reserve_tokens=50) as wrapper:
        assert wrapper.plan.max_rows(50) == 1


def test_a_masked_model_keeps_no_tokens_to_reserve() -> None:
    """Reserved tokens take nothing where no keys and values are kept."""
    budget = {"cpu": of("bert").weights_bytes + of("bert").beside_bytes}
    assert of("bert", devices=budget, reserve_tokens=10**6).fits


@pytest.mark.parametrize("tokens", [-1, 1.5, "many", None])
def test_reserved_tokens_are_a_whole_number(tokens: Any) -> None:
    """What is no number of tokens is refused with what was given."""
    for verb in (lmkit.plan, lmkit.load):
        call: Any = verb
        with pytest.raises(lmkit.OptionError, match=re.escape(f"reserve_tokens={tokens!r} is not accepted")):
            call("causal", checkpoints.folder("llama"), reserve_tokens=tokens)


def test_a_block_that_no_device_can_hold_is_named() -> None:
    """Where even the smallest precision leaves a part larger than every device, the part is named, and the ways out."""
    plan = of("llama", devices={"cuda:0": 5000, "cuda:1": 5000, "cpu": 5000})
    assert not plan.fits
    largest = max(plan.modules, key=lambda module: module.bytes)
    assert (
        f"the largest part is {largest.name!r} with {written(largest.bytes)}, which no device can hold"
        in (plan.reasons["fits"])
    )
    assert "No precision makes it fit: name larger or more devices, or a folder" in plan.reasons["fits"]


def test_several_devices_that_do_not_fit_are_all_named() -> None:
    """What does not fit several devices together says what each has."""
    plan = of("llama", devices={"cuda:0": 40_000, "cpu": 30_000})
    assert not plan.fits
    assert "cuda:0 40.0 kB and cpu 30.0 kB" in plan.reasons["fits"] or "has room for" in plan.reasons["fits"]


def test_an_explicit_map_that_overfills_a_device_names_it() -> None:
    """Of the caller's own map the device that is too small is named, with what is needed there."""
    where = {"": "cuda:0", "lm_head": "cpu"}
    plan = of("llama", devices=Placement(where, {"cuda:0": 10_000, "cpu": "1GiB"}))
    needed = bytes_below("llama", ["model"])
    assert not plan.fits
    assert f"cuda:0 has room for 10.0 kB, and {written(needed)} are needed there" in plan.reasons["fits"]


def test_bitsandbytes_beside_a_card_wants_all_parts_on_it() -> None:
    """A plan for bitsandbytes with parts on the CPU does not fit, unless its config allows them there."""
    where = Placement({"": "cuda:0", "model.layers.1": "cpu"}, {"cuda:0": "1GiB", "cpu": "1GiB"})
    plan = of("llama", "int8", where)
    assert not plan.fits
    assert "bitsandbytes wants all parts on accelerators, and some would be on 'cpu'" in plan.reasons["fits"]
    config = hf.BitsAndBytesConfig(load_in_8bit=True, llm_int8_enable_fp32_cpu_offload=True)
    assert of("llama", config, where).fits


# Rows ---------------------------------------------------------------------------------------------


def test_rows_are_what_fits_beside_the_weights() -> None:
    """As many rows fit as their keys and values do in what the weights leave, by plain division."""
    plan = of("llama", devices={"cpu": "1GiB"})
    config = checkpoints.reference("llama")[0].config
    token = config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim * 4
    for rows in (0, 1, 3, 100):
        budget = {"cpu": plan.weights_bytes + rows * 20 * token + token}
        assert of("llama", devices=budget).max_rows(20) == rows
    assert plan.max_rows(20) == (GIB - plan.weights_bytes) // (20 * token)


def test_rows_of_an_encoder_decoder_have_a_source() -> None:
    """Sources take keys and values too: as long as the output if nobody says, else as long as said."""
    plan = of("bart", devices={"cpu": "1GiB"})
    model = checkpoints.reference("bart")[0]
    token = model.config.decoder_layers * 2 * model.config.d_model * 4
    left = GIB - plan.weights_bytes
    assert plan.max_rows(20) == left // (40 * token)
    assert plan.max_rows(20, 5) == left // (25 * token)


def test_rows_over_two_cards_are_bounded_by_the_fuller_one() -> None:
    """Keys and values lie where their blocks do, so that the card with less room for its share sets the number."""
    where = {"": "cuda:0", "model.layers.1": "cuda:1", "lm_head": "cuda:1", "model.norm": "cuda:1"}
    first, second = bytes_below("llama", ["model.embed_tokens", "model.layers.0"]), 10**6
    plan = of("llama", devices=Placement(where, {"cuda:0": first + 10_000, "cuda:1": second}))
    assert plan.key_values is not None
    row = plan.key_values.of(10)
    assert plan.max_rows(10) == math.floor(10_000 / (row / 2))


def test_a_plan_that_does_not_fit_holds_no_rows() -> None:
    """No rows fit where the weights do not."""
    assert of("llama", devices={"cpu": 1000}).max_rows(1) == 0


# Failing ------------------------------------------------------------------------------------------


def models() -> int:
    """Count the transformers models in memory that hold weights."""
    gc.collect()
    kinds = (found for found in gc.get_objects() if issubclass(type(found), transformers.PreTrainedModel))
    return sum(found.device.type != "meta" for found in kinds)


def test_a_load_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    """After a load that was refused or that broke, no model is in memory and torch draws what it would have."""
    broken = checkpoints.changed("llama", tmp_path / "broken", lambda model, _: model.model.layers.pop(1))
    (broken / "config.json").write_text(
        (checkpoints.folder("llama") / "config.json").read_text(encoding="utf-8"), encoding="utf-8"
    )
    before, drawn = models(), torch.random.get_rng_state()
    for folder, devices in ((checkpoints.folder("llama"), {"cpu": 1000}), (broken, "cpu")):
        with pytest.raises(LmkitError):
            load("causal", folder, "float32", devices)
    assert models() == before
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert not (tmp_path / "off").exists()


# Names and sizes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "count, text",
    [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 kB"), (2.5e6, "2.5 MB"), (16e9, "16.0 GB"), (3e13, "30.0 TB")],
)
def test_sizes_are_written_for_people(count: float, text: str) -> None:
    """Bytes are written in powers of 1000, with one digit."""
    assert size(count) == text


def test_neighbours_are_named_as_a_range() -> None:
    """Parts whose names only differ by a number are one range, where they follow each other."""
    names = ["embed", "layers.0", "layers.1", "layers.2", "norm", "layers.4", "", "head"]
    parts = [ModulePlan(name, "cpu", "float32", 1) for name in names]
    assert summed_names(parts) == "embed, layers.0-2, norm, layers.4, (the model's own), head"


def test_the_machines_own_memory_is_what_a_plan_fits() -> None:
    """Nine tenths of what is free is the budget where nobody gives one."""
    assert planned("causal", checkpoints.folder("llama"), CPU).placement.max_memory == {"cpu": 36 * GIB}


def test_what_fits_goes_nowhere_else(tmp_path: Path) -> None:
    """A folder for what does not fit changes nothing where all of it fits, to the byte."""
    alone = of("llama")
    needed = alone.weights_bytes + alone.beside_bytes
    divided = of("llama", devices={"cpu": needed, "disk": str(tmp_path)})
    assert divided.bytes_per_device == {"cpu": alone.weights_bytes}
    assert "offload" not in divided.reasons
    assert "disk" in of("llama", devices={"cpu": needed - 1, "disk": str(tmp_path)}).bytes_per_device


@pytest.mark.parametrize("word", ["int8", "int4"])
def test_lmkits_own_layers_are_not_read_from_a_disk(word: Any, tmp_path: Path) -> None:
    """Accelerate reads no integers from a disk: the plan says so, before a weight is read."""
    budget = {"cpu": of("llama").weights_bytes // 8, "disk": str(tmp_path)}
    with pytest.raises(PlacementError, match="int8 and int4 cannot be read from a disk part by part"):
        lmkit.load("causal", checkpoints.folder("llama"), word, budget)
