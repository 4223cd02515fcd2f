"""All three tasks on models that need no network: what they wrote, how fast, and why each row ended.

Run it with `bash .ci/run -s demo`, which installs what it needs. It takes under three minutes on two cores, most of it
to read the GGUF file of the chat model, and exits with 1 if an answer is not the expected one.
"""

import sys
import time
from pathlib import Path

import lmkit
import smollm2

CHECKPOINTS = Path(__file__).parent / "checkpoints"
NUMBERS = [  # a text, its language, the language wanted, the expected translation
    ("four thousand and seventy-one", "en", "fr", "quatre mille soixante et onze"),
    ("neunhundertneunundneunzig", "de", "en", "nine hundred and ninety-nine"),
    ("trescientos cincuenta mil", "es", "de", "dreihundertfünfzigtausend"),
]
FACTS = {"The currency of Japan is the [MASK].": "yen", "Kenya is a country in [MASK].": "africa"}
CHATS = [[{"role": "user", "content": text}] for text in ("What is the capital of France?", "Name one ocean.")]


def describe(model: lmkit.Generator | lmkit.Translator | lmkit.Unmasker) -> None:
    """Print what was loaded, in what precision and why."""
    print(f"\n{Path(model.name).name}: {model.memory_bytes / 1e6:,.1f} MB, {model.plan.precision}", flush=True)


def show(result: lmkit.Generation | lmkit.Unmasking, expected: str) -> bool:
    """Print a result; return whether it has what was expected."""
    ended = f"  ({result.finish_reason}, {result.timing.seconds:.2f} s)" if isinstance(result, lmkit.Generation) else ""
    print(f"  {result}{ended}", flush=True)
    return expected in str(result)


def main() -> int:
    """Run everything; return 0 if all answers were the expected ones."""
    started, right = time.perf_counter(), list[bool]()
    texts, sources, targets, expected = zip(*NUMBERS, strict=True)
    for name in ("numbers-m2m100", "numbers-t5"):
        with lmkit.load("seq2seq", CHECKPOINTS / name) as translator:
            describe(translator)
            right += map(show, translator(texts, source=sources, target=targets), expected)
    with lmkit.load("masked", CHECKPOINTS / "world-bert") as unmasker:
        describe(unmasker)
        right += map(show, unmasker(list(FACTS)), FACTS.values())
    with lmkit.load("causal", smollm2.path()) as generator:
        describe(generator)
        for chunk in generator.stream(CHATS[0], max_new_tokens=24):
            print(f"{chunk.text}|", end="", flush=True)
        print()
        right += map(show, generator.chat(CHATS, max_new_tokens=24), ("Paris", ""))
    print(f"\n{time.perf_counter() - started:.0f} s in all, {right.count(True)} of {len(right)} answers as expected")
    return 0 if all(right) else 1


if __name__ == "__main__":
    sys.exit(main())
