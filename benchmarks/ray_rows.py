"""What Ray costs beside the model: `python benchmarks/ray_rows.py MODEL [--rows 1000] [--tokens 64]`.

The same rows by `map` in one process, and by Ray Data with one actor that has all cores; of the second also what the
actor's calls took, so that the rest is Ray's.
"""

import argparse
import importlib
import os
import time
from pathlib import Path
from typing import Any

import lmkit
import lmkit.ray


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=64)
    given = parser.parse_args()
    texts = [f"Tell me about the number {number}." for number in range(given.rows)]
    options: dict[str, Any] = {"max_new_tokens": given.tokens, "min_new_tokens": given.tokens}
    with lmkit.load("causal", given.model) as generator:
        generator(texts[:2], **options)
        begun = time.perf_counter()
        expected = [result.text for result in generator.map(texts, **options)]
        alone = time.perf_counter() - begun
    print(f"map: {alone:.1f} s for {given.rows} rows of {given.tokens} tokens")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray: Any = importlib.import_module("ray")

    ray.init(include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    data: Any = ray.data
    data.DataContext.get_current().execution_options.preserve_order = True
    cores = os.cpu_count() or 1

    class Timed(lmkit.ray.Mapper):
        def __call__(self, batch: Any) -> Any:
            begun = time.perf_counter()
            found = super().__call__(batch)
            took = found["error"].to_pylist()  # the column's own length
            return found.append_column("seconds", [[(time.perf_counter() - begun) / len(took)] * len(took)])

    rows = data.from_items([{"text": text} for text in texts], override_num_blocks=max(given.rows // 128, 1))
    begun = time.perf_counter()
    found = rows.map_batches(
        Timed,
        fn_constructor_args=("causal", str(Path(given.model).resolve())),
        fn_constructor_kwargs=options,
        batch_format="pyarrow",
        batch_size=256,
        compute=data.ActorPoolStrategy(size=1),
        num_cpus=cores,
    ).take_all()
    whole = time.perf_counter() - begun
    model = sum(row["seconds"] for row in found)
    same = [row["answer"] for row in found] == expected
    print(f"Ray: {whole:.1f} s, of which the model {model:.1f} s; the same texts: {same}")


if __name__ == "__main__":
    main()
