"""Which operators can work on tokens that groups of slices divide (`token_groups`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from xdsl.dialects import func
from xdsl.ir import Operation, SSAValue

from ..ir import dist, nn, paged, quant
from ..ir.types import shape_of
from .block_needs import Crossing
from .isa.layout import FeatureOrder, features_per_slice, plain
from .isa.rules import SLICES_PER_PE
from .kernels.attention_tiling import dealt_run
from .kernels.cache import collects_in_groups
from .kernels.rope import rotates_in_groups
from .lower_quant import block_of, group_of
from .supported import is_scalar
from .token_groups import GROUPS, divides, unit_positions
from .value_uses import before_codes

RING = SLICES_PER_PE // GROUPS
TOKENS_RANK = 3
"""Dims of a tensor that is no tensor of heads: [B, T, D]."""


def groupable(
    segment: Iterable[Operation],
    orders: Mapping[SSAValue, FeatureOrder],
    crossings: Mapping[SSAValue, Crossing],
    sequences: int,
    tokens: int,
) -> bool:
    """Whether each operator's kernel can work on a chunk's tokens in groups.

    `crossings` are values that earlier segments have left in HBM, as all slices hold them.
    """
    own = set(segment)
    if tokens % (GROUPS * RING):
        return False
    entering = {value for op in own for value in op.operands if value.owner not in own}
    if not all(_keeps_units(crossings[value].order) for value in entering & crossings.keys()):
        return False
    return all(_suits(op, orders, own, sequences, tokens // GROUPS) for op in own)


def _suits(
    op: Operation,
    orders: Mapping[SSAValue, FeatureOrder],
    own: set[Operation],
    sequences: int,
    tokens: int,
) -> bool:
    def order(value: SSAValue) -> FeatureOrder:
        return orders.get(value) or plain(shape_of(value)[-1])

    match op:
        case nn.LinearOp() | quant.LinearOp():
            if block_of(op) is not None:
                return False
            return divides(order(op.x), RING) and _holds(op.y, order(op.y), own)
        case quant.DynamicScaleOp():
            return group_of(op.y) is None and _fills(order(op.x))
        case quant.QuantizeOp() | quant.DequantizeOp():
            return True
        case nn.RmsNormOp():
            return _slices_used(order(op.x)) % RING == 0 and len(shape_of(op.x)) == TOKENS_RANK
        case nn.RopeOp():
            return _keeps_units(order(op.x)) and rotates_in_groups(order(op.x), RING)
        case paged.AttentionOp():
            q = order(op.q.owner.x if isinstance(op.q.owner, nn.RopeOp) else op.q)
            one = shape_of(op.cache)[1] == 1 and sequences == 1
            return one and _keeps_units(q) and dealt_run(q, RING, tokens) is not None
        case paged.WriteOp():
            k = order(before_codes(op.k))
            return _keeps_units(k) and collects_in_groups(k, RING, tokens)
        case nn.BinaryOp():
            return is_scalar(op.b) or shape_of(op.a) == shape_of(op.b)
        case dist.AllReduceOp():
            scatters = op.algorithm is not None and op.algorithm.data == "scatter_gather"
            return not scatters or tokens % (op.mask.value.data + 1) == 0
        case nn.UnaryOp() | nn.ScaleOp() | nn.ReshapeOp() | nn.TransposeOp() | nn.CastOp():
            return True
        case func.ReturnOp():
            # Who reads the result reads all slices, and only positions are written.
            results = [value for value in op.operands if not isinstance(value.owner, paged.WriteOp)]
            return all(_slices_used(order(value)) == SLICES_PER_PE for value in results)
        case _:
            return isinstance(op, nn.SliceOp | nn.ConstantOp)


def _slices_used(order: FeatureOrder) -> int:
    return -(-order.positions // features_per_slice(order))


def _fills(order: FeatureOrder) -> bool:
    """Whether each slice of a group has units of its own, equally many."""
    if not divides(order, RING):
        return False
    units = features_per_slice(order) // unit_positions(order, RING)
    return _slices_used(order) * units % RING == 0


def _holds(value: SSAValue, order: FeatureOrder, own: set[Operation]) -> bool:
    """Whether the slices of a group can hold a product's result, and bring it where it is read."""
    if not divides(order, RING):
        return False
    leaves = any(
        use.operation not in own or isinstance(use.operation, func.ReturnOp) for use in value.uses
    )
    return not leaves or _keeps_units(order)


def _keeps_units(order: FeatureOrder) -> bool:
    """Whether what one of 64 slices would hold stays together in a slice of a group."""
    return divides(order, RING) and unit_positions(order, RING) == features_per_slice(order)
