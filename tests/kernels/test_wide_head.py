"""Output layers that share their weight with several embeddings: a copy in 8 bits multiplies."""

from pathlib import Path
from typing import Any

import pytest
import torch

import checkpoints
import lmkit
from lmkit.engine.compiled import CompiledDecoderStep
from lmkit.kernels.native.operators import refusal

pytestmark = pytest.mark.skipif(refusal() is not None, reason="there are no kernels here")


def loaded(word: str, compile: Any) -> Any:  # noqa: A002 - the option's name
    """Load a tiny Marian, whose output layer, encoder and decoder have one weight."""
    task: Any = checkpoints.FAMILIES["marian"].task
    return lmkit.load(task, str(checkpoints.folder("marian")), word, "cpu", compile=compile)


@pytest.mark.parametrize("word", ["int8", "int4"])
def test_scores_are_those_of_the_weight_but_for_rounding(word: str) -> None:
    """The copy's scores lie within a hundredth of the weight's, and are not the very same."""
    head = loaded(word, "kernels").model.get_output_embeddings()
    rows = torch.randn(40, head.in_features, generator=torch.Generator().manual_seed(0)).to(head.weight.dtype)
    exact = rows.double() @ head.weight.detach().double().T
    with torch.no_grad():
        off = float((head(rows).double() - exact).norm() / exact.norm())
    assert 1e-4 < off < 0.01 + 2**-8


def test_the_weight_stays_the_embeddings_and_is_what_is_saved() -> None:
    """The state is the one without kernels; a weight that is replaced is what multiplies from then on."""
    plain, quick = (loaded("int8", how).model for how in (False, "kernels"))
    states = plain.state_dict(), quick.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    head = quick.get_output_embeddings()
    assert head.weight is quick.get_input_embeddings().weight
    head.weight = torch.nn.Parameter(torch.zeros_like(head.weight), requires_grad=False)
    with torch.no_grad():
        assert not head(torch.ones(1, head.in_features, dtype=head.weight.dtype)).any()


def test_the_plan_counts_the_copy() -> None:
    """The plan says how many bytes the copy takes, a byte for each number."""
    wrapper = loaded("int8", "kernels")
    assert "is held in 8 bits as well" in wrapper.plan.reasons["kernels"]
    assert "held in 8 bits" not in loaded("int8", compile=False).plan.reasons.get("kernels", "")


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # inductor's imports
def test_a_compiled_step_multiplies_by_the_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiled step's scores are those of the step that is not compiled; by the weight they are others."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = loaded("int8", "kernels").model
    with torch.no_grad():
        step = CompiledDecoderStep(model)
        del step._sample  # each try goes on behind it
        found, expected = step._tried()
        del step._sample, model.get_output_embeddings().forward
        by_weight = step._tried()[1]
    off, else_off = (float((one - expected).norm() / expected.norm()) for one in (found, by_weight))
    assert off < else_off / 4
