"""The tiny checkpoints, each saved and loaded once per session, and what plain transformers does with them."""

import atexit
import inspect
import json
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers

import families
import lmkit

hf: Any = transformers
torch.set_num_threads(1)  # tiny models: a second thread costs more than it brings, most of all beside others
ROOT = Path(tempfile.mkdtemp(prefix="lmkit-checkpoints-"))
atexit.register(shutil.rmtree, ROOT, ignore_errors=True)

FAMILIES = {f.name: f for f in (*families.CAUSAL, *families.SEQ2SEQ, *families.MASKED)}
CAUSAL = [family.name for family in families.CAUSAL]
SEQ2SEQ = [family.name for family in families.SEQ2SEQ]
MASKED = [family.name for family in families.MASKED]
PAIRS = {
    "mbart": ("en_XX", "ro_RO"),
    "mbart50": ("en_XX", "fr_XX"),
    "m2m100": ("en", "fr"),
    "nllb": ("eng_Latn", "fra_Latn"),
}
"""A source and a target for the families whose languages are tokens."""

_AUTO = {"causal": "AutoModelForCausalLM", "seq2seq": "AutoModelForSeq2SeqLM", "masked": "AutoModelForMaskedLM"}


@cache
def folder(name: str) -> Path:
    """Return the folder of a family's checkpoint; nobody writes into it."""
    return families.save(FAMILIES[name], ROOT / name)


@cache
def wrapper(name: str) -> Any:
    """Return the family's wrapper; nobody closes or changes it."""
    return fresh(name)


def fresh(name: str, where: Path | None = None) -> Any:
    """Load a wrapper of its own, from the family's folder or a changed copy of it."""
    task = FAMILIES[name].task
    return lmkit.load(task, str(where or folder(name)), "float32", "cpu")


@cache
def reference(name: str) -> tuple[Any, Any]:
    """Return the family's model and tokenizer as plain transformers loads them."""
    model, tokenizer = plain(FAMILIES[name].task, folder(name))
    if name in PAIRS:
        tokenizer.src_lang, tokenizer.tgt_lang = PAIRS[name]
    return model, tokenizer


def plain(task: str, where: Path) -> tuple[Any, Any]:
    """Load a model and its tokenizer with transformers alone."""
    model = getattr(hf, _AUTO[task]).from_pretrained(where, dtype=torch.float32)
    return model.eval(), hf.AutoTokenizer.from_pretrained(where)


def changed(name: str, where: Path, edit: Callable[[Any, Any], None]) -> Path:
    """Save a copy of a family's checkpoint, after `edit(model, tokenizer)` changed it."""
    model, tokenizer = plain(FAMILIES[name].task, folder(name))
    edit(model, tokenizer)
    model.save_pretrained(where)
    shutil.copytree(folder(name), where, dirs_exist_ok=True, ignore=_only_vocabularies)
    tokenizer.save_pretrained(where)
    return where


def _only_vocabularies(_folder: str, names: list[str]) -> set[str]:
    return {name for name in names if not name.endswith((".spm", "vocab.json", ".model", ".txt"))}


def configured(name: str, where: Path, **values: Any) -> Path:
    """Save a copy of a family's checkpoint with other values in its generation config."""
    shutil.copytree(folder(name), where)
    path = where / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return where


def cache_name(model: Any) -> str:
    """Return what plain transformers calls the cache: it was renamed in 5.24."""
    return next(name for name in ("cache", "past_key_values") if name in inspect.signature(model.forward).parameters)


def texts(name: str) -> list[str]:
    """Return the prompts of the family's task."""
    return families.texts(FAMILIES[name].task)


def languages(name: str) -> dict[str, str]:
    """Return the `source` and `target` a family wants on every call."""
    if name in PAIRS:
        return dict(zip(("source", "target"), PAIRS[name], strict=True))
    return {"target": "fra"} if name == "marian_group" else {}


def encoded(name: str, text: str) -> list[int]:
    """Return the ids of a text by the family's tokenizer, its languages set as its documentation says."""
    tokenizer = reference(name)[1]
    text = f">>fra<< {text}" if name == "marian_group" else text
    ids: list[int] = tokenizer(text)["input_ids"]
    return ids


def target_token(name: str) -> int:
    """Return the token of the target language, for the families that have one."""
    tokenizer = reference(name)[1]
    find = tokenizer.get_lang_id if name == "m2m100" else tokenizer.convert_tokens_to_ids
    return int(find(PAIRS[name][1]))


def forced(name: str) -> dict[str, int]:
    """Return the forced BOS of a target language, as the family's documentation has it; mBART's start token is it."""
    return {"forced_bos_token_id": target_token(name)} if name in PAIRS and name != "mbart" else {}


def padded(rows: Sequence[Sequence[int]], pad: int, *, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows as a matrix of ids and its attention mask."""
    width = max(map(len, rows))
    gaps = [[pad] * (width - len(row)) for row in rows]
    ids = [[*g, *row] if left else [*row, *g] for g, row in zip(gaps, rows, strict=True)]
    holes = [[0] * len(g) for g in gaps]
    ones = [[1] * len(row) for row in rows]
    mask = [[*h, *o] if left else [*o, *h] for h, o in zip(holes, ones, strict=True)]
    return torch.tensor(ids), torch.tensor(mask)


def inputs(name: str, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode a batch as transformers' users do: padded left for causal models, right for the others."""
    tokenizer = reference(name)[1]
    rows = [encoded(name, prompt) for prompt in prompts]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    return padded(rows, pad, left=FAMILIES[name].task == "causal")


def logits(model: Any) -> torch.Tensor:
    """Return the scores of a model for a fixed input."""
    ids = torch.arange(5, 25)[None]
    more = {"decoder_input_ids": ids[:, :4]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids, **more).logits
    return found.float()


def ends(model: Any) -> set[int]:
    """Return the ids that end a text of the model."""
    eos = model.generation_config.eos_token_id
    return set(eos) if isinstance(eos, list) else {eos}


def until_end(token_ids: Sequence[int], ending: set[int]) -> list[int]:
    """Cut generated tokens before the first end token."""
    stop = next((n for n, token_id in enumerate(token_ids) if token_id in ending), len(token_ids))
    return list(token_ids[:stop])


def generated(name: str, prompts: Sequence[str], model: Any = None, **settings: Any) -> list[list[int]]:
    """Return the new tokens that `model.generate` gives a batch, greedily unless `settings` say more."""
    model = model or reference(name)[0]
    ids, mask = inputs(name, prompts)
    chosen = {"do_sample": False, "num_beams": 1, "max_new_tokens": 24} | forced(name) | settings
    with torch.no_grad():
        found = model.generate(ids, attention_mask=mask, **chosen)
    skip = ids.shape[1] if FAMILIES[name].task == "causal" else 1
    return [until_end(row[skip:].tolist(), ends(model)) for row in found]


@contextmanager
def forwards(module: Any) -> Iterator[list[dict[str, Any]]]:
    """List the keyword arguments of every forward pass of a module while the block runs."""
    seen: list[dict[str, Any]] = []

    def note(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(dict(kwargs))

    handle = module.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def before_forwards(module: Any, do: Callable[[int, dict[str, Any]], None]) -> Iterator[None]:
    """Call `do(step, keyword arguments)` before every forward pass of a module while the block runs."""
    steps = iter(range(10**6))

    def hook(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        do(next(steps), kwargs)

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def on_logits(model: Any, change: Callable[[int, torch.Tensor], None]) -> Iterator[None]:
    """Call `change(step, logits)` after every forward pass of the model while the block runs."""
    steps = iter(range(10**6))

    def hook(_module: Any, _args: Any, output: Any) -> None:
        change(next(steps), output.logits)

    handle = model.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def idle(generator: Any) -> bool:
    """Say whether a wrapper's engine holds nothing of any caller: no rows, and no keys and values but kept prefixes."""
    stats = generator.stats
    return (stats.running, stats.waiting, stats.cache_bytes) == (0, 0, 0)


def forget(generator: Any) -> None:
    """Let a wrapper's engine drop the prefixes that it keeps of other tests."""
    generator._engine._batches._prefixes.clear()


def threads() -> set[str]:
    """Return the names of the threads that run, but for the one that watches over tqdm's bars."""
    return {thread.name for thread in threading.enumerate() if type(thread).__name__ != "TMonitor"}
