"""Element types that ports, memories and engines handle."""

from __future__ import annotations

from enum import IntEnum

import ml_dtypes
import numpy as np


class DType(IntEnum):
    """An element type; the value is its code in a record."""

    BF16 = 1
    F32 = 2
    I32 = 3
    F8E4M3 = 4
    F8E5M2 = 5
    I8 = 6
    I16 = 7
    I4 = 8
    F4E2M1 = 9
    """Only a table lookup reads it."""

    @property
    def bits(self) -> int:
        return _BITS[self]

    @property
    def is_float(self) -> bool:
        return self in (
            DType.BF16,
            DType.F32,
            DType.F8E4M3,
            DType.F8E5M2,
            DType.F4E2M1,
        )

    def bytes_for(self, elements: int) -> int:
        """Bytes that `elements` packed values take (two of 4 bits share a byte)."""
        return (elements * self.bits + 7) // 8

    @property
    def numpy(self) -> np.dtype[np.generic]:
        """The numpy type; 4-bit types have none, two of them share a byte."""
        return _NUMPY[self]


_BITS = {
    DType.BF16: 16,
    DType.F32: 32,
    DType.I32: 32,
    DType.F8E4M3: 8,
    DType.F8E5M2: 8,
    DType.I8: 8,
    DType.I16: 16,
    DType.I4: 4,
    DType.F4E2M1: 4,
}

_NUMPY: dict[DType, np.dtype[np.generic]] = {
    DType.BF16: np.dtype(ml_dtypes.bfloat16),
    DType.F32: np.dtype(np.float32),
    DType.I32: np.dtype(np.int32),
    DType.F8E4M3: np.dtype(ml_dtypes.float8_e4m3fn),
    DType.F8E5M2: np.dtype(ml_dtypes.float8_e5m2),
    DType.I8: np.dtype(np.int8),
    DType.I16: np.dtype(np.int16),
}
