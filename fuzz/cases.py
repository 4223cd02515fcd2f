"""Hostile checkpoints: a whole one, and edits of its files by someone who knows the formats.

A case is data, so that one that was found is kept: a line of `seeds.jsonl`, `{"base": name, "edits": [...]}`. An edit
is `[file, kind, ...]`:

- `[file, "set", path, value]` and `[file, "drop", path]` change a JSON file, or the header of a safetensors file;
- `[file, "bytes", offset, hex]`, `[file, "cut", length]` and `[file, "length", number]` change any file: some bytes,
  its end, the eight bytes with which safetensors says how long its header is;
- `[file, "text", text]` replaces a file, or adds one;
- `[file, "remove"]`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
import struct
import tempfile
from pathlib import Path
from typing import Any, TypeAlias

from hypothesis import strategies as st

Edit: TypeAlias = list[Any]
Case: TypeAlias = dict[str, Any]

TASKS = {"llama": "causal", "gpt2": "causal", "t5": "seq2seq", "bert": "masked", "gguf": "causal", "adapter": "causal"}
"""The checkpoints that are edited, and their tasks."""

VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 3, 10**4, 10**7, 10**12, 2**63, -(2**31), 0.5, -1e308, 1e308, float("nan")),
    *("", "x", "auto", "../../x", "org/name", "a" * 10**5, "\x00", "(a+)+$", "[", "float32", "sdpa", "{{ 1/0 }}"),
    *([], [[]], [None], [5], ["x"], [0] * 10**4, {}, {"": {}}, {"x": 5}, {"self": None}, {"0": "x"}),
]
"""What is put in place of a value: other types, other sizes, other meanings."""

KEYS = [
    *("auto_map", "_attn_implementation", "attn_implementation", "quantization_config", "dtype", "rope_parameters"),
    *("architectures", "model_type", "num_hidden_layers", "n_layer", "num_labels", "vocab_size", "layer_types"),
    *("text_config", "tie_word_embeddings", "num_experts", "experts_implementation", "use_kernels", "custom_generate"),
    *("chat_template", "tokenizer_class", "model_max_length", "eos_token_id", "num_beams", "length_penalty"),
]
"""Keys that mean something in one of the files, for any of them."""

BITS = ["{{ 'a' * 10**9 }}", "{% for i in range(10**9) %}x{% endfor %}", "{{ messages }}", "{{ 10 ** 10 ** 8 }}", "{{"]
BITS += ["{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}"]
BITS += [
    "{{ messages[0]['content'] | center(10**9) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ 1 / 0 }}",
]
BITS += [
    "{% for m in messages %}{{ m.content }}{% endfor %}",
    "{{ ''.__class__.__mro__ }}",
    "{{ raise_exception('x') }}",
]
BITS += ["{{ '%*d' % (10**9, 1) }}", "{{ cycler.__init__.__globals__.os.system('true') }}", "{% include 'x' %}"]


@functools.cache
def base(name: str) -> Path:
    """Return a whole checkpoint of this name, saved once."""
    import checkpoints
    import gguf_tiny

    folder = Path(tempfile.mkdtemp(prefix="lmkit-fuzz-base-")) / name
    if name == "gguf":
        folder.mkdir()
        gguf_tiny.save(folder / "model.gguf")
    elif name == "adapter":
        _save_adapter(folder)
    else:
        shutil.copytree(checkpoints.folder(name), folder)
    if name == "gpt2":
        model, _ = checkpoints.plain("causal", folder)
        (folder / "model.safetensors").unlink()
        model.save_pretrained(folder, max_shard_size="100KB")
    return folder


def _save_adapter(folder: Path) -> None:
    from peft import LoraConfig, get_peft_model

    import checkpoints

    model: Any = checkpoints.plain("causal", checkpoints.folder("llama"))[0]
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).save_pretrained(folder)


def pointers(value: Any, most: int = 400) -> list[list[Any]]:
    """List the paths to what is inside a JSON value, those that are near first."""
    found: list[list[Any]] = []
    queue: list[tuple[list[Any], Any]] = [([], value)]
    while queue and len(found) < most:
        path, one = queue.pop(0)
        inside = one.items() if isinstance(one, dict) else enumerate(one) if isinstance(one, list) else ()
        for key, part in list(inside)[:50]:
            found.append([*path, key])
            queue.append(([*path, key], part))
    return found


@functools.cache
def _places(name: str) -> dict[str, list[list[Any]]]:
    """Return the files of a base, each with the paths inside it if it is JSON."""
    return {
        file.name: pointers(json.loads(file.read_text())) if file.suffix == ".json" else []
        for file in sorted(base(name).iterdir())
        if file.is_file()
    }


@st.composite
def edits(draw: Any, name: str) -> Edit:
    """Draw an edit of a checkpoint, more often one of JSON than of bytes."""
    file = draw(st.sampled_from(sorted(_places(name))))
    kind = draw(
        st.sampled_from(["json"] * 8 + ["bytes", "bytes", "cut", "length", "text", "remove", "header", "template"])
    )
    if kind == "json" and file.endswith(".json"):
        return draw(_of_json(name, file))
    if kind == "header" and (weights := [one for one in _places(name) if one.endswith(".safetensors")]):
        return draw(_of_header(name, weights[0]))
    return draw(_of_bytes(name, file, kind))


@st.composite
def _of_json(draw: Any, name: str, file: str) -> Edit:
    known = _places(name)[file]
    path = draw(st.sampled_from(known)) if known and draw(st.booleans()) else [draw(st.sampled_from(KEYS))]
    if draw(st.integers(0, 5)) == 0:
        return [file, "drop", path]
    return [file, "set", path, draw(st.sampled_from(VALUES) | st.integers(-3, 10**6))]


@st.composite
def _of_header(draw: Any, name: str, file: str) -> Edit:
    tensors = sorted(header((base(name) / file).read_bytes())[0])
    field = draw(st.sampled_from([["dtype"], ["shape"], ["shape", 0], ["data_offsets"], ["data_offsets", 1], []]))
    return [file, "set", [draw(st.sampled_from(tensors)), *field], draw(st.sampled_from(VALUES))]


@st.composite
def _of_bytes(draw: Any, name: str, file: str, kind: str) -> Edit:
    size = (base(name) / file).stat().st_size
    if kind == "bytes":
        offset = draw(st.integers(0, min(size, 4096)) | st.integers(0, size))
        return [file, kind, offset, draw(st.binary(min_size=1, max_size=16)).hex()]
    if kind in ("cut", "length"):
        return [file, kind, draw(st.integers(0, size) | st.sampled_from([2**63 - 1, 2**32, 10**9]))]
    if kind == "remove":
        return [file, kind]
    if kind == "text":
        return [file, kind, draw(st.sampled_from(["", "[", "[" * 10**5, "{}", "null", '{"a":' * 10**4]))]
    return ["chat_template.jinja", "text", "".join(draw(st.lists(st.sampled_from(BITS), min_size=1, max_size=3)))]


@st.composite
def cases(draw: Any) -> Case:
    """Draw a checkpoint and one to three edits."""
    name = draw(st.sampled_from(sorted(TASKS)))
    return {"base": name, "edits": draw(st.lists(edits(name), min_size=1, max_size=3))}


def write(case: Case, folder: Path) -> Path:
    """Write the checkpoint of a case into a folder; return what is loaded."""
    shutil.copytree(base(case["base"]), folder)
    for file, kind, *more in case["edits"]:
        _edit(folder / file, kind, more)
    return folder


def _edit(file: Path, kind: str, more: list[Any]) -> None:
    before = file.read_bytes() if file.is_file() else b""
    if kind == "remove":
        file.unlink(missing_ok=True)
    elif kind == "text":
        file.write_text(more[0], encoding="utf-8", errors="surrogatepass")
    elif kind == "bytes":
        changed = bytes.fromhex(more[1])
        file.write_bytes(before[: more[0]] + changed + before[more[0] + len(changed) :])
    elif kind == "cut":
        file.write_bytes(before[: more[0]])
    elif kind == "length":
        file.write_bytes(struct.pack("<Q", more[0]) + before[8:])
    elif file.suffix == ".safetensors":
        with contextlib.suppress(ValueError, struct.error, RecursionError):
            head, data = header(before)
            packed = json.dumps(_changed(head, kind, *more)).encode()
            file.write_bytes(struct.pack("<Q", len(packed)) + packed + data)
    else:
        with contextlib.suppress(ValueError, RecursionError):  # an edit before has left no JSON
            file.write_text(json.dumps(_changed(json.loads(before or b"{}"), kind, *more)))


def header(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Divide a safetensors file into its header and its data."""
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def _changed(value: Any, kind: str, path: list[Any], new: Any = None) -> Any:
    """Return a JSON value with one place of it changed; where an edit before took the place away, the value."""
    inside = value
    for key in path[:-1]:
        try:
            inside = inside[key]
        except (KeyError, IndexError, TypeError):
            return value
    try:
        if kind == "drop":
            del inside[path[-1]]
        else:
            inside[path[-1]] = new
    except (KeyError, IndexError, TypeError):
        pass
    return value
