"""What becomes of f32 sums over codes: multipliers of features and of tokens, and biases.

A product multiplies its sums by the scale of each feature itself. What is left is here: a scale
of all inputs joins the scales of the features before the product, scales of tokens and biases
follow it.
"""

from __future__ import annotations

from ..emitter import Emitter, Ref
from ..isa.dtypes import DType
from ..isa.instructions import (
    Alu,
    Commit,
    Context,
    Counter,
    Groups,
    Op,
    Source,
    Stream,
    Vector,
    VectorOp,
)
from ..isa.layout import NUMBER_STRIDE_BYTES
from ..isa.plan import SLICE_ADDRESS_BYTES, Memory
from ..isa.rules import SLICES_PER_PE, VRF_BYTES
from .linear import NUMBER_BYTES, Product

ADD_VRF = VectorOp(Alu.FMA, Op.ADD, y=Source.VRF)
"""Adds what the VRF holds."""
MULTIPLY_VRF = VectorOp(Alu.MUL0, Op.MUL, y=Source.VRF)
"""Multiplies by what the VRF holds."""
RUN = 8
"""f32 elements per packet: a flit."""


def feature_scales(product: Product) -> Ref:
    """f32 in data memory: what the sums of each of a slice's features are multiplied by."""
    emit, scales = product.emit, product.scales
    assert scales is not None
    weight = product.load_scale()
    if scales.number is None:
        return weight
    count = scales.bytes_before(product.y.units * product.y.unit) // 4
    both = emit.alloc(Memory.DM, 4 * count, "scale")
    emit.exec(
        Context.SUB,
        [Counter(count // RUN, a=4 * RUN, commit=4 * RUN)],
        Stream(RUN),
        a=weight,
        dtype=DType.F32,
        vrf=emit.load_vrf(scales.number, NUMBER_BYTES // 4, "input_scale"),
        out=both,
        vector=Vector((MULTIPLY_VRF,)),
        commit=Commit(columns=RUN, column_stride=4),
    )
    return both


def load_number(emit: Emitter, number: Ref) -> Ref:
    """A parameter of one element, in HBM as `one_number`, in the slices' data memory."""
    dm = emit.alloc(Memory.DM, NUMBER_BYTES, "number")
    loop = SLICES_PER_PE, NUMBER_STRIDE_BYTES, SLICE_ADDRESS_BYTES
    emit.dma([loop], NUMBER_BYTES, number, dm)
    return dm


def widened(emit: Emitter, vector: Ref, count: int) -> Ref:
    """`count` bf16 values in data memory as f32."""
    wide = emit.alloc(Memory.DM, 4 * count, "vector")
    emit.exec(
        Context.SUB,
        [Counter(count // RUN, a=2 * RUN, commit=4 * RUN)],
        Stream(RUN, cast=DType.F32),
        a=vector,
        out=wide,
        out_dtype=DType.F32,
        commit=Commit(columns=RUN, column_stride=4),
    )
    return wide


def rescale(product: Product, sums: Ref, tokens: Ref | None, bias: Ref | None) -> None:
    """y = sums · scale of the token + bias; all of them f32, sums [token][C], bias [C]."""
    emit, y = product.emit, product.y
    at_a_time = VRF_BYTES // 2 // NUMBER_BYTES if tokens is not None else y.tokens
    row_bytes = 4 * y.per_slice
    for first in range(0, y.tokens, at_a_time):
        count = min(at_a_time, y.tokens - first)
        vrf = None
        if tokens is not None:
            place = tokens.at(first * NUMBER_BYTES)
            vrf = emit.load_vrf(place, count * NUMBER_BYTES // 4, "token_scales")
        emit.exec(
            Context.MAIN,
            [
                Counter(count, a=row_bytes, vrf=NUMBER_BYTES if vrf else 0, commit=y.row_bytes),
                Counter(
                    y.per_slice // RUN,
                    a=4 * RUN,
                    b=4 * RUN if bias else 0,
                    commit=y.dtype.bytes_for(RUN),
                ),
            ],
            Stream(RUN, pair=bias is not None),
            a=sums.at(first * row_bytes),
            b=bias,
            dtype=DType.F32,
            vrf=vrf,
            out=y.ref.at(first * y.row_bytes),
            out_dtype=y.dtype,
            vector=Vector(_steps(vrf is not None, bias is not None)),
            commit=Commit(columns=RUN, column_stride=y.dtype.bytes_for(1)),
            valid_slices=product.loaded_slices,
        )


def _steps(scaled: bool, biased: bool) -> tuple[VectorOp, ...]:
    groups = Groups.FIRST if biased else Groups.BOTH
    scale = VectorOp(Alu.MUL0, Op.MUL, y=Source.VRF, groups=groups)
    add = VectorOp(Alu.FMA, Op.ADD, y=Source.ZIP)
    return (scale,) * scaled + (add,) * biased
