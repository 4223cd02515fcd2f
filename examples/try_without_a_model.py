"""Test code that is built on lmkit, with a model that is none; no torch is imported."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from lmkit.testing import FakeGenerator

if TYPE_CHECKING:
    import lmkit


def summary(generator: lmkit.Generator, text: str) -> str:
    """Summarize a text, and mark a summary that was cut: the code to be tested."""
    result = generator.chat([{"role": "user", "content": f"Summarize: {text}"}], max_new_tokens=5)
    return result.text + (" […]" if result.finish_reason == "length" else "")


def main() -> None:
    """Test what is whole, what is cut, and what was asked."""
    fake = FakeGenerator({"Summarize: rain": "It rains.", "Summarize: all": "It rains, and then it snows."})
    assert summary(fake, "rain") == "It rains."  # noqa: S101 - a test
    assert summary(fake, "all").endswith(" […]")  # noqa: S101
    print(f"{len(fake.calls)} calls, the last of {fake.calls[-1].prompt!r}; torch: {'torch' in sys.modules}")


if __name__ == "__main__":
    main()
