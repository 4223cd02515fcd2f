"""What is measured in a process of its own: a start with compilation, and the memory of one workload.

Prints one JSON object as its last line. Started by `_context.in_fresh_process`.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import _data
import _machine
from _context import load


def compiled(folder: str) -> dict[str, Any]:
    """Load with compilation, and call once."""
    begun = time.perf_counter()
    generator = load("causal", Path(folder), compile=True)
    loaded = time.perf_counter() - begun
    generator(_data.steady_chats()[:1], max_new_tokens=8)
    return {"load": loaded, "first_call": time.perf_counter() - begun - loaded}


def memory(folder: str, new_tokens: str) -> dict[str, Any]:
    """Run workload A with lmkit alone, and return the bytes that were resident at most."""
    import resource

    generator = load("causal", Path(folder))
    loaded = _machine.resident_bytes()
    results = generator(_data.steady_chats(), max_new_tokens=int(new_tokens))
    config = generator.model.config
    held = sum(result.prompt_tokens + result.generated_tokens for result in results)
    # A key and a value of two bytes each.
    per_token = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return {
        "weights": sum(file.stat().st_size for file in Path(folder).glob("*.safetensors")),
        "held": generator.memory_bytes,
        "keys_values": held * per_token,
        "loaded": loaded,
        "peak": _machine.resident_bytes("VmHWM"),
        "max_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "tokens": sum(result.generated_tokens for result in results),
    }


def scores(folder: str) -> dict[str, Any]:
    """Run workload Q with lmkit alone, and return the bytes that were resident at most."""
    from _scores import scored_texts

    generator = load("causal", Path(folder))
    texts = scored_texts(generator.tokenizer)
    generator.score(texts[0])
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak so far was that of loading
    loaded = _machine.resident_bytes()
    found = generator.score(texts)
    return {"loaded": loaded, "peak": _machine.resident_bytes("VmHWM"), "tokens": sum(len(s.tokens) for s in found)}


def imports() -> dict[str, Any]:
    """Import what lmkit stands on, the classes of this model included, and return the bytes resident then."""
    from importlib import import_module

    for name in ("torch", "transformers", "transformers.models.llama.modeling_llama"):
        import_module(name)
    return {"resident": _machine.resident_bytes()}


if __name__ == "__main__":
    measurement, *given = sys.argv[1:]
    measurements: dict[str, Any] = {"compiled": compiled, "memory": memory, "scores": scores, "imports": imports}
    print(json.dumps(measurements[measurement](*given)))
