"""The parameters that a module declares, as what a checkpoint is checked against."""

from __future__ import annotations

from xdsl.dialects.builtin import ModuleOp

from ..ir.nn_parameters import NUMPY_DTYPES
from ..ir.types import dtype_of, shape_of
from ..ir.verification import parameters
from .parameters import ParameterSpec


def declared_parameters(module: ModuleOp) -> list[ParameterSpec]:
    """Name, shape and type of each `nn.parameter`, in the module's order."""
    return [
        ParameterSpec(name, shape_of(op.type), NUMPY_DTYPES[dtype_of(op.type)])
        for name, op in parameters(module).items()
    ]
