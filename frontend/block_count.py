"""How many transformer blocks a model has, known before anything heavy is imported or read."""

from __future__ import annotations

import json
from pathlib import Path

from .source import locate_model


def declared_blocks(model: str | Path) -> int | None:
    """What the model's own description says; None where it leaves that to its config class.

    A description that cannot be read is for `open_model` to refuse.
    Raises: FRO001, FRO002, GGF001.
    """
    path = locate_model(model, weights=False)
    count = _of_gguf(path) if path.is_file() else _of_config(path / "config.json")
    return count if isinstance(count, int) and count > 0 else None


def _of_gguf(path: Path) -> object:
    from .gguf_file import GgufFile

    metadata = GgufFile.open(path).metadata
    return metadata.get(f"{metadata.get('general.architecture')}.block_count")


def _of_config(path: Path) -> object:
    try:
        return json.loads(path.read_bytes())["num_hidden_layers"]
    except (OSError, ValueError, TypeError, KeyError):
        return None
