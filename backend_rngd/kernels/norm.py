"""RMS normalisation over all features of a token, or over each head's."""

from __future__ import annotations

import math

from ..emitter import Activation, Emitter, Ref, bits
from ..isa.dtypes import DType
from ..isa.instructions import (
    Alu,
    Commit,
    Context,
    Counter,
    Fate,
    Op,
    Placement,
    Reduce,
    Source,
    Stream,
    Vector,
    VectorOp,
)
from ..isa.plan import Memory
from ..isa.rules import VRF_BYTES
from .linear_groups import load_units

RUN = 8
"""bf16 elements per packet: a cast to f32 gives a whole flit."""


def rms_norm(
    emit: Emitter, x: Activation, weight: Ref, eps: float, *, per_head: bool, label: str
) -> Activation:
    """y = x · w / sqrt(mean(x²) + eps), in f32 throughout and rounded once to bf16.

    The mean is over the whole order, or over each of its heads. `weight` is laid out by
    `VectorLayout(x.order)`.
    """
    features = x.order.head_dim if per_head else x.order.features
    span = x.order.padded if per_head else x.ring * x.unit
    group = max(1, span // x.unit)
    """Slices that share one mean."""
    parts = max(1, x.unit // span)
    """Means per slice and token: whole heads in a slice."""
    assert x.groups == 1 or not per_head, "groups of slices hold no mean per head"
    y = emit.activation(x.order, x.tokens, label, groups=x.groups)
    w = load_units(emit, weight, x)
    sums = emit.alloc(Memory.DM, x.tokens * parts * 8, "square_sums")
    _square_sums(emit, x, parts, sums)
    inverse = emit.alloc(Memory.DM, x.tokens * parts * 8, "inverse_rms")
    _inverse_rms(emit, sums, inverse, x.tokens * parts, group, features, eps)
    tokens = min(x.tokens, VRF_BYTES // (8 * parts))
    for first in range(0, x.tokens, tokens):
        _scale(emit, x, y, w, inverse, parts, first, min(tokens, x.tokens - first))
    return y


def _square_sums(emit: Emitter, x: Activation, parts: int, sums: Ref) -> None:
    """Per token and part, the slice's sum of squares as an f32 in 8 bytes."""
    part_bytes = x.row_bytes // parts
    emit.exec(
        Context.MAIN,
        [
            Counter(x.tokens * parts, a=part_bytes, commit=8),
            Counter(x.units, fate=Fate.VSUM, a=x.unit_bytes),
            Counter(part_bytes // (2 * RUN), fate=Fate.VSUM, a=2 * RUN),
        ],
        Stream(RUN, cast=DType.F32),
        a=x.ref,
        out=sums,
        out_dtype=DType.F32,
        vector=Vector(
            (VectorOp(Alu.MUL0, Op.MUL, y=Source.SELF),), reduce=Reduce.ADD, reduce_columns=True
        ),
        commit=Commit(columns=2, column_stride=4),
    )


def _inverse_rms(
    emit: Emitter, sums: Ref, out: Ref, count: int, group: int, features: int, eps: float
) -> None:
    """1 / sqrt(sum over `group` slices / features + eps), for each 8-byte entry."""
    run = 2 * math.gcd(4, count)
    emit.exec(
        Context.MAIN,
        [Counter(2 * count // run, a=4 * run, commit=4 * run)],
        Stream(run),
        a=sums,
        dtype=DType.F32,
        out=out,
        vector=Vector(
            (
                VectorOp(Alu.FMA, Op.FMA, y=Source.IMM0, z=Source.IMM1),
                VectorOp(Alu.FPU, Op.SQRT),
                VectorOp(Alu.FP_DIV, Op.DIV, y=Source.IMM2, reverse=True),
            ),
            imm=(bits(1.0 / features), bits(eps), bits(1.0)),
            slice_reduce=Reduce.ADD if group > 1 else Reduce.NONE,
            slice_group=group,
            slice_placement=Placement.FIRST if group > 1 else Placement.LAST,
        ),
        commit=Commit(columns=run, column_stride=4),
    )


def _scale(
    emit: Emitter,
    x: Activation,
    y: Activation,
    w: Ref,
    inverse: Ref,
    parts: int,
    first: int,
    tokens: int,
) -> None:
    """x · w · inverse for `tokens` tokens; the pair's groups are x and w."""
    vrf = emit.load_vrf(inverse.at(first * parts * 8), 2 * tokens * parts, "inverse_rms")
    part_bytes = x.row_bytes // parts
    emit.exec(
        Context.MAIN,
        [
            Counter(tokens, a=x.row_bytes, vrf=8 * parts, commit=y.row_bytes),
            Counter(parts, a=part_bytes, b=part_bytes, vrf=8, commit=part_bytes),
            Counter(x.units, a=x.unit_bytes, b=x.row_bytes, commit=y.unit_bytes),
            Counter(part_bytes // (2 * RUN), a=2 * RUN, b=2 * RUN, commit=2 * RUN),
        ],
        Stream(RUN, cast=DType.F32, pair=True),
        a=x.ref.at(first * x.row_bytes),
        b=w,
        vrf=vrf,
        out=y.ref.at(first * y.row_bytes),
        out_dtype=DType.BF16,
        vector=Vector(
            (
                VectorOp(Alu.MUL0, Op.MUL, y=Source.ZIP),
                VectorOp(Alu.MUL1, Op.MUL, y=Source.VRF),
            )
        ),
        commit=Commit(columns=RUN, column_stride=2),
    )
