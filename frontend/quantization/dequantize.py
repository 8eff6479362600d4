"""What codes and multipliers mean, exactly: the reference that everything else is held to."""

from __future__ import annotations

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
