"""Sums over ranks in a block: where ranks put their parts, and who sums what."""

from __future__ import annotations

from xdsl.ir import SSAValue

from ..ir import dist
from ..ir.types import shape_of
from .block_state import BlockState
from .emitter import Activation
from .fusion import ReducedResidual
from .isa.layout import FeatureOrder, features_per_slice, plain
from .kernels import rows
from .kernels.exchange import AllReduce, Piece, Summand, pieces, put


def _reduction(state: BlockState, value: SSAValue) -> AllReduce | None:
    """How a value is summed over ranks, if nothing else becomes of it."""
    users = [use.operation for use in value.uses]
    if len(users) != 1 or not isinstance(users[0], dist.AllReduceOp):
        return None
    op = users[0]
    assert op.algorithm is not None, "`lower-collectives` chooses one"
    residual = any(
        isinstance(fusion, ReducedResidual) and fusion.reduce is op
        for fusion in state.fused.values()
    )
    dtype = state.dtype_of(value)
    return AllReduce(op.algorithm.data, op.mask.value.data, dtype, residual)


def _reserved(
    state: BlockState, value: SSAValue, reduce: AllReduce, order: FeatureOrder, tokens: int
) -> Summand:
    """Where a value is to be written that is summed over ranks."""
    summand = reduce.reserve(state.emit, order, tokens, state.groups)
    state.now.summands[value] = summand
    return summand


def all_reduce(
    state: BlockState, op: dist.AllReduceOp, y: SSAValue, residual: SSAValue | None
) -> Activation:
    """The value `y`: what `op` sums over ranks, and the residual."""
    reduce = _reduction(state, op.x)
    assert reduce is not None, op
    if op.x not in state.now.summands:
        x = state.of(op.x)
        reserved = _reserved(state, op.x, reduce, x.order, x.tokens)
        for source, slots in zip(pieces(x, len(reserved.slots)), reserved.slots, strict=True):
            put(state.emit, source, slots.first)
    summand = state.now.summands.pop(op.x)
    added = () if residual is None else _added(state, residual, reduce)
    out = room(state, y, summand.order, summand.tokens)
    state.now.own_parts[y] = reduce.run(state.emit, summand, added, out)
    return out


def _added(state: BlockState, residual: SSAValue, reduce: AllReduce) -> tuple[Piece, ...]:
    """What this rank adds of a residual: no more than the tokens that it sums."""
    own = state.now.own_parts.get(residual)
    if own and reduce.scatters and state.groups > 1:
        return own
    if residual in state.values or state.groups == 1 or not reduce.scatters:
        return reduce.whole_residual(state.emit, state.of(residual))
    order = plain(shape_of(residual)[-1])
    first = state.chunk.first(state.shape) * features_per_slice(order) * 2
    return reduce.load_residual(
        state.emit,
        state.argument(residual, first),
        order,
        state.chunk.count // state.groups,
        state.groups,
        rows.hidden_stride(order, state.shape.all_tokens),
    )


def room(state: BlockState, value: SSAValue, order: FeatureOrder, tokens: int) -> Activation:
    """Where a product or a sum over ranks is to be written."""
    reduce = _reduction(state, value)
    if reduce is not None:
        return _reserved(state, value, reduce, order, tokens)
    dtype = state.dtype_of(value)
    return state.emit.activation(order, tokens, "product", dtype, state.groups)
