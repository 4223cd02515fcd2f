"""What processes of a pool do, which have to find it by its name."""

from pathlib import Path
from typing import Any

import lmkit.ray


def answered(folder: Path, batch: dict[str, Any], **options: Any) -> list[str]:
    """Load a causal model, and answer."""
    found: list[str] = lmkit.ray.Mapper("causal", folder, "float32", "cpu", **options)(batch)["answer"].tolist()
    return found
