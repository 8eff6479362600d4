"""What a module declares or computes that a checkpoint is checked against."""

from __future__ import annotations

from xdsl.dialects.builtin import ModuleOp

from ..ir import nn
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


def rotary_frequencies(module: ModuleOp) -> tuple[float, ...] | None:
    """The frequencies by which positions turn; None if none do, or not all by the same ones."""
    ropes = (op for op in module.walk() if isinstance(op, nn.RopeOp))
    found = {tuple(map(float, op.inv_freq.get_values())) for op in ropes}
    return found.pop() if len(found) == 1 else None
