"""Which keys a query may see: bits that select cached keys and values, and a bias on scores.

Cached keys and values past a sequence's length may hold anything, so they are selected away by
bits before any product (0 · NaN is NaN). Causality is a finite bias on the scores.
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
    Op,
    Source,
    Stream,
    Vector,
    VectorOp,
)
from ..isa.rules import LANES
from .attention_tiling import MASK_KEYS, Rows, Span
from .attention_work import Work

MASKED = -1e30
"""Bias of a score that causality hides; its exponential is exactly zero."""
SIGN_SHIFT = 31
WORDS = 8
"""32-bit words of a packet."""


@dataclass(frozen=True)
class Masks:
    """Masks of the keys from `first` of each slice on; earlier keys are seen by every row."""

    first: int
    select: Ref
    """i32 [key]: all ones for a key that may be read, else zero."""
    bias: Ref | None
    """f32 [key] for a single token: MASKED for a key that it does not see, else zero."""


def many_tokens(work: Work, index: Ref, lengths: Ref, first: int) -> Masks:
    """Masks for many tokens: their bias depends on the token (`token_bias`)."""
    return Masks(first, _select(work, index, lengths, first), None)


def single_token(work: Work, index: Ref, lengths: Ref) -> Masks:
    """Masks for one token, the last of its sequence: it sees all keys below the length."""
    select = _select(work, index, lengths, 0)
    bias = work.alloc(work.turn.keys * 4, "bias")
    work.exec(
        Context.MAIN,
        [Counter(work.turn.keys // WORDS, a=32, commit=32)],
        Stream(WORDS),
        a=select,
        dtype=DType.I32,
        out=bias,
        out_dtype=DType.F32,
        vector=Vector(
            (
                VectorOp(Alu.FXP_TO_FP, Op.ITOF),
                VectorOp(Alu.FMA, Op.FMA, y=Source.IMM0, z=Source.IMM0),
            ),
            imm=(bits(MASKED), 0, 0),
        ),
        commit=Commit(columns=WORDS, column_stride=4),
    )
    return Masks(0, select, bias)


def _select(work: Work, index: Ref, lengths: Ref, first: int) -> Ref:
    """i32 per key from `first` on: all ones if its index is below its sequence's length."""
    keys = work.turn.keys - first
    select = work.alloc(keys * 4, "key_select")
    work.exec(
        Context.MAIN,
        [Counter(keys // WORDS, a=32, commit=32)],
        Stream(WORDS),
        a=index.at(first * 4),
        dtype=DType.I32,
        vrf=work.shared_vrf(lengths, 2, "length"),
        out=select,
        vector=Vector(
            (
                VectorOp(Alu.FXP_ADD, Op.ISUB, y=Source.VRF),
                VectorOp(Alu.FXP_RSHIFT, Op.SAR, y=Source.IMM0),
            ),
            imm=(SIGN_SHIFT, 0, 0),
        ),
        commit=Commit(columns=WORDS, column_stride=4),
    )
    return select


def apply_select(work: Work, masks: Masks, rows: Ref, row_bytes: int, span: Span) -> None:
    """Zero what must not be read of the keys of `span`; `rows` starts at its first key."""
    _, hidden = span.split(masks.first)
    for part in hidden.at_most(MASK_KEYS):
        place = rows.at((part.first - span.first) * row_bytes)
        source = masks.select.at((part.first - masks.first) * 4)
        work.exec(
            Context.MAIN,
            [
                Counter(part.count, a=row_bytes, vrf=4, commit=row_bytes),
                Counter(row_bytes // 32, a=32, commit=32),
            ],
            Stream(WORDS),
            a=place,
            dtype=DType.I32,
            vrf=work.vrf(source, part.count, "key_select", DType.I32),
            out=place,
            vector=Vector((VectorOp(Alu.LOGIC_AND, Op.AND, y=Source.VRF),)),
            commit=Commit(columns=WORDS, column_stride=4),
        )


def token_bias(work: Work, rows: Rows, index: Ref, positions: Ref, span: Span) -> Ref:
    """f32 [key][token] of the span: 0 where the key is not after the token, else MASKED.

    `positions` holds those of the tile's tokens, 8 B each, in the first slice of a group.
    """
    bias = work.alloc(span.count * rows.tokens * 4, "bias")
    work.exec(
        Context.MAIN,
        [
            Counter(span.count, a=4, commit=rows.tokens * 4),
            Counter(rows.tokens // LANES, vrf=8 * LANES, commit=4 * LANES),
        ],
        Stream(LANES, run_step=0),
        a=index.at(span.first * 4),
        dtype=DType.I32,
        vrf=work.shared_vrf(positions, 2 * rows.tokens, "positions"),
        out=bias,
        out_dtype=DType.F32,
        vector=Vector(
            (
                VectorOp(Alu.FXP_ADD, Op.ISUB, y=Source.VRF, reverse=True),
                VectorOp(Alu.FXP_RSHIFT, Op.SAR, y=Source.IMM0),
                VectorOp(Alu.FXP_TO_FP, Op.ITOF),
                VectorOp(Alu.MUL0, Op.MUL, y=Source.IMM1),
            ),
            imm=(SIGN_SHIFT, bits(-MASKED), 0),
            vrf_column=8,
        ),
        commit=Commit(columns=LANES, column_stride=4),
    )
    return bias
