"""Imported models that several tests read and none changes: each is imported once."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from xdsl.dialects.builtin import ModuleOp

sys.path.insert(0, str(Path(__file__).parent))  # for `programs`
sys.path.insert(0, str(Path(__file__).parents[1]))  # for `model_zoo`

ImportZoo = Callable[[str], ModuleOp]


@pytest.fixture(scope="session")
def imported() -> ImportZoo:
    """`imported("qwen2")` is that tiny model's module, as it comes from the frontend."""
    from model_zoo import make_config

    from furiosa_llm.frontend.torch_import import import_model

    once = cache(lambda kind: import_model(make_config(kind)))
    return lambda kind: once(kind).clone()
