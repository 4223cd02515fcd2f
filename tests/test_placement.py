from pathlib import Path
from typing import Any

import pytest
import torch

import families
import lmkit
from lmkit.errors import PlacementError
from lmkit.placement import Placement, resolve_placement

GIB = 2**30
PROMPTS = ["The old sailor", "She"]
NO_ACCELERATOR = not torch.accelerator.is_available()


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the placement see two CUDA devices, of 10 and 20 GiB free."""
    free = {0: 10 * GIB, 1: 20 * GIB}
    monkeypatch.setattr("lmkit.placement.accelerator", lambda: "cuda")
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.accelerator,
        "get_memory_info",
        lambda device: (free[torch.device(device).index], 40 * GIB),
    )


@pytest.fixture
def only_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the placement see no accelerator, whatever this machine has."""
    monkeypatch.setattr("lmkit.placement.accelerator", lambda: None)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a tiny Llama."""
    family = next(family for family in families.CAUSAL if family.name == "llama")
    return families.save(family, tmp_path_factory.mktemp("placement") / "llama")


@pytest.fixture(scope="module")
def expected(llama: Path) -> list[tuple[int, ...]]:
    """Return the tokens of the model when all of it is on the CPU."""
    return tokens(llama, "cpu")


def tokens(folder: Path, devices: Any) -> list[tuple[int, ...]]:
    """Load with these devices and continue the prompts."""
    with lmkit.load("causal", folder, "float32", devices) as generator:
        return [result.token_ids for result in generator(PROMPTS, max_new_tokens=8)]


def size(folder: Path) -> int:
    """Return the bytes of the weights."""
    return (folder / "model.safetensors").stat().st_size


@pytest.mark.usefixtures("only_cpu")
@pytest.mark.parametrize("devices", ["auto", "cpu", torch.device("cpu"), ["cpu"], (torch.device("cpu"),), "cpu:0"])
def test_a_machine_without_accelerator_computes_on_its_cpu(devices: Any) -> None:
    """Every way to name the CPU, and `"auto"` without accelerator, is the whole model on the CPU."""
    placed = resolve_placement(devices)
    assert placed.device_map == {"": "cpu"}
    assert placed.max_memory == {}
    assert placed.device_type == "cpu"
    assert placed.reason


@pytest.mark.usefixtures("only_cpu")
def test_the_automatic_choice_says_why() -> None:
    """The CPU that nobody asked for comes with its reason, the one asked for with that."""
    assert resolve_placement("auto").reason == "no accelerator on this machine"
    assert resolve_placement("cpu").reason == "as asked"


@pytest.mark.usefixtures("only_cpu")
@pytest.mark.parametrize(
    "devices, given",
    [
        ("cuda", "cuda"),
        ("cuda:1", "cuda:1"),
        (0, "0"),
        (torch.device("cuda:3"), "cuda"),
        (["cpu", "cuda:0"], "cuda:0"),
        ({"cuda:0": "1GiB"}, "cuda:0"),
        ({0: "1GiB", "cpu": "1GiB"}, "0"),
        ("mps", "mps"),
        (-1, "-1"),
    ],
)
def test_an_absent_device_is_refused_with_those_that_are_here(devices: Any, given: str) -> None:
    """A device that this machine lacks is a `PlacementError` that says what was given and is here."""
    with pytest.raises(PlacementError) as caught:
        resolve_placement(devices)
    message = str(caught.value)
    assert given in message
    assert "not on this machine, which has 'cpu'" in message
    assert "or 'auto'" in message


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("devices", [2, "cuda:2", torch.device("cuda", 2), [0, 2]])
def test_a_device_beyond_the_last_lists_the_others(devices: Any) -> None:
    """With two GPUs the third is refused, and both are named."""
    with pytest.raises(PlacementError, match="'cpu', 'cuda:0', 'cuda:1'"):
        resolve_placement(devices)


@pytest.mark.parametrize(
    "devices",
    ["", "gpu 0", "CUDA:0", "cuda:", "cuda:x", "auto,cpu", [], (), None, 1.5, True, {"cpu"}],
)
def test_what_names_no_device_is_refused_with_what_is_accepted(devices: Any) -> None:
    """Something written in another way is a `PlacementError` that shows every way."""
    with pytest.raises(PlacementError) as caught:
        resolve_placement(devices)
    message = str(caught.value)
    assert f"devices={devices!r} is not accepted" in message
    for accepted in ("'auto'", "'cpu'", "'cuda:0'", "a list", "'20GiB'", "'disk': 'offload/'"):
        assert accepted in message


@pytest.mark.usefixtures("two_gpus")
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
        ("cpu", "cpu"),
    ],
)
def test_one_device_takes_the_whole_model(devices: Any, name: str) -> None:
    """A string, a number or a torch.device puts the whole model there, by its full name."""
    placed = resolve_placement(devices)
    assert placed.device_map == {"": name}
    assert placed.device_type == name.split(":", maxsplit=1)[0]


@pytest.mark.usefixtures("two_gpus")
def test_auto_uses_every_accelerator_there_is() -> None:
    """`"auto"` leaves the division to accelerate, computes on CUDA, and says how many there are."""
    placed = resolve_placement("auto")
    assert (placed.device_map, placed.max_memory, placed.offload_folder) == ("auto", {}, None)
    assert placed.device_type == "cuda"
    assert "2 cuda device(s)" in placed.reason


@pytest.mark.usefixtures("two_gpus")
def test_a_list_splits_over_what_is_free() -> None:
    """A list of devices becomes their free memory less a tenth, and nothing on other devices."""
    placed = resolve_placement([0, torch.device("cuda:1")])
    assert placed.device_map == "auto"
    assert placed.max_memory == {0: 9 * GIB, 1: 18 * GIB}
    assert placed.offload_folder is None
    assert placed.reason == "split over 'cuda:0', 'cuda:1'"


@pytest.mark.usefixtures("two_gpus")
def test_budgets_become_bytes() -> None:
    """A dict of budgets is turned into bytes, numbers accelerators, and allows its folder alone."""
    given = {"cuda:0": "20GiB", 1: 5 * GIB, "cpu": "48GiB", "disk": "offload/"}
    before = dict(given)
    placed = resolve_placement(given)
    assert placed.device_map == "auto"
    assert placed.max_memory == {0: 20 * GIB, 1: 5 * GIB, "cpu": 48 * GIB}
    assert placed.offload_folder == "offload/"
    assert placed.device_type == "cuda"
    assert given == before


@pytest.mark.usefixtures("two_gpus")
def test_budgets_without_an_accelerator_compute_on_the_cpu() -> None:
    """Where only the CPU has a budget it is what computes, so `precision="auto"` asks about it."""
    assert resolve_placement({"cpu": "4GiB"}).device_type == "cpu"


@pytest.mark.parametrize(
    "budgets, part",
    [
        ({"cpu": "lots"}, "{'cpu': 'lots'}"),
        ({"cpu": "20"}, "{'cpu': '20'}"),
        ({"cpu": 1.5}, "{'cpu': 1.5}"),
        ({"cpu": None}, "{'cpu': None}"),
        ({"cpu": -1}, "{'cpu': -1}"),
        ({"cpu": True}, "{'cpu': True}"),
    ],
)
def test_a_budget_that_is_no_size_is_refused(budgets: Any, part: str) -> None:
    """A budget is bytes or a text with a unit; anything else is named, with an example."""
    with pytest.raises(PlacementError) as caught:
        resolve_placement(budgets)
    assert f"the budget {part} is not accepted" in str(caught.value)
    assert "write bytes, or a text such as '20GiB'" in str(caught.value)


@pytest.mark.parametrize("budgets", [{}, {"disk": "offload/"}])
def test_budgets_need_a_device_that_computes(budgets: Any) -> None:
    """A dict that names no device, or the disk alone, is refused."""
    with pytest.raises(PlacementError, match="names no device that computes: add one, such as"):
        resolve_placement(budgets)


@pytest.mark.parametrize("folder", [3, True])
def test_the_disk_takes_a_folder(folder: Any) -> None:
    """The value of `"disk"` is a path; a number there is a mistake, and is told so."""
    with pytest.raises(PlacementError, match="'disk' takes a folder's path"):
        resolve_placement({"cpu": "1GiB", "disk": folder})


def test_a_placement_is_passed_through() -> None:
    """A `Placement` is the caller's own decision and is kept as it is."""
    mine = Placement({"": "cpu"}, reason="mine")
    assert resolve_placement(mine) is mine


@pytest.mark.skipif(not NO_ACCELERATOR, reason="this machine has an accelerator")
@pytest.mark.parametrize(
    "devices",
    ["auto", "cpu", torch.device("cpu"), ["cpu"], Placement({"": "cpu"})],
    ids=str,
)
def test_every_way_to_the_cpu_loads_there(llama: Path, devices: Any) -> None:
    """`load` puts the model on the CPU and its plan says so."""
    with lmkit.load("causal", llama, "float32", devices) as generator:
        assert generator.device == torch.device("cpu")
        assert {p.device.type for p in generator.model.parameters()} == {"cpu"}
        assert generator.plan.placement.device_map == {"": "cpu"}


@pytest.mark.parametrize(
    "budget",
    [10**9, "4GiB", "1.5GiB", "4 GiB", "4000MB", "4000MiB", "4000000KB", "4000000KiB", "1TB", "1TiB"],
)
def test_every_accepted_budget_loads(llama: Path, budget: Any, expected: list[tuple[int, ...]]) -> None:
    """A budget that is large enough, in any accepted unit, gives the same tokens."""
    budgets = {"cpu": budget}
    assert tokens(llama, budgets) == expected
    assert budgets == {"cpu": budget}


def test_a_budget_too_small_is_refused(llama: Path) -> None:
    """What does not fit, with no folder named, is refused with the parts and the ways out."""
    with pytest.raises(PlacementError) as caught:
        lmkit.load("causal", llama, "float32", {"cpu": size(llama) // 2})
    message = str(caught.value)
    assert "cannot hold" in message
    assert "'disk': 'offload/'" in message


def test_a_folder_takes_what_does_not_fit(llama: Path, tmp_path: Path, expected: list[tuple[int, ...]]) -> None:
    """With a folder for the disk a small budget loads, offloads a part, and gives the same tokens."""
    budgets = {"cpu": size(llama) // 2, "disk": str(tmp_path / "offload")}
    before = dict(budgets)
    with lmkit.load("causal", llama, "float32", budgets) as generator:
        where: Any = generator.model
        assert "disk" in where.hf_device_map.values()
        assert [r.token_ids for r in generator(PROMPTS, max_new_tokens=8)] == expected
    assert budgets == before


def test_offloading_is_told(llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Offloading is slow, so the log of lmkit warns of it."""
    budgets = {"cpu": size(llama) // 2, "disk": str(tmp_path / "offload")}
    with caplog.at_level("WARNING", "lmkit"):
        lmkit.load("causal", llama, "float32", budgets).close()
    assert "offloaded to" in caplog.text
    assert "'disk'" in caplog.text


def test_an_explicit_map_is_followed(llama: Path, expected: list[tuple[int, ...]]) -> None:
    """A `Placement` with a device per module loads, is not changed, and gives the same tokens."""
    where = {"model": "cpu", "lm_head": "cpu"}
    assert tokens(llama, Placement(where)) == expected
    assert where == {"model": "cpu", "lm_head": "cpu"}


@pytest.mark.usefixtures("only_cpu")
def test_a_placement_on_an_absent_device_is_refused(llama: Path) -> None:
    """A `Placement` is checked too: a device that is not here is a `PlacementError`."""
    with pytest.raises(PlacementError, match="not on this machine"):
        lmkit.load("causal", llama, "float32", Placement({"": "cuda:7"}))
