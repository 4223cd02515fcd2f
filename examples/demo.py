"""All three tasks on models that need no network: what they wrote, how fast, and why each row ended.

Run it with `bash .ci/run -s demo`, which installs what it needs. The demo itself takes under three minutes on two
cores, most of it to read the GGUF file of the chat model. It exits with 1 if an answer is not the expected one.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import lmkit
import smollm2

if TYPE_CHECKING:
    from collections.abc import Sequence

CHECKPOINTS = Path(__file__).parent / "checkpoints"

# (text, its language, the language wanted, the expected translation), by the codes that T5 checkpoints use.
NUMBERS = [
    ("four thousand and seventy-one", "en", "fr", "quatre mille soixante et onze"),
    ("four thousand and seventy-one", "en", "de", "viertausendeinundsiebzig"),
    ("neunhundertneunundneunzig", "de", "en", "nine hundred and ninety-nine"),
    ("quatre-vingt-dix-sept", "fr", "es", "noventa y siete"),
    ("trescientos cincuenta mil", "es", "de", "dreihundertfünfzigtausend"),
]
NLLB_CODES = {"en": "eng_Latn", "de": "deu_Latn", "fr": "fra_Latn", "es": "spa_Latn"}

FACTS = [
    ("The currency of Japan is the [MASK].", "yen"),
    ("The capital of France is [MASK].", "paris"),
    ("People in Brazil speak [MASK].", "portuguese"),
    ("Kenya is a country in [MASK].", "africa"),
]


def chat() -> list[str]:
    """Ask SmolLM2 one question as a stream, then two at once; return what was unexpected."""
    started = time.perf_counter()
    generator = lmkit.load("causal", smollm2.path())
    describe("A chat, streamed, then two as a batch: SmolLM2-135M-Instruct", generator, started)
    with generator:
        answer = stream_answer(generator, "What is the capital of France?")
        questions = ["Name one ocean.", "What color is the sky?"]
        chats = [[{"role": "user", "content": question}] for question in questions]
        results = generator.chat(chats, max_new_tokens=24)
    for question, result in zip(questions, results, strict=True):
        print(f"  > {question}\n  {' '.join(result.text.split())}")
    print_ends(results)
    return [] if "Paris" in answer else [f"the capital of France: {answer!r}"]


def stream_answer(generator: lmkit.Generator, question: str) -> str:
    """Print the answer while it grows, and return it."""
    print(f"  > {question}\n  ", end="")
    started, text, seconds_to_first_text = time.perf_counter(), "", 0.0
    for chunk in generator.stream([{"role": "user", "content": question}], max_new_tokens=24):
        print(chunk.text, end="", flush=True)
        text += chunk.text
        seconds_to_first_text = seconds_to_first_text or time.perf_counter() - started
        if chunk.finish_reason is not None:
            seconds = time.perf_counter() - started
            print(f"\n  first text after {seconds_to_first_text:.2f} s, all after {seconds:.2f} s", end="")
            print(f", ended by {chunk.finish_reason!r}")
    return text


def translate(name: str, codes: dict[str, str]) -> list[str]:
    """Translate all numbers in one call, each in its own direction; return what was unexpected."""
    started = time.perf_counter()
    translator = lmkit.load("seq2seq", CHECKPOINTS / name)
    describe(f"Numbers in several directions, in one call: {name}", translator, started)
    texts, sources, targets, expected = zip(*NUMBERS, strict=True)
    with translator:
        results = translator(
            texts, source=[codes[language] for language in sources], target=[codes[language] for language in targets]
        )
    for result in results:
        print(f"  {result.source_language} → {result.target_language}  {result.source} → {result.text}")
    print_ends(results)
    pairs = zip(results, expected, strict=True)
    return [f"{name}: {result.source!r} → {result.text!r}" for result, text in pairs if result.text != text]


def fill_in() -> list[str]:
    """Fill one gap in each fact; return what was unexpected."""
    started = time.perf_counter()
    unmasker = lmkit.load("masked", CHECKPOINTS / "world-bert")
    describe("Facts filled in: world-bert", unmasker, started)
    started = time.perf_counter()
    with unmasker:
        results = unmasker([text for text, _ in FACTS], top_k=3)
    seconds = time.perf_counter() - started
    for result in results:
        guesses = ", ".join(f"{guess.token} {guess.score:.0%}" for guess in result.candidates)
        print(f"  {result.text}  {guesses}")
    print(f"  {len(results)} texts in {seconds:.2f} s")
    pairs = zip(results, FACTS, strict=True)
    return [f"{result}" for result, (_, word) in pairs if result.candidates[0].token != word]


def describe(title: str, model: lmkit.Generator | lmkit.Translator | lmkit.Unmasker, started: float) -> None:
    """Print what was loaded, in what precision and why."""
    print(f"\n{title}")
    print(f"  loaded in {time.perf_counter() - started:.1f} s, {model.memory_bytes / 1e6:,.1f} MB on {model.device}")
    print(f"  {model.plan.precision}", flush=True)


def print_ends(results: Sequence[lmkit.Generation]) -> None:
    """Print how many tokens each row had, how fast the rows were together, and why each ended."""
    counts = [result.generated_tokens for result in results]
    seconds = max(result.timing.seconds for result in results)
    ends = ", ".join(f"{count} ({result.finish_reason})" for count, result in zip(counts, results, strict=True))
    print(f"  tokens per row, and why it ended: {ends}; {sum(counts) / seconds:.1f} tokens/s together")


def main() -> int:
    """Run everything; return 0 if all answers were the expected ones."""
    started = time.perf_counter()
    unexpected = [
        *translate("numbers-m2m100", NLLB_CODES),
        *translate("numbers-t5", {code: code for code in NLLB_CODES}),
        *fill_in(),
        *chat(),
    ]
    print(f"\n{time.perf_counter() - started:.0f} s in all")
    for answer in unexpected:
        print(f"unexpected: {answer}", file=sys.stderr)
    return 1 if unexpected else 0


if __name__ == "__main__":
    sys.exit(main())
