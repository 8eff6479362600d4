"""The parameters that a module declares, as what a checkpoint is checked against."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import Attribute

from ..ir.types import bf16, dtype_of, f16, f32, f64, i32, shape_of
from ..ir.verification import parameters
from .parameters import ParameterSpec

NUMPY_DTYPES: dict[Attribute, np.dtype[Any]] = {
    bf16: np.dtype(ml_dtypes.bfloat16),
    f16: np.dtype(np.float16),
    f32: np.dtype(np.float32),
    f64: np.dtype(np.float64),
    i32: np.dtype(np.int32),
}


def declared_parameters(module: ModuleOp) -> list[ParameterSpec]:
    """Name, shape and type of each `nn.parameter`, in the module's order."""
    return [
        ParameterSpec(name, shape_of(op.type), NUMPY_DTYPES[dtype_of(op.type)])
        for name, op in parameters(module).items()
    ]
