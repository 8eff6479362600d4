"""Activations in codes of 8 bits: their scales, the codes, and what the codes mean.

Codes are e4m3. Products and multiplications take them as the bf16 numbers that they are, which the
lookup table of the main context gives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..emitter import Activation, Emitter, Ref, bits
from ..isa.dtypes import DType
from ..isa.instructions import (
    Alu,
    Birth,
    Commit,
    Context,
    Counter,
    Fate,
    Generate,
    Op,
    Placement,
    Reduce,
    Source,
    Stream,
    Switch,
    Topology,
    Vector,
    VectorOp,
)
from ..isa.layout import CHUNK, FeatureOrder, features_per_slice
from ..isa.plan import SLICE_ADDRESS_BYTES, Memory
from ..isa.rules import SLICES_PER_PE, VRF_BYTES
from .linear import NUMBER_BYTES
from .linear_groups import load_units

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
    """f32 in data memory, each in 8 bytes: some for each token, or one number."""

    ref: Ref
    per_token: bool
    parts: int = 1
    """A token's numbers in a slice, for as many equal runs of its positions there."""


@dataclass(frozen=True)
class ColumnScale:
    """f32 in data memory [unit][position]: a number for each of a slice's positions."""

    ref: Ref


Scale = InputScale | ColumnScale


def token_scales(emit: Emitter, x: Activation) -> InputScale:
    """max |x| / 448 of each token: in every slice that holds a part of it."""
    maxima = _magnitudes(emit, x, 1)
    return InputScale(_divided(emit, maxima, x.tokens, x.ring), per_token=True)


def group_scales(emit: Emitter, x: Activation, group: int) -> InputScale:
    """max |x| / 448 of each `group` neighbours of a token, in the slices that hold them."""
    parts, ring = group_cut(x.order, group)
    maxima = _magnitudes(emit, x, parts)
    if parts == 1:
        return InputScale(_divided(emit, maxima, x.tokens, ring), per_token=True)
    if ring == 1:
        scales = _divided(emit, maxima, x.tokens * parts, 1)
        return InputScale(scales, per_token=True, parts=parts)
    scales = _straddling(emit, x, maxima, group // CHUNK, ring)
    return InputScale(scales, per_token=True, parts=parts)


def group_cut(order: FeatureOrder, group: int) -> tuple[int, int]:
    """Runs of a slice's positions that have a scale each, and neighbouring slices that share them.

    Either groups are whole parts of a slice, or whole slices are parts of a group; or else the
    runs are chunks, and the slices are as many as hold whole groups together.
    """
    per_slice = features_per_slice(order)
    ring = group // math.gcd(per_slice, group)
    if ring == 1:
        return per_slice // group, 1
    return (1 if group % per_slice == 0 else per_slice // CHUNK), ring


def has_groups(order: FeatureOrder, group: int) -> bool:
    """Whether the slices that share groups can exchange them: positions are features, in chunks."""
    _, ring = group_cut(order, group)
    dense = order.positions == order.features and not order.rotary
    return dense and group % CHUNK == 0 and ring & (ring - 1) == 0 and ring <= SLICES_PER_PE


def _magnitudes(emit: Emitter, x: Activation, parts: int) -> Ref:
    """max |x| of each token and part of a slice's positions, in 8 bytes; zero in unused slices."""
    count = x.tokens * parts
    maxima = emit.alloc(Memory.DM, count * NUMBER_BYTES, "magnitudes")
    if _slices(x) < SLICES_PER_PE:
        _zero(emit, maxima, count)
    part_bytes = x.row_bytes // parts
    emit.exec(
        Context.MAIN,
        [
            Counter(count, a=part_bytes, commit=NUMBER_BYTES),
            Counter(x.units, fate=Fate.VSUM, a=x.unit_bytes),
            Counter(part_bytes // (2 * RUN), fate=Fate.VSUM, a=2 * RUN),
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
        ),
        commit=Commit(columns=2, column_stride=4),
        valid_slices=_slices(x),
    )
    return maxima


def _slices(x: Activation) -> int:
    """Slices that hold features, or zeros beside them; nobody has written to the others."""
    return x.slices_read if x.groups == 1 else SLICES_PER_PE


def _zero(emit: Emitter, numbers: Ref, count: int) -> None:
    run = NUMBER_BYTES // 4 * math.gcd(4, count)
    emit.exec(
        Context.SUB,
        [Counter(count * NUMBER_BYTES // (4 * run), commit=4 * run)],
        Stream(run),
        a=None,
        dtype=DType.F32,
        out=numbers,
        commit=Commit(columns=run, column_stride=4),
        generate=Generate(),
    )


TO_SCALE = (
    VectorOp(Alu.FP_DIV, Op.DIV, y=Source.IMM0),
    VectorOp(Alu.CLIP_MAX, Op.MAX, y=Source.IMM1),
)
"""A magnitude to a scale."""
TO_SCALE_NUMBERS = bits(LARGEST_CODE), bits(LEAST_SCALE), 0


def _divided(emit: Emitter, maxima: Ref, count: int, slices: int) -> Ref:
    """Scales of the largest of as many slices' magnitudes."""
    scales = emit.alloc(Memory.DM, count * NUMBER_BYTES, "input_scales")
    emit.exec(
        Context.MAIN,
        [Counter(count, a=NUMBER_BYTES, commit=NUMBER_BYTES)],
        Stream(NUMBER_BYTES // 4),
        a=maxima,
        dtype=DType.F32,
        out=scales,
        vector=Vector(
            TO_SCALE,
            imm=TO_SCALE_NUMBERS,
            slice_reduce=Reduce.MAX if slices > 1 else Reduce.NONE,
            slice_group=slices,
            slice_placement=Placement.FIRST if slices > 1 else Placement.LAST,
        ),
        commit=Commit(columns=NUMBER_BYTES // 4, column_stride=4),
    )
    return scales


def _straddling(emit: Emitter, x: Activation, maxima: Ref, chunks: int, ring: int) -> Ref:
    """The scale of each chunk, where groups of `chunks` begin inside slices.

    The slices of a ring tell each other their chunks' magnitudes, all of them find the groups'
    scales, and each takes those of its own chunks.
    """
    own, of_ring = x.per_slice // CHUNK, ring * x.per_slice // CHUNK
    own_bytes, ring_bytes = own * NUMBER_BYTES, of_ring * NUMBER_BYTES
    number, alone = Stream(NUMBER_BYTES // 4), Commit(columns=NUMBER_BYTES // 4, column_stride=4)
    told = emit.alloc(Memory.DM, x.tokens * ring_bytes, "magnitudes")
    emit.exec(
        Context.SUB,
        [
            Counter(x.tokens, a=own_bytes, commit=ring_bytes),
            Counter(own, a=NUMBER_BYTES, commit=NUMBER_BYTES),
            Counter(ring, birth=Birth.SLICE, slices=1, commit=own_bytes),
        ],
        number,
        a=maxima,
        dtype=DType.F32,
        out=told,
        switch=Switch(Topology.BROADCAST01, ring),
        commit=alone,
    )
    groups = of_ring // chunks
    found = emit.alloc(Memory.DM, x.tokens * groups * NUMBER_BYTES, "group_scales")
    emit.exec(
        Context.MAIN,
        [
            Counter(x.tokens * groups, a=chunks * NUMBER_BYTES, commit=NUMBER_BYTES),
            Counter(chunks, fate=Fate.VSUM, a=NUMBER_BYTES),
        ],
        number,
        a=told,
        dtype=DType.F32,
        out=found,
        vector=Vector(TO_SCALE, imm=TO_SCALE_NUMBERS, reduce=Reduce.MAX),
        commit=alone,
    )
    spread = emit.alloc(Memory.DM, x.tokens * ring_bytes, "group_scales")
    emit.exec(
        Context.SUB,
        [
            Counter(x.tokens * groups, a=NUMBER_BYTES, commit=chunks * NUMBER_BYTES),
            Counter(chunks, commit=NUMBER_BYTES),
        ],
        number,
        a=found,
        dtype=DType.F32,
        out=spread,
        commit=alone,
    )
    scales = emit.alloc(Memory.DM, x.tokens * own_bytes, "input_scales")
    emit.dma(
        [
            (SLICES_PER_PE // ring, ring * SLICE_ADDRESS_BYTES, ring * SLICE_ADDRESS_BYTES),
            (ring, SLICE_ADDRESS_BYTES + own_bytes, SLICE_ADDRESS_BYTES),
            (x.tokens, ring_bytes, own_bytes),
        ],
        own_bytes,
        spread,
        scales,
    )
    return scales


def quantize(emit: Emitter, x: Activation, scale: Scale) -> Activation:
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
        valid_slices=_slices(codes),
    )
    return wide


def dequantize(emit: Emitter, codes: Activation, scale: Scale) -> Activation:
    """codes · scale, rounded once to bf16; codes are bytes or bf16 numbers."""
    multiply = VectorOp(Alu.MUL0, Op.MUL, y=Source.VRF)
    return _scaled(emit, codes, scale, multiply, "dequantized", DType.BF16)


def load_columns(emit: Emitter, scale: Ref, x: Activation) -> ColumnScale:
    """Scales of x's columns, in HBM as a `ScaleLayout` of its order.

    Padding has a scale of zero there, and no zero is divided by zero here.
    """
    stored = load_units(emit, scale, x, DType.F32)
    count = x.units * x.unit
    least = emit.alloc(Memory.DM, 4 * count, "column_scales")
    emit.exec(
        Context.SUB,
        [Counter(count // RUN, a=4 * RUN, commit=4 * RUN)],
        Stream(RUN),
        a=stored,
        dtype=DType.F32,
        out=least,
        vector=Vector(
            (VectorOp(Alu.CLIP_MAX, Op.MAX, y=Source.IMM0),), imm=(bits(LEAST_SCALE), 0, 0)
        ),
        commit=Commit(columns=RUN, column_stride=4),
    )
    return ColumnScale(least)


def _scaled(
    emit: Emitter, x: Activation, scale: Scale, op: VectorOp, label: str, dtype: DType
) -> Activation:
    """x and its scales as the operands of `op`, in f32 and rounded once to `dtype`."""
    y = emit.activation(x.order, x.tokens, label, dtype, x.groups)
    if isinstance(scale, ColumnScale):
        for part in _parts_of_columns(x):
            _with_columns(emit, x, scale.ref, op, y, part)
    else:
        _with_numbers(emit, x, scale, op, y)
    return y


def _with_numbers(
    emit: Emitter, x: Activation, scale: InputScale, op: VectorOp, y: Activation
) -> None:
    parts, step = scale.parts, scale.parts * NUMBER_BYTES if scale.per_token else 0
    at_a_time = max(1, VRF_BYTES // 2 // step) if scale.per_token else x.tokens
    part = x.unit // parts
    for first in range(0, x.tokens, at_a_time):
        count = min(at_a_time, x.tokens - first)
        numbers = (count * step or NUMBER_BYTES) // 4
        vrf = emit.load_vrf(scale.ref.at(first * step), numbers, "input_scales")
        emit.exec(
            Context.MAIN,
            [
                Counter(count, a=x.row_bytes, vrf=step, commit=y.row_bytes),
                Counter(x.units, a=x.unit_bytes, commit=y.unit_bytes),
                Counter(
                    parts,
                    a=x.dtype.bytes_for(part),
                    vrf=NUMBER_BYTES,
                    commit=y.dtype.bytes_for(part),
                ),
                Counter(part // RUN, a=x.dtype.bytes_for(RUN), commit=y.dtype.bytes_for(RUN)),
            ],
            Stream(RUN, cast=DType.F32),
            a=x.ref.at(first * x.row_bytes),
            dtype=x.dtype,
            vrf=vrf,
            out=y.ref.at(first * y.row_bytes),
            out_dtype=y.dtype,
            vector=Vector((op,)),
            commit=Commit(columns=RUN, column_stride=y.dtype.bytes_for(1)),
            valid_slices=_slices(x),
        )


@dataclass(frozen=True)
class _Columns:
    """Some units of a slice and, of each of them, some positions."""

    first_unit: int
    units: int
    first: int
    positions: int


def _parts_of_columns(x: Activation) -> list[_Columns]:
    """All columns, in parts whose scales fit half of the VRF."""
    most = VRF_BYTES // 2 // 4
    units, positions = max(1, most // x.unit), min(x.unit, most)
    return [
        _Columns(unit, min(units, x.units - unit), first, min(positions, x.unit - first))
        for unit in range(0, x.units, units)
        for first in range(0, x.unit, positions)
    ]


def _with_columns(
    emit: Emitter, x: Activation, scales: Ref, op: VectorOp, y: Activation, part: _Columns
) -> None:
    first = part.first_unit * x.unit + part.first
    count = part.units * part.positions
    vrf = emit.load_vrf(scales.at(4 * first), count, "column_scales")
    emit.exec(
        Context.MAIN,
        [
            Counter(x.tokens, a=x.row_bytes, commit=y.row_bytes),
            Counter(part.units, a=x.unit_bytes, vrf=4 * part.positions, commit=y.unit_bytes),
            Counter(
                part.positions // RUN,
                a=x.dtype.bytes_for(RUN),
                vrf=4 * RUN,
                commit=y.dtype.bytes_for(RUN),
            ),
        ],
        Stream(RUN, cast=DType.F32),
        a=x.ref.at(part.first_unit * x.unit_bytes + x.dtype.bytes_for(part.first)),
        dtype=x.dtype,
        vrf=vrf,
        out=y.ref.at(part.first_unit * y.unit_bytes + y.dtype.bytes_for(part.first)),
        out_dtype=y.dtype,
        vector=Vector((op,), vrf_column=4),
        commit=Commit(columns=RUN, column_stride=y.dtype.bytes_for(1)),
        valid_slices=_slices(x),
    )
