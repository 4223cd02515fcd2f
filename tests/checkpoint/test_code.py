import contextlib
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import checkpoints
import lmkit
from lmkit.checkpoint.code import check_adapter_code, check_code

STUB = """
import pathlib
class Stub:
    INFERENCE = TRAINING = ALL = None
    def __init__(self, *args, **named): pass
def __getattr__(name):
    if name.startswith("__"): raise AttributeError(name)
    return Stub
def noted(*args, **named):
    with pathlib.Path(__file__).with_name("calls").open("a") as file: file.write(repr(args) + "\\n")
    raise RuntimeError("a stub")
get_kernel = get_local_kernel = load_kernel = kernelize = noted
def use_kernel_forward_from_hub(name): return lambda cls: cls
def use_kernelized_func(*names): return lambda cls: cls
def register_kernel_mapping(*args, **named): pass
def replace_kernel_forward_from_hub(*args, **named): pass
"""
RUN = """
import json, sys, lmkit
from transformers.utils import is_kernels_available
assert is_kernels_available()
for folder, options in json.loads(sys.argv[1]):
    try:
        with lmkit.load("causal", folder, **{"precision": "float32", "devices": "cpu", **options}) as generator:
            print(len(generator("Level up", max_new_tokens=2).token_ids))
    except lmkit.LmkitError as error:
        print(type(error).__name__, error)
"""
REPOSITORY = "org/kernel"
NAMING: list[dict[str, Any]] = [
    {"attn_implementation": REPOSITORY},
    {"_attn_implementation": REPOSITORY},
    {"_attn_implementation_internal": REPOSITORY},
    {"attn_implementation": "kernels-community/flash-attn2@main:function"},
    {"attn_implementation": "paged|org/kernel"},
    {"attn_implementation": {"": REPOSITORY}},
    {"text_config": {"attn_implementation": REPOSITORY}},
    {"parts": [{"_attn_implementation": REPOSITORY}]},
    {"experts_implementation": REPOSITORY},
    {"_experts_implementation": {"text_config": REPOSITORY}},
]
STANDING_FOR_ONE: list[dict[str, Any]] = [
    {"attn_implementation": "flash_attention_2"},
    {"_attn_implementation": "flash_attention_3"},
    {"experts_implementation": "deepgemm"},
    {"experts_implementation": "sonicmoe"},
    *(
        {"quantization_config": {"quant_method": one}}
        for one in ("eetq", "fbgemm_fp8", "fp8", "metal", "mxfp4", "nvfp4")
    ),
]
"""What transformers fetches a kernel for where the package `kernels` is installed."""
HARMLESS: list[dict[str, Any]] = [
    {},
    {"attn_implementation": "eager"},
    {"use_kernels": True, "kernel_config": {"kernel_mapping": {"RMSNorm": "org/kernel:Norm"}}},
    {"custom_generate": REPOSITORY, "custom_pipelines": {"text-generation": {"impl": "code.Pipeline"}}},
    {"auto_map": {"AutoModelForCausalLM": "org/other--code.Model"}},
]


def configured(where: Path, content: dict[str, Any]) -> str:
    """Copy a tiny checkpoint with other values in its config."""
    shutil.copytree(checkpoints.folder("llama"), where)
    file = where / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | content), encoding="utf-8")
    return str(where)


@pytest.fixture
def stub(tmp_path: Path) -> Path:
    """Put a package in the place of `kernels` that notes what is asked of it."""
    package = tmp_path / "stub" / "kernels"
    for part, source in (("__init__.py", STUB), ("layer/__init__.py", ""), ("layer/mode.py", "class Mode: pass\n")):
        (package / part).parent.mkdir(parents=True, exist_ok=True)
        (package / part).write_text(source, encoding="utf-8")
    from transformers.utils.import_utils import KERNELS_MIN_VERSION

    about = package.parent / f"kernels-{KERNELS_MIN_VERSION}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n", encoding="utf-8"
    )
    return package


def told(stub: Path, cases: list[tuple[str, dict[str, Any]]]) -> tuple[list[str], str]:
    """Load checkpoints in a process that has the stub; return what each gives, and what was asked of the stub."""
    paths = os.pathsep.join([str(stub.parent), *filter(None, sys.path)])
    command = [sys.executable, "-c", RUN, json.dumps(cases)]
    run = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=300, check=True
    )
    assert "Failed to load" not in run.stderr, "the message of bitsandbytes that it has other code"
    calls = stub / "calls"
    return run.stdout.splitlines(), calls.read_text(encoding="utf-8") if calls.exists() else ""


def test_no_native_code_is_fetched_for_what_a_config_names(stub: Path, tmp_path: Path) -> None:
    """With `kernels` installed, a config that names native code is refused, and another asks for none."""
    configs = [*NAMING, *STANDING_FOR_ONE, *HARMLESS]
    cases: list[tuple[str, dict[str, Any]]] = [
        (configured(tmp_path / str(number), one), {}) for number, one in enumerate(configs)
    ]
    cases += [(cases[0][0], {"attn_implementation": "sdpa"})]
    # These fetch code when they are imported.
    cases += [(str(checkpoints.folder("llama")), {"precision": "nf4"}), (str(checkpoints.folder("gpt_neo")), {})]
    found, calls = told(stub, cases)
    refused = len(NAMING) + len(STANDING_FOR_ONE)
    assert all(one.startswith("WeightsError") and "trust_remote_code=True" in one for one in found[:refused])
    assert found[refused:] == ["2"] * (len(cases) - refused)
    assert calls == ""


def test_native_code_that_is_trusted_is_fetched(stub: Path, tmp_path: Path) -> None:
    """With `trust_remote_code=True` transformers asks for what a config names."""
    folder = configured(tmp_path / "here", {"attn_implementation": "kernels-community/some"})
    assert "kernels-community/some" in told(stub, [(folder, {"trust_remote_code": True})])[1]


@pytest.mark.parametrize("content", NAMING, ids=json.dumps)
def test_what_names_native_code_is_refused_without_the_package(content: dict[str, Any]) -> None:
    """A repository is refused by name, whether its code could be fetched or not; the message says which key."""
    with pytest.raises(
        lmkit.WeightsError, match=r"'some/name' names code .*_implementation\w*: .*trust_remote_code=True"
    ):
        check_code("some/name", content, trusted=False)


def test_code_that_is_trusted_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """A log says what is trusted."""
    with caplog.at_level(logging.WARNING, logger="lmkit"):
        check_code("some/name", {"attn_implementation": REPOSITORY}, trusted=True)
    assert 'attn_implementation: "org/kernel"' in caplog.text


@pytest.mark.parametrize(
    "content",
    [
        {"megatron_config": {"a": 1}, "megatron_core": "megatron.core"},
        {"peft_type": "XLORA", "adapters": {"a": "org/adapter"}},
        {"shadow_model": "org/model"},
    ],
    ids=json.dumps,
)
def test_an_adapter_that_names_modules_is_refused(content: dict[str, Any]) -> None:
    """An adapter's config does not have peft import modules, or fetch other models."""
    with pytest.raises(lmkit.WeightsError, match=r"the config of 'some/name' names code"):
        check_adapter_code("some/name", content, trusted=False)
    check_adapter_code("some/name", dict.fromkeys(content), trusted=False)


MARK = "from pathlib import Path\nPath({ran!r}).touch()\n"


@pytest.mark.parametrize(
    "file, content",
    [
        ("tokenizer_config.json", {"tokenizer_class": "New", "auto_map": {"AutoTokenizer": ["new.New", None]}}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["org/other--new.New", "org/other--new.New"]}}),
        ("processor_config.json", {"processor_class": "New", "auto_map": {"AutoProcessor": "new.New"}}),
        ("generation_config.json", {"custom_generate": ".", "auto_map": {"AutoConfig": "new.New"}}),
        ("config.json", {"auto_map": {"AutoConfig": "new.New", "AutoTokenizer": "new.New"}}),
    ],
    ids=str,
)
def test_no_file_has_python_run(file: str, content: dict[str, Any], tmp_path: Path) -> None:
    """Python files beside a checkpoint do not run, whichever of its files names them: it loads, or is refused."""
    folder = Path(configured(tmp_path / "here", {}))
    ran = tmp_path / "ran"
    for name in ("new.py", "custom_generate/generate.py", "sitecustomize.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(MARK.format(ran=str(ran)), encoding="utf-8")
    known = json.loads((folder / file).read_text(encoding="utf-8")) if (folder / file).exists() else {}
    (folder / file).write_text(json.dumps(known | content), encoding="utf-8")
    with contextlib.suppress(lmkit.LmkitError), lmkit.load("causal", str(folder), "float32", "cpu") as generator:
        generator("Level up", max_new_tokens=2)
    assert not ran.exists()
