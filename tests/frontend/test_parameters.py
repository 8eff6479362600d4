"""Binding parameters to a checkpoint: all problems at once, conversion tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from furiosa_llm.errors import CompileError
from furiosa_llm.frontend.checkpoint import TensorInfo
from furiosa_llm.frontend.parameters import ParameterSpec, bind_parameters

BF16 = np.dtype(ml_dtypes.bfloat16)


@dataclass
class MemoryCheckpoint:
    """Arrays as a checkpoint, counting what is read."""

    arrays: Mapping[str, np.ndarray[Any, Any]]
    path: str = "memory"
    reads: list[str] = field(default_factory=list)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return {n: TensorInfo(n, a.shape, a.dtype, a.dtype.name) for n, a in self.arrays.items()}

    def read(self, name: str) -> np.ndarray[Any, Any]:
        self.reads.append(name)
        return self.arrays[name]

    def read_rows(self, name: str, begin: int, end: int) -> np.ndarray[Any, Any]:
        self.reads.append(name)
        return self.arrays[name][begin:end]


def test_all_problems_are_reported_at_once() -> None:
    checkpoint = MemoryCheckpoint(
        {
            "fits": np.zeros((2, 3), np.float32),
            "short": np.zeros((2, 2), np.float32),
            "quantised": np.zeros((2, 3), ml_dtypes.float8_e4m3fn),
        }
    )
    names = ["fits", "short", "quantised", "absent"]
    with pytest.raises(CompileError) as caught:
        bind_parameters([ParameterSpec(name, (2, 3), BF16) for name in names], checkpoint)
    assert caught.value.code == "CKP005"
    assert caught.value.at == "memory"
    assert caught.value.cause.split("\n    - ")[1:] == [
        "`short` has the shape [2, 2], the model has [2, 3]",
        "`quantised` is stored as float8_e4m3fn, the model has bfloat16",
        "`absent` [2, 3] is missing",
    ]
    assert checkpoint.reads == []


@pytest.mark.parametrize("stored", [np.float16, np.float32, np.float64])
def test_floats_are_rounded_when_read(stored: type[np.floating[Any]]) -> None:
    values = np.array([1.0, 1.00390625, -3.14159], stored)
    checkpoint = MemoryCheckpoint({"w": values})
    bound = bind_parameters([ParameterSpec("w", (3,), BF16)], checkpoint)
    assert checkpoint.reads == []
    np.testing.assert_array_equal(bound("w"), values.astype(BF16))
    assert bound.read("w").dtype == BF16


def test_a_matching_type_is_not_copied() -> None:
    values = np.zeros((4, 4), BF16)
    bound = bind_parameters([ParameterSpec("w", (4, 4), BF16)], MemoryCheckpoint({"w": values}))
    assert np.shares_memory(bound.read("w"), values)


def test_tensors_that_the_model_does_not_use_are_told() -> None:
    checkpoint = MemoryCheckpoint({"b": np.zeros(1, BF16), "a": np.zeros(1, BF16)})
    assert bind_parameters([ParameterSpec("a", (1,), BF16)], checkpoint).extra == ("b",)


HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"
TABLE_SPEC = ParameterSpec(TABLE, (4, 2), BF16)


@pytest.mark.parametrize("names", [[TABLE], [HEAD], [TABLE, HEAD]])
def test_a_tied_tensor_may_have_either_name(names: list[str]) -> None:
    values = np.arange(8, dtype=np.float32).reshape(4, 2)
    checkpoint = MemoryCheckpoint({name: values.copy() for name in names})
    bound = bind_parameters([TABLE_SPEC], checkpoint, {HEAD: TABLE})
    assert bound.extra == ()
    np.testing.assert_array_equal(bound.read(TABLE), values.astype(BF16))
    np.testing.assert_array_equal(bound.read_rows(TABLE, 1, 3), values[1:3].astype(BF16))


@pytest.mark.parametrize(
    "head", [np.zeros((4, 2), np.float32), np.ones((4, 2), BF16), np.ones((2, 2), np.float32)]
)
def test_tied_tensors_that_differ_are_refused(head: np.ndarray[Any, Any]) -> None:
    """transformers would use both; the module has only one."""
    checkpoint = MemoryCheckpoint({TABLE: np.ones((4, 2), np.float32), HEAD: head})
    with pytest.raises(CompileError, match="does not fit") as caught:
        bind_parameters([TABLE_SPEC], checkpoint, {HEAD: TABLE})
    assert f"`{HEAD}` and `{TABLE}` differ" in caught.value.cause


@given(st.integers(1, 9), st.data())
def test_rows_are_rows_of_the_whole(rows: int, data: st.DataObject) -> None:
    begin = data.draw(st.integers(0, rows))
    end = data.draw(st.integers(begin, rows))
    values = np.arange(rows * 2, dtype=np.float32).reshape(rows, 2) / 7
    bound = bind_parameters([ParameterSpec("w", (rows, 2), BF16)], MemoryCheckpoint({"w": values}))
    np.testing.assert_array_equal(bound.read_rows("w", begin, end), bound.read("w")[begin:end])
