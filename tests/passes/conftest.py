"""Imported models that several tests read and none changes: each is imported once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
from model_zoo import make_config
from xdsl.dialects.builtin import ModuleOp

from furiosa_llm.frontend.torch_import import import_model

ImportZoo = Callable[[str], ModuleOp]


@pytest.fixture(scope="session")
def imported() -> ImportZoo:
    """`imported("qwen2")` is that tiny model's module, as it comes from the frontend."""
    once = cache(lambda kind: import_model(make_config(kind)))
    return lambda kind: once(kind).clone()
