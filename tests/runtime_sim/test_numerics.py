"""The rectifier, and how precise the vector engine's functions are."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from error_bounds import FUNCTION_UNITS, LEAST, U_F32
from one_pass import through_pass

from furiosa_llm.backend_rngd.isa.dtypes import DType
from furiosa_llm.backend_rngd.isa.instructions import Op, Vector, VectorOp
from furiosa_llm.backend_rngd.isa.units import ALU_OPS
from furiosa_llm.runtime_sim import numerics


def test_relu_keeps_nan_and_makes_every_zero_positive() -> None:
    values = np.array([1.5, -2.0, -0.0, 0.0, np.nan, np.inf, -np.inf], np.float32)
    got = numerics.relu(values)
    assert not np.signbit(got[:4]).any()
    assert np.array_equal(
        got, np.array([1.5, 0, 0, 0, np.nan, np.inf, 0], np.float32), equal_nan=True
    )
    assert numerics.relu(np.array([-3, 4], np.int32)).tolist() == [0, 4]


def sigmoid(x: np.ndarray) -> np.ndarray:
    found: np.ndarray = 1.0 / (1.0 + np.exp(-x))
    return found


EXACT: dict[Op, Callable[[np.ndarray], np.ndarray]] = {
    Op.SQRT: np.sqrt,
    Op.ERF: np.vectorize(math.erf),
    Op.TANH: np.tanh,
    Op.SIN: np.sin,
    Op.COS: np.cos,
    Op.SIGMOID: sigmoid,
    Op.EXP: np.exp,
    Op.NEGEXP: lambda x: np.exp(-x),
    Op.LOG: np.log,
}


@pytest.mark.parametrize("op", FUNCTION_UNITS)
def test_functions_are_as_precise_as_documented(op: Op) -> None:
    """At every bf16 number and at f32 between -100 and 100, dense around 0."""
    rng = np.random.default_rng(0)
    every_bf16 = (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32)
    parts = [rng.uniform(-limit, limit, 30_000) for limit in (100, 10, 2, 1e-3)]
    wide = np.concatenate(parts).astype(np.float32)
    x = np.concatenate([every_bf16, wide])
    alu = next(alu for alu, ops in ALU_OPS.items() if op in ops)
    found = through_pass(
        x.view(np.uint32), DType.F32, DType.F32, vector=Vector((VectorOp(alu, op),))
    ).view(np.float32)
    with np.errstate(all="ignore"):
        want = EXACT[op](x.astype(np.float64))
    assert np.array_equal(np.isnan(found), np.isnan(want))
    f32_range = np.abs(want) < 2.0**128
    assert np.isinf(found[~f32_range & ~np.isnan(want)]).all()
    distance = np.abs(found[f32_range] - want[f32_range])
    assert (distance <= FUNCTION_UNITS[op] * U_F32 * np.abs(want[f32_range]) + LEAST).all()
