"""Inputs and outputs: arrays of the host in the layout that a program gives them in HBM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import ml_dtypes
import numpy as np

from .. import errors
from ..backend_rngd.isa.program import TensorIo

Array = np.ndarray
_NUMPY: dict[str, np.dtype[np.generic]] = {
    "i32": np.dtype(np.int32),
    "f32": np.dtype(np.float32),
    "bf16": np.dtype(ml_dtypes.bfloat16),
}


def element_view(io: TensorIo, content: Array) -> Array:
    """The elements of `io` in a region's bytes, of the tensor's shape."""
    *outer, last = io.shape
    strides = [io.element_bytes]
    row = io.row_bytes
    for n in reversed(outer):
        strides.insert(0, row)
        row *= n
    return np.ndarray((*outer, last), _NUMPY[io.dtype], content, 0, tuple(strides))


def check_inputs(expected: Sequence[TensorIo], given: Mapping[str, Array]) -> None:
    """Raises: SIM020 for an input that is missing, unknown, or of another shape or type."""
    names = {io.name for io in expected}
    for name in given:
        if name not in names:
            raise errors.input_mismatch(name, f"the program has only {', '.join(sorted(names))}")
    for io in expected:
        if io.name not in given:
            raise errors.input_mismatch(io.name, "missing")
        array = given[io.name]
        if array.shape != io.shape:
            problem = f"shape {list(array.shape)}, the program expects {list(io.shape)}"
            raise errors.input_mismatch(io.name, problem)
        if array.dtype != _NUMPY[io.dtype]:
            problem = f"dtype {array.dtype}, the program expects {_NUMPY[io.dtype]}"
            raise errors.input_mismatch(io.name, problem)
