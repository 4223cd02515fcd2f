"""vLLM on the CPU: prompts as token ids, greedy, each row with its own budget."""

import os
import time
from typing import Any

from _talk import Answer, Job, serve

# In this process: between jobs nothing is left spinning that would slow the other sides down.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")  # GiB
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def start(settings: Job) -> tuple[Answer, dict[str, Any]]:
    """Load the checkpoint in the folder `model`."""
    import vllm

    # Without prefix caching, for a repeat would find the prompts of the one before it.
    model = vllm.LLM(
        model=settings["model"],
        dtype=settings["dtype"],
        max_model_len=8192,
        max_num_seqs=settings["rows"],
        enable_prefix_caching=False,
        disable_log_stats=True,
    )

    def answer(job: Job) -> dict[str, Any]:
        held: dict[str, Any] = {}
        if job.get("schema"):
            held = {"structured_outputs": vllm.sampling_params.StructuredOutputsParams(json=job["schema"])}
        options = [
            vllm.SamplingParams(temperature=0.0, max_tokens=budget, ignore_eos=job["forced"], detokenize=True, **held)
            for budget in job["budgets"]
        ]
        prompts: Any = [{"prompt_token_ids": ids} for ids in job["prompts"]]
        begun = time.perf_counter()
        outputs = model.generate(prompts, options, use_tqdm=False)
        seconds = time.perf_counter() - begun
        return {"seconds": seconds, "tokens": [len(output.outputs[0].token_ids) for output in outputs]}

    told = f"{settings['dtype']}, up to {settings['rows']} rows at a time"
    return answer, {"version": vllm.__version__, "settings": told}


if __name__ == "__main__":
    serve(start)
