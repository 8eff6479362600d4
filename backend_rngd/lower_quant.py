"""Operators of `quant`, and what is quantised about a product: its weights and scales."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from xdsl.ir import Attribute, SSAValue

from ..ir import dist, nn, paged, quant
from ..ir.types import bf16, dtype_of, f8e4m3, f8e5m2, shape_of
from .emitter import Activation, Emitter, Ref
from .isa.dtypes import DType
from .isa.layout import Layout, ScaleLayout, one_number
from .kernels.largest import Comparison
from .kernels.linear import Scales
from .kernels.quantize import InputScale, dequantize, looked_up, quantize, token_scales
from .kernels.rescale import load_number
from .value_uses import Linear

WEIGHTS: Mapping[Attribute, DType] = MappingProxyType(
    {bf16: DType.BF16, f8e4m3: DType.F8E4M3, f8e5m2: DType.F8E5M2}
)
Quantizing = quant.DynamicScaleOp | quant.QuantizeOp | quant.DequantizeOp


def weight_dtype(op: Linear) -> DType:
    """The type that the weights have in memory; floats of other types are placed as bf16."""
    return WEIGHTS.get(dtype_of(op.w), DType.BF16)


def scale_names(op: Linear) -> frozenset[str]:
    """Names of the `Scales` that the product has."""
    if not isinstance(op, quant.LinearOp):
        return frozenset()
    if op.x_scale is None:
        return frozenset({"weight"})
    return frozenset({"weight", "tokens" if is_computed(op.x_scale) else "number"})


def is_for_cache(op: quant.QuantizeOp) -> bool:
    """Whether the codes go to the KV cache and nowhere else."""
    return all(isinstance(use.operation, paged.WriteOp) for use in op.y.uses)


def becomes_codes(value: SSAValue) -> bool:
    """Whether a value, perhaps in another shape, is measured or quantised: in all slices."""
    users = [use.operation for use in value.uses]
    return any(
        becomes_codes(op.y) if isinstance(op, nn.ReshapeOp) else isinstance(op, Quantizing)
        for op in users
    )


def is_computed(scale: SSAValue) -> bool:
    """Whether the program computes a scale; others are parameters."""
    return measured_by(scale) is not None


def measured_by(scale: SSAValue) -> quant.DynamicScaleOp | None:
    """What computes a scale, of this rank's part of the tokens if ranks compare theirs."""
    owner = scale.owner
    while isinstance(owner, dist.AllReduceOp) and not owner.is_sum:
        owner = owner.x.owner
    return owner if isinstance(owner, quant.DynamicScaleOp) else None


@dataclass
class ChunkScales:
    """The scales of a chunk's activations: numbers are loaded once, others are computed."""

    emit: Emitter
    parameter: Callable[[SSAValue, Layout], Ref]
    """Where a parameter lies in HBM in a layout."""
    known: dict[SSAValue, InputScale] = field(default_factory=dict)
    tokens: dict[SSAValue, int] = field(default_factory=dict)
    """How many tokens have a scale of their own."""

    def compute(self, op: quant.DynamicScaleOp, x: Activation) -> None:
        """The scale of each token."""
        self.known[op.y] = token_scales(self.emit, x)
        self.tokens[op.y] = x.tokens

    def compare(self, op: dist.AllReduceOp) -> None:
        """The largest of the ranks' scales of each token."""
        assert op.algorithm is not None, "`lower-collectives` chooses one"
        comparison = Comparison(op.algorithm.data, op.mask.value.data)
        tokens = self.tokens[op.y] = self.tokens[op.x]
        largest = comparison.run(self.emit, self.known[op.x].ref, tokens)
        self.known[op.y] = InputScale(largest, per_token=True)

    def of(self, value: SSAValue) -> InputScale:
        """A scale in data memory."""
        if value not in self.known:
            number = self.parameter(value, one_number(shape_of(value)))
            self.known[value] = InputScale(load_number(self.emit, number), per_token=False)
        return self.known[value]

    def apply(self, op: quant.QuantizeOp | quant.DequantizeOp, x: Activation) -> Activation:
        """The operator's result; codes are bytes for a cache, bf16 numbers for all else."""
        if isinstance(op, quant.DequantizeOp):
            return dequantize(self.emit, x, self.of(op.scale))
        codes = quantize(self.emit, x, self.of(op.scale))
        return codes if is_for_cache(op) else looked_up(self.emit, codes)

    def of_product(self, op: Linear, y: Activation) -> Scales | None:
        """The scales of a product."""
        if not isinstance(op, quant.LinearOp):
            return None
        shape = shape_of(op.w_scale)
        layout = ScaleLayout(
            order=y.order, per_slice=y.per_slice, shape=shape, rows=op.rows.value.data
        )
        weight = self.parameter(op.w_scale, layout)
        if op.x_scale is None:
            return Scales(weight)
        scale = self.of(op.x_scale)
        if scale.per_token:
            return Scales(weight, tokens=scale.ref)
        return Scales(weight, number=scale.ref)


def reason_against(op: quant.LinearOp | Quantizing) -> str | None:
    """Why the backend has no kernel for an operator."""
    match op:
        case quant.LinearOp():
            (rows, columns), (_, k) = op.block, shape_of(op.w)
            if columns < k:
                return f"scales of blocks of {rows} x {columns} weights"
            return _reason_against_scale(op.x_scale) if op.x_scale is not None else None
        case quant.DynamicScaleOp():
            return _reason_against_scale(op.y)
        case _:
            return _reason_against_scale(op.scale)


def _reason_against_scale(scale: SSAValue) -> str | None:
    measured = measured_by(scale)
    if measured is not None:
        group, k = measured.group.value.data, shape_of(measured.x)[-1]
        return None if group == k else f"scales of groups of {group} inputs"
    return None if math.prod(shape_of(scale)) == 1 else "stored scales of several inputs"
