"""Shared by the tests of `ir`: IR snippets whose operands come from nowhere."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from xdsl.dialects.builtin import ModuleOp
from xdsl.dialects.test import Test

from furiosa_llm.ir.text import parse_module

Snippet = Callable[[str, list[str]], ModuleOp]


@pytest.fixture
def snippet() -> Snippet:
    """Parse one op; its operands `%0`, `%1`, … get the given types from a `test.op`."""

    def parse(op: str, operand_types: list[str]) -> ModuleOp:
        names = ", ".join(f"%{index}" for index in range(len(operand_types)))
        source = f'{names} = "test.op"() : () -> ({", ".join(operand_types)})\n'
        text = (source if operand_types else "") + op
        return parse_module(text, extra_dialects={"test": lambda: Test})

    return parse
