"""The machine's number conversions, exact and vectorised.

Every conversion that an adapter or the cast engine makes goes through here. The rules are those
of the vendor's published host oracle (docs/numerics.md); silicon is not confirmed.

- bf16: round to nearest even; a subnormal result, or a subnormal that is read, becomes a zero of
  its sign; NaN is 0x7FC0, as f32 0x7FC00000.
- f8e4m3: round to nearest even, subnormals included; saturates at 448; NaN is 0x7F.
- f8e5m2: halves round up in magnitude; a subnormal's mantissa stays at most 3; beyond the range
  infinity; NaN is 0x7E.
- f32 to i32: halves round away from zero; clamps; NaN becomes the largest value of its sign.
- i32 to i16, i8 and i4: wraps. i32 to f32: round to nearest even.
- Fixed-point numbers with `f` bits behind the point: the same after multiplying by 2**f, which is
  exact, and before dividing by it.
- f4e2m1 has the values 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives; tables from it to f8 and
  from f8 to bf16 keep every value (f8 NaN becomes 0x7FC0).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import ml_dtypes
import numpy as np

from ..backend_rngd.isa.dtypes import DType

Array = np.ndarray
TABLE_ELEMENTS = 8192
"""Up to here a table lookup beats computing and then searching for special values."""

NAN_F32 = 0x7FC00000
_RAW: dict[DType, np.dtype[np.generic]] = {
    DType.BF16: np.dtype(np.uint16),
    DType.F32: np.dtype(np.float32),
    DType.I32: np.dtype(np.int32),
    DType.F8E4M3: np.dtype(np.uint8),
    DType.F8E5M2: np.dtype(np.uint8),
    DType.I8: np.dtype(np.int8),
    DType.I16: np.dtype(np.int16),
    DType.I4: np.dtype(np.int8),
    DType.F4E2M1: np.dtype(np.uint8),
}


def raw_dtype(dtype: DType) -> np.dtype[np.generic]:
    """The numpy type that holds elements of `dtype`: bits for small floats.

    4-bit elements have a byte each here; in memory two share one (`nibbles`, `packed_nibbles`).
    """
    return _RAW[dtype]


def decoder(dtype: DType) -> Callable[[Array], Array]:
    """Raw elements -> f32 (float types) or i32 (integer types), C-contiguous and newly made."""
    return _DECODERS[dtype]


def encoder(dtype: DType) -> Callable[[Array], Array]:
    """f32 (float types) or i32 (integer types) -> raw elements."""
    return _ENCODERS[dtype]


# --- bf16 ---


@functools.cache
def _bf16_values() -> Array:
    """f32[65536]: what each code means."""
    bits = np.arange(1 << 16, dtype=np.uint32) << 16
    magnitude = bits & 0x7FFFFFFF
    bits[magnitude < 0x00800000] &= 0x80000000
    bits[magnitude > 0x7F800000] = NAN_F32
    return bits.view(np.float32)


@functools.cache
def _bf16_canonical() -> Array:
    """u16[65536]: the code that is written for each code."""
    return (_bf16_values().view(np.uint32) >> 16).astype(np.uint16)


def _has_special(codes: Array) -> bool:
    """Whether any code is a NaN or a subnormal; zeros are neither."""
    if codes.size == 0:
        return False
    magnitude = codes & np.uint16(0x7FFF)
    if magnitude.max() > 0x7F80:
        return True
    magnitude -= np.uint16(1)  # a zero wraps to the largest value
    return bool(magnitude.min() < 0x7F)


def bf16_to_f32(codes: Array) -> Array:
    """u16 -> f32."""
    if codes.size <= TABLE_ELEMENTS or _has_special(codes):
        values: Array = _bf16_values().take(codes)
        return values
    wide: Array = codes.view(ml_dtypes.bfloat16).astype(np.float32, order="C")
    return wide


def f32_to_bf16(values: Array) -> Array:
    """f32 -> u16."""
    codes: Array = values.astype(ml_dtypes.bfloat16).view(np.uint16)
    if codes.size <= TABLE_ELEMENTS or _has_special(codes):
        codes = _bf16_canonical().take(codes)
    return codes


# --- fp8 ---


@functools.cache
def _f8_values(dtype: DType) -> Array:
    """f32[256]: what each code of an 8-bit float means."""
    codes = np.arange(256, dtype=np.uint8)
    values = codes.view(dtype.numpy).astype(np.float32)
    values[np.isnan(values)] = np.uint32(NAN_F32).view(np.float32)
    return values


def f8e4m3_to_f32(codes: Array) -> Array:
    """u8 -> f32."""
    values: Array = _f8_values(DType.F8E4M3).take(codes)
    return values


def f8e5m2_to_f32(codes: Array) -> Array:
    """u8 -> f32."""
    values: Array = _f8_values(DType.F8E5M2).take(codes)
    return values


def f32_to_f8e4m3(values: Array) -> Array:
    """f32 -> u8."""
    clipped = np.clip(values, np.float32(-448.0), np.float32(448.0))
    codes: Array = clipped.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    codes[np.isnan(values)] = 0x7F
    return codes


def f32_to_f8e5m2(values: Array) -> Array:
    """f32 -> u8."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    magnitude = bits & np.uint32(0x7FFFFFFF)
    # 2 of 23 mantissa bits stay, and the exponent's bias goes from 127 to 15.
    normal = ((magnitude + np.uint32(1 << 20)) >> 21).astype(np.int64) - (112 << 2)
    normal = np.minimum(normal, 0x7C)
    is_normal = magnitude >= 0x38800000
    units = np.where(is_normal, np.float32(0.0), np.abs(values)) * np.float32(1 << 16)
    # In f64: the f32 below a half would become one when a half is added.
    small = np.minimum(np.floor(units.astype(np.float64) + 0.5), 3.0)
    code = np.where(is_normal, normal, small.astype(np.int64))
    code |= (bits >> 24).astype(np.int64) & 0x80
    code[magnitude > 0x7F800000] = 0x7E
    return code.astype(np.uint8)


# --- integers ---


def f32_to_i32(values: Array, fraction_bits: int = 0) -> Array:
    """f32 -> i32, a fixed-point number."""
    wide = values.astype(np.float64) * 2.0**fraction_bits
    rounded = np.trunc(wide + np.copysign(0.5, wide))
    clamped = np.clip(rounded, -(2.0**31), 2.0**31 - 1)
    limit = np.where(np.signbit(values), -(2.0**31), 2.0**31 - 1)
    return np.where(np.isnan(values), limit, clamped).astype(np.int32)


def i32_to_f32(values: Array, fraction_bits: int = 0) -> Array:
    """i32, a fixed-point number -> f32."""
    converted = values.astype(np.float32)
    if fraction_bits:
        converted *= np.float32(2.0**-fraction_bits)
    return converted


def saturate(values: Array) -> Array:
    """i64 -> i32."""
    clipped: Array = np.clip(values, -(1 << 31), (1 << 31) - 1).astype(np.int32)
    return clipped


# --- 4-bit elements ---


def nibbles(content: Array, signed: bool) -> Array:
    """u8[..., n] -> [..., 2n]: the low half of a byte is the first element."""
    parts = np.empty((*content.shape, 2), np.uint8)
    np.bitwise_and(content, 15, out=parts[..., 0])
    np.right_shift(content, 4, out=parts[..., 1])
    if signed:
        parts ^= 8
        parts -= 8
    flat: Array = parts.reshape(*content.shape[:-1], -1).view(np.int8 if signed else np.uint8)
    return flat


def packed_nibbles(values: Array) -> Array:
    """[..., 2n] of i32 -> u8[..., n], wrapping."""
    codes = values.astype(np.uint8) & np.uint8(15)
    packed: Array = codes[..., ::2] | codes[..., 1::2] << np.uint8(4)
    return packed


# --- the fetch adapter's tables ---


@functools.cache
def lookup_table(source: DType, target: DType) -> Array:
    """The code of `target` for each code of `source`."""
    if source == DType.F4E2M1:
        magnitudes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
        values = np.concatenate([magnitudes, -magnitudes])
    else:
        values = _f8_values(source)
    codes: Array = encoder(target)(values)
    return codes


def _copy(values: Array) -> Array:
    return values.copy(order="C")


def _same(values: Array) -> Array:
    return values


def _widen(values: Array) -> Array:
    return values.astype(np.int32, order="C")


def _narrow(dtype: DType) -> Callable[[Array], Array]:
    target = raw_dtype(dtype)
    return lambda values: values.astype(target)


_DECODERS: dict[DType, Callable[[Array], Array]] = {
    DType.BF16: bf16_to_f32,
    DType.F32: _copy,
    DType.I32: _copy,
    DType.F8E4M3: f8e4m3_to_f32,
    DType.F8E5M2: f8e5m2_to_f32,
    DType.I8: _widen,
    DType.I16: _widen,
    DType.I4: _widen,
}
_ENCODERS: dict[DType, Callable[[Array], Array]] = {
    DType.BF16: f32_to_bf16,
    DType.F32: _same,
    DType.I32: _same,
    DType.F8E4M3: f32_to_f8e4m3,
    DType.F8E5M2: f32_to_f8e5m2,
    DType.I8: _narrow(DType.I8),
    DType.I16: _narrow(DType.I16),
    DType.I4: _narrow(DType.I8),
}


def relu(values: Array) -> Array:
    """Commit's rectifier: NaN stays (quiet), all that is negative and -0 become +0."""
    zero = values.dtype.type(0)
    kept = values > zero
    if values.dtype == np.float32:
        kept |= np.isnan(values)
    return np.where(kept, values, zero)


def erf(values: Array) -> Array:
    """The error function, f32 -> f32, within one unit in the last place.

    erf(x) = 2/sqrt(pi) · exp(-x²) · Σ 2^n x^(2n+1) / (1·3···(2n+1)): every term has x's sign, so
    nothing cancels; past |x| = 4 the f32 result is 1.
    """
    x = np.clip(values.astype(np.float64), -4.5, 4.5)
    square = x * x
    term = x.copy()
    total = x.copy()
    for n in range(1, 90):
        term = term * (2.0 * square / (2 * n + 1))
        total += term
    result: Array = (2.0 / np.sqrt(np.pi) * np.exp(-square) * total).astype(np.float32)
    return result
