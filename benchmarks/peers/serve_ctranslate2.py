"""CTranslate2: a Marian checkpoint, converted; source texts as token ids, greedy or with beams."""

import json
import time
from pathlib import Path
from typing import Any

from _talk import Answer, Job, serve


def start(settings: Job) -> tuple[Answer, dict[str, Any]]:
    """Convert the checkpoint in the folder `model`, and load it in each setting that a job can name."""
    import ctranslate2
    from ctranslate2.converters import TransformersConverter

    translators = {}
    for kind in sorted(ctranslate2.get_supported_compute_types("cpu") & set(settings["kinds"])):
        folder = Path(settings["folder"]) / kind
        TransformersConverter(settings["model"]).convert(str(folder), quantization=kind, force=True)
        for workers, threads in settings["workers"]:
            translator = ctranslate2.Translator(
                str(folder), compute_type=kind, inter_threads=workers, intra_threads=threads
            )
            translators[f"{kind}, {workers}x{threads}"] = translator, workers
    vocabulary = json.loads((folder / "shared_vocabulary.json").read_text(encoding="utf-8"))

    def answer(job: Job) -> dict[str, Any]:
        sources = [[vocabulary[number] for number in ids] for ids in job["prompts"]]
        (budget,) = set(job["budgets"])
        translator, workers = translators[job["setting"]]
        begun = time.perf_counter()
        results = translator.translate_batch(
            sources,
            beam_size=job["beams"],
            min_decoding_length=budget,
            max_decoding_length=budget,
            max_batch_size=-(-len(sources) // workers),  # one batch for each worker
        )
        seconds = time.perf_counter() - begun
        return {"seconds": seconds, "tokens": [len(result.hypotheses[0]) for result in results]}

    return answer, {"version": ctranslate2.__version__, "settings": sorted(translators)}


if __name__ == "__main__":
    serve(start)
