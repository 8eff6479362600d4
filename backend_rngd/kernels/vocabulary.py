"""Looking up a table that is cut over the ranks by rows."""

from __future__ import annotations

import math

from ..emitter import Emitter, Ref
from ..isa.dtypes import DType
from ..isa.instructions import Alu, Commit, Context, Counter, Op, Source, Stream, Vector, VectorOp
from ..isa.plan import Memory

WORD_BYTES = 8
"""Of an entry of the lists: an i32, and what fills it up to a unit of data memory."""


def local_rows(
    emit: Emitter, ids: Ref, first_row: Ref, rows: int, tokens: int, scratch: Ref
) -> Ref:
    """A list in HBM of this rank's rows for `tokens` rows of the whole table.

    The rank has rows first_row .. first_row + rows - 1; every other row becomes `rows`, where its
    table has zeros. As an unsigned number without its top bit, a row before the first is larger
    than all others, so one minimum does both sides.
    """
    words = tokens * WORD_BYTES
    table = emit.alloc(Memory.DM, WORD_BYTES, "first_row")
    emit.dma([], WORD_BYTES, first_row, table)
    first = emit.load_vrf(table, 2, "first_row", DType.I32, valid_slices=1)
    own = emit.alloc(Memory.DM, words, "ids")
    emit.dma([], words, ids, own)
    out = emit.alloc(Memory.DM, words, "local_rows")
    run = 2 * math.gcd(4, tokens)
    emit.exec(
        Context.MAIN,
        [Counter(2 * tokens // run, a=4 * run, commit=4 * run)],
        Stream(run),
        a=own,
        dtype=DType.I32,
        vrf=first,
        out=out,
        vector=Vector(
            (
                VectorOp(Alu.FXP_ADD, Op.ISUB, y=Source.VRF),
                VectorOp(Alu.FXP_LSHIFT, Op.SHL, y=Source.IMM0),
                VectorOp(Alu.FXP_RSHIFT, Op.SHR, y=Source.IMM0),
                VectorOp(Alu.CLIP_MIN, Op.IMIN, y=Source.IMM1),
            ),
            imm=(1, rows, 0),
        ),
        commit=Commit(columns=run, column_stride=4),
        valid_slices=1,
    )
    emit.dma([], words, out, scratch)
    return scratch
