"""Operators that treat each feature on its own."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from ..emitter import Activation, Emitter, Ref, bits
from ..isa.dtypes import DType
from ..isa.instructions import (
    Alu,
    Commit,
    Context,
    Counter,
    Op,
    Source,
    Stream,
    Vector,
    VectorOp,
)

RUN = 8
"""Elements per packet: as f32 they fill a flit."""
MAX_COUNT = 65536

BINARY: Mapping[str, VectorOp] = MappingProxyType(
    {
        "nn.add": VectorOp(Alu.FMA, Op.ADD, y=Source.ZIP),
        "nn.sub": VectorOp(Alu.FMA, Op.SUB, y=Source.ZIP),
        "nn.mul": VectorOp(Alu.MUL0, Op.MUL, y=Source.ZIP),
    }
)
UNARY: Mapping[str, tuple[VectorOp, ...]] = MappingProxyType(
    {
        "nn.silu": (
            VectorOp(Alu.FPU, Op.SIGMOID, stash=True),
            VectorOp(Alu.MUL0, Op.MUL, y=Source.STASH),
        ),
        "nn.sigmoid": (VectorOp(Alu.FPU, Op.SIGMOID),),
        "nn.tanh": (VectorOp(Alu.FPU, Op.TANH),),
    }
)


def binary(emit: Emitter, op: str, x: Activation, y: Activation, label: str) -> Activation:
    """x op y in f32, rounded once to their type. Both have one layout."""
    layouts = [(t.order, t.tokens, t.dtype, t.groups) for t in (x, y)]
    assert layouts[0] == layouts[1], (x, y)
    return _pass(emit, x, y.ref, (BINARY[op],), label)


def unary(emit: Emitter, op: str, x: Activation, label: str) -> Activation:
    """op(x) in f32, rounded once to x's type."""
    return _pass(emit, x, None, UNARY[op], label)


SCALAR: Mapping[str, VectorOp] = MappingProxyType(
    {
        "nn.mul": VectorOp(Alu.MUL0, Op.MUL, y=Source.IMM0),
        "nn.div": VectorOp(Alu.FP_DIV, Op.DIV, y=Source.IMM0),
    }
)


def with_scalar(emit: Emitter, op: str, x: Activation, scalar: float, label: str) -> Activation:
    """x op scalar in f32, rounded once to x's type."""
    return _pass(emit, x, None, (SCALAR[op],), label, scalar)


def _pass(
    emit: Emitter,
    x: Activation,
    other: Ref | None,
    ops: tuple[VectorOp, ...],
    label: str,
    scalar: float = 0.0,
) -> Activation:
    out = emit.activation(x.order, x.tokens, label, x.dtype, x.groups)
    step = x.dtype.bytes_for(RUN)
    packets = x.tokens * x.row_bytes // step
    rows = -(-packets // MAX_COUNT)
    while packets % rows:
        rows += 1
    row_bytes = packets // rows * step
    emit.exec(
        Context.MAIN,
        [
            Counter(x.units, a=x.unit_bytes, b=x.unit_bytes if other else 0, commit=x.unit_bytes),
            Counter(rows, a=row_bytes, b=row_bytes if other else 0, commit=row_bytes),
            Counter(packets // rows, a=step, b=step if other else 0, commit=step),
        ],
        Stream(RUN, cast=DType.F32 if x.dtype == DType.BF16 else None, pair=other is not None),
        a=x.ref,
        b=other,
        dtype=x.dtype,
        out=out.ref,
        vector=Vector(ops, imm=(bits(scalar), 0, 0)),
        commit=Commit(columns=RUN, column_stride=step // RUN),
    )
    return out
