"""Numbers of the scalar machine, one at a time: an int is an i32 pattern, a float an f32 value."""

from __future__ import annotations

import struct

import between
import exact_conversions as exact
import numpy as np
from between import FORMATS, Between, Value

from furiosa_llm.backend_rngd.isa.dtypes import DType
from furiosa_llm.backend_rngd.isa.instructions import Exec, Op

Number = float | int


def wrap(value: int) -> int:
    return (value + (1 << 31)) % (1 << 32) - (1 << 31)


def saturated(value: int) -> int:
    return max(-(1 << 31), min((1 << 31) - 1, value))


def known_int(value: Value) -> int | Between:
    return value if isinstance(value, Between) else as_int(value)


def known_float(value: Value) -> float | Between:
    return value if isinstance(value, Between) else as_float(value)


def as_int(value: Value) -> int:
    assert not isinstance(value, Between), "an f32 that is not known has no bits"
    return value if isinstance(value, int) else struct.unpack("<i", struct.pack("<f", value))[0]


def as_float(value: Value) -> float:
    assert not isinstance(value, Between), "an integer that is not known has no bits"
    return value if isinstance(value, float) else struct.unpack("<f", struct.pack("<i", value))[0]


def load_half(memory: np.ndarray, place: int, dtype: DType) -> Number:
    """An element at a half byte: the low half of a byte comes first."""
    if dtype.bits >= 8:
        assert place % 2 == 0, place
        return load(memory, place // 2, dtype)
    code = int(memory[place // 2]) >> 4 * (place % 2) & 15
    if dtype == DType.F4E2M1:
        return between.code_value(code, dtype)
    return code - 16 if code > 7 else code


def save_half(memory: np.ndarray, place: int, value: int) -> None:
    shift = 4 * (place % 2)
    memory[place // 2] = int(memory[place // 2]) & ~(15 << shift) & 255 | (value & 15) << shift


def load(memory: np.ndarray, at: int, dtype: DType) -> Number:
    assert at >= 0, at
    raw = memory[at : at + dtype.bits // 8].tobytes()
    if dtype == DType.F32:
        return float(struct.unpack("<f", raw)[0])
    if dtype in FORMATS:
        return between.code_value(int.from_bytes(raw, "little"), dtype)
    return int.from_bytes(raw, "little", signed=True)


def cast(value: Number, dtype: DType, to: DType | None) -> Number:
    """The fetch adapter's cast; small floats are already their f32 value."""
    del dtype
    return between.as_number(float(value), DType.BF16) if to == DType.BF16 else value


def result_value(c: Exec, value: Value) -> Value:
    """The last unit may have left another view of the bits than the result's type."""
    if isinstance(value, Between):
        return value
    dtype = c.stream.cast or c.stream.lookup or c.a.dtype
    is_float = dtype.is_float
    for op in c.vector.ops:
        is_float = op.op == Op.ITOF or (is_float and op.op != Op.FTOI)
    return as_float(value) if is_float else as_int(value)


def rectified(value: Value) -> Value:
    if isinstance(value, Between):
        return value if value == between.UNKNOWN else between.corners(np.maximum, [value, 0.0])
    return value if value != value or value > 0 else type(value)(0)


def save(memory: np.ndarray, at: int, value: Number, dtype: DType) -> None:
    assert at >= 0, at
    size = dtype.bits // 8
    if dtype == DType.F32:
        raw = struct.pack("<f", value)
    elif dtype.is_float:
        raw = FORMATS[dtype].rounded(exact.f32_bits(value)).to_bytes(size, "little")
    else:
        raw = (int(value) % (1 << dtype.bits)).to_bytes(size, "little")
    memory[at : at + size] = np.frombuffer(raw, np.uint8)
