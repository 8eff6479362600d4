"""Conversions, over all codes or against rules written out one number at a time."""

from __future__ import annotations

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from furiosa_llm.backend_rngd.isa.dtypes import DType
from furiosa_llm.runtime_sim import numerics

ALL_16 = np.arange(1 << 16, dtype=np.uint16)
ALL_8 = np.arange(256, dtype=np.uint8)
bit_patterns = st.integers(0, 2**32 - 1)


def f32(bits: int) -> float:
    return float(np.uint32(bits).view(np.float32))


@pytest.mark.parametrize("repeat", [1, 3])
def test_every_bf16_code_means_its_number(repeat: int) -> None:
    """Repeated, the array is so large that another path takes over."""
    codes = np.tile(ALL_16, repeat)
    for size in (100, codes.size):
        got = numerics.bf16_to_f32(codes[:size]).view(np.uint32)
        want = codes[:size].astype(np.uint32) << 16
        want[(want & 0x7F800000) == 0] &= 0x80000000
        want[(want & 0x7FFFFFFF) > 0x7F800000] = 0x7FC00000
        assert np.array_equal(got, want)


@pytest.mark.parametrize("repeat", [1, 3])
def test_every_bf16_code_survives_a_round_trip(repeat: int) -> None:
    codes = np.tile(ALL_16, repeat)
    got = numerics.f32_to_bf16(numerics.bf16_to_f32(codes))
    want = codes.copy()
    want[(codes & 0x7F80) == 0] &= 0x8000
    want[(codes & 0x7FFF) > 0x7F80] = 0x7FC0
    assert np.array_equal(got, want)


def test_ordinary_numbers_take_the_fast_path_with_the_same_result() -> None:
    values = np.random.default_rng(0).normal(size=100_000).astype(np.float32)
    values[:10] = 0.0
    fast = numerics.f32_to_bf16(values)
    slow = np.concatenate([numerics.f32_to_bf16(part) for part in np.split(values, 20)])
    assert np.array_equal(fast, slow)
    assert np.array_equal(
        numerics.bf16_to_f32(fast), fast.view(ml_dtypes.bfloat16).astype(np.float32)
    )


@given(bit_patterns)
def test_f32_to_bf16_rounds_to_the_nearest_even(bits: int) -> None:
    code = int(numerics.f32_to_bf16(np.array([bits], np.uint32).view(np.float32))[0])
    sign, magnitude = bits >> 31, bits & 0x7FFFFFFF
    if magnitude > 0x7F800000:
        assert code == 0x7FC0
        return
    low, rest = divmod(magnitude, 1 << 16)
    up = rest > 0x8000 or (rest == 0x8000 and low % 2 == 1)
    want = low + up
    want = 0 if want < 0x80 else want
    assert code == (sign << 15) | want


@pytest.mark.parametrize("dtype", [DType.F8E4M3, DType.F8E5M2])
def test_every_fp8_code_survives_a_round_trip(dtype: DType) -> None:
    values = numerics.decoder(dtype)(ALL_8)
    got = numerics.encoder(dtype)(values)
    nan = np.isnan(values)
    assert np.array_equal(got[~nan], ALL_8[~nan])
    assert set(got[nan].tolist()) == {0x7F if dtype == DType.F8E4M3 else 0x7E}
    assert set(values[nan].view(np.uint32).tolist()) == {0x7FC00000}


def finite(dtype: DType) -> list[tuple[Fraction, int]]:
    """Positive finite numbers of an 8-bit float with their codes, ascending."""
    values = numerics.decoder(dtype)(ALL_8[:128])
    return [(Fraction(float(v)), i) for i, v in enumerate(values) if math.isfinite(v)]


@given(bit_patterns)
def test_f32_to_f8e4m3_rounds_to_the_nearest_even_and_saturates(bits: int) -> None:
    value = f32(bits)
    code = int(numerics.f32_to_f8e4m3(np.array([value], np.float32))[0])
    if math.isnan(value):
        assert code == 0x7F
        return
    magnitude = Fraction(min(abs(value), 448.0))
    best = min(finite(DType.F8E4M3), key=lambda vc: (abs(vc[0] - magnitude), vc[1] % 2))
    assert code == (0x80 if math.copysign(1, value) < 0 else 0) | best[1]


@given(bit_patterns | st.integers(0x36000000, 0x48000000))
def test_f32_to_f8e5m2_rounds_half_up_in_magnitude(bits: int) -> None:
    value = f32(bits)
    code = int(numerics.f32_to_f8e5m2(np.array([value], np.float32))[0])
    if math.isnan(value):
        assert code == 0x7E
        return
    sign = 0x80 if math.copysign(1, value) < 0 else 0
    magnitude = abs(value)
    if magnitude < 2.0**-14:
        want = min(3, math.floor(Fraction(magnitude) * (1 << 16) + Fraction(1, 2)))
    elif magnitude >= 61440.0:
        want = 0x7C
    else:
        numbers = finite(DType.F8E5M2)
        want = min(numbers, key=lambda vc: (abs(vc[0] - Fraction(magnitude)), -vc[1]))[1]
    assert code == sign | want


@given(st.floats(width=32))
def test_f32_to_i32_rounds_half_away_and_clamps(value: float) -> None:
    got = int(numerics.f32_to_i32(np.array([value], np.float32))[0])
    low, high = -(1 << 31), (1 << 31) - 1
    if math.isnan(value) or math.isinf(value):
        assert got == (low if math.copysign(1, value) < 0 else high)
        return
    rounded = math.floor(Fraction(abs(value)) + Fraction(1, 2)) * (1 if value >= 0 else -1)
    assert got == max(low, min(high, rounded))


@given(st.integers(-(2**31), 2**31 - 1))
def test_integers_wrap_when_they_are_narrowed(value: int) -> None:
    array = np.array([value], np.int32)
    assert int(numerics.encoder(DType.I8)(array)[0]) == (value + 128) % 256 - 128
    assert int(numerics.encoder(DType.I16)(array)[0]) == (value + 2**15) % 2**16 - 2**15
    assert float(numerics.i32_to_f32(array)[0]) == float(np.float32(value))


def test_relu_keeps_nan_and_makes_every_zero_positive() -> None:
    values = np.array([1.5, -2.0, -0.0, 0.0, np.nan, np.inf, -np.inf], np.float32)
    got = numerics.relu(values)
    assert not np.signbit(got[:4]).any()
    assert np.array_equal(
        got, np.array([1.5, 0, 0, 0, np.nan, np.inf, 0], np.float32), equal_nan=True
    )
    assert numerics.relu(np.array([-3, 4], np.int32)).tolist() == [0, 4]


def test_erf_is_right_to_the_last_place() -> None:
    x = np.concatenate([np.linspace(-5, 5, 2001), [1e-6, -1e-20, 0.0]]).astype(np.float32)
    want = np.array([math.erf(v) for v in x.astype(np.float64)])
    assert np.abs(numerics.erf(x) - want).max() <= 2.0**-24
    assert math.isnan(numerics.erf(np.array([np.nan], np.float32))[0])
