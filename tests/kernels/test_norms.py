"""Norms by the root mean square: against float64, in models, and which modules they are."""

from typing import Any

import pytest
import torch
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import checkpoints
import lmkit
from lmkit.kernels import norms
from lmkit.kernels.native.build import INSTRUCTIONS, NoKernelsError
from lmkit.kernels.native.norms import normed
from lmkit.kernels.native.operators import operators


@pytest.fixture(scope="module", params=[None, *INSTRUCTIONS], ids=str)
def kernels(request: pytest.FixtureRequest) -> Any:
    """Return the kernels of each set of instructions that this processor has."""
    has = torch.cpu.get_capabilities()
    if request.param and not all(has.get(one) for one in INSTRUCTIONS[request.param]):
        pytest.skip(f"this processor has no {request.param}")
    try:
        return operators(request.param)
    except NoKernelsError as error:
        pytest.skip(str(error))


def module(kind: Any, size: int, dtype: torch.dtype) -> Any:
    """Make a norm with weights that are not all alike."""
    made = kind(size, eps=1e-5).to(dtype).requires_grad_(requires_grad=False)
    made.weight.copy_(torch.randn(size, generator=torch.Generator().manual_seed(1)))
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1, 15, 16, 100, 576])
def test_any_shape_is_as_in_float64_and_as_transformers_rounds_it(kernels: Any, size: int, dtype: torch.dtype) -> None:
    """Rows of any length, also where they do not lie side by side, and as often rounded as transformers' own."""
    own = module(LlamaRMSNorm, size, dtype)
    given = torch.randn(5, 3, 2 * size, generator=torch.Generator().manual_seed(2)).to(dtype)[..., ::2]
    found = kernels.rms_norm(given, own.weight, own.variance_epsilon)
    within = 1e-5 if dtype is torch.float32 else 2**-7
    torch.testing.assert_close(found.double(), normed(given, own.weight, 1e-5), rtol=within, atol=0)
    assert float((found != own(given)).float().mean()) < (1 if dtype is torch.float32 else 0.01)


def test_a_row_is_alone(kernels: Any) -> None:
    """A row is bit for bit what it is without the others, and NaN and infinity of one are no other's."""
    weight = torch.ones(100)
    rows = torch.randn(700, 100, generator=torch.Generator().manual_seed(3))
    rows[3, 5], rows[4, 5] = torch.nan, torch.inf
    found = kernels.rms_norm(rows, weight, 1e-6)
    assert found[3].isnan().all()
    assert found[4, 5].isnan()
    assert found[[0, 1, 2, *range(5, 700)]].isfinite().all()
    assert all(torch.equal(found[at], kernels.rms_norm(rows[at], weight, 1e-6)) for at in (0, 99, 699))


def test_only_norms_that_the_kernel_reproduces_use_it(kernels: Any) -> None:
    """Gemma's norm, which adds 1 to its weight, and float16 keep their own code; what is trained does too."""
    known, other = module(LlamaRMSNorm, 64, torch.bfloat16), module(GemmaRMSNorm, 64, torch.bfloat16)
    model = torch.nn.ModuleList([known, other, module(LlamaRMSNorm, 64, torch.float16)])
    assert norms.put_on(model, kernels) == 1
    assert "forward" in vars(known)
    given = torch.randn(2, 64).bfloat16().requires_grad_()
    known(given).sum().backward()
    assert given.grad is not None


def test_a_model_writes_what_it_writes_without() -> None:
    """In float32 a model with kernels writes the tokens of one without, and its norms are the kernel's."""
    folder = str(checkpoints.folder("llama"))
    plain, quick = (lmkit.load("causal", folder, "float32", "cpu", compile=how) for how in (False, "kernels"))  # type: ignore[arg-type]
    if "kernel in C++" not in quick.plan.reasons["attention"]:
        pytest.skip("there are no kernels here")
    assert any("forward" in vars(part) for part in quick.model.modules())
    prompts = ["1 2 3", "a longer one of several"]
    wanted: Any = {"max_new_tokens": 12}
    assert [r.token_ids for r in quick(prompts, **wanted)] == [r.token_ids for r in plain(prompts, **wanted)]
