"""Operators of `quant`, and what is quantised about a product: its weights and scales."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from xdsl.ir import Attribute, Block, SSAValue

from ..ir import dist, nn, paged, quant
from ..ir.types import bf16, dtype_of, f8e4m3, f8e5m2, shape_of
from .emitter import Activation, ActivationShape, Emitter, Ref
from .isa.dtypes import DType
from .isa.layout import (
    CHUNK,
    BlockScaleLayout,
    FeatureOrder,
    Layout,
    ScaleLayout,
    features_per_slice,
    heads,
    one_number,
    plain,
    scale_cells,
)
from .isa.rules import VRF_BYTES
from .kernels.largest import Comparison
from .kernels.linear import Scales
from .kernels.quantize import (
    ColumnScale,
    InputScale,
    Scale,
    dequantize,
    group_scales,
    has_groups,
    load_columns,
    looked_up,
    quantize,
    token_scales,
)
from .kernels.rescale import load_number
from .tiling_search import ProductKey
from .value_uses import HEADS_RANK, Linear

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
    if op.x_scale is None or group_of(op.x_scale):
        return frozenset({"weight"})
    return frozenset({"weight", "tokens" if is_computed(op.x_scale) else "number"})


def block_of(op: Linear) -> tuple[int, int] | None:
    """Rows and columns of weights that share a scale, if several scales meet in a sum."""
    if not isinstance(op, quant.LinearOp) or op.block[1] >= shape_of(op.w)[1]:
        return None
    return op.block


def is_for_cache(op: quant.QuantizeOp) -> bool:
    """Whether the codes go to the KV cache and nowhere else."""
    return all(isinstance(use.operation, paged.WriteOp) for use in op.y.uses)


def is_computed(scale: SSAValue) -> bool:
    """Whether the program computes a scale; others are parameters."""
    return measured_by(scale) is not None


def measured_by(scale: SSAValue) -> quant.DynamicScaleOp | None:
    """What computes a scale, of this rank's part of the tokens if ranks compare theirs."""
    owner = scale.owner
    while isinstance(owner, dist.AllReduceOp) and not owner.is_sum:
        owner = owner.x.owner
    return owner if isinstance(owner, quant.DynamicScaleOp) else None


def is_of_columns(scale: SSAValue, codes: SSAValue) -> bool:
    """Whether a stored scale has a number for each column of what it belongs to."""
    shape = shape_of(scale)
    return not is_computed(scale) and shape != (1,) and shape == shape_of(codes)[-1:]


def stand_for_values(scale: SSAValue, codes: SSAValue) -> bool:
    """Whether codes are kept as what they mean: no sum over them has one scale."""
    return group_of(scale) is not None or is_of_columns(scale, codes)


def group_of(scale: SSAValue) -> int | None:
    """The neighbours of a token that share a scale, if a token has several."""
    if not isinstance(scale.owner, quant.DynamicScaleOp):
        return None
    group = scale.owner.group.value.data
    return group if group < shape_of(scale.owner.x)[-1] else None


@dataclass
class ChunkScales:
    """The scales of a chunk's activations: numbers are loaded once, others are computed.

    Codes of a token with several scales, of groups or of columns, are multiplied by them at once:
    sums over several of them have no scale of their own. So such codes stand for what they mean,
    in bf16.
    """

    emit: Emitter
    parameter: Callable[[SSAValue, Layout], Ref]
    """Where a parameter lies in HBM in a layout."""
    known: dict[SSAValue, InputScale] = field(default_factory=dict)
    tokens: dict[SSAValue, int] = field(default_factory=dict)
    """How many tokens have a scale of their own."""
    columns: dict[tuple[SSAValue, FeatureOrder], ColumnScale] = field(default_factory=dict)

    def compute(self, op: quant.DynamicScaleOp, x: Activation) -> None:
        """The scale of each token, or of each group in a token."""
        group = group_of(op.y)
        scale = group_scales(self.emit, x, group) if group else token_scales(self.emit, x)
        self.known[op.y] = scale
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
        scale, mean_values = self._of(op, x), stand_for_values(op.scale, op.y)
        if isinstance(op, quant.DequantizeOp):
            return x if mean_values else dequantize(self.emit, x, scale)
        codes = quantize(self.emit, x, scale)
        if mean_values:
            return dequantize(self.emit, codes, scale)
        return codes if is_for_cache(op) else looked_up(self.emit, codes)

    def _of(self, op: quant.QuantizeOp | quant.DequantizeOp, x: Activation) -> Scale:
        if not is_of_columns(op.scale, op.y):
            return self.of(op.scale)
        key = op.scale, x.order
        if key not in self.columns:
            shape = shape_of(op.scale)
            layout = ScaleLayout(order=x.order, per_slice=x.per_slice, shape=shape, rows=1)
            self.columns[key] = load_columns(self.emit, self.parameter(op.scale, layout), x)
        return self.columns[key]

    def of_product(self, op: Linear, key: ProductKey, y: Activation) -> Scales | None:
        """The scales of a product."""
        if not isinstance(op, quant.LinearOp):
            return None
        weight = self.parameter(op.w_scale, _scale_layout(op, key, y.per_slice))
        cells = key.shape.cells
        if op.x_scale is None or group_of(op.x_scale):
            return Scales(weight, cells=cells)
        scale = self.of(op.x_scale)
        if scale.per_token:
            return Scales(weight, tokens=scale.ref, cells=cells)
        return Scales(weight, number=scale.ref, cells=cells)


def _scale_layout(op: quant.LinearOp, key: ProductKey, per_slice: int) -> Layout:
    rows, shape = op.rows.value.data, shape_of(op.w_scale)
    if key.block is None:
        return ScaleLayout(order=key.out, per_slice=per_slice, shape=shape, rows=rows)
    return BlockScaleLayout(
        out=key.out,
        into=key.x,
        per_slice=per_slice,
        k_padded=key.shape.k,
        parts=key.shape.parts,
        shape=shape,
        rows=rows,
        columns=op.columns.value.data,
    )


def reason_against(op: quant.LinearOp | Quantizing) -> str | None:
    """Why the backend has no kernel for an operator."""
    match op:
        case quant.LinearOp():
            reason = _reason_against_blocks(op)
            if reason is None and op.x_scale is not None:
                reason = _reason_against_scale(op.x_scale, op.x)
            return reason
        case quant.DynamicScaleOp():
            return _reason_against_groups(op)
        case quant.QuantizeOp():
            return _reason_against_scale(op.scale, op.y)
        case _:
            return _reason_against_scale(op.scale, op.codes)


def _reason_against_blocks(op: quant.LinearOp) -> str | None:
    block, (n, k) = block_of(op), shape_of(op.w)
    if block is None:
        return None
    into, rows = _order_read(op.x) or plain(k), plain(n)
    x, per_slice = ActivationShape(into, 1), features_per_slice(rows)
    cells = scale_cells(rows, into, per_slice, x.slices_read * x.per_slice, 1, block)
    if cells is not None and 4 * cells.group_numbers <= VRF_BYTES * cells.row_numbers:
        return None
    what = f"scales of blocks of {block[0]} x {block[1]} weights, where "
    if cells is not None:
        return f"{what}the {k} inputs are cut into {cells.count} sums"
    of_heads = f", in heads of {into.head_dim}," if into.heads > 1 else ""
    return f"{what}pieces of {CHUNK} of the {k} inputs{of_heads} belong to two blocks"


def _order_read(value: SSAValue) -> FeatureOrder | None:
    """The order of an input that comes from attention; None for others, which are plain."""
    while not isinstance(value.owner, Block) and value.owner.operands:
        op = value.owner
        if isinstance(op, paged.AttentionOp):
            *_, count, head_dim = shape_of(op.y)
            return heads(count, head_dim, rotary=False)
        if isinstance(op, Linear | nn.RmsNormOp | nn.EmbeddingOp | dist.AllReduceOp):
            return None
        value = op.operands[0]
    return None


def _reason_against_scale(scale: SSAValue, codes: SSAValue) -> str | None:
    measured, made = measured_by(scale), codes.owner
    if measured is not None and group_of(measured.y) and scale is not measured.y:
        return "scales of groups that lie across ranks"
    if measured is None and math.prod(shape_of(scale)) > 1:
        if not is_of_columns(scale, codes):
            return "stored scales of several tokens"
        if len(shape_of(codes)) == HEADS_RANK:
            return "stored scales of the columns of each head"
    scales = {scale, made.scale} if isinstance(made, quant.QuantizeOp) else {scale}
    if len(scales) > 1 and any(stand_for_values(each, codes) for each in scales):
        return "codes of several scales that were made by others"
    if not isinstance(made, quant.QuantizeOp) and stand_for_values(scale, codes):
        return "codes of several scales that no operator makes"
    return None


def _reason_against_groups(op: quant.DynamicScaleOp) -> str | None:
    """Why no slices could find the scales of groups of an activation."""
    group, order = group_of(op.y), _order_read(op.x) or plain(shape_of(op.x)[-1])
    if group is None or has_groups(order, group):
        return None
    per_slice = features_per_slice(order)
    return f"scales of groups of {group} inputs, of which a slice holds {per_slice}"
