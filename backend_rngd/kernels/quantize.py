"""Activations in codes of 8 bits: their scales, the codes, and what the codes mean.

Codes are e4m3. Products and multiplications take them as the bf16 numbers that they are, which the
lookup table of the main context gives.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..emitter import Activation, Emitter, Ref, bits
from ..isa.dtypes import DType
from ..isa.instructions import (
    Alu,
    Commit,
    Context,
    Counter,
    Fate,
    Gate,
    Op,
    Placement,
    Reduce,
    Source,
    Stream,
    Vector,
    VectorOp,
)
from ..isa.layout import CHUNK
from ..isa.plan import Memory
from ..isa.rules import SLICES_PER_PE, VRF_BYTES
from .linear import NUMBER_BYTES

RUN = 8
"""bf16 elements per packet: a cast to f32 gives a whole flit."""
LARGEST_CODE = 448.0
LEAST_SCALE = 2.0**-126
"""The smallest normal f32. A scale of zero would make zeros NaN; this one gives zeros, and loses
nothing of tokens so small: bf16 has no smaller numbers."""
MAGNITUDE = 0x7FFFFFFF
"""An f32 without its sign."""


@dataclass(frozen=True)
class InputScale:
    """f32 in data memory, each in 8 bytes: one for each token, or one number."""

    ref: Ref
    per_token: bool


def token_scales(emit: Emitter, x: Activation) -> InputScale:
    """max |x| / 448 of each token: in every slice that holds a part of it."""
    maxima = emit.alloc(Memory.DM, x.tokens * NUMBER_BYTES, "magnitudes")
    unused = x.groups == 1 and x.slices_used < SLICES_PER_PE
    emit.exec(
        Context.MAIN,
        [
            Counter(x.tokens, a=x.row_bytes, commit=NUMBER_BYTES),
            Counter(x.units, fate=Fate.VSUM, a=x.unit_bytes),
            Counter(x.row_bytes // (2 * RUN), fate=Fate.VSUM, a=2 * RUN),
        ],
        Stream(RUN, cast=DType.F32),
        a=x.ref,
        out=maxima,
        out_dtype=DType.F32,
        vector=Vector(
            (VectorOp(Alu.LOGIC_AND, Op.AND, y=Source.IMM0),),
            imm=(MAGNITUDE, 0, 0),
            reduce=Reduce.MAX,
            reduce_columns=True,
            # Slices without features may hold anything.
            gates=(Gate(0, SLICES_PER_PE - 1, x.slices_used),) if unused else (),
        ),
        commit=Commit(columns=2, column_stride=4),
    )
    scales = emit.alloc(Memory.DM, x.tokens * NUMBER_BYTES, "token_scales")
    emit.exec(
        Context.MAIN,
        [Counter(x.tokens, a=NUMBER_BYTES, commit=NUMBER_BYTES)],
        Stream(NUMBER_BYTES // 4),
        a=maxima,
        dtype=DType.F32,
        out=scales,
        vector=Vector(
            (
                VectorOp(Alu.FP_DIV, Op.DIV, y=Source.IMM0),
                VectorOp(Alu.CLIP_MAX, Op.MAX, y=Source.IMM1),
            ),
            imm=(bits(LARGEST_CODE), bits(LEAST_SCALE), 0),
            slice_reduce=Reduce.MAX,
            slice_group=x.ring,
            slice_placement=Placement.FIRST,
        ),
        commit=Commit(columns=NUMBER_BYTES // 4, column_stride=4),
    )
    return InputScale(scales, per_token=True)


def quantize(emit: Emitter, x: Activation, scale: InputScale) -> Activation:
    """The codes nearest to x / scale, a byte each; the cast saturates."""
    divide = VectorOp(Alu.FP_DIV, Op.DIV, y=Source.VRF)
    return _scaled(emit, x, scale, divide, "codes", DType.F8E4M3)


def looked_up(emit: Emitter, codes: Activation) -> Activation:
    """Codes as the bf16 numbers that they are."""
    wide = emit.activation(codes.order, codes.tokens, "code_values", groups=codes.groups)
    emit.exec(
        Context.MAIN,
        [
            Counter(codes.units, a=codes.unit_bytes, commit=wide.unit_bytes),
            Counter(codes.tokens * codes.unit // CHUNK, a=CHUNK, commit=2 * CHUNK),
        ],
        Stream(CHUNK, lookup=DType.BF16),
        a=codes.ref,
        dtype=DType.F8E4M3,
        out=wide.ref,
        commit=Commit(columns=CHUNK, column_stride=2),
    )
    return wide


def dequantize(emit: Emitter, codes: Activation, scale: InputScale) -> Activation:
    """codes · scale, rounded once to bf16."""
    multiply = VectorOp(Alu.MUL0, Op.MUL, y=Source.VRF)
    return _scaled(emit, codes, scale, multiply, "dequantized", DType.BF16)


def _scaled(
    emit: Emitter, x: Activation, scale: InputScale, op: VectorOp, label: str, dtype: DType
) -> Activation:
    """x and its scales as the operands of `op`, in f32 and rounded once to `dtype`."""
    y = emit.activation(x.order, x.tokens, label, dtype, x.groups)
    at_a_time = VRF_BYTES // 2 // NUMBER_BYTES if scale.per_token else x.tokens
    step = NUMBER_BYTES if scale.per_token else 0
    for first in range(0, x.tokens, at_a_time):
        count = min(at_a_time, x.tokens - first)
        numbers = (count if scale.per_token else 1) * NUMBER_BYTES // 4
        vrf = emit.load_vrf(scale.ref.at(first * step), numbers, "input_scales")
        emit.exec(
            Context.MAIN,
            [
                Counter(count, a=x.row_bytes, vrf=step, commit=y.row_bytes),
                Counter(x.units, a=x.unit_bytes, commit=y.unit_bytes),
                Counter(x.unit // RUN, a=2 * RUN, commit=dtype.bytes_for(RUN)),
            ],
            Stream(RUN, cast=DType.F32),
            a=x.ref.at(first * x.row_bytes),
            vrf=vrf,
            out=y.ref.at(first * y.row_bytes),
            out_dtype=dtype,
            vector=Vector((op,)),
            commit=Commit(columns=RUN, column_stride=dtype.bytes_for(1)),
        )
    return y
