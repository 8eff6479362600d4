"""One block: a function's operators for a part of its tokens, as commands.

Activations stand in data memory between operators; the hidden state comes from HBM and goes back
there. A block's HBM arguments are collected on the way: what they stand for is in `needs`, and
`tile` binds them for each call.
"""

from __future__ import annotations

from xdsl.dialects import func
from xdsl.ir import Operation, Region

from ..ir import dist, nn, paged, quant
from ..ir.types import shape_of
from .block_needs import LoweredBlock
from .block_state import BlockState
from .emitter import Activation
from .fusion import Fusion, keys_values
from .isa.layout import VectorLayout
from .kernels import elementwise
from .kernels.norm import rms_norm
from .lower_attention import lower_attention, lower_rope, lower_write
from .lower_fused import lower_fused
from .lower_products import lower_linear
from .lower_rows import leave_crossings, lower_embedding, lower_last_token, lower_return
from .lower_sums import all_reduce
from .rngd import BlockOp, WorkOp
from .supported import is_scalar
from .tokens import Chunk
from .value_uses import HEADS_RANK, useful_macs


def lower_block(state: BlockState) -> LoweredBlock:
    """Emit the block; `state` comes without values, and is used up."""
    ops = list(state.body.ops) if state.segment is None else state.segment
    fused = state.fused
    if state.groups > 1:
        fused = fused | keys_values(state.body)
    later = {part for fusion in fused.values() for part in fusion.parts[:-1]}
    for op in ops:
        for chunk in state.chunks:
            _count_work(state, op, chunk)
    # Operator by operator, so that one chunk's long products hide another's short commands.
    for op in ops:
        for of_chunk in state.states:
            state.now, state.emit.location = of_chunk, op.location
            if op in fused:
                _lower_fused(state, op, fused[op])
            elif op not in later:
                _lower(state, op)
    if state.segment is not None:
        for of_chunk in state.states:
            state.now = of_chunk
            leave_crossings(state, set(ops))
    return LoweredBlock(BlockOp(state.name, Region(state.block)), state.needs, state.starts)


def _count_work(state: BlockState, op: Operation, chunk: Chunk) -> None:
    macs = useful_macs(op, state.shape, chunk)
    if macs:
        state.emit.location = op.location
        state.emit.append(WorkOp(macs))


def _lower(state: BlockState, op: Operation) -> None:
    match op:
        case nn.EmbeddingOp():
            state.values[op.y] = lower_embedding(state, op)
        case nn.LinearOp() | quant.LinearOp():
            state.values[op.y] = lower_linear(state, op)
        case quant.DynamicScaleOp():
            state.now.scales.compute(op, state.of(op.x))
        case quant.QuantizeOp() | quant.DequantizeOp():
            state.values[op.y] = state.now.scales.apply(op, state.of(op.operands[0]))
        case nn.RmsNormOp():
            state.values[op.y] = _rms_norm(state, op)
        case nn.RopeOp():
            state.values[op.y] = lower_rope(state, op)
        case nn.ScaleOp():
            x, factor = state.of(op.x), op.factor.value.data
            state.values[op.y] = elementwise.with_scalar(state.emit, "nn.mul", x, factor, "scale")
        case paged.WriteOp():
            lower_write(state, op)
        case paged.AttentionOp():
            state.values[op.y] = lower_attention(state, op)
        case paged.LastTokenOp():
            state.values[op.y] = lower_last_token(state, op)
        case dist.AllReduceOp() if op.is_sum:
            state.values[op.y] = all_reduce(state, op, op.y, None)
        case dist.AllReduceOp():
            state.now.scales.compare(op)
        case dist.LocalRowsOp():
            pass  # made where the table is read
        case nn.ReshapeOp() | nn.TransposeOp() | nn.CastOp():
            state.values[op.y] = state.of(op.x)
        case nn.SliceOp() | nn.ConstantOp():
            pass  # part of a parameter, or a scalar: named where it is used
        case func.ReturnOp():
            lower_return(state, op)
        case nn.BinaryOp() if is_scalar(op.b):
            assert isinstance(op.b.owner, nn.ConstantOp)
            x, scalar = state.of(op.a), float(op.b.owner.to_numpy().reshape(()))
            state.values[op.y] = elementwise.with_scalar(state.emit, op.name, x, scalar, "scale")
        case nn.BinaryOp():
            x, y = state.of(op.a), state.of(op.b)
            label = op.name.removeprefix("nn.")
            state.values[op.y] = elementwise.binary(state.emit, op.name, x, y, label)
        case _:
            assert isinstance(op, nn.UnaryOp), op
            label = op.name.removeprefix("nn.")
            state.values[op.y] = elementwise.unary(state.emit, op.name, state.of(op.x), label)


def _lower_fused(state: BlockState, op: Operation, fusion: Fusion) -> None:
    if not lower_fused(state, op, fusion):
        for part in fusion.parts:
            state.emit.location = part.location
            _lower(state, part)


def _rms_norm(state: BlockState, op: nn.RmsNormOp) -> Activation:
    x = state.of(op.x)
    per_head = len(shape_of(op.x)) == HEADS_RANK
    layout = VectorLayout(order=x.order, per_slice=x.per_slice, repeat=per_head)
    weight = state.parameter(op.weight, layout)
    return rms_norm(state.emit, x, weight, op.eps.value.data, per_head=per_head, label="normalised")
