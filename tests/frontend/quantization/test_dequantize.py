"""All 256 codes of each type, under each granularity, against scalar arithmetic."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from furiosa_llm.frontend.quantization.dequantize import dequantize
from furiosa_llm.frontend.quantization.scales import multipliers
from furiosa_llm.models.quantization import (
    E4M3_MAX,
    PER_CHANNEL,
    PER_TENSOR,
    ScaleTensor,
    WeightScheme,
    per_block,
    per_group,
)

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
FNUZ = np.dtype(ml_dtypes.float8_e4m3fnuz)
ALL = np.arange(256, dtype=np.uint8).reshape(16, 16)


def value_of(code: int, *, exponent_bits: int, bias: int) -> Fraction:
    """A sign, an exponent and a mantissa, read as IEEE 754 reads them."""
    mantissa_bits = 7 - exponent_bits
    sign = -1 if code & 0x80 else 1
    exponent = (code & 0x7F) >> mantissa_bits
    mantissa = code & (1 << mantissa_bits) - 1
    one = 1 << mantissa_bits if exponent else 0
    power = max(exponent, 1) - bias - mantissa_bits
    return sign * (one + mantissa) * Fraction(2) ** power


LAYOUT: dict[Any, dict[str, int]] = {
    ml_dtypes.float8_e4m3fn: {"exponent_bits": 4, "bias": 7},
    ml_dtypes.float8_e5m2: {"exponent_bits": 5, "bias": 15},
    ml_dtypes.float8_e4m3fnuz: {"exponent_bits": 4, "bias": 8},
}


@pytest.mark.parametrize("dtype", LAYOUT, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("scheme", [PER_TENSOR, PER_CHANNEL, per_group(5), per_block(3, 7)])
def test_every_code_under_every_granularity(dtype: Any, scheme: WeightScheme) -> None:
    grid = scheme.grid_of((16, 16))
    scales = np.random.default_rng(0).uniform(1e-4, 3, grid).astype(np.float32)
    codes = ALL.view(dtype)
    values = dequantize(codes, scheme, scales)
    rows, columns = scheme.block_of((16, 16))
    for (row, column), code in np.ndenumerate(ALL):
        value = values.item(row, column)
        if np.isfinite(codes[row, column].astype(np.float32)):
            scale = Fraction(float(scales[row // rows, column // columns]))
            assert Fraction(value) == value_of(int(code), **LAYOUT[dtype]) * scale
        else:
            assert not np.isfinite(value)


SIZE = st.integers(1, 40)


@given(rows=SIZE, columns=SIZE, block=st.tuples(SIZE, SIZE))
def test_partial_blocks(rows: int, columns: int, block: tuple[int, int]) -> None:
    """Each cell has the multiplier of the block that it lies in."""
    scheme = per_block(*block)
    grid = scheme.grid_of((rows, columns))
    scales = np.arange(1, 1 + grid[0] * grid[1], dtype=np.float32).reshape(grid)
    values = dequantize(np.ones((rows, columns), E4M3), scheme, scales)
    for block_row in range(grid[0]):
        for block_column in range(grid[1]):
            part = values[
                block_row * block[0] : (block_row + 1) * block[0],
                block_column * block[1] : (block_column + 1) * block[1],
            ]
            assert part.size
            assert (part == scales[block_row, block_column]).all()


@pytest.mark.parametrize(
    ("stored", "divisor", "expected"),
    [
        (np.float32(0.1), 1.0, np.float32(0.1)),
        (ml_dtypes.bfloat16(0.1), 1.0, np.float32(0.10009765625)),
        (np.array(126, np.uint8).view(ml_dtypes.float8_e8m0fnu), 1.0, np.float32(0.5)),
        (np.float32(3.5), E4M3_MAX, np.float32(0.0078125)),
    ],
)
def test_multipliers_of_each_stored_type(stored: Any, divisor: float, expected: Any) -> None:
    scale = ScaleTensor("s", "f32", (), (1, 1), divisor)
    values = multipliers(scale, lambda name: np.asarray(stored))
    assert values.dtype == np.float32
    assert values.tolist() == [[expected]]
