import psutil
import pytest
import torch

from lmkit.planning.machine import accelerator, computes_bfloat16, give_back, memory, this_machine
from machines import CPU, MPS, OLD_CPU, OLD_CUDA, TWO_CUDA


def test_a_machine_knows_its_accelerators() -> None:
    """All devices but the CPU are accelerators, in order."""
    assert [machine.accelerators for machine in (CPU, TWO_CUDA, MPS)] == [[], ["cuda:0", "cuda:1"], ["mps:0"]]


def test_a_machine_knows_where_bfloat16_is_native() -> None:
    """Each kind of device has bfloat16 units or not; one that is not here is taken to have them."""
    assert [machine.bfloat16("cpu") for machine in (CPU, OLD_CPU, OLD_CUDA)] == [True, False, False]
    assert [machine.bfloat16("cuda") for machine in (CPU, TWO_CUDA, OLD_CUDA)] == [True, True, False]


def test_this_machine_is_what_torch_and_the_system_say() -> None:
    """The CPU is always there, with the system's memory; accelerators are those that torch counts."""
    machine = this_machine()
    assert machine.devices["cpu"].total_bytes == psutil.virtual_memory().total
    assert 0 < machine.devices["cpu"].free_bytes <= machine.devices["cpu"].total_bytes
    assert machine.devices["cpu"].bfloat16 == computes_bfloat16()
    assert len(machine.accelerators) == (torch.accelerator.device_count() if accelerator() else 0)
    assert list(machine.devices)[-1] == "cpu"


@pytest.mark.parametrize("capability, native", [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_accelerators_are_recorded_with_their_memory(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], *, native: bool
) -> None:
    """What torch tells of two CUDA cards is what the machine has; bfloat16 is native from capability 8.0 on."""
    monkeypatch.setattr("lmkit.planning.machine.accelerator", lambda: "cuda")
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda device: (10 + device.index, 40))
    monkeypatch.setattr(torch.accelerator, "memory_reserved", lambda _device: 0)
    monkeypatch.setattr(torch.accelerator, "memory_allocated", lambda _device: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _number: capability)
    devices = this_machine().devices
    assert list(devices) == ["cuda:0", "cuda:1", "cpu"]
    assert [(devices[name].free_bytes, devices[name].total_bytes) for name in ("cuda:0", "cuda:1")] == [
        (10, 40),
        (11, 40),
    ]
    assert {devices[name].bfloat16 for name in ("cuda:0", "cuda:1")} == {native}


@pytest.mark.parametrize("name", ["amx_bf16", "avx512_bf16", "bf16"])
def test_one_instruction_set_is_enough(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A processor computes bfloat16 natively if torch reports any of the instruction sets for it."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, name: True})
    assert computes_bfloat16()


@pytest.mark.parametrize("found", [{}, {"avx512_bf16": False}, {"avx2": True, "avx512_f": True}])
def test_without_them_bfloat16_is_not_native(monkeypatch: pytest.MonkeyPatch, found: dict[str, bool]) -> None:
    """A processor without those instruction sets does not compute bfloat16 natively."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    assert not computes_bfloat16()


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_what_torch_keeps_is_free(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Blocks that torch holds and nobody uses count as free, on the device that is asked about."""
    kept = {0: (30, 12), 1: (5, 5)}
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda device: (10 + device.index, 80))
    monkeypatch.setattr(torch.accelerator, "memory_reserved", lambda device: kept[device.index][0])
    monkeypatch.setattr(torch.accelerator, "memory_allocated", lambda device: kept[device.index][1])
    assert memory(torch.device(kind, 0)) == (10 + 30 - 12, 80)
    assert memory(torch.device(kind, 1)) == (11, 80)


def test_mps_is_asked_for_what_it_recommends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Mac's GPU has the part of the system's memory that torch may take, less what tensors hold."""
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 100)
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: 30)
    assert memory(torch.device("mps")) == (70, 100)


@pytest.mark.parametrize("error", [None, RuntimeError("device-side assert triggered")])
def test_memory_is_given_back(monkeypatch: pytest.MonkeyPatch, error: Exception | None) -> None:
    """Accelerators are asked to let go of what nobody uses, where there are some; a device that is dead stays so."""
    asked: list[int] = []

    def empty() -> None:
        asked.append(1)
        if error is not None:
            raise error

    monkeypatch.setattr(torch.accelerator, "empty_cache", empty)
    give_back()
    assert not asked
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    give_back()
    assert asked
