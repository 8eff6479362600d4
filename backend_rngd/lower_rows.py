"""Rows that a block takes from HBM by their numbers, and rows that it leaves there."""

from __future__ import annotations

from xdsl.dialects import func
from xdsl.ir import Operation, SSAValue

from ..ir import dist, nn, paged
from ..ir.types import shape_of
from .block_needs import Result, Scratch
from .block_state import BlockState
from .emitter import Activation, Ref
from .isa.layout import RankNumbers, RowTableLayout, features_per_slice, plain
from .isa.rules import SLICES_PER_PE
from .kernels import rows
from .kernels.vocabulary import local_rows
from .tokens import WORD_BYTES


def lower_embedding(state: BlockState, op: nn.EmbeddingOp) -> Activation:
    """The table's rows that the token ids name."""
    count, width = shape_of(op.table)
    order = plain(width)
    layout = RowTableLayout(order=order, per_slice=features_per_slice(order), rows=count)
    ids, id_bytes = _rows(state, op.ids, count)
    table = state.parameter(op.table, layout)
    return rows.embedding(state.emit, table, order, ids, id_bytes, state.chunk.count)


def _rows(state: BlockState, ids: SSAValue, count: int) -> tuple[Ref, int]:
    """The list of the table's rows, and the bytes of an entry; the table has `count` rows."""
    if not isinstance(ids.owner, dist.LocalRowsOp):
        row_bytes = state.shape.row_bytes("input_ids")
        return state.input(ids, state.shape.id_bytes, row_bytes), state.shape.id_bytes
    op, tokens = ids.owner, state.chunk.count
    assert state.shape.id_bytes == WORD_BYTES, "ids that become data have a word each"
    firsts = tuple(_first_row(op.cut, rank) for rank in range(op.cut.ranks))
    return local_rows(
        state.emit,
        state.input(op.ids, WORD_BYTES, state.shape.row_bytes("input_ids")),
        state.need(RankNumbers(numbers=firsts, count=WORD_BYTES // 4)),
        count - 1,
        tokens,
        state.need(Scratch("local_rows", tokens * WORD_BYTES)),
    ), WORD_BYTES


def lower_last_token(state: BlockState, op: paged.LastTokenOp) -> Activation:
    """The row of each sequence's last token, from the hidden state in HBM."""
    if state.shape.tokens == 1:
        return state.of(op.x)
    return rows.last_rows(
        state.emit,
        state.argument(op.x),
        plain(shape_of(op.x)[-1]),
        state.shape.sequences,
        state.shape.tokens,
        state.chunk.first_sequence,
        state.chunk.sequences,
        state.argument(op.lengths),
        WORD_BYTES,
    )


def lower_return(state: BlockState, op: func.ReturnOp) -> None:
    """Store the function's results: the hidden state in its plain order, or logits."""
    for number, value in enumerate(op.operands):
        if isinstance(value.owner, paged.WriteOp):
            continue  # written in place
        if isinstance(value.owner, Operation):
            state.emit.location = value.owner.location
        x = state.of(value)
        logits = number in state.logits
        tokens_per_sequence = 1 if shape_of(value)[1] == 1 else state.shape.tokens
        all_tokens = state.shape.sequences * tokens_per_sequence
        first = (
            state.chunk.first_sequence
            if tokens_per_sequence == 1
            else state.chunk.first(state.shape)
        )
        result = Result(number, x.order, all_tokens, logits)
        if logits:
            start = first * SLICES_PER_PE * x.row_bytes
            rows.store_logits(state.emit, x, state.need(result, start), 0)
        else:
            # Who loads it knows no order but this one.
            assert x.order == plain(x.order.features), x.order
            out = state.need(result, first * x.row_bytes)
            rows.store_rows(state.emit, x, out, all_tokens, 0)


def leave_crossings(state: BlockState, own: set[Operation]) -> None:
    """Store what later segments read."""
    for value, x in list(state.values.items()):
        here = isinstance(value.owner, Operation) and value.owner in own
        read = any(use.operation not in own for use in value.uses)
        if not (here and read) or isinstance(value.owner, func.ReturnOp):
            continue
        state.store_crossing(value, x)


def _first_row(cut: dist.CutAttr, rank: int) -> int:
    """The row of the whole table that a rank's part begins with; it may have none."""
    pieces = cut.pieces(rank)
    assert all(begin == 0 for begin, _ in pieces), "a rank has one run of rows"
    return pieces[0][1][0] if pieces else cut.whole_size
