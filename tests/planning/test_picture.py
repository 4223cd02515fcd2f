import json
import re
from typing import Any

import pytest

import checkpoints
import lmkit
from html_page import Page
from lmkit.planning.placement import Placement

HOSTILE = "<script>alert('1')</script>\"&"
EVERY = ["llama", "gemma2", "mamba", "t5", "bart", "bert"]


def of(name: str, devices: Any = None, **options: Any) -> lmkit.LoadPlan:
    """Plan to load a family's tiny checkpoint."""
    plan: Any = lmkit.plan
    found: lmkit.LoadPlan = plan(
        checkpoints.FAMILIES[name].task, checkpoints.folder(name), "float32", devices or {"cpu": "1GiB"}, **options
    )
    return found


def drawn(plan: lmkit.LoadPlan) -> Page:
    """Draw a plan and read the picture."""
    page = Page(plan._repr_html_())
    assert page.open == []
    return page


# As text ------------------------------------------------------------------------------------------


def test_a_plan_is_a_table() -> None:
    """A line for each fact, the names in a column of their own, then a line per device with its parts."""
    plan = of("llama")
    lines = dict(re.split(r"  +", line, maxsplit=1) for line in str(plan).splitlines())
    assert lines["name"] == plan.name
    assert lines["model"] == f"LlamaForCausalLM, {plan.parameters:,} parameters, for 'causal'"
    assert lines["precision"] == f"float32, {plan.weights_bytes / 1000:.1f} kB of weights"
    assert lines["context"] == "128 tokens"
    row = plan.kv_bytes_per_token or 0
    rows = (2**30 - plan.weights_bytes) // (128 * row)
    assert lines["keys and values"] == (
        f"{row} bytes a token; a row of 128 tokens takes {128 * row / 1000:.1f} kB, and {rows:,} fit"
    )
    assert lines["fits"] == "yes"
    assert lines["why: precision"] == plan.reasons["precision"]
    assert lines["cpu"] == (
        f"{plan.weights_bytes / 1000:.1f} kB of 1.1 GB: model.embed_tokens, model.layers.0-1, model.norm, lm_head"
    )
    starts = {re.split(r"  +", line)[0].ljust(20) for line in str(plan).splitlines()}
    assert len(starts) == len(str(plan).splitlines())


@pytest.mark.parametrize("name", EVERY)
def test_every_kind_of_model_has_a_table(name: str) -> None:
    """Models of each task, bounded or not, with keys and values or without, are written with every reason."""
    plan = of(name)
    shown = str(plan)
    assert ("keys and values" in shown) == (plan.key_values is not None)
    assert ("not bounded" in shown) == (plan.context_length is None)
    for what, reason in plan.reasons.items():
        assert re.search(rf"^why: {what} +{re.escape(reason)}$", shown, re.MULTILINE)


def test_what_does_not_fit_is_loud() -> None:
    """A plan that does not fit says NO, why, and no number of rows."""
    shown = str(of("llama", {"cpu": 1000}))
    assert re.search(r"^fits +NO$", shown, re.MULTILINE)
    assert re.search(r"^why: fits +cpu has room for 1\.0 kB", shown, re.MULTILINE)
    assert ", and " not in next(line for line in shown.splitlines() if line.startswith("keys and values"))


def test_each_device_has_a_line() -> None:
    """Parts on several devices are told per device, the disk without a limit."""
    where = {"": "cuda:0", "model.layers.1": "cpu", "lm_head": "disk"}
    shown = str(of("llama", Placement(where, {"cuda:0": "24GiB", "cpu": "1GiB"}, "off/")))
    assert re.search(
        r"^cuda:0 +\S+ kB of 25\.8 GB: model\.embed_tokens, model\.layers\.0, model\.norm$", shown, re.MULTILINE
    )
    assert re.search(r"^cpu +\S+ kB of 1\.1 GB: model\.layers\.1$", shown, re.MULTILINE)
    assert re.search(r"^disk +\S+ kB: lm_head$", shown, re.MULTILINE)


# As a picture -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_a_picture_shows_every_part_and_every_fact(name: str) -> None:
    """The picture is balanced HTML with a block per part, named with its bytes, and the table's facts."""
    plan = of(name)
    page = drawn(plan)
    titles = [found["title"] for found in page.attributes if "title" in found]
    assert len(titles) == len(plan.modules)
    for module, title in zip(plan.modules, titles, strict=True):
        assert title is not None
        assert title.startswith(f"{module.name}: {module.dtype}, ")
    for fact in (plan.name, *plan.reasons.values()):
        assert fact in page.texts
    assert {*page.tags} == {"div"}


def test_bars_are_as_long_as_their_budgets() -> None:
    """The device with the largest budget has the longest bar, and blocks fill as much of it as their bytes do."""
    where = {"": "cuda:0", "model.layers.1": "cpu", "lm_head": "cpu", "model.norm": "cpu"}
    plan = of("llama", Placement(where, {"cuda:0": 10**6, "cpu": 2 * 10**6}))
    styles = [found["style"] or "" for found in drawn(plan).attributes if "style" in found]
    bars = [float(found[1]) for style in styles if (found := re.search(r"flex;width:([\d.]+)%", style))]
    assert bars == [50.0, 100.0]
    blocks = [float(found[1]) for style in styles if (found := re.match(r"width:([\d.]+)%", style))]
    order = [module for device in ("cuda:0", "cpu") for module in plan.modules if module.device == device]
    limits = {"cuda:0": 10**6, "cpu": 2 * 10**6}
    assert blocks == [pytest.approx(100 * one.bytes / limits[one.device], abs=1e-3) for one in order]


@pytest.mark.parametrize("devices", [{"cpu": 0}, {"cpu": 1000}, {"cuda:0": 0, "cpu": 0}], ids=str)
def test_what_fits_nowhere_is_drawn_too(devices: Any) -> None:
    """A picture of a plan that does not fit is one, even of devices without any memory."""
    plan = of("llama", devices)
    assert plan.reasons["fits"] in drawn(plan).texts


def test_hostile_names_are_escaped(tmp_path: Any) -> None:
    """A folder's name that is HTML is shown as it is written, and is no element of the picture."""
    folder = tmp_path / HOSTILE.replace("/", "|")
    folder.symlink_to(checkpoints.folder("llama"))
    plan = lmkit.plan("causal", folder, "float32", {"cpu": "1GiB"})
    page = drawn(plan)
    assert "script" not in page.tags
    assert "<script" not in plan._repr_html_()
    assert str(folder) in page.texts


def test_hostile_reasons_and_parts_are_escaped() -> None:
    """What a caller gives as a reason is escaped as well."""
    page = drawn(of("llama", Placement({"": "cpu"}, {"cpu": "1GiB"}, reason=HOSTILE)))
    assert HOSTILE in page.texts
    assert "script" not in page.tags


# As JSON ------------------------------------------------------------------------------------------


def private(value: Any) -> list[str]:
    """Return the keys that begin with an underscore, at any depth."""
    if isinstance(value, dict):
        return [key for key in value if key.startswith("_")] + [one for part in value.values() for one in private(part)]
    return [one for part in value for one in private(part)] if isinstance(value, list) else []


@pytest.mark.parametrize("name", EVERY)
def test_a_plan_is_json(name: str) -> None:
    """`to_dict()` is what JSON writes and reads again, has no private fields, and the sums a reader wants."""
    plan = of(name)
    plain = plan.to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert private(plain) == []
    assert plain["task"] == plan.task
    assert plain["parameters"] == plan.parameters
    assert plain["precision"]["name"] == "float32"
    assert plain["device_map"] == {"": "cpu"}
    assert plain["modules"] == [
        {"name": one.name, "device": one.device, "dtype": one.dtype, "bytes": one.bytes} for one in plan.modules
    ]
    assert plain["fits"] is True
    assert plain["reasons"] == dict(plan.reasons)


@pytest.mark.parametrize("name", ["weights_bytes", "bytes_per_device", "kv_bytes_per_token"])
def test_json_has_what_a_plan_computes(name: str) -> None:
    """What a plan sums up is in its JSON too: a reader of it has no methods."""
    plan = of("llama")
    assert plan.to_dict()[name] == getattr(plan, name)


@pytest.mark.parametrize("word", ["int8", "int4", "nf4"])
def test_a_quantized_plan_is_json(word: str) -> None:
    """A quantization config is written by its own settings, a dtype by its name."""
    plan: Any = lmkit.plan
    plain = plan("causal", checkpoints.folder("llama"), word, {"cpu": "1GiB"}).to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["precision"]["name"] == word
    assert plain["precision"]["dtype"] in ("float32", "torch.float32")
    assert private(plain) == []
