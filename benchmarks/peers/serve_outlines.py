"""outlines on transformers: prompts as token ids in one batch, greedy, held to a JSON schema or not."""

import json
import os
import time
from typing import Any

from _talk import Answer, Job, serve

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def start(settings: Job) -> tuple[Answer, dict[str, Any]]:
    """Load the checkpoint in the folder `model`."""
    import importlib.metadata

    import outlines
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    plain = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=getattr(torch, settings["dtype"]))
    model: Any = outlines.from_transformers(plain, tokenizer)
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id

    def answer(job: Job) -> dict[str, Any]:
        width = max(map(len, job["prompts"]))
        rows = [[pad] * (width - len(ids)) + ids for ids in job["prompts"]]
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in job["prompts"]])
        most = max(job["budgets"])
        begun = time.perf_counter()
        held: dict[str, Any] = {"min_new_tokens": most}
        if job.get("schema"):
            asked = outlines.json_schema(json.dumps(job["schema"]))
            processor = outlines.Generator(model, asked).logits_processor
            held = {"logits_processor": model.type_adapter.format_output_type(processor)}
        options = {"max_new_tokens": most, "do_sample": False, "pad_token_id": pad, **held}
        written = plain.generate(input_ids=torch.tensor(rows), attention_mask=mask, **options)[:, width:].tolist()
        seconds = time.perf_counter() - begun
        counts = [row.index(end) + 1 if end in row and job.get("schema") else len(row) for row in written]
        return {"seconds": seconds, "tokens": [min(pair) for pair in zip(counts, job["budgets"], strict=True)]}

    return answer, {"version": importlib.metadata.version("outlines"), "settings": f"{settings['dtype']}, one batch"}


if __name__ == "__main__":
    serve(start)
