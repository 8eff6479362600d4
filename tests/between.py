"""Numbers of which a command's meaning only says that they lie between two others.

Every unit rounds as its definition says, but for two things: the vector engine's functions are
right to a few units, and sums of f32 may be taken in any order (docs/numerics.md). What follows
from such a number is computed for both of its ends: operations on f32 are monotone in each operand,
rounded or not, so the extremes are at the corners.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import exact_conversions as exact
import numpy as np
from error_bounds import FUNCTION_UNITS, LEAST, U_F32, gamma

from furiosa_llm.backend_rngd.isa.dtypes import DType
from furiosa_llm.backend_rngd.isa.instructions import Op

FORMATS = {
    DType.BF16: exact.BF16,
    DType.F8E4M3: exact.F8E4M3,
    DType.F8E5M2: exact.F8E5M2,
    DType.F4E2M1: exact.F4E2M1,
}
LOW_I32, HIGH_I32 = -(1 << 31), (1 << 31) - 1
GRIDS = (4, 10, 16)
"""Bits behind the point of numbers whose sums are exact while they are small."""


@dataclass(frozen=True)
class Between:
    """An f32 or an integer from `low` to `high`; integers count on without wrapping."""

    low: float | int
    high: float | int


Value = float | int | Between
UNKNOWN = Between(-math.inf, math.inf)
"""Any f32, NaN too."""
ANY_INTEGER = Between(LOW_I32, HIGH_I32)
APPROXIMATE = set(FUNCTION_UNITS) - {Op.SQRT}
"""Functions that need not be rounded right."""


def ends(value: Value) -> tuple[float, float]:
    """As exact numbers, integers too."""
    return (value.low, value.high) if isinstance(value, Between) else (value, value)


def to_f32(value: float) -> float:
    with np.errstate(all="ignore"):
        return float(np.float32(value))


def _span(low: float, high: float) -> Value:
    return low if low == high else Between(low, high)


def corners(function: Callable[..., float], values: Sequence[Value]) -> Value:
    """A monotone function of f32, each operand by itself."""
    found = [function(*corner) for corner in itertools.product(*map(ends, values))]
    if not any(isinstance(v, Between) for v in values):
        return found[0]  # a NaN keeps its sign
    if any(math.isnan(v) for v in found):
        return UNKNOWN
    return _span(min(found), max(found))


def floats(op: Op, unit: Callable[[Op, Sequence[float]], float], values: Sequence[Value]) -> Value:
    """A unit that is rounded right, of operands of which some are not known."""
    if op in (Op.ABSMIN, Op.ABSMAX):
        values = [_magnitude(v) for v in values]
    if op == Op.DIV and ends(values[1])[0] <= 0.0 <= ends(values[1])[1]:
        return UNKNOWN
    return corners(lambda *corner: unit(op, corner), values)


def _magnitude(value: Value) -> Value:
    low, high = sorted(map(abs, ends(value)))
    inside = ends(value)[0] < 0 < ends(value)[1]
    return _span(0.0 if inside else low, high)


def function(op: Op, exactly: Callable[[Op, Sequence[float]], float], x: Value) -> Value:
    """A function that is right to a few units; `exactly` gives it in f64."""
    low, high = ends(x)
    values = [exactly(op, [v]) for v in (low, high)]
    if any(math.isnan(v) for v in values):
        return UNKNOWN if isinstance(x, Between) else to_f32(values[0])
    if op in (Op.SIN, Op.COS):  # not monotone, but not steeper than one
        if not math.isfinite(high - low):
            return UNKNOWN
        values = [values[0] - (high - low), values[0] + (high - low)]
    unit = FUNCTION_UNITS[op] * U_F32
    off = [unit * abs(v) + LEAST if math.isfinite(v) else 0.0 for v in values]
    down = min(v - e for v, e in zip(values, off, strict=True))
    up = max(v + e for v, e in zip(values, off, strict=True))
    return _span(to_f32(down), to_f32(up))


def total(values: Sequence[Value]) -> Value:
    """A sum of f32 in any order."""
    known = [v for v in values if isinstance(v, float)]
    if len(known) == len(values) and (len(known) <= 2 or _is_exact(known)):
        return to_f32(math.fsum(known) if all(map(math.isfinite, known)) else sum(known))
    size = sum(max(map(abs, ends(v))) for v in values)
    if not size < 2.0**127:
        return UNKNOWN
    lost = gamma(len(values) - 1) * size * (1.0 + 2.0**-20) + LEAST
    low, high = (sum(ends(v)[i] for v in values) for i in (0, 1))
    return _span(to_f32(low - lost), to_f32(high + lost))


def _is_exact(values: Sequence[float]) -> bool:
    """Whether every partial sum is a number of f32: all are small multiples of one number."""
    size = sum(map(abs, values))
    return any(
        size < 2.0 ** (24 - grid) and all((v * 2.0**grid).is_integer() for v in values)
        for grid in GRIDS
    )


def integers(op: Op, unit: Callable[[int, int], int], x: Value, y: Value) -> Value:
    """An integer unit behind the conversion from f32; sums that wrap go on counting."""
    wraps = op in (Op.IADD, Op.ISUB)
    if op in (Op.IABSMIN, Op.IABSMAX):
        x, y = _magnitude(x), _magnitude(y)
    pairs = [(int(a), int(b)) for a, b in itertools.product(ends(x), ends(y))]
    inside = all(LOW_I32 <= v <= HIGH_I32 for pair in pairs for v in pair)
    if not wraps and not inside:
        return ANY_INTEGER
    found = [unit(a, b) for a, b in pairs]
    return _span(min(found), max(found))


def clamped(value: Value) -> Value:
    """Saturated to i32."""
    low, high = (max(LOW_I32, min(HIGH_I32, int(v))) for v in ends(value))
    return _span(low, high)


def allows(value: Between, found: float | int, dtype: DType) -> bool:
    """Whether `found` may be what a number between those ends is, as a `dtype`."""
    if not dtype.is_float:
        return (int(found) - int(value.low)) % (1 << dtype.bits) <= value.high - value.low
    if value == UNKNOWN:
        return True
    low, high = (as_number(v, dtype) for v in ends(value))
    return low <= found <= high


def as_number(value: float, dtype: DType) -> float:
    """An f32 rounded to a type of floats, exactly."""
    if dtype == DType.F32:
        return to_f32(value)
    form = FORMATS[dtype]
    code = form.rounded(exact.f32_bits(to_f32(value)))
    return code_value(code, dtype)


def code_value(code: int, dtype: DType) -> float:
    """What a code of a small float means."""
    bits = exact.widened(FORMATS[dtype], code)
    return float(np.uint32(bits).view(np.float32))
