"""Models that several tests read and none changes: each is made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from model_zoo import make_model


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`zoo("qwen2")` is the directory of that tiny model; do not write into it."""
    root = tmp_path_factory.mktemp("zoo")

    def directory(kind: str) -> Path:
        path = root / kind
        return path if path.exists() else make_model(kind, path, tokenizer=True)

    return directory
