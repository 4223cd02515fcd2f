"""Plans for published models at their published sizes. `published.py` is the reference: no number here is lmkit's."""

import atexit
import functools
import json
import math
import shutil
import struct
import tempfile
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import pytest
import torch
from safetensors import safe_open
from transformers.integrations.accelerate import get_balanced_memory

import lmkit
import published
from lmkit.engine.scheduler import Scheduler
from lmkit.planning import weight_names
from lmkit.planning.skeleton import Skeleton
from published import BUDGETS, PUBLISHED, Published

GIB = 2**30
GB = 10**9
ROOT = Path(tempfile.mkdtemp(prefix="lmkit-published-"))
atexit.register(shutil.rmtree, ROOT, ignore_errors=True)

EVERY = pytest.mark.parametrize("entry", PUBLISHED, ids=str)
NAMED = {str(entry): entry for entry in PUBLISHED}
HEAVY = {"Meta-Llama-3-70B", "Qwen3-30B-A3B", "DeepSeek-V2-Lite", "Jamba-v0.1", "Qwen3-Next-80B-A3B-Instruct"}
EVERY_QUANTIZED = pytest.mark.parametrize(
    "entry",
    [pytest.param(entry, id=str(entry), marks=pytest.mark.slow if str(entry) in HEAVY else ()) for entry in PUBLISHED],
)
"""Some models have so many parts that it takes seconds to put quantized ones into their places."""
ROOMY = {"cpu": "1TiB"}
ROOMY_GPU = {"cuda:0": "1TiB"}


@pytest.fixture(autouse=True)
def _what_machines_do_not_change_is_done_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the names of a file, and try the model of each dtype, with the first plan that does, not with each.

    transformers itself copies its rules for each tensor to do so: 10 seconds for the 74,000 of Qwen3-Next. What a model
    keeps, which a forward pass shows, takes three quarters of the time of a plan.
    """
    tried = Skeleton._tried

    def check_names(skeleton: Any, *arguments: Any) -> None:
        if (file := (arguments[-1], type(skeleton.model))) not in _CHECKED:
            weight_names.check_names(skeleton, *arguments)
            _CHECKED.add(file)

    def try_once(skeleton: Any, *, looks: bool) -> Any:
        case = (skeleton._case.source.name, type(skeleton.model), skeleton.model.dtype, looks)
        if case not in _TRIED:
            _TRIED[case] = tried(skeleton, looks=looks)
        return _TRIED[case]

    monkeypatch.setattr("lmkit.planning.make.check_names", check_names)
    monkeypatch.setattr(Skeleton, "_tried", try_once)


_CHECKED: set[tuple[str, type]] = set()
_TRIED: dict[tuple[Any, ...], Any] = {}


@functools.cache
def folder(entry: Published) -> Path:
    """Write an entry's checkpoint once."""
    return published.write(entry, ROOT / str(entry))


def plan(entry: Published, precision: str, devices: Mapping[str, str]) -> Any:
    """Plan to load an entry; the same plan is made once."""
    return _plan(entry, precision, tuple(devices.items()))


@functools.cache
def _plan(entry: Published, precision: str, devices: tuple[tuple[str, str], ...]) -> Any:
    return lmkit.plan(entry.task, str(folder(entry)), precision, dict(devices))


def budget_bytes(devices: Mapping[str, str]) -> dict[str, int]:
    """Turn the budgets of these tests, all in GiB or TiB, into bytes."""
    return {device: int(text[:-3]) * {"G": GIB, "T": 1024 * GIB}[text[-3]] for device, text in devices.items()}


def where(name: str, device_map: Mapping[str, Any]) -> Any:
    """Return the device of a parameter: that of the longest name in the map which it is or which it is in."""
    while name not in device_map:
        assert name, f"the map names no place for it: {device_map}"
        name = name.rpartition(".")[0]
    return device_map[name]


def blocks(entry: Published) -> dict[str, list[str]]:
    """Return the names of the parameters in each block that transformers never divides."""
    model = published.meta_model(entry)
    return {
        name: [f"{name}.{inner}" for inner, _ in module.named_parameters()]
        for name, module in model.named_modules()
        if type(module).__name__ in (model._no_split_modules or ())
    }


# The entries ------------------------------------------------------------------------------------


@EVERY
def test_an_entry_is_the_model_of_its_published_count(entry: Published) -> None:
    """What transformers builds from the config has the published parameters, and the file the published numbers."""
    model = published.meta_model(entry)
    own = sum(model.get_parameter(name).numel() for name in entry.untied)
    assert sum(parameter.numel() for parameter in model.parameters()) + own == entry.parameters
    held = sum(math.prod(shape) for _, shape in published.tensors(entry).values())
    assert held == (entry.stored or entry.parameters)


@EVERY
def test_an_entry_is_written_whole_and_takes_no_disk(entry: Published) -> None:
    """Safetensors reads every header; the files are as long as all weights, and hold blocks for the headers only."""
    files = sorted(folder(entry).glob("*.safetensors"))
    names: set[str] = set()
    headers = 0
    for file in files:
        with safe_open(file, framework="pt") as opened:
            names |= {*opened.keys()}
        with file.open("rb") as raw:
            headers += 8 + struct.unpack("<Q", raw.read(8))[0]
    assert names == {*published.tensors(entry)}
    total = sum(map(published.size, published.tensors(entry).values()))
    assert sum(file.stat().st_size for file in files) == headers + total
    assert sum(file.stat().st_blocks * 512 for file in files) < headers + 2**16 * len(files)
    if len(files) > 1:
        index = json.loads((folder(entry) / "model.safetensors.index.json").read_text(encoding="utf-8"))
        assert index["metadata"]["total_size"] == total
        assert {*index["weight_map"].values()} == {file.name for file in files}


CACHED = [entry for entry in published.CAUSAL if entry.kv_bytes_per_token] + [NAMED["flan-t5-xl"], NAMED["t5-3b"]]


@pytest.mark.parametrize("entry", CACHED, ids=str)
def test_an_entry_s_cache_grows_as_transformers_lets_it_grow(entry: Published) -> None:
    """The numbers written down by hand are what a forward pass on the meta device leaves in the cache."""
    one, two = (cache_numbers(entry, length) for length in (1, 2))
    assert two[0] - one[0] == entry.kv_bytes_per_token / 2
    assert two[1] - one[1] == entry.cross_bytes_per_token / 2


def cache_numbers(entry: Published, length: int) -> tuple[int, int]:
    """Count the keys and values of that many tokens: those of the text, and those of an encoder's output."""
    ids = torch.zeros(1, length, dtype=torch.long, device="meta")
    more = {"decoder_input_ids": ids} if entry.task == "seq2seq" else {}
    with torch.no_grad():
        kept = published.meta_model(entry)(input_ids=ids, use_cache=True, **more)["past_key_values"]
    if entry.task == "seq2seq":
        return numbers(kept.self_attention_cache.layers), numbers(kept.cross_attention_cache.layers)
    return numbers(kept.layers), 0


def numbers(layers: Iterable[Any]) -> int:
    """Count the keys and values of the layers that have some; a recurrent one has a state instead."""
    with_keys = [layer for layer in layers if getattr(layer, "keys", None) is not None]
    return sum(layer.keys.numel() + layer.values.numel() for layer in with_keys)


# Sizes ------------------------------------------------------------------------------------------


@EVERY
def test_a_plan_counts_the_published_parameters(entry: Published) -> None:
    """The count is the published one to the last parameter, whatever else the file holds or holds twice."""
    made = plan(entry, "bfloat16", ROOMY)
    assert made.parameters == entry.parameters
    assert (made.task, made.name) == (entry.task, str(folder(entry)))
    assert made.architecture == entry.config.get("architectures", [entry.config["model_type"]])[0]
    assert made.model_class == type(published.meta_model(entry)).__name__
    assert made.context_length == entry.context_length


@pytest.mark.parametrize("precision, width", [("float32", 4), ("bfloat16", 2), ("float16", 2)])
@EVERY
def test_a_plan_s_bytes_are_those_of_the_file_in_the_precision(entry: Published, precision: str, width: int) -> None:
    """Each number of the file that the model has takes the precision's width; T5 keeps some float32 in float16."""
    made = plan(entry, precision, ROOMY)
    kept = entry.kept_float32 if precision == "float16" else 0
    assert made.weights_bytes == file_numbers(entry) * width + kept * 2
    assert sum(module.bytes for module in made.modules) == made.weights_bytes


def file_numbers(entry: Published) -> int:
    """Count the numbers in the headers, less what the model does not have, and what it has only once."""
    left_out = {*entry.extra, *entry.repeated}
    headers = {name: shape for name, (_, shape) in published.tensors(entry).items() if name not in left_out}
    absent = [published.meta_model(entry).get_buffer(name).shape for name in entry.absent]
    return sum(map(math.prod, [*headers.values(), *absent]))


BANDS = [
    # In GB: half a byte or one per weight of a linear layer, a little for scales, two bytes for the rest. Of Llama-3
    # 8B the rest are two embeddings of 0.53 billion, 2.1 GB; 6.98 billion weights are in linear layers.
    ("Meta-Llama-3-8B", "int4", 4.5, 6.5),
    ("Meta-Llama-3-8B", "nf4", 4.5, 6.5),
    ("Meta-Llama-3-8B", "int8", 8.5, 10.0),
    ("Meta-Llama-3-70B", "int4", 36, 43),  # 68.5 billion, and 2.1 in embeddings
    ("Meta-Llama-3-70B", "int8", 70, 75),
    ("Llama-3.2-1B", "int4", 0.9, 1.2),  # 0.97 billion, and 0.26 in the one embedding
    ("Llama-3.2-1B", "int8", 1.4, 1.7),
    ("SmolLM2-135M", "int4", 0.10, 0.14),  # 0.106 billion, and 0.028
    ("Mistral-7B-v0.1", "int4", 3.6, 4.8),  # 7.0 billion, and 0.26
    ("Mistral-7B-v0.1", "int8", 7.2, 8.0),
    ("gemma-2-9b-it", "int4", 5.5, 7.0),  # 8.3 billion, and 0.92
    ("gemma-2-9b-it", "int8", 9.8, 11.0),
    ("Phi-3-mini-4k-instruct", "int4", 2.0, 2.8),  # 3.6 billion, and 0.2
    ("Qwen2.5-7B-Instruct", "int4", 5.0, 6.5),  # 6.5 billion, and 1.09
    ("nllb-200-distilled-600M", "int4", 0.55, 1.5),  # 0.35 billion, and 0.26, which may stay in float32
]


@pytest.mark.parametrize("name, precision, low, high", BANDS)
def test_quantized_weights_take_what_their_bits_say(name: str, precision: str, low: float, high: float) -> None:
    """Eight bits take half of bfloat16 and four a quarter, for the linear layers; the embeddings stay."""
    assert low * GB < plan(NAMED[name], precision, ROOMY_GPU).weights_bytes < high * GB


@EVERY_QUANTIZED
def test_fewer_bits_take_fewer_bytes(entry: Published) -> None:
    """On a GPU, 4 bits take less than 8, 8 less than the file's own dtype, and nf4 is what int4 means."""
    whole = plan(entry, "auto", ROOMY_GPU)
    eight, four, nf4 = (plan(entry, word, ROOMY_GPU) for word in ("int8", "int4", "nf4"))
    assert four.weights_bytes < eight.weights_bytes < whole.weights_bytes
    assert nf4.weights_bytes == four.weights_bytes
    assert four.parameters == eight.parameters == entry.parameters


EXPERTS = [
    # Numbers of the experts by hand: layers with experts x experts x three matrices.
    ("Mixtral-8x7B-v0.1", 32 * 8 * 3 * 4096 * 14336),
    ("Qwen3-30B-A3B", 48 * 128 * 3 * 2048 * 768),
    ("DeepSeek-V2-Lite", 26 * 64 * 3 * 2048 * 1408),
    ("Jamba-v0.1", 16 * 16 * 3 * 4096 * 14336),
    ("Qwen3-Next-80B-A3B-Instruct", 48 * 512 * 3 * 2048 * 512),
]


@pytest.mark.parametrize("name, numbers", EXPERTS)
def test_experts_stay_as_wide_as_they_are_on_a_gpu(name: str, numbers: int) -> None:
    """Bitsandbytes quantizes linear layers, and experts in transformers 5 are none: the plan promises no less."""
    entry = NAMED[name]
    assert 2 * numbers < plan(entry, "int4", ROOMY_GPU).weights_bytes < 2 * entry.parameters


# Keys and values --------------------------------------------------------------------------------


@EVERY
def test_a_plan_knows_what_a_token_adds_to_the_cache(entry: Published) -> None:
    """Keys and values per token are those worked out by hand, and twice as many bytes in float32."""
    narrow, wide = (plan(entry, word, ROOMY).kv_bytes_per_token for word in ("bfloat16", "float32"))
    assert narrow == entry.kv_bytes_per_token
    assert wide == (None if narrow is None else 2 * narrow)


@EVERY
def test_the_engine_s_budget_is_the_plan_s(entry: Published) -> None:
    """What the engine counts for a row is what the plan says, and one more token is what was worked out by hand."""
    found = plan(entry, "bfloat16", ROOMY)
    seq2seq = entry.task == "seq2seq"
    model = SimpleNamespace(config=SimpleNamespace(is_encoder_decoder=seq2seq), device=torch.device("cpu"))
    scheduler = Scheduler(model, found.key_values)

    def row(source: int, answer: int) -> Any:
        config = SimpleNamespace(max_new_tokens=answer)
        return SimpleNamespace(request=SimpleNamespace(input_ids=(0,) * source, config=config), width=1)

    counted = [scheduler.bytes_for(row(source, answer)) for source, answer in ((7, 3), (7, 4), (8, 3))]
    if found.key_values is None:
        assert counted == [0, 0, 0]
        return
    assert counted[0] == (found.key_values.of(3, 7) if seq2seq else found.key_values.of(10))
    assert counted[1] - counted[0] == entry.kv_bytes_per_token
    assert counted[2] - counted[0] == (entry.cross_bytes_per_token if seq2seq else entry.kv_bytes_per_token)


ROWS = [
    # What is left of the budget, in whole rows of 8192 tokens; a plan may keep some of it free. Where every layer has a
    # window, transformers keeps the newest tokens only, one less than the window: the next one completes it.
    ("Meta-Llama-3-8B", "24GiB", (24 * GIB - 16_060_522_496) // (8192 * 131072)),
    ("Meta-Llama-3-8B", "80GiB", (80 * GIB - 16_060_522_496) // (8192 * 131072)),
    ("Mistral-7B-v0.1", "24GiB", (24 * GIB - 14_483_464_192) // (4095 * 131072)),
    ("Qwen2.5-7B-Instruct", "24GiB", (24 * GIB - 15_231_233_024) // (8192 * 57344)),
    ("Phi-3-mini-4k-instruct", "80GiB", (80 * GIB - 7_642_159_104) // (2046 * 393216)),
]


@pytest.mark.parametrize("name, machine, most", ROWS)
def test_as_many_rows_fit_as_the_rest_of_the_memory_holds(name: str, machine: str, most: int) -> None:
    """Rows of 8192 tokens are at most what the rest of the budget holds, and at least half of it."""
    assert most / 2 <= plan(NAMED[name], "bfloat16", BUDGETS[machine]).max_rows(8192) <= most


@pytest.mark.parametrize("machine", BUDGETS)
@pytest.mark.parametrize("entry", CACHED, ids=str)
def test_longer_rows_are_fewer(entry: Published, machine: str) -> None:
    """Never do more rows fit when each is longer; none does where the weights do not fit."""
    made = plan(entry, "bfloat16", BUDGETS[machine])
    rows = [made.max_rows(tokens) for tokens in (1, 16, 128, 1024)]
    assert all(more >= fewer >= 0 for more, fewer in pairwise(rows))
    if made.fits:
        assert rows[0] > rows[-1]
    else:
        assert rows == [0] * 4


# Devices ----------------------------------------------------------------------------------------


@EVERY
def test_a_plan_says_what_fits(entry: Published) -> None:
    """On one GPU of 24 GiB, one and two of 80, and 64 GiB without any, what fits is what was worked out by hand."""
    assert what_fits(entry, "bfloat16", entry.fits_bfloat16) == entry.fits_bfloat16


@EVERY_QUANTIZED
def test_a_plan_says_what_fits_in_four_bits(entry: Published) -> None:
    """The same in 4 bits, of which a mixture of experts gains little."""
    assert what_fits(entry, "int4", entry.fits_int4) == entry.fits_int4


def what_fits(entry: Published, precision: str, machines: Iterable[str]) -> dict[str, bool]:
    """Say for each machine whether the plan's weights fit."""
    return {machine: plan(entry, precision, BUDGETS[machine]).fits for machine in machines}


FITTING = [
    pytest.param(entry, machine, id=f"{entry}-{machine}")
    for entry in PUBLISHED
    for machine, fits in entry.fits_bfloat16.items()
    if fits
]


@pytest.mark.parametrize("entry, machine", FITTING)
def test_what_fits_is_within_every_budget(entry: Published, machine: str) -> None:
    """The bytes per device are all the weights, no device has more than its budget, and the modules say the same."""
    made = plan(entry, "bfloat16", BUDGETS[machine])
    budgets = budget_bytes(BUDGETS[machine])
    assert sum(made.bytes_per_device.values()) == made.weights_bytes
    assert {*made.bytes_per_device} <= {*budgets}
    assert all(taken <= budgets[device] for device, taken in made.bytes_per_device.items())
    per_device = dict.fromkeys(made.bytes_per_device, 0)
    for module in made.modules:
        per_device[module.device] += module.bytes
    assert per_device == dict(made.bytes_per_device)


@pytest.mark.parametrize("entry, machine", FITTING)
def test_a_block_is_on_one_device(entry: Published, machine: str) -> None:
    """No block that has a residual connection is divided, and every parameter has a place."""
    made = plan(entry, "bfloat16", BUDGETS[machine])
    for name, parameters in blocks(entry).items():
        assert len({where(parameter, made.device_map) for parameter in parameters}) == 1, name
    everything = {where(name, made.device_map) for name in published.meta_model(entry).state_dict()}
    assert everything == {*made.bytes_per_device}


@pytest.mark.parametrize("name", ["Meta-Llama-3-70B", "Mixtral-8x7B-v0.1", "Jamba-v0.1", "Qwen3-Next-80B-A3B-Instruct"])
def test_what_is_too_big_for_one_gpu_is_split_over_both(name: str) -> None:
    """Each of two GPUs gets its part of a model that neither holds alone."""
    made = plan(NAMED[name], "bfloat16", BUDGETS["2x80GiB"])
    assert {*made.bytes_per_device} == {"cuda:0", "cuda:1"}
    assert min(made.bytes_per_device.values()) > made.weights_bytes / 4


# Accelerate's own answer ------------------------------------------------------------------------

MACHINES: list[Mapping[str, str]] = [
    {"cuda:0": "80GiB", "cuda:1": "80GiB"},
    {"cuda:0": "10GiB", "cuda:1": "16GiB"},
    {"cuda:0": "6GiB", "cuda:1": "8GiB", "cuda:2": "24GiB"},
    {"cuda:0": "48GiB", "cuda:1": "80GiB", "cuda:2": "80GiB"},
]
PLACED = [
    ("Meta-Llama-3-8B", 0),
    ("Meta-Llama-3-8B", 1),
    ("Meta-Llama-3-8B", 2),
    ("Meta-Llama-3-70B", 0),
    ("Meta-Llama-3-70B", 3),
    ("Mixtral-8x7B-v0.1", 0),
    ("Mixtral-8x7B-v0.1", 3),
    ("gemma-2-9b-it", 1),
    ("gemma-2-9b-it", 2),
    ("Phi-3-mini-4k-instruct", 2),
    ("DeepSeek-V2-Lite", 3),
    ("Jamba-v0.1", 0),
]


@pytest.mark.parametrize("name, machine", PLACED)
def test_the_parts_go_where_accelerate_puts_them(name: str, machine: int) -> None:
    """On GPUs of different budgets each parameter is on the device which accelerate chooses for it."""
    entry, devices = NAMED[name], MACHINES[machine]
    model = published.meta_model(entry)
    ours, theirs = plan(entry, "bfloat16", devices).device_map, accelerate_map(model, devices)
    for parameter, _ in model.named_parameters():
        assert where(parameter, ours) == f"cuda:{where(parameter, theirs)}", parameter


def accelerate_map(model: Any, devices: Mapping[str, str]) -> dict[str, Any]:
    """Divide a model by accelerate, among budgets balanced as transformers does for device_map="auto"."""
    whole = sorted(model._no_split_modules)
    budgets = {int(device.removeprefix("cuda:")): taken for device, taken in budget_bytes(devices).items()}
    balanced = get_balanced_memory(model, budgets, no_split_module_classes=whole)
    return dict(accelerate.infer_auto_device_map(model, balanced, no_split_module_classes=whole))
