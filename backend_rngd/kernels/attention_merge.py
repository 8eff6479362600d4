"""Joining the results of several segments of keys, each with maxima and sums of its own.

    softmax(s) · v = Σ wᵢ · oᵢ / Σ wᵢ · lᵢ,   wᵢ = exp(mᵢ - max m)

with segment i's maximum mᵢ, sum of exponentials lᵢ and unnormalised result oᵢ.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..emitter import Ref, bits
from ..isa.dtypes import DType
from ..isa.instructions import (
    Alu,
    Commit,
    Context,
    Counter,
    Fate,
    Op,
    Reduce,
    Source,
    Stream,
    Vector,
    VectorOp,
)
from .attention_tiling import Rows
from .attention_work import Work

RUN = 8
INVERT = VectorOp(Alu.FP_DIV, Op.DIV, y=Source.IMM0, reverse=True)
"""1 / x, with 1.0 as the first immediate."""
ONE = (bits(1.0), 0, 0)


@dataclass(frozen=True)
class Partial:
    """Statistics f32 [segment][row] and results f32 [segment][row][head_dim] in memory."""

    maxima: Ref
    sums: Ref
    results: Ref
    segments: int

    def statistics(self, segment: int, rows: Rows) -> tuple[Ref, Ref]:
        """Where a segment's maxima and sums are."""
        skip = segment * rows.count * 4
        return self.maxima.at(skip), self.sums.at(skip)


def weights(work: Work, rows: Rows, partial: Partial, maxima: Ref, sums: Ref) -> Ref:
    """exp(m - maximum) [segment][row]; `maxima` and `sums` get those of all segments, [row]."""
    row_bytes, lanes = rows.count * 4, rows.lanes
    packets = Commit(columns=lanes, column_stride=4)
    by_row = [
        Counter(rows.blocks, a=lanes * 4, vrf=lanes * 4, commit=lanes * 4),
        Counter(partial.segments, fate=Fate.VSUM, a=row_bytes, vrf=row_bytes),
    ]
    work.exec(
        Context.MAIN,
        by_row,
        Stream(lanes),
        a=partial.maxima,
        dtype=DType.F32,
        out=maxima,
        vector=Vector(reduce=Reduce.MAX),
        commit=packets,
    )
    found = work.alloc(partial.segments * row_bytes, "weights")
    work.exec(
        Context.MAIN,
        [
            Counter(partial.segments, a=row_bytes, commit=row_bytes),
            Counter(rows.blocks, a=lanes * 4, vrf=lanes * 4, commit=lanes * 4),
        ],
        Stream(lanes),
        a=partial.maxima,
        dtype=DType.F32,
        vrf=work.vrf(maxima, rows.count, "merged_maxima"),
        out=found,
        vector=Vector(
            (VectorOp(Alu.FMA, Op.SUB, y=Source.VRF), VectorOp(Alu.EXP, Op.EXP)), vrf_column=4
        ),
        commit=packets,
    )
    work.exec(
        Context.MAIN,
        by_row,
        Stream(lanes),
        a=partial.sums,
        dtype=DType.F32,
        vrf=work.vrf(found, partial.segments * rows.count, "weights"),
        out=sums,
        vector=Vector((VectorOp(Alu.MUL0, Op.MUL, y=Source.VRF),), reduce=Reduce.ADD, vrf_column=4),
        commit=packets,
    )
    return found


def shares(work: Work, rows: Rows, partial: Partial) -> Ref:
    """weights / sums, [segment][row]."""
    row_bytes, lanes = rows.count * 4, rows.lanes
    sums = work.alloc(row_bytes, "merged_sums")
    found = weights(work, rows, partial, work.alloc(row_bytes, "merged_maxima"), sums)
    out = work.alloc(partial.segments * row_bytes, "shares")
    work.exec(
        Context.MAIN,
        [
            Counter(partial.segments, a=row_bytes, commit=row_bytes),
            Counter(rows.blocks, a=lanes * 4, vrf=lanes * 4, commit=lanes * 4),
        ],
        Stream(lanes),
        a=found,
        dtype=DType.F32,
        vrf=work.vrf(sums, rows.count, "merged_sums"),
        out=out,
        vector=Vector((VectorOp(Alu.FP_DIV, Op.DIV, y=Source.VRF),), vrf_column=4),
        commit=Commit(columns=lanes, column_stride=4),
    )
    return out


def weighted(
    work: Work, rows: Rows, partial: Partial, factors: Ref, out: Ref, out_dtype: DType
) -> None:
    """Σ factor · results over all segments: [row][head_dim]."""
    row_bytes = 4 * work.head_dim
    size_bytes = rows.count * row_bytes
    out_bytes = out_dtype.bytes_for(work.head_dim)
    work.exec(
        Context.MAIN,
        [
            Counter(rows.count, a=row_bytes, vrf=4, commit=out_bytes),
            Counter(work.head_dim // RUN, a=4 * RUN, commit=out_dtype.bytes_for(RUN)),
            Counter(partial.segments, fate=Fate.VSUM, a=size_bytes, vrf=rows.count * 4),
        ],
        Stream(RUN),
        a=partial.results,
        dtype=DType.F32,
        vrf=work.vrf(factors, partial.segments * rows.count, "shares"),
        out=out,
        out_dtype=out_dtype,
        vector=Vector((VectorOp(Alu.MUL0, Op.MUL, y=Source.VRF),), reduce=Reduce.ADD),
        commit=Commit(columns=RUN, column_stride=out_dtype.bytes_for(1)),
    )
