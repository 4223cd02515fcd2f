"""Which errors are a lack of memory, and which leave a device unusable, told apart without one."""

from typing import Any

import pytest
import torch

import checkpoints
import lmkit
from checkpoints import texts
from lmkit.engine import batches
from lmkit.engine.failures import dead, out_of_memory
from lmkit.engine.passes import base

CUDA = torch.device("cuda", 0)
SHORT = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    torch.AcceleratorError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("MPS backend out of memory (MPS allocated: 17.6 GB, other allocations: 1.2 GB, max allowed: 18 GB)."),
    RuntimeError("level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
    MemoryError(),
]
OTHERS = [
    torch.AcceleratorError("CUDA error: device-side assert triggered"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    ValueError("out of memory"),
]


@pytest.mark.parametrize("error", SHORT, ids=str)
def test_errors_of_memory_are_known(error: Exception) -> None:
    """Whichever library runs out of memory, it is known by its class or its words."""
    assert out_of_memory(error)


@pytest.mark.parametrize("error", OTHERS, ids=str)
def test_other_errors_are_not_of_memory(error: Exception) -> None:
    """A failed assertion, a wrong shape and a caller's own words are something else."""
    assert not out_of_memory(error)


def test_a_device_is_asked_whether_it_is_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind an error a device that answers is alive; one that fails again, though not for memory, is dead."""
    again: list[Exception] = []

    def synchronize(device: torch.device) -> None:
        assert device == CUDA
        for error in again:
            raise error

    monkeypatch.setattr(torch.accelerator, "synchronize", synchronize)
    error = torch.AcceleratorError("CUDA error: device-side assert triggered")
    assert not dead(error, CUDA)
    again[:] = [torch.AcceleratorError("CUDA error: out of memory")]
    assert not dead(error, CUDA)
    again[:] = [error]
    assert dead(error, CUDA)
    assert not dead(error, torch.device("cpu"))
    assert not dead(ValueError("of a hook"), CUDA)


def refuse(_module: Any, _args: Any) -> None:
    """Fail as a kernel does."""
    raise torch.AcceleratorError("CUDA error: device-side assert triggered")


@pytest.mark.parametrize("verb", ["call", "score"])
def test_a_dead_device_ends_the_model(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows are told to restart the process, once, and so are later calls; nothing is tried again."""
    tried: list[int] = []

    def found(error: Exception, _device: torch.device) -> bool:
        tried.append(1)
        return isinstance(error, torch.AcceleratorError)

    monkeypatch.setattr(batches, "dead", found)
    monkeypatch.setattr(base, "dead", found)
    with checkpoints.fresh("llama") as loaded:
        loaded.score("She")
        ask = loaded if verb == "call" else loaded.score
        options = {"max_new_tokens": 4} if verb == "call" else {}
        handle = loaded.model.model.register_forward_pre_hook(refuse)
        for _ in range(2):
            with pytest.raises(lmkit.EngineError, match=r"device-side assert triggered\): restart the process"):
                ask(texts("llama"), **options)
            handle.remove()
        assert len(tried) == 1


@pytest.mark.parametrize("error", SHORT[1:3], ids=str)
def test_kept_memory_is_given_back_where_it_is_short(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step without memory is tried again once torch and the prefixes have let go of what they keep."""
    given: list[int] = []
    monkeypatch.setattr(batches, "give_back", lambda: given.append(1))
    with checkpoints.fresh("llama") as loaded:
        expected = loaded(texts("llama"), max_new_tokens=4)
        steps: list[int] = []

        def fail(_module: Any, _args: Any) -> None:
            steps.append(1)
            if len(steps) == 2:
                raise error

        loaded.model.model.register_forward_pre_hook(fail)
        found = loaded(texts("llama"), max_new_tokens=4)
        assert given == [1]
        assert [one.token_ids for one in found] == [one.token_ids for one in expected]
