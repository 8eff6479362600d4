"""Attention over the paged KV cache, for one or many query tokens per sequence.

The slices are divided over (sequence, kv head, split): each split holds a part of the keys, and
the innermost slices of a group combine their maxima and sums over the ring. Keys are the stream of
the first product, query rows stand in the register file; values are the stream of the second,
probabilities stand in the register file.

A tile of query rows walks the keys that it sees in segments, each with a softmax of its own; what
causality hides from all its rows is not walked. The second product divides by the sums when there
is one segment with one tile of values; else `attention_merge` joins the results.

Rows of one (sequence, kv head) are its G query heads times T tokens: row g · T + t, lanes along t;
with one token, lanes along g. Rows are padded to whole lanes with copies of the last head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..emitter import Activation, Emitter, Index, Ref, bits
from ..isa.dtypes import DType
from ..isa.instructions import (
    Alu,
    Commit,
    Context,
    Counter,
    Op,
    Sink,
    Source,
    Stream,
    Switch,
    Topology,
    Vector,
    VectorOp,
)
from ..isa.layout import heads
from ..isa.plan import SLICE_ADDRESS_BYTES, Memory
from . import attention_masks
from .attention_masks import Masks
from .attention_rows import ONES, RowsKernel, Shared, Tile
from .attention_tiling import (
    KEY_TILE_BYTES,
    KEY_UNIT,
    Round,
    Rows,
    Span,
    row_tiles,
    segments,
)
from .attention_work import Work

NO_LOOP = Index(0, None)
STRAIGHT_ROUNDS = 8
"""Rounds alike that are written out."""
LOOP_ROUNDS = 4
"""Rounds of a loop's body where there are more: the loop's fence costs a few percent of them."""


@dataclass(frozen=True)
class Inputs:
    """HBM buffers that attention reads, each at the first sequence and token of the chunk."""

    cache: Ref
    block_table: Ref
    table_row_bytes: int
    lengths: Ref
    length_bytes: int
    positions: Ref
    position_bytes: int
    """Between two tokens; the positions of a sequence follow those of the one before."""
    key_index: dict[tuple[int, int], Ref]
    """`KeyIndex` tables by (splits, keys)."""
    zeros: Ref
    """Zeros, enough for a slice of the output."""


@dataclass
class PagedAttention:
    """softmax(scale · q · kᵀ) · v for a chunk of tokens.

    q is in rotary order (or plain heads) with G query heads to each of `kv_heads`. With several
    tokens, token t of the chunk stands at position `first_token` + t of its sequence, or is
    padding. The result has the heads of q in plain order.
    """

    emit: Emitter
    q: Activation
    kv_heads: int
    sequences: int
    first_token: int
    rounds: list[Round]
    """What the slices work on, one after another (`attention_rounds`)."""
    scale: float
    inputs: Inputs

    def run(self) -> Activation:
        """Emit all rounds; the output's padding positions that products read are zero."""
        order = heads(self.q.order.heads, self.q.order.head_dim, rotary=False)
        out = self.emit.activation(order, self.q.tokens, "attention")
        self._zero_tail(out)
        tables: dict[tuple[int, int], tuple[Ref, Ref]] = {}
        for work in self._works():
            key = work.turn.splits, work.turn.keys
            if key not in tables:
                index = self.emit.alloc(Memory.DM, work.turn.keys * 4, "key_index")
                self.emit.load_slices(self.inputs.key_index[key], index, work.turn.keys * 4)
                tables[key] = index, _ones(self.emit, index)
            _RoundKernel(self, work, out, *tables[key]).run()
        return out

    def _works(self) -> Iterator[Work]:
        """The rounds; many that are alike are a loop."""
        rounds = self.rounds
        while rounds:
            first = rounds[0]
            alike = 1
            while alike < len(rounds) and rounds[alike] == first.later(alike):
                alike += 1
            now, rounds = rounds[:alike], rounds[alike:]
            if alike > STRAIGHT_ROUNDS:
                turns = alike // LOOP_ROUNDS
                for index in self.emit.loop(turns, straight=0):
                    for i in range(LOOP_ROUNDS):
                        yield self._work(first.later(i), index, LOOP_ROUNDS * first.sequences)
                now = now[turns * LOOP_ROUNDS :]
            for turn in now:
                yield self._work(turn, NO_LOOP, 0)

    def _work(self, turn: Round, loop: Index, loop_sequences: int) -> Work:
        return Work(self.emit, turn, self.q.order.padded, loop, loop_sequences)

    def _zero_tail(self, out: Activation) -> None:
        covered, read = out.order.positions, out.slices_read * out.per_slice
        if covered == read:
            return
        # Whole slices only: heads are written later, into the slices that they own.
        first = covered // out.per_slice
        self.emit.dma(
            [(out.slices_read - first, 0, SLICE_ADDRESS_BYTES)],
            out.size_bytes,
            self.inputs.zeros,
            out.ref.at(first * SLICE_ADDRESS_BYTES),
        )


def _ones(emit: Emitter, index: Ref) -> Ref:
    """A packet of bf16 ones, made of any finite integers."""
    ones = emit.alloc(Memory.DM, 2 * ONES, "ones")
    emit.exec(
        Context.MAIN,
        [Counter(ONES // 8, commit=16)],
        Stream(8),
        a=index,
        dtype=DType.I32,
        out=ones,
        out_dtype=DType.BF16,
        vector=Vector(
            (
                VectorOp(Alu.FXP_TO_FP, Op.ITOF),
                VectorOp(Alu.FMA, Op.FMA, y=Source.IMM0, z=Source.IMM1),
            ),
            imm=(bits(0.0), bits(1.0), 0),
        ),
        commit=Commit(columns=8, column_stride=2),
    )
    return ones


@dataclass
class _RoundKernel:
    """The commands of one round; names of buffers say what a slice holds."""

    whole: PagedAttention
    work: Work
    out: Activation
    index: Ref
    ones: Ref

    def __post_init__(self) -> None:
        self.emit, self.turn = self.work.emit, self.work.turn
        self.inputs = self.whole.inputs
        self.head_dim = self.work.head_dim
        self.group = self.whole.q.order.heads // self.whole.kv_heads
        self.tokens = self.whole.q.tokens // self.whole.sequences
        splits = self.turn.splits
        self.switch = Switch(Topology.BROADCAST1, splits) if splits > 1 else Switch()

    def run(self) -> None:
        kept = None
        if self.turn.keys * 4 * self.head_dim <= KEY_TILE_BYTES:
            kept = self._load(Span(0, self.turn.keys), keys=True, values=True)
        shared = Shared(
            self.whole.scale,
            self._load,
            kept,
            self.masks,
            self.index,
            self.ones,
            self.positions,
        )
        for rows in row_tiles(self.group, self.tokens, self.head_dim):
            plan = segments(rows, self._seen(rows), self.head_dim, kept=kept is not None)
            queries = self._fill_queries(rows)
            kernel = RowsKernel(self.work, shared, rows, plan, queries, self._seen_by_all(rows))
            self._move_rows(rows, self.out, kernel.attend(), outwards=True)

    def _seen(self, rows: Rows) -> int:
        """Keys per slice that some row of the tile sees."""
        if self.tokens == 1:
            return self.turn.keys
        return self.turn.up_to(self.whole.first_token + rows.first_token + rows.tokens)

    def _seen_by_all(self, rows: Rows) -> int:
        """Keys per slice that all rows of the tile see."""
        if self.tokens == 1:
            return 0
        return self.turn.within(self.whole.first_token + rows.first_token + 1)

    # --- what is visible ---

    @cached_property
    def positions(self) -> Ref:
        """Of the sequence's tokens in the chunk, 8 B each."""
        row_bytes = self.tokens * self.inputs.position_bytes
        return self.work.per_sequence(self.inputs.positions, row_bytes, row_bytes, "positions")

    @cached_property
    def masks(self) -> Masks:
        lengths = self.work.per_sequence(self.inputs.lengths, self.inputs.length_bytes, 8, "length")
        if self.tokens == 1:
            return attention_masks.single_token(self.work, self.index, lengths, self.positions)
        # Tokens that are no padding see all keys before the chunk.
        first = self.turn.within(self.whole.first_token)
        return attention_masks.many_tokens(self.work, self.index, lengths, first)

    # --- keys and values ---

    def _load(self, span: Span, *, keys: bool, values: bool) -> Tile:
        """Keys, values or both from the cache, what may not be read zero."""
        turn, half = self.turn, 2 * self.head_dim
        start, pitch = (0 if keys else half), half * (keys + values)
        buffer = self.work.alloc(span.count * pitch, "keys_values")
        table = self.work.at(self.inputs.block_table, self.inputs.table_row_bytes)
        runs = [(span.count // KEY_UNIT, 0, KEY_UNIT * pitch, turn.unit * 4)]
        runs += [(KEY_UNIT, 0, pitch, 4)]
        head_bytes = turn.splits * SLICE_ADDRESS_BYTES
        self.emit.gather(
            [
                (turn.sequences, 0, turn.kv_heads * head_bytes, self.inputs.table_row_bytes),
                (turn.kv_heads, 2 * half, head_bytes, 0),
                (turn.splits, 0, SLICE_ADDRESS_BYTES, KEY_UNIT * 4),
                *(runs if turn.splits > 1 else [(span.count, 0, pitch, 4)]),
            ],
            pitch,
            self.inputs.cache.at(turn.first_head * 2 * half + start),
            buffer,
            index=table.at(span.first * turn.splits * 4),
            row_bytes=self.whole.kv_heads * 2 * half,
        )
        attention_masks.apply_select(self.work, self.masks, buffer, pitch, span)
        value_ref = buffer.at(pitch - half) if values else None
        return Tile(span, pitch, buffer if keys else None, value_ref)

    # --- query rows ---

    def _fill_queries(self, rows: Rows) -> Ref:
        """Query rows to the register file of every split of their group."""
        buffer = self.work.alloc(rows.count * 2 * self.head_dim, "queries")
        self._move_rows(rows, self.whole.q, buffer, outwards=False)
        trf = self.emit.trf()
        row_bytes = 2 * self.head_dim
        self.work.exec(
            Context.SUB,
            [
                Counter(rows.blocks, a=rows.lanes * row_bytes, trf=row_bytes),
                Counter(rows.lanes, a=row_bytes, lanes=1),
                Counter(self.head_dim // 16, a=32, trf=32),
            ],
            Stream(16),
            a=buffer,
            out=trf,
            commit=Commit(Sink.TRF, columns=16),
            switch=self.switch,
            trf_lanes=rows.lanes,
        )
        return trf

    def _move_rows(self, rows: Rows, x: Activation, buffer: Ref, *, outwards: bool) -> None:
        """Between tokens [m][C] and rows [row][head_dim] in each group's first slice."""
        turn, order = self.turn, x.order
        run = min(x.per_slice, order.padded)
        # Padded rows repeat the last head: they must be finite, and nobody reads what they give.
        count = rows.heads if outwards or rows.tokens > 1 else rows.count
        axes = np.ix_(
            np.arange(turn.sequences),
            np.arange(turn.kv_heads),
            np.arange(count),
            np.arange(rows.tokens),
            np.arange(order.padded // run),
        )
        sequence, kv_head, head, token, part = axes
        own_head = rows.first_head + np.minimum(head, rows.heads - 1)
        query_head = (turn.first_head + kv_head) * self.group + own_head
        x_slice, in_slice = np.divmod(query_head * order.padded + part * run, x.per_slice)
        m = sequence * self.tokens + rows.first_token + token
        x_byte = m * x.row_bytes + in_slice * 2
        row_slice = (sequence * turn.kv_heads + kv_head) * turn.splits
        row_byte = (head * rows.tokens + token) * 2 * order.padded + part * run * 2
        place = self.work.at(x.ref, self.tokens * x.row_bytes)
        if outwards:
            self.emit.regroup(buffer, row_slice, row_byte, place, x_slice, x_byte, 2 * run)
        else:
            self.emit.regroup(place, x_slice, x_byte, buffer, row_slice, row_byte, 2 * run)
