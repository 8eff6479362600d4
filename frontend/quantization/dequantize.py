"""What codes and multipliers mean, exactly: the reference that everything else is held to."""

from __future__ import annotations

from typing import NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ...models.quantization import WeightScheme
from ..checkpoint import Array

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
FNUZ_TOP = 0x7F
"""Code of 240 in e4m3fnuz, where e4m3 has NaN."""


def dequantize(
    codes: Array, scheme: WeightScheme, multipliers: NDArray[np.float32]
) -> NDArray[np.float64]:
    """codes [O, I] times their blocks' multipliers [grid], exact.

    A code has at most 4 significant bits and a multiplier 24, so f64 holds every product.
    """
    rows, columns = scheme.block_of((codes.shape[0], codes.shape[1]))
    row_of = np.arange(codes.shape[0]) // rows
    column_of = np.arange(codes.shape[1]) // columns
    spread = multipliers[row_of[:, None], column_of[None, :]]
    return codes.astype(np.float64) * spread.astype(np.float64)


class Recoded(NamedTuple):
    codes: Array
    """e4m3."""
    multiplier: float
    """What each e4m3 value is multiplied by to give the value of the old code; a power of two."""


def recode_fnuz(codes: Array) -> Recoded | None:
    """The same values as e4m3, None where no e4m3 tensor has all of them.

    Values carry over unless they are odd multiples of 2^-10, the smallest step of e4m3fnuz. Equal
    bits mean half as much in e4m3fnuz as in e4m3, so else the bits carry over with a multiplier of
    1/2, unless there are codes of 240 (NaN in e4m3).
    """
    values = codes.astype(np.float32)
    if np.isnan(values).any():
        return None
    same_values = values.astype(E4M3)
    if (same_values.astype(np.float32) == values).all():
        return Recoded(same_values, 1.0)
    bits = codes.view(np.uint8)
    if ((bits & FNUZ_TOP) == FNUZ_TOP).any():
        return None
    return Recoded(bits.view(E4M3), 0.5)
