import copy
import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch

import checkpoints
import lmkit
from lmkit.errors import PlacementError
from lmkit.planning.machine import Machine
from lmkit.planning.placement import BYTES_PER_SECOND, SHARE, Placement, resolve_placement
from machines import CPU, GB, GIB, MPS, OLD_CPU, TWO_CUDA, planned

PROMPTS = ["The old sailor", "She"]


def tokens(devices: Any) -> list[tuple[int, ...]]:
    """Load a tiny Llama with these devices and continue the prompts."""
    with lmkit.load("causal", checkpoints.folder("llama"), "float32", devices) as generator:
        return [result.token_ids for result in generator(PROMPTS, max_new_tokens=8)]


def plan(devices: Any) -> lmkit.LoadPlan:
    """Plan to load a tiny Llama, on devices that need not be here."""
    return lmkit.plan("causal", checkpoints.folder("llama"), "float32", devices)


# One device -------------------------------------------------------------------------------------


@pytest.mark.parametrize("machine", [CPU, OLD_CPU], ids=["server", "laptop"])
@pytest.mark.parametrize("devices", ["auto", "cpu", torch.device("cpu"), ["cpu"], (torch.device("cpu"),), "cpu:0"])
def test_a_machine_without_accelerator_computes_on_its_cpu(devices: Any, machine: Machine) -> None:
    """Every way to name the CPU, and `"auto"` without accelerator, is the model in nine tenths of what is free."""
    placed = resolve_placement(devices, machine)
    assert placed.device_map == {"": "cpu"}
    assert placed.max_memory == {"cpu": int(machine.devices["cpu"].free_bytes * 0.9)}
    assert placed.offload_folder is None
    assert placed.device_type == "cpu"
    assert placed.reason


def test_the_automatic_choice_says_why() -> None:
    """What nobody asked for comes with its reason, what was asked for with that."""
    assert resolve_placement("auto", CPU).reason == "no accelerator on this machine"
    assert resolve_placement("cpu", CPU).reason == "as asked"
    assert resolve_placement("auto", MPS).reason == "'mps:0', then the CPU for what they cannot hold"
    assert resolve_placement("auto", TWO_CUDA).reason == "'cuda:0', 'cuda:1', then the CPU for what they cannot hold"


@pytest.mark.parametrize(
    "devices, given",
    [
        ("cuda", "'cuda'"),
        ("cuda:1", "'cuda:1'"),
        (0, "0"),
        (torch.device("cuda:3"), "cuda"),
        (["cpu", "cuda:0"], "'cuda:0'"),
        ({"cuda:0": "1GiB"}, "'cuda:0'"),
        ({0: "1GiB", "cpu": "1GiB"}, "0"),
        ("mps", "'mps'"),
        ("meta", "'meta'"),
        (-1, "-1"),
        (Placement({"": "cuda:7"}), "'cuda:7'"),
        (Placement("auto", {"cuda:7": "24GiB"}), "'cuda:7'"),
        (Placement({"model": "cpu", "lm_head": "cuda:7"}, {"cuda:7": "24GiB"}), "'cuda:7'"),
    ],
)
def test_an_absent_device_is_refused_with_those_that_are_here(devices: Any, given: str) -> None:
    """A device that this machine lacks is a `PlacementError` that says what was given and is here."""
    with pytest.raises(PlacementError) as caught:
        resolve_placement(devices, CPU)
    message = str(caught.value)
    assert message.startswith("the device ")
    assert given in message
    assert message.endswith("is not on this machine, which has 'cpu': pass one of those, or 'auto'.")


@pytest.mark.parametrize("devices", [2, "cuda:2", torch.device("cuda", 2), [0, 2], "mps"])
def test_a_device_beyond_the_last_lists_the_others(devices: Any) -> None:
    """With two cards the third is refused, and both are named."""
    with pytest.raises(PlacementError, match="which has 'cpu', 'cuda:0', 'cuda:1': pass one"):
        resolve_placement(devices, TWO_CUDA)


@pytest.mark.parametrize(
    "devices", ["", "gpu 0", "CUDA:0", "cuda:", "cuda:x", "auto,cpu", [], (), None, 1.5, True, {"cpu"}]
)
def test_what_names_no_device_is_refused_with_what_is_accepted(devices: Any) -> None:
    """Something written in another way is a `PlacementError` that shows every way."""
    with pytest.raises(PlacementError) as caught:
        resolve_placement(devices, TWO_CUDA)
    message = str(caught.value)
    assert f"devices={devices!r} is not accepted" in message
    for accepted in ("'auto'", "'cpu'", "'cuda:0'", "a list", "'20GiB'", "0.8", "'disk': 'offload/'", "Placement"):
        assert accepted in message


@pytest.mark.parametrize(
    "devices, name",
    [
        ("cuda", "cuda:0"),
        ("cuda:1", "cuda:1"),
        (0, "cuda:0"),
        (1, "cuda:1"),
        (torch.device("cuda"), "cuda:0"),
        (torch.device("cuda:1"), "cuda:1"),
        ([1], "cuda:1"),
        ([1, "cuda:1"], "cuda:1"),
        ("cpu", "cpu"),
    ],
)
def test_one_device_takes_the_whole_model(devices: Any, name: str) -> None:
    """A string, a number or a torch.device puts the whole model there, by its full name."""
    placed = resolve_placement(devices, TWO_CUDA)
    assert placed.device_map == {"": name}
    assert placed.max_memory == {name: int(TWO_CUDA.devices[name].free_bytes * SHARE)}
    assert placed.device_type == name.split(":", maxsplit=1)[0]


def test_a_number_is_one_of_the_machines_own_accelerators() -> None:
    """A number means a CUDA card where there are CUDA cards, and the graphics of an Apple machine there."""
    assert resolve_placement(0, MPS).device_map == {"": "mps:0"}
    assert resolve_placement("mps", MPS).device_type == "mps"


# Several devices --------------------------------------------------------------------------------


def test_auto_uses_every_accelerator_then_the_cpu_and_no_disk() -> None:
    """`"auto"` divides the model over all accelerators and the CPU, nine tenths of what is free of each."""
    placed = resolve_placement("auto", TWO_CUDA)
    assert (placed.device_map, placed.offload_folder) == ("auto", None)
    assert placed.max_memory == {"cuda:0": 63 * GB, "cuda:1": 72 * GB, "cpu": int(360 * GIB)}
    assert list(placed.max_memory) == ["cuda:0", "cuda:1", "cpu"]
    assert placed.device_type == "cuda"
    assert resolve_placement("auto", MPS).device_type == "mps"


def test_a_list_splits_over_exactly_those() -> None:
    """A list of devices becomes their free memory less a tenth, and nothing on other devices."""
    placed = resolve_placement([0, torch.device("cuda:1")], TWO_CUDA)
    assert placed.device_map == "auto"
    assert placed.max_memory == {"cuda:0": 63 * GB, "cuda:1": 72 * GB}
    assert placed.offload_folder is None
    assert placed.reason == "split over 'cuda:0', 'cuda:1'"


@pytest.mark.parametrize("devices", [["cuda:0", "cpu"], ["cpu", "cuda:0"]])
def test_a_list_computes_on_its_accelerator_whatever_the_order(devices: list[str]) -> None:
    """A list with a card and the CPU computes on the card, and leaves the second card alone."""
    placed = resolve_placement(devices, TWO_CUDA)
    assert placed.device_type == "cuda"
    assert set(placed.max_memory) == {"cuda:0", "cpu"}


def test_a_list_of_two_cards_divides_the_model_over_both() -> None:
    """A model that fits one of two cards is still split over those that were listed, blocks whole."""
    plan = planned("causal", checkpoints.folder("llama"), TWO_CUDA, "float32", ["cuda:0", "cuda:1"])
    assert set(plan.bytes_per_device) == {"cuda:0", "cuda:1"}
    assert {module.name for module in plan.modules} >= {"model.layers.0", "model.layers.1"}


# Budgets ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "budget, size",
    [
        (0, 0),
        (12345, 12345),
        ("20GiB", 20 * 2**30),
        ("20GB", 20 * 10**9),
        ("1.5GiB", 3 * 2**29),
        ("2 GB", 2 * 10**9),
        ("3KB", 3000),
        ("3KiB", 3072),
        ("3MB", 3 * 10**6),
        ("3MiB", 3 * 2**20),
        ("1TB", 10**12),
        ("1TiB", 2**40),
        (0.8, int(0.8 * 80 * 10**9)),
        (1.0, 80 * 10**9),
    ],
)
def test_a_budget_is_bytes_a_text_or_a_fraction(budget: Any, size: int) -> None:
    """GB are powers of 1000, GiB of 1024, a fraction is one of the device's whole memory; the dict is not changed."""
    given = {"cuda:0": budget, "cpu": "48GiB"}
    before = dict(given)
    placed = resolve_placement(given, TWO_CUDA)
    assert placed.max_memory == {"cuda:0": size, "cpu": 48 * GIB}
    assert given == before


def test_budgets_are_ordered_as_they_are_filled() -> None:
    """Budgets are sorted with accelerators by number and the CPU last; only the folder they name is used."""
    given = {"cpu": "48GiB", "disk": "offload/", 1: 5 * GIB, "cuda:0": "20GiB"}
    before = dict(given)
    placed = resolve_placement(given, TWO_CUDA)
    assert placed.device_map == "auto"
    assert list(placed.max_memory.items()) == [("cuda:0", 20 * GIB), ("cuda:1", 5 * GIB), ("cpu", 48 * GIB)]
    assert placed.offload_folder == "offload/"
    assert placed.device_type == "cuda"
    assert given == before


def test_one_budget_is_the_whole_model_there() -> None:
    """Where only the CPU has a budget it takes the whole model and computes, so `precision="auto"` asks about it."""
    placed = resolve_placement({"cpu": "4GiB"}, TWO_CUDA)
    assert (placed.device_map, placed.max_memory) == ({"": "cpu"}, {"cpu": 4 * GIB})
    assert placed.device_type == "cpu"


@pytest.mark.parametrize(
    "budgets, part",
    [
        ({"cpu": "lots"}, "{'cpu': 'lots'}"),
        ({"cpu": "20"}, "{'cpu': '20'}"),
        ({"cpu": "20G"}, "{'cpu': '20G'}"),
        ({"cpu": "-1GB"}, "{'cpu': '-1GB'}"),
        ({"cpu": "offload/"}, "{'cpu': 'offload/'}"),
        ({"cpu": 1.5}, "{'cpu': 1.5}"),
        ({"cpu": 0.0}, "{'cpu': 0.0}"),
        ({"cpu": -0.5}, "{'cpu': -0.5}"),
        ({"cpu": float("nan")}, "{'cpu': nan}"),
        ({"cpu": None}, "{'cpu': None}"),
        ({"cpu": -1}, "{'cpu': -1}"),
        ({"cpu": True}, "{'cpu': True}"),
        (Placement("auto", {"cpu": "lots"}), "{'cpu': 'lots'}"),
        (Placement({"": "cpu"}, {"cpu": "lots"}), "{'cpu': 'lots'}"),
    ],
)
def test_a_budget_that_is_no_size_is_refused(budgets: Any, part: str) -> None:
    """A budget is bytes, a text with a unit or a fraction; anything else is named, with an example of each."""
    with pytest.raises(PlacementError) as caught:
        resolve_placement(budgets, CPU)
    message = str(caught.value)
    assert f"the budget {part} is not accepted" in message
    assert "write bytes, a text such as '20GiB', or a fraction of its memory such as 0.8" in message


@pytest.mark.parametrize("budgets", [{}, {"disk": "offload/"}])
def test_budgets_need_a_device_that_computes(budgets: Any) -> None:
    """A dict that names no device, or the disk alone, is refused."""
    with pytest.raises(PlacementError, match="names no device that computes: add one, such as"):
        resolve_placement(budgets, CPU)


@pytest.mark.parametrize("folder", [3, True, 0.5])
def test_the_disk_takes_a_folder(folder: Any) -> None:
    """The value of `"disk"` is a path; a number there is a mistake, and is told so."""
    with pytest.raises(PlacementError, match=rf"'disk': {folder}}} is not accepted: 'disk' takes a folder's path"):
        resolve_placement({"cpu": "1GiB", "disk": folder}, CPU)


# Devices that are not here ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "devices",
    [
        {"cuda:0": "24GiB"},
        {"cuda:0": "24GiB", "cuda:1": 24 * GIB, "cpu": "64GiB"},
        {0: "24GiB", "cpu": 0.5},
        Placement("auto", {"cuda:0": "24GiB", "cpu": 0.5}),
        Placement({"": "cuda:0"}, {"cuda:0": "24GiB"}),
        Placement({"": "cuda"}, {"cuda": "24GiB"}),
        Placement({"model": "cuda:0", "lm_head": "cpu"}, {"cuda:0": "24GiB"}),
    ],
    ids=repr,
)
def test_a_plan_takes_devices_that_are_not_here_by_their_size(devices: Any) -> None:
    """Where a plan is all that is wanted, an absent device with a budget in bytes is accepted, and load refuses it."""
    placed = resolve_placement(devices, CPU, absent=True)
    assert placed.max_memory["cuda:0"] == 24 * GIB
    assert placed.device_type == "cuda"
    with pytest.raises(PlacementError, match="is not on this machine, which has 'cpu'"):
        resolve_placement(devices, CPU)


@pytest.mark.parametrize("devices", ["cuda:0", 0, ["cuda:0", "cuda:1"], Placement({"": "cuda:0"})], ids=repr)
def test_an_absent_device_without_a_size_is_refused_by_a_plan_too(devices: Any) -> None:
    """Of a device that is not here and has no budget nothing is known, so that a plan refuses it."""
    with pytest.raises(PlacementError, match="is not on this machine, which has 'cpu'"):
        resolve_placement(devices, CPU, absent=True)


@pytest.mark.parametrize("devices", ["gpu:0", ["gpu:0", "cpu"], {"gpu:0": "24GiB"}, Placement({"": "gpu:0"})], ids=repr)
def test_a_plan_says_which_absent_devices_it_takes(devices: Any) -> None:
    """A kind of device that nobody knows is answered with the kinds that are; only a plan speaks of absent ones."""
    with pytest.raises(PlacementError) as caught:
        resolve_placement(devices, CPU, absent=True)
    told = str(caught.value)
    assert "the device 'gpu:0' is not on this machine, which has 'cpu'" in told
    kinds = told.partition("A plan also takes devices that are not here, with budgets in bytes: ")[2]
    for name in re.findall(r"'(\w+:0)'", kinds):
        assert resolve_placement({name: "24GiB"}, CPU, absent=True).max_memory == {name: 24 * GIB}
    assert {"'cuda:0'", "'xpu:0'", "'mps:0'"} <= set(re.findall(r"'\w+:0'", kinds))
    with pytest.raises(PlacementError, match=r"or 'auto'\.$"):
        resolve_placement(devices, CPU)


def test_a_fraction_of_an_absent_device_is_refused() -> None:
    """A fraction of memory that nobody knows is refused, with what to write."""
    with pytest.raises(
        PlacementError, match=r"'cuda:0' is not on this machine, so 0\.8 of its memory is unknown"
    ) as got:
        resolve_placement({"cuda:0": 0.8}, CPU, absent=True)
    assert "write a size, as '24GiB'" in str(got.value)


# A Placement ------------------------------------------------------------------------------------


def test_a_placement_keeps_what_the_caller_decided() -> None:
    """A `Placement` is completed, not changed: devices by full name, budgets in bytes, the rest as it was."""
    mine = Placement({"a": "cuda", "b": "cpu", "c": "disk"}, {"cpu": "1GiB"}, "folder/", {"disk": 1e9}, "mine")
    before = copy.deepcopy(mine)
    placed = resolve_placement(mine, TWO_CUDA)
    assert placed.device_map == {"a": "cuda:0", "b": "cpu", "c": "disk"}
    assert placed.max_memory == {"cuda:0": 63 * GB, "cpu": GIB}
    assert (placed.offload_folder, placed.bytes_per_second, placed.reason) == ("folder/", {"disk": 1e9}, "mine")
    assert mine == before


def test_an_automatic_placement_may_use_what_is_free() -> None:
    """`Placement("auto")` divides over what `devices="auto"` does, and offloads to the folder that it names."""
    placed = resolve_placement(Placement("auto", offload_folder="folder/"), TWO_CUDA)
    assert placed.max_memory == resolve_placement("auto", TWO_CUDA).max_memory
    assert (placed.device_map, placed.offload_folder) == ("auto", "folder/")
    assert resolve_placement(Placement("auto"), TWO_CUDA).offload_folder is None


def test_a_word_that_is_no_map_is_refused() -> None:
    """Words that only transformers has for a device map are refused, with what to pass."""
    with pytest.raises(PlacementError, match="device_map='balanced' is not accepted: pass 'auto', or a device per"):
        resolve_placement(Placement("balanced"), CPU)


def test_modules_on_disk_need_a_folder() -> None:
    """A map that sends a module to disk, and names no folder for it, is refused with the field to set."""
    with pytest.raises(PlacementError, match=r"no folder is named for them: pass offload_folder=\."):
        resolve_placement(Placement({"model": "cpu", "lm_head": "disk"}), CPU)


def test_the_speeds_that_are_assumed_are_written_down() -> None:
    """Where nobody gives a speed, one for the CPU and one for the disk is assumed."""
    assert set(BYTES_PER_SECOND) == {"cpu", "disk"}
    assert BYTES_PER_SECOND["cpu"] > BYTES_PER_SECOND["disk"] > 0


# Maps against a model ---------------------------------------------------------------------------

LAYERS = {"model.layers.0": "cpu", "model.layers.1": "cpu"}
REST = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
GPU = {"cuda:0": "24GiB", "cpu": "24GiB"}


def refused(where: Mapping[str, str], name: str = "llama") -> str:
    """Return what a plan says of a map that it refuses."""
    with pytest.raises(PlacementError) as caught:
        lmkit.plan(checkpoints.FAMILIES[name].task, checkpoints.folder(name), "float32", Placement(where, GPU, "off/"))
    return str(caught.value)


def test_a_map_with_an_unknown_module_is_refused_with_the_nearest() -> None:
    """A module that the model does not have is named with the nearest one and the model's first parts."""
    message = refused({**REST, **LAYERS, "model.layer.1": "cpu"})
    assert message.startswith("the model has no module 'model.layer.1'. Did you mean 'model.layers.1'?")
    assert "Its parts are 'model.embed_tokens', 'model.layers.0', 'model.layers.1', 'model.norm', …" in message


@pytest.mark.parametrize("missing", ["model.layers.1", "lm_head", "model.embed_tokens", "model.norm"])
def test_a_map_that_leaves_a_module_out_names_it(missing: str) -> None:
    """A map that does not reach a part of the model says which, and how to reach all."""
    where = {name: device for name, device in {**REST, **LAYERS}.items() if name != missing}
    assert refused(where) == (f"the map leaves out '{missing}': give each a device, or all of them one by the name ''.")


def test_a_map_that_leaves_many_modules_out_names_five() -> None:
    """Of many parts that a map does not reach the first five are named, and the others counted."""
    message = refused({"lm_head": "cpu"}, "gpt_neox")
    assert message.startswith("the map leaves out 'gpt_neox.embed_in', ")
    assert refused({}, "bert").count("'") <= 2 * 6


@pytest.mark.parametrize("inside", ["model.layers.1.mlp", "model.layers.1.self_attn.q_proj"])
def test_a_map_that_divides_a_block_is_refused(inside: str) -> None:
    """A block whose parts would be on two devices is named; parts that go where the block goes are fine."""
    message = refused({**REST, **LAYERS, inside: "cuda:0"})
    assert message == "the map divides 'model.layers.1', which stays whole: give it one device, by that name."
    assert lmkit.plan("causal", checkpoints.folder("llama"), devices=Placement({"": "cpu", inside: "cpu"})).fits


def test_a_map_that_names_half_a_block_alone_divides_it() -> None:
    """A map that gives a device to a part of a block, and none to the block, is refused as dividing it."""
    where = {**REST, "model.layers.0": "cpu", "model.layers.1.mlp": "cpu"}
    assert refused(where).startswith("the map divides 'model.layers.1', which stays whole")


@pytest.mark.parametrize(
    "name, where",
    [
        ("gpt2", {"transformer": "cpu", "lm_head": "cuda:0"}),
        ("gemma2", {"model": "cuda:0", "lm_head": "cpu"}),
        ("bart", {"": "cpu", "model.decoder": "cuda:0"}),
        ("bert", {"bert": "cuda:0", "cls": "cpu"}),
    ],
)
def test_a_map_that_separates_tied_modules_is_refused(name: str, where: dict[str, str]) -> None:
    """Modules that are one weight cannot be on two devices: both are named."""
    message = refused(where, name)
    assert message.endswith("share a weight and cannot be on 'cpu', 'cuda:0': give them one device.")
    assert message.count("'") >= 8


def test_a_map_may_separate_modules_that_are_not_tied() -> None:
    """A tiny Llama's output layer is a weight of its own, and may be anywhere."""
    plan = lmkit.plan(
        "causal", checkpoints.folder("llama"), "float32", Placement({"": "cuda:0", "lm_head": "cpu"}, GPU)
    )
    assert {module.name: module.device for module in plan.modules}["lm_head"] == "cpu"


# What is loaded ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "devices", ["auto", "cpu", torch.device("cpu"), ["cpu"], Placement({"": "cpu"}), {"cpu": "4GiB"}], ids=str
)
@pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has an accelerator")
def test_every_way_to_the_cpu_loads_there(devices: Any) -> None:
    """`load` puts the model on the CPU and its plan says so."""
    with lmkit.load("causal", checkpoints.folder("llama"), "float32", devices) as generator:
        assert generator.device == torch.device("cpu")
        assert {p.device.type for p in generator.model.parameters()} == {"cpu"}
        assert generator.plan.device_map == {"": "cpu"}
        assert generator.plan.placement.device_map == {"": "cpu"}


@pytest.mark.parametrize("budget", [10**9, "1.5GiB", "4 GiB", "4000000KB", 0.8])
def test_every_accepted_budget_loads(budget: Any) -> None:
    """A budget that is large enough, in any accepted unit, gives the same tokens, and is not changed."""
    budgets = {"cpu": budget}
    assert tokens(budgets) == tokens("cpu")
    assert budgets == {"cpu": budget}


def test_an_explicit_map_is_followed() -> None:
    """A `Placement` with a device per module loads, is not changed, and gives the same tokens."""
    where = {"model": "cpu", "lm_head": "cpu"}
    assert tokens(Placement(where)) == tokens("cpu")
    assert where == {"model": "cpu", "lm_head": "cpu"}


@pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has an accelerator")
def test_a_placement_on_an_absent_device_is_refused_by_load() -> None:
    """`load` refuses a device that is not here although the placement gives it a size; `plan` takes it."""
    devices = Placement({"": "cuda:7"}, {"cuda:7": "24GiB"})
    with pytest.raises(PlacementError, match="not on this machine"):
        lmkit.load("causal", checkpoints.folder("llama"), "float32", devices)
    assert plan(devices).device_map == {"": "cuda:7"}
