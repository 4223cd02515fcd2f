"""llama.cpp through llama-cpp-python: one stream from a GGUF file, greedy."""

import itertools
import time
from typing import Any

from _talk import Answer, Job, serve


def start(settings: Job) -> tuple[Answer, dict[str, Any]]:
    """Load the GGUF file `gguf`."""
    import llama_cpp

    model = llama_cpp.Llama(
        settings["gguf"], n_ctx=8192, n_threads=settings["threads"], n_threads_batch=settings["threads"], verbose=False
    )

    def answer(job: Job) -> dict[str, Any]:
        (prompt,), (budget,) = job["prompts"], job["budgets"]
        model.reset()  # else it would go on from the prompt of the last job
        begun = time.perf_counter()
        first = 0.0
        text = b""
        # generate() does not look for the end token, so this always runs to the budget.
        for token in itertools.islice(model.generate(prompt, temp=0.0), budget):
            first = first or time.perf_counter() - begun
            text += model.detokenize([token])
        seconds = time.perf_counter() - begun
        return {"seconds": seconds, "tokens": [budget], "first_token_seconds": first}

    return answer, {"version": llama_cpp.__version__, "settings": f"Q4_1, {settings['threads']} threads"}


if __name__ == "__main__":
    serve(start)
