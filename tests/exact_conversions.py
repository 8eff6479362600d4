"""The documented conversions in whole numbers, and the inputs at which their results change.

Written from the rules that `runtime_sim/numerics.py` lists, one number at a time, with Python's
integers alone: no code and no library's float type is shared with what is tested. An f32 is given
by its 32 bits; sign · significand · 2**exponent is what they mean.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass

NAN_F32 = 0x7FC00000
INFINITY_F32 = 0x7F800000
SPECIAL_F32 = (
    *(0x00000000, 0x00000001, 0x00400000, 0x007FFFFF, 0x00800000, 0x7F7FFFFF, 0x7F800000),
    *(0x7F800001, 0x7FA00000, 0x7FBFFFFF, 0x7FC00000, 0x7FC00001, 0x7FFFFFFF),
)
"""Zero, subnormals, the ends of the normal range, infinity, NaNs that signal and quiet ones."""


@dataclass(frozen=True)
class Format:
    """A small float: sign, exponent with a bias, `mantissa_bits`; how f32 is rounded to it."""

    bits: int
    mantissa_bits: int
    least_exponent: int
    """Of the smallest normal number."""
    largest: int
    """Code of the largest finite magnitude."""
    overflow: int
    """Code that magnitudes beyond it become."""
    nan: int
    half_up: bool = False
    """Halves round up in magnitude, instead of to the even code."""
    least_normal_only_from_itself: bool = False
    """What is below the smallest normal number does not round up to it."""
    flushes: bool = False
    """Subnormal numbers are zeros, when they are read and when they are results."""

    @property
    def sign(self) -> int:
        return 1 << (self.bits - 1)

    def value(self, code: int) -> float:
        """The number that a magnitude's code means, exactly (its sign left out)."""
        field, mantissa = divmod(code & (self.sign - 1), 1 << self.mantissa_bits)
        if field == 0 and self.flushes:
            return 0.0
        significand = mantissa + (field > 0) * (1 << self.mantissa_bits)
        exponent = self.least_exponent + max(0, field - 1) - self.mantissa_bits
        return math.ldexp(significand, exponent)

    def rounded(self, bits: int) -> int:
        """The code that an f32 becomes."""
        sign, magnitude = self.sign * (bits >> 31), bits & 0x7FFFFFFF
        if magnitude > INFINITY_F32:
            return self.nan
        if magnitude == INFINITY_F32:
            return sign | self.overflow
        significand, exponent = parts(magnitude)
        top = significand.bit_length() - 1 + exponent
        is_normal = significand > 0 and top >= self.least_exponent
        step = (top if is_normal else self.least_exponent) - self.mantissa_bits
        units, rest = divmod(significand << max(0, exponent - step), 1 << max(0, step - exponent))
        twice = 2 * rest - (1 << max(0, step - exponent))
        units += twice > 0 or (twice == 0 and (self.half_up or units % 2 == 1))
        if not is_normal and self.least_normal_only_from_itself:
            units = min(units, (1 << self.mantissa_bits) - 1)
        # A carry out of the mantissa is the next exponent's first code.
        code = units + ((top - self.least_exponent) << self.mantissa_bits if is_normal else 0)
        if self.flushes and code < 1 << self.mantissa_bits:
            return sign
        return sign | (self.overflow if code > self.largest else code)


BF16 = Format(16, 7, -126, largest=0x7F7F, overflow=0x7F80, nan=0x7FC0, flushes=True)
F8E4M3 = Format(8, 3, -6, largest=0x7E, overflow=0x7E, nan=0x7F)
F8E5M2 = Format(
    8,
    2,
    -14,
    largest=0x7B,
    overflow=0x7C,
    nan=0x7E,
    half_up=True,
    least_normal_only_from_itself=True,
)
F4E2M1 = Format(4, 1, 0, largest=7, overflow=7, nan=-1)


def parts(magnitude: int) -> tuple[int, int]:
    """(significand, exponent) of the bits of a finite f32 without its sign."""
    field, mantissa = divmod(magnitude, 1 << 23)
    return mantissa + (field > 0) * (1 << 23), max(1, field) - 150


def f32_bits(value: float) -> int:
    """The bits of a number that f32 has."""
    return int.from_bytes(struct.pack("<f", value), "little")


def boundaries(form: Format) -> Iterator[int]:
    """Positive f32 at which the result may change: codes, midpoints, and both neighbours of each.

    The number after the largest one counts as a code: midway to it magnitudes overflow.
    """
    for code in range(form.largest + 1):
        low, high = form.value(code), form.value(code + 1)
        for value in (low, (low + high) / 2):
            # Past f32's range there is no midpoint's neighbour; infinity is among the specials.
            if value < 2.0**128:
                bits = f32_bits(value)
                yield from (b for b in (bits - 1, bits, bits + 1) if 0 <= b < INFINITY_F32)


def widened(form: Format, code: int) -> int:
    """The bits of the f32 that a code means."""
    magnitude = code & (form.sign - 1)
    sign = 0x80000000 * (code >= form.sign)
    if form in (BF16, F8E5M2) and magnitude == form.overflow:
        return sign | INFINITY_F32
    return sign | f32_bits(form.value(code)) if magnitude <= form.largest else NAN_F32


def to_fixed(bits: int, fraction_bits: int) -> int:
    """f32 to i32 with `fraction_bits` behind the point: halves away from zero, clamped."""
    low, high = -(1 << 31), (1 << 31) - 1
    magnitude = bits & 0x7FFFFFFF
    if magnitude >= INFINITY_F32:  # infinity, or a NaN, which counts by its sign
        return low if bits >> 31 else high
    significand, exponent = parts(magnitude)
    shift = exponent + fraction_bits
    units = significand << shift if shift >= 0 else (significand + (1 << -shift >> 1)) >> -shift
    return max(low, -units) if bits >> 31 else min(high, units)


def from_fixed(value: int, fraction_bits: int) -> int:
    """i32 to the bits of the nearest f32, ties to even."""
    magnitude = abs(value)
    cut = max(0, magnitude.bit_length() - 24)
    units, rest = magnitude >> cut, magnitude & ((1 << cut) - 1)
    units += 2 * rest > 1 << cut or (2 * rest == 1 << cut and cut > 0 and units % 2 == 1)
    return f32_bits(math.ldexp(math.copysign(units, value), cut - fraction_bits))


def wrapped(value: int, bits: int) -> int:
    """The number of `bits` bits that has the low bits of `value`."""
    return (value + (1 << (bits - 1))) % (1 << bits) - (1 << (bits - 1))
