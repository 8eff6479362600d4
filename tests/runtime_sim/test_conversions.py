"""Every conversion at every input that decides its result, through the pass that makes it.

Narrow to wide: all codes. Wide to narrow: each number of the narrow type, each midpoint between
two of them, and the f32 next to all of these on either side, which is where a rounding can change;
with both signs, the range's ends, infinities, subnormals and NaNs. What is expected comes from
`tests/exact_conversions.py`, whole numbers written from the documented rules.
"""

from __future__ import annotations

import functools

import exact_conversions as exact
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from one_pass import through_pass

from furiosa_llm.backend_rngd.isa.dtypes import DType
from furiosa_llm.backend_rngd.isa.instructions import Alu, Op, Source, Vector, VectorOp
from furiosa_llm.runtime_sim import numerics

FORMATS = {
    DType.BF16: exact.BF16,
    DType.F8E4M3: exact.F8E4M3,
    DType.F8E5M2: exact.F8E5M2,
    DType.F4E2M1: exact.F4E2M1,
}
NARROW = [DType.BF16, DType.F8E4M3, DType.F8E5M2]
EIGHT_BITS = NARROW[1:]
SIGN = 0x80000000


def codes(dtype: DType) -> np.ndarray:
    """All codes of a type of 4, 8 or 16 bits."""
    return np.arange(1 << dtype.bits, dtype=np.uint16 if dtype.bits > 8 else np.uint8)


def unsigned(values: list[int], bits: int = 32) -> np.ndarray:
    return np.array([v % (1 << bits) for v in values], f"u{max(8, bits) // 8}")


@functools.cache
def boundaries(dtype: DType) -> tuple[np.ndarray, np.ndarray]:
    """(bits of f32, codes that they become)."""
    form = FORMATS[dtype]
    positive = sorted({*exact.boundaries(form), *exact.SPECIAL_F32})
    bits = [*positive, *(b | SIGN for b in positive)]
    return unsigned(bits), unsigned([form.rounded(b) for b in bits], dtype.bits)


# --- small floats to f32 and back ---


@pytest.mark.parametrize("dtype", NARROW)
def test_every_code_means_its_number(dtype: DType) -> None:
    want = unsigned([exact.widened(FORMATS[dtype], int(c)) for c in codes(dtype)])
    got = through_pass(codes(dtype), dtype, DType.F32, cast=DType.F32)
    assert np.array_equal(got, want)
    assert np.array_equal(numerics.decoder(dtype)(codes(dtype)).view(np.uint32), want)


@pytest.mark.parametrize("dtype", NARROW)
def test_every_code_survives_a_round_trip(dtype: DType) -> None:
    """But NaNs, of which one stays, and bf16's subnormals, which are zeros."""
    form = FORMATS[dtype]
    want = unsigned([form.rounded(exact.widened(form, int(c))) for c in codes(dtype)], dtype.bits)
    assert np.array_equal(through_pass(codes(dtype), dtype, dtype, cast=DType.F32), want)
    changed = codes(dtype)[want != codes(dtype)]
    magnitudes = changed & (form.sign - 1)
    assert ((magnitudes > form.overflow) | (magnitudes < 0x80 * form.flushes)).all()


@pytest.mark.parametrize("dtype", NARROW)
def test_a_commit_rounds_right_at_every_boundary(dtype: DType) -> None:
    bits, want = boundaries(dtype)
    assert np.array_equal(through_pass(bits, DType.F32, dtype), want)


def test_the_fetch_cast_rounds_like_the_commit() -> None:
    bits, want = boundaries(DType.BF16)
    assert np.array_equal(through_pass(bits, DType.F32, DType.BF16, cast=DType.BF16), want)


def test_large_and_small_arrays_are_rounded_alike() -> None:
    """Numbers without NaN or subnormals take another way in large arrays."""
    bits, want = boundaries(DType.BF16)
    ordinary = ((want & 0x7FFF) >= 0x80) & ((want & 0x7FFF) <= 0x7F80)
    got = numerics.f32_to_bf16(bits[ordinary].view(np.float32))
    assert ordinary.sum() > numerics.TABLE_ELEMENTS
    assert np.array_equal(got, want[ordinary])
    assert np.array_equal(numerics.bf16_to_f32(got).view(np.uint32) >> 16, want[ordinary])


@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_every_bf16_code_as_fp8(dtype: DType) -> None:
    form = FORMATS[dtype]
    want = [form.rounded(exact.widened(exact.BF16, int(c))) for c in codes(DType.BF16)]
    got = through_pass(codes(DType.BF16), DType.BF16, dtype, cast=DType.F32)
    assert np.array_equal(got, unsigned(want, 8))


@pytest.mark.parametrize("dtype", NARROW)
@given(bits=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50))
def test_any_f32(dtype: DType, bits: list[int]) -> None:
    with np.errstate(invalid="ignore"):  # as the device does: NaNs that signal
        got = numerics.encoder(dtype)(unsigned(bits).view(np.float32))
    assert got.tolist() == [FORMATS[dtype].rounded(b) for b in bits]


def test_the_rectifier_of_the_commit() -> None:
    """NaN stays, as the quiet one; what is negative, and -0, become +0."""
    bits, rounded = boundaries(DType.BF16)
    want = np.where((bits & 0x7FFFFFFF) > exact.INFINITY_F32, 0x7FC0, rounded)
    want[(bits >= SIGN) & (want != 0x7FC0)] = 0
    got = through_pass(bits, DType.F32, DType.BF16, relu=True)
    assert np.array_equal(got, want)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (DType.F4E2M1, DType.F8E4M3),
        (DType.F4E2M1, DType.F8E5M2),
        (DType.F8E4M3, DType.BF16),
        (DType.F8E5M2, DType.BF16),
    ],
)
def test_tables_keep_every_value(source: DType, target: DType) -> None:
    before, after = FORMATS[source], FORMATS[target]
    want = [after.rounded(exact.widened(before, int(c))) for c in codes(source)]
    got = through_pass(codes(source), source, target, lookup=target)
    assert np.array_equal(got, unsigned(want, target.bits))
    kept = [exact.widened(after, int(c)) for c in got]
    assert kept == [exact.widened(before, int(c)) for c in codes(source)]


# --- integers ---


@pytest.mark.parametrize("dtype", [DType.I4, DType.I8, DType.I16])
def test_every_integer_is_widened(dtype: DType) -> None:
    want = unsigned([exact.wrapped(int(c), dtype.bits) for c in codes(dtype)])
    assert np.array_equal(through_pass(codes(dtype), dtype, DType.I32, cast=DType.I32), want)


@pytest.mark.parametrize("dtype", [DType.I4, DType.I8, DType.I16])
def test_integers_wrap_when_they_are_narrowed(dtype: DType) -> None:
    """All low halves under some high ones."""
    low = np.arange(1 << 16, dtype=np.uint32)
    values = np.concatenate([low | high << 16 for high in (0, 1, 0x7FFF, 0x8000, 0xFFFF)])
    want = values % np.uint32(1 << dtype.bits)
    assert np.array_equal(through_pass(values, DType.I32, dtype), want)


@pytest.mark.parametrize("dtype", [DType.I4, DType.I8])
def test_a_zero_point_makes_every_code_one_bit_wider(dtype: DType) -> None:
    """i5 and i9 hold every difference, so nothing wraps."""
    top = 1 << (dtype.bits - 1)
    for zero_point in (-top, -1, 0, 1, top - 1):
        differences = [exact.wrapped(int(c), dtype.bits) - zero_point for c in codes(dtype)]
        got = through_pass(codes(dtype), dtype, DType.I32, zero_point=zero_point)
        assert np.array_equal(got, unsigned(differences))


WIDTHS = [31, 30, 24, 16, 8, 1, 0]
"""Bits before the point: the rest of 31 are behind it."""


def convert(values: np.ndarray, alu: Alu, op: Op, width: int) -> np.ndarray:
    source, target = (DType.F32, DType.I32) if op == Op.FTOI else (DType.I32, DType.F32)
    vector = Vector((VectorOp(alu, op, int_width=width),))
    return through_pass(values, source, target, vector=vector)


@pytest.mark.parametrize("width", WIDTHS)
def test_f32_to_fixed_point_at_halves_and_limits(width: int) -> None:
    """Halves, whole numbers and their neighbours; each power of two; where clamping begins."""
    fraction_bits = 31 - width
    halves = [n / 2 for n in range(2048)] + [
        2.0**e + k / 2 for e in range(12, 23) for k in range(9)
    ]
    values = [*halves, *(2.0**e for e in range(-30, 40)), 2.0**31 - 128, 2.0**31 + 256]
    middle = {exact.f32_bits(v * 2.0**-fraction_bits) for v in values}
    near = {b + d for b in middle for d in (-1, 0, 1) if 0 <= b + d} | set(exact.SPECIAL_F32)
    bits = [*sorted(near), *(b | SIGN for b in sorted(near))]
    want = unsigned([exact.to_fixed(b, fraction_bits) for b in bits])
    got = convert(unsigned(bits), Alu.FP_TO_FXP, Op.FTOI, width)
    assert np.array_equal(got, want)


@pytest.mark.parametrize("width", WIDTHS)
def test_fixed_point_to_f32_at_every_kind_of_tie(width: int) -> None:
    """Numbers of 24 bits and less are exact; beyond, midpoints between f32 and their neighbours."""
    values = {*range(-300, 300), -(1 << 31), (1 << 31) - 1}
    for exponent in range(23, 31):
        step = 1 << (exponent - 22)  # two units of the last place
        for mantissa in (0, 1, 2, 3, 0x155555, 0x3FFFFE, 0x3FFFFF):
            middle = (1 << exponent) + mantissa * step + step // 2
            for value in range(middle - step, middle + step + 1, max(1, step // 8)):
                values |= {value - 1, value, value + 1, -value}
    chosen = sorted(v for v in values if -(1 << 31) <= v < 1 << 31)
    want = unsigned([exact.from_fixed(v, 31 - width) for v in chosen])
    got = convert(unsigned(chosen), Alu.FXP_TO_FP, Op.ITOF, width)
    assert np.array_equal(got, want)


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=20), st.integers(0, 31))
def test_any_fixed_point_number(bits: list[int], fraction_bits: int) -> None:
    raw = unsigned(bits)
    fixed = numerics.f32_to_i32(raw.view(np.float32), fraction_bits)
    assert fixed.tolist() == [exact.to_fixed(b, fraction_bits) for b in bits]
    floats = numerics.i32_to_f32(raw.view(np.int32), fraction_bits).view(np.uint32)
    assert floats.tolist() == [exact.from_fixed(exact.wrapped(b, 32), fraction_bits) for b in bits]


EDGES = [0, 1, 2, 3, 1 << 15, 1 << 29, (1 << 30) - 1, 1 << 30, (1 << 31) - 2, (1 << 31) - 1]
PAIRED = [*EDGES, *(-v for v in EDGES[1:]), -(1 << 31)]


@pytest.mark.parametrize("factor", PAIRED)
def test_fixed_point_products_round_halves_up_and_saturate_once(factor: int) -> None:
    """((a · b >> 30) + 1) >> 1, with the one product that is too large made the largest number."""
    vector = Vector(
        (VectorOp(Alu.FXP_MUL, Op.MUL_FXP, y=Source.IMM0),), imm=(factor % (1 << 32), 0, 0)
    )
    want = [min((1 << 31) - 1, ((a * factor >> 30) + 1) >> 1) for a in PAIRED]
    got = through_pass(unsigned(PAIRED), DType.I32, DType.I32, vector=vector)
    assert np.array_equal(got, unsigned(want))
