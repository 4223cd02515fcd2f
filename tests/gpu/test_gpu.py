"""What only a card can tell: each test is one of what was read or counted without one, to be true or false on it.

Run by `nox -s gpu`, or where nox is not, by `python benchmarks/gpu.py`. Nothing here has run on a card so far.
"""

import gc
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import checkpoints
import lmkit
from checkpoints import texts
from lmkit.planning.machine import memory

pytestmark = pytest.mark.gpu
hf: Any = transformers
FAMILIES = [*checkpoints.CAUSAL, *checkpoints.SEQ2SEQ]
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 0.8, "top_p": 0.9, "top_k": 40, "seed": 7},
    "penalties": {"repetition_penalty": 1.2, "frequency_penalty": 0.3},
    "logprobs": {"logprobs": 5},
}


def on_card(name: str, precision: str = "float32", **options: Any) -> Any:
    """Load a family's tiny checkpoint on the card."""
    where = str(checkpoints.folder(name))
    return lmkit.load(checkpoints.FAMILIES[name].task, where, precision, "cuda", **options)


@pytest.fixture
def llama() -> Iterator[Any]:
    """Have a model that the test may spoil."""
    with on_card("llama") as loaded:
        yield loaded


@pytest.mark.parametrize("name", FAMILIES)
def test_families_have_the_tokens_of_generate(name: str) -> None:
    """In float32 on the card, alone and in a batch of several lengths, rows have the tokens of generate on a CPU."""
    told = checkpoints.languages(name)
    expected = [checkpoints.generated(name, [text], max_new_tokens=8)[0] for text in texts(name)]
    with on_card(name) as loaded:
        assert [list(one.token_ids) for one in loaded(texts(name), max_new_tokens=8, **told)] == expected
        assert list(loaded(texts(name)[0], max_new_tokens=8, **told).token_ids) == expected[0]


def test_compiled_steps_are_replayed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """T6: compiled steps of rows that end one after another are recorded as CUDA graphs, and have generate's tokens."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    prompts, budgets = texts("llama"), [8, 24, 16, 24, 12]
    with on_card("llama", compile=True) as loaded:
        found = loaded(prompts, max_new_tokens=budgets[: len(prompts)])
    for prompt, budget, one in zip(prompts, budgets, found, strict=False):
        assert list(one.token_ids) == checkpoints.generated("llama", [prompt], max_new_tokens=budget)[0]
    assert "CUDA graphs" not in caplog.text


@pytest.mark.parametrize("way", WAYS)
def test_choice_is_the_cpus(llama: Any, way: str) -> None:
    """T3: whatever the options, the card chooses as a CPU does."""
    expected = checkpoints.wrapper("llama")(texts("llama"), max_new_tokens=12, **WAYS[way])
    found = llama(texts("llama"), max_new_tokens=12, **WAYS[way])
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]


@pytest.mark.filterwarnings("always")
@pytest.mark.parametrize("way", WAYS)
def test_a_step_waits_once(llama: Any, way: str, recwarn: pytest.WarningsRecorder) -> None:
    """T5: torch warns of each synchronization; those of a run of 40 tokens are 20 more than those of 20."""
    waits = []
    for budget in (20, 20, 40):  # the first warms up
        recwarn.clear()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            llama(texts("llama"), max_new_tokens=budget, min_new_tokens=budget, **WAYS[way])
        finally:
            torch.cuda.set_sync_debug_mode("default")
        waits.append(sum("synchroniz" in str(one.message) for one in recwarn))
    assert waits[2] - waits[1] <= 20, waits


def test_memory_comes_back(llama: Any) -> None:
    """T7: what a model and its batches held is free again for others once it is closed, and a plan sees all of it."""
    del llama
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.mem_get_info()[0]
    loaded = on_card("llama", "bfloat16")
    loaded(texts("llama") * 20, max_new_tokens=64)
    assert memory(torch.device("cuda", 0))[0] > torch.cuda.mem_get_info()[0]
    loaded.close()
    assert before - torch.cuda.mem_get_info()[0] < 64 * 2**20  # handles of libraries stay
    assert torch.cuda.memory_allocated() < 2**20


def test_kept_blocks_do_not_shrink_batches(llama: Any) -> None:
    """T8: after rows of thousands of tokens the next call may take as much memory as the first."""
    before, _ = memory(torch.device("cuda", 0))
    llama(texts("llama") * 64, max_new_tokens=200)
    kept = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    assert kept > 2**20
    assert before - memory(torch.device("cuda", 0))[0] < kept


def test_no_row_is_lost_where_memory_ends(llama: Any) -> None:
    """T9: with a small part of the card rows run in fewer at a time; an error that is kept keeps no memory."""
    prompts = texts("llama") * 8
    expected = [one.token_ids for one in llama(prompts, max_new_tokens=16)]
    held = torch.cuda.memory_reserved()
    torch.cuda.set_per_process_memory_fraction((held + 2**21) / torch.cuda.mem_get_info()[1])
    try:
        found = llama(prompts, max_new_tokens=16)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert [one.token_ids for one in found] == expected


def test_unknown_tokens_never_reach_the_card(llama: Any) -> None:
    """T10: a token beyond the embeddings is refused, and the next call has its answer."""
    with pytest.raises(lmkit.OptionError):
        llama([llama.model.config.vocab_size], max_new_tokens=2)
    assert llama(texts("llama")[0], max_new_tokens=2).generated_tokens


def test_streams_of_callers_change_nothing(llama: Any) -> None:
    """T2 and T11: threads that set streams of their own get what single calls get, 60 short calls each."""
    prompts = texts("llama")
    expected = [llama(prompt, max_new_tokens=5).token_ids for prompt in prompts]
    wrong: list[Any] = []

    def call(number: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for turn in range(60):
                place = (number + turn) % len(prompts)
                if llama(prompts[place], max_new_tokens=5).token_ids != expected[place]:
                    wrong.append((number, turn))

    threads = [threading.Thread(target=call, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("inputs, outputs", [(256, 48), (4096, 1024)])
@pytest.mark.parametrize("bits", [4, 8])
def test_integer_kernels_are_right(bits: int, inputs: int, outputs: int) -> None:
    """T13: products in 4 and 8 bits are those of the widened weight, of few rows and many; it is saved as loaded."""
    from lmkit.kernels.quantized import Int4Linear, Int8Linear
    from quantized_layers import filled, numbers, widened

    kind: Any = Int4Linear if bits == 4 else Int8Linear
    plain = filled(kind, numbers(outputs, inputs), torch.bfloat16, packed=False)
    weight, _ = widened(plain.state_dict())
    layer = filled(kind, numbers(outputs, inputs), torch.bfloat16, packed=False).cuda()
    layer.pack()
    for rows in (1, 16, 200):
        given = numbers(rows, inputs, seed=rows).to(torch.bfloat16)
        expected = given.double() @ weight.T
        assert torch.allclose(layer(given.cuda()).cpu().double(), expected, rtol=0.02, atol=0.02 * inputs**0.5)
    for name, value in layer.state_dict().items():
        assert torch.equal(value.cpu(), plain.state_dict()[name])


def test_a_failed_assertion_ends_the_engine() -> None:
    """An error that leaves the device unusable is told as such: in a process of its own, which it ends."""
    import subprocess
    import sys

    program = f"""
import torch, lmkit
model = lmkit.load("causal", {str(checkpoints.folder("llama"))!r}, "float32", "cuda")
model.model.model.embed_tokens.register_forward_pre_hook(lambda module, args: (args[0] + 10**6,))
for _ in range(2):
    try:
        model("She", max_new_tokens=2)
    except lmkit.EngineError as error:
        assert "restart the process" in str(error), error
        print("told")
"""
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True)
    assert done.stdout.count("told") == 2, done.stderr[-2000:]


def test_plans_count_what_the_card_holds() -> None:
    """The bytes of a plan are those that the card allocates, within 2% and its rounding to blocks."""
    gc.collect()
    before = torch.cuda.memory_allocated()
    with on_card("llama", "bfloat16") as loaded:
        tensors = len(list(loaded.model.parameters()))
        held = torch.cuda.memory_allocated() - before
        assert held <= loaded.plan.weights_bytes * 1.02 + 512 * (tensors + 8)
