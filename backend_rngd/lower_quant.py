"""What is quantised about a product: the type of its weights, and its scales."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from xdsl.ir import Attribute, SSAValue

from ..ir import quant
from ..ir.types import bf16, dtype_of, f8e4m3, f8e5m2, shape_of
from .emitter import Activation, Ref
from .isa.dtypes import DType
from .isa.layout import Layout, ScaleLayout
from .kernels.linear import Scales
from .value_uses import Linear

WEIGHTS: Mapping[Attribute, DType] = MappingProxyType(
    {bf16: DType.BF16, f8e4m3: DType.F8E4M3, f8e5m2: DType.F8E5M2}
)


def weight_dtype(op: Linear) -> DType:
    """The type that the weights have in memory; floats of other types are placed as bf16."""
    return WEIGHTS.get(dtype_of(op.w), DType.BF16)


def scale_names(op: Linear) -> frozenset[str]:
    """Names of the `Scales` that the product has."""
    return frozenset({"weight"} if isinstance(op, quant.LinearOp) else ())


def scales_of(
    op: Linear, y: Activation, parameter: Callable[[SSAValue, Layout], Ref]
) -> Scales | None:
    """The scales of a product; one row of weights may share its own with any others."""
    if not isinstance(op, quant.LinearOp):
        return None
    layout = ScaleLayout(
        order=y.order,
        per_slice=y.per_slice,
        shape=shape_of(op.w_scale),
        rows=op.rows.value.data,
    )
    return Scales(parameter(op.w_scale, layout))
