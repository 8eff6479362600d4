"""Attention over the paged KV cache, for one or many query tokens per sequence.

The slices are divided over (sequence, kv head, split): each split holds a part of the keys, and
the innermost slices of a group combine their maxima and sums over the ring. Keys are the stream of
the first product, query rows stand in the register file; values are the stream of the second,
probabilities stand in the register file.

Cached keys and values past a sequence's length may hold anything, so they are selected away by
bits before any product (0 · NaN is NaN). Causality is then a finite bias on the scores.

Rows of one (sequence, kv head) are its G query heads times T tokens: row g · T + t, lanes along t;
with one token, lanes along g. Rows are padded with zeros to whole lanes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..emitter import Activation, Emitter, Ref, bits
from ..isa.dtypes import DType
from ..isa.instructions import (
    Alu,
    Birth,
    Commit,
    Context,
    Contraction,
    Counter,
    Fate,
    Op,
    Reduce,
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
from ..isa.rules import LANES, TRANSPOSER_ROWS
from .attention_tiling import Round, Rows, attention_rounds, row_tiles

MASKED = -1e30
"""Bias of a score that causality hides; its exponential is exactly zero."""
SIGN_SHIFT = 31


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


@dataclass
class PagedAttention:
    """softmax(scale · q · kᵀ) · v for a chunk of tokens.

    q is in rotary order (or plain heads) with G query heads to each of `kv_heads`; `attended` keys
    per sequence are walked. The result has the heads of q in plain order.
    """

    emit: Emitter
    q: Activation
    kv_heads: int
    sequences: int
    attended: int
    scale: float
    inputs: Inputs
    key_index: dict[tuple[int, int], Ref]
    """`KeyIndex` tables by (splits, keys)."""
    zeros: Ref
    """HBM zeros, enough for a slice of the output or of the padded query rows."""

    def run(self) -> Activation:
        """Emit all rounds; the output's padding positions that products read are zero."""
        order = heads(self.q.order.heads, self.q.order.head_dim, rotary=False)
        out = self.emit.activation(order, self.q.tokens, "attention")
        self._zero_tail(out)
        for turn in attention_rounds(
            self.sequences, self.kv_heads, self.attended, 4 * self.q.order.padded
        ):
            _RoundKernel(self, turn, out).run()
        return out

    def _zero_tail(self, out: Activation) -> None:
        covered, read = out.order.positions, out.slices_read * out.per_slice
        if covered == read:
            return
        # Whole slices only: heads are written later, into the slices that they own.
        first = covered // out.per_slice
        self.emit.dma(
            [(out.slices_read - first, 0, SLICE_ADDRESS_BYTES)],
            out.size_bytes,
            self.zeros,
            out.ref.at(first * SLICE_ADDRESS_BYTES),
        )


class _RoundKernel:
    """The commands of one round; names of buffers say what a slice holds."""

    def __init__(self, whole: PagedAttention, turn: Round, out: Activation) -> None:
        self.emit = whole.emit
        self.whole = whole
        self.turn = turn
        self.out = out
        self.inputs = whole.inputs
        self.head_dim = whole.q.order.padded
        self.group = whole.q.order.heads // whole.kv_heads
        self.tokens = whole.q.tokens // whole.sequences
        self.switch = Switch(Topology.BROADCAST1, turn.splits) if turn.splits > 1 else Switch()

    def run(self) -> None:
        turn = self.turn
        self.index = self.emit.alloc(Memory.DM, turn.keys * 8, "key_index")
        table = self.whole.key_index[turn.splits, turn.keys]
        self.emit.load_slices(table, self.index, turn.keys * 8)
        self.select = self._key_select()
        whole_tile = turn.key_tile == turn.keys
        kept = self._load_keys(0, values=True, keys=True) if whole_tile else None
        for rows in row_tiles(self.group, self.tokens, turn.keys, self.head_dim):
            bias = self._bias(rows)
            scores = self._scores(rows, kept, bias)
            probabilities, sums = self._softmax(rows, scores, bias)
            self._store(rows, self._weighted_values(rows, kept, probabilities), sums)

    # --- what is visible ---

    def _per_slice(self, source: Ref, stride: int, run_bytes: int, label: str) -> Ref:
        """The sequence's own bytes in each of its slices."""
        turn = self.turn
        buffer = self.emit.alloc(Memory.DM, run_bytes, label)
        shared = turn.kv_heads * turn.splits
        self.emit.dma(
            [
                (turn.sequences, stride, shared * SLICE_ADDRESS_BYTES),
                (shared, 0, SLICE_ADDRESS_BYTES),
            ],
            run_bytes,
            source.at(turn.first_sequence * stride),
            buffer,
        )
        return buffer

    def _key_select(self) -> Ref:
        """Per key 8 bytes, the first word all ones if the key is inside its sequence's length."""
        lengths = self._per_slice(self.inputs.lengths, self.inputs.length_bytes, 8, "length")
        vrf = self._load_vrf(lengths, 2, "length", DType.I32)
        select = self.emit.alloc(Memory.DM, self.turn.keys * 8, "key_select")
        self._exec(
            Context.MAIN,
            [Counter(self.turn.keys // 4, a=32, commit=32)],
            Stream(8),
            a=self.index,
            dtype=DType.I32,
            vrf=vrf,
            out=select,
            vector=Vector(
                (
                    VectorOp(Alu.FXP_ADD, Op.ISUB, y=Source.VRF),
                    VectorOp(Alu.FXP_RSHIFT, Op.SAR, y=Source.IMM0),
                ),
                imm=(SIGN_SHIFT, 0, 0),
            ),
            commit=Commit(columns=8, column_stride=4),
        )
        return select

    def _bias(self, rows: Rows) -> Ref:
        """f32 bias: 0 where the key's index is at most the token's position, else MASKED.

        [key][tokens of the tile] for many tokens; 8 bytes per key for one.
        """
        single = rows.tokens == 1
        columns = 2 if single else rows.tokens
        positions = self._per_slice(
            self.inputs.positions.at(rows.first_token * self.inputs.position_bytes),
            self.tokens * self.inputs.position_bytes,
            rows.tokens * 8,
            "positions",
        )
        vrf = self._load_vrf(positions, 2 * rows.tokens, "positions", DType.I32)
        bias = self.emit.alloc(Memory.DM, self.turn.keys * columns * 4, "bias")
        run = 2 if single else LANES
        self._exec(
            Context.MAIN,
            [
                Counter(self.turn.keys, a=8, commit=columns * 4),
                Counter(columns // run, vrf=8 * run, commit=4 * run),
            ],
            Stream(run, run_step=0),
            a=self.index,
            dtype=DType.I32,
            vrf=vrf,
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
                vrf_column=0 if single else 8,
            ),
            commit=Commit(columns=run, column_stride=4),
        )
        return bias

    # --- keys and values ---

    def _load_keys(self, first: int, *, keys: bool, values: bool) -> Ref:
        """A tile of the cache from key `first` of each slice: [key][K | V], unused keys zero."""
        turn, half = self.turn, 2 * self.head_dim
        buffer = self.emit.alloc(Memory.DM, turn.key_tile * 2 * half, "keys_values")
        start, width = (0 if keys else half), half * (keys + values)
        slot_bytes = self.whole.kv_heads * 2 * half
        index = self.inputs.block_table.at(
            turn.first_sequence * self.inputs.table_row_bytes + first * 4
        )
        split_bytes, head_bytes = SLICE_ADDRESS_BYTES, turn.splits * SLICE_ADDRESS_BYTES
        self.emit.gather(
            [
                (turn.sequences, 0, turn.kv_heads * head_bytes, self.inputs.table_row_bytes),
                (turn.kv_heads, 2 * half, head_bytes, 0),
                (turn.splits, 0, split_bytes, turn.keys * 4),
                (turn.key_tile, 0, 2 * half, 4),
            ],
            width,
            self.inputs.cache.at(turn.first_head * 2 * half + start),
            buffer.at(start),
            index=index,
            row_bytes=slot_bytes,
        )
        select = self._load_vrf(
            self.select.at(first * 8), 2 * turn.key_tile, "key_select", DType.I32
        )
        self._exec(
            Context.MAIN,
            [
                Counter(turn.key_tile, a=2 * half, vrf=8, commit=2 * half),
                Counter(width // 32, a=32, commit=32),
            ],
            Stream(8),
            a=buffer.at(start),
            dtype=DType.I32,
            vrf=select,
            out=buffer.at(start),
            vector=Vector((VectorOp(Alu.LOGIC_AND, Op.AND, y=Source.VRF),)),
            commit=Commit(columns=8, column_stride=4),
        )
        return buffer

    def _key_tiles(self) -> range:
        return range(0, self.turn.keys, self.turn.key_tile)

    # --- scores ---

    def _scores(self, rows: Rows, kept: Ref | None, bias: Ref) -> Ref:
        """[key][row] f32: scale · q · k, with the bias of a single token's keys added."""
        queries = self._fill_queries(rows)
        scores = self.emit.alloc(Memory.DM, self.turn.keys * rows.count * 4, "scores")
        for first in self._key_tiles():
            tile = kept or self._load_keys(first, keys=True, values=False)
            self._score_tile(rows, tile, queries, scores.at(first * rows.count * 4), bias, first)
        return scores

    def _score_tile(
        self, rows: Rows, keys: Ref, queries: Ref, scores: Ref, bias: Ref, first: int
    ) -> None:
        single = rows.tokens == 1
        packet = 32 if self.head_dim % 32 == 0 else 16
        row_bytes = rows.count * 4
        vrf = None
        op = VectorOp(Alu.MUL0, Op.MUL, y=Source.IMM0)
        if single:
            vrf = self._load_vrf(bias.at(first * 8), 2 * self.turn.key_tile, "bias")
            op = VectorOp(Alu.FMA, Op.FMA, y=Source.IMM0, z=Source.VRF)
        self._exec(
            Context.MAIN,
            [
                Counter(
                    self.turn.key_tile,
                    a=4 * self.head_dim,
                    vrf=8 if single else 0,
                    commit=row_bytes,
                ),
                Counter(self.head_dim // packet, fate=Fate.MSUM, a=2 * packet, trf=2 * packet),
                Counter(
                    rows.blocks, birth=Birth.REUSE, trf=2 * self.head_dim, commit=rows.lanes * 4
                ),
            ],
            Stream(packet),
            a=keys,
            trf=queries,
            vrf=vrf,
            out=scores,
            out_dtype=DType.F32,
            contraction=Contraction(
                pack=packet // 16,
                lanes=rows.lanes,
                trf_read=2 * packet,
                depth=packet.bit_length() - 1,
            ),
            vector=Vector((op,), imm=(bits(self.whole.scale), 0, 0)),
            commit=Commit(lanes=rows.lanes, lane_stride=4),
        )

    def _fill_queries(self, rows: Rows) -> Ref:
        """Query rows to the register file of every split of their group."""
        buffer = self.emit.alloc(Memory.DM, rows.count * 2 * self.head_dim, "queries")
        if rows.needs_zeros:
            self.emit.dma(
                [(self.turn.slices, 0, SLICE_ADDRESS_BYTES)],
                rows.count * 2 * self.head_dim,
                self.whole.zeros,
                buffer,
            )
        self._move_rows(rows, self.whole.q, buffer, outwards=False)
        trf = self.emit.trf()
        row_bytes = 2 * self.head_dim
        self._exec(
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
        axes = np.ix_(
            np.arange(turn.sequences),
            np.arange(turn.kv_heads),
            np.arange(rows.heads),
            np.arange(rows.tokens),
            np.arange(order.padded // run),
        )
        sequence, kv_head, head, token, part = axes
        query_head = (turn.first_head + kv_head) * self.group + rows.first_head + head
        x_slice, in_slice = np.divmod(query_head * order.padded + part * run, x.per_slice)
        m = (turn.first_sequence + sequence) * self.tokens + rows.first_token + token
        x_byte = m * x.row_bytes + in_slice * 2
        row_slice = (sequence * turn.kv_heads + kv_head) * turn.splits
        row_byte = (head * rows.tokens + token) * 2 * order.padded + part * run * 2
        if outwards:
            self.emit.regroup(buffer, row_slice, row_byte, x.ref, x_slice, x_byte, 2 * run)
        else:
            self.emit.regroup(x.ref, x_slice, x_byte, buffer, row_slice, row_byte, 2 * run)

    # --- softmax ---

    def _softmax(self, rows: Rows, scores: Ref, bias: Ref) -> tuple[Ref, Ref]:
        """Unnormalised probabilities [row][key] in bf16, and their sum per row in 8 bytes."""
        if rows.tokens > 1:
            self._add_bias(rows, scores, bias)
        maxima = self._row_maxima(rows, scores)
        probabilities = self._exponentials(rows, scores, maxima)
        return probabilities, self._row_sums(rows, probabilities)

    def _add_bias(self, rows: Rows, scores: Ref, bias: Ref) -> None:
        """scores [key][head][token] += bias [key][token]."""
        token_bytes = rows.tokens * 4
        self._exec(
            Context.MAIN,
            [
                Counter(self.turn.keys, a=rows.count * 4, b=token_bytes, commit=rows.count * 4),
                Counter(rows.heads, a=token_bytes, commit=token_bytes),
                Counter(rows.tokens // LANES, a=32, b=32, commit=32),
            ],
            Stream(LANES, pair=True),
            a=scores,
            b=bias,
            dtype=DType.F32,
            out=scores,
            vector=Vector((VectorOp(Alu.FMA, Op.ADD, y=Source.ZIP),)),
            commit=Commit(columns=LANES, column_stride=4),
        )

    def _row_maxima(self, rows: Rows, scores: Ref) -> Ref:
        """f32 per row: the largest score over all splits."""
        maxima = self.emit.alloc(Memory.DM, rows.count * 4, "maxima")
        self._exec(
            Context.MAIN,
            [
                Counter(rows.blocks, a=rows.lanes * 4, commit=rows.lanes * 4),
                Counter(self.turn.keys, fate=Fate.VSUM, a=rows.count * 4),
            ],
            Stream(rows.lanes),
            a=scores,
            dtype=DType.F32,
            out=maxima,
            vector=self._across_splits(Vector(reduce=Reduce.MAX), Reduce.MAX),
            commit=Commit(columns=rows.lanes, column_stride=4),
        )
        return maxima

    def _exponentials(self, rows: Rows, scores: Ref, maxima: Ref) -> Ref:
        """exp(score - maximum) as bf16, turned to [row][key]."""
        vrf = self._load_vrf(maxima, rows.count, "maxima")
        row_bytes = self.turn.keys * 2
        probabilities = self.emit.alloc(Memory.DM, rows.count * row_bytes, "probabilities")
        self._exec(
            Context.MAIN,
            [
                Counter(
                    rows.blocks,
                    a=rows.lanes * 4,
                    vrf=rows.lanes * 4,
                    commit=rows.lanes * row_bytes,
                ),
                Counter(self.turn.keys, a=rows.count * 4, commit=2),
            ],
            Stream(rows.lanes),
            a=scores,
            dtype=DType.F32,
            vrf=vrf,
            out=probabilities,
            out_dtype=DType.BF16,
            vector=Vector(
                (
                    VectorOp(Alu.FMA, Op.SUB, y=Source.VRF),
                    VectorOp(Alu.EXP, Op.EXP),
                ),
                vrf_column=4,
            ),
            commit=Commit(
                columns=rows.lanes,
                column_stride=row_bytes,
                transpose_rows=min(rows.lanes, TRANSPOSER_ROWS[16]),
                transpose_columns=8,
            ),
        )
        return probabilities

    def _row_sums(self, rows: Rows, probabilities: Ref) -> Ref:
        """Sum over all keys and splits of the rounded probabilities, f32 in 8 bytes per row."""
        sums = self.emit.alloc(Memory.DM, rows.count * 8, "sums")
        self._exec(
            Context.MAIN,
            [
                Counter(rows.count, a=self.turn.keys * 2, commit=8),
                Counter(self.turn.keys // 8, fate=Fate.VSUM, a=16),
            ],
            Stream(8, cast=DType.F32),
            a=probabilities,
            out=sums,
            out_dtype=DType.F32,
            vector=self._across_splits(Vector(reduce=Reduce.ADD, reduce_columns=True), Reduce.ADD),
            commit=Commit(columns=2, column_stride=4),
        )
        return sums

    def _across_splits(self, vector: Vector, reduce: Reduce) -> Vector:
        if self.turn.splits == 1:
            return vector
        return replace(vector, slice_reduce=reduce, slice_group=self.turn.splits)

    # --- values ---

    def _weighted_values(self, rows: Rows, kept: Ref | None, probabilities: Ref) -> Ref:
        """[row][head_dim] f32: probabilities · values, summed over keys and splits."""
        size_bytes = rows.count * self.head_dim * 4
        trf = self._fill_probabilities(rows, probabilities)
        total: Ref | None = None
        for first in self._key_tiles():
            tile = kept or self._load_keys(first, keys=False, values=True)
            part = self.emit.alloc(Memory.DM, size_bytes, "weighted_values")
            self._weigh_tile(rows, tile, trf.at(first * 2), part)
            if total is not None:
                self._accumulate(total, part, size_bytes)
            total = total or part
        assert total is not None
        return total

    def _fill_probabilities(self, rows: Rows, probabilities: Ref) -> Ref:
        trf = self.emit.trf()
        row_bytes = self.turn.keys * 2
        self._exec(
            Context.SUB,
            [
                Counter(rows.blocks, a=rows.lanes * row_bytes, trf=row_bytes),
                Counter(rows.lanes, a=row_bytes, lanes=1),
                Counter(self.turn.keys // 8, a=16, trf=16),
            ],
            Stream(8),
            a=probabilities,
            out=trf,
            commit=Commit(Sink.TRF, columns=8),
            trf_lanes=rows.lanes,
        )
        return trf

    def _weigh_tile(self, rows: Rows, tile: Ref, trf: Ref, out: Ref) -> None:
        """Each packet holds neighbouring values of one key; the keys are summed in time."""
        packet = 32 if self.head_dim % 32 == 0 else 16
        at_once = next(n for n in (4, 2, 1) if rows.blocks % n == 0)
        row_bytes, block_bytes = self.turn.keys * 2, rows.lanes * self.head_dim * 4
        self._exec(
            Context.MAIN,
            [
                Counter(
                    rows.blocks // at_once, trf=at_once * row_bytes, commit=at_once * block_bytes
                ),
                Counter(self.head_dim // packet, a=2 * packet, commit=4 * packet),
                Counter(self.turn.key_tile, fate=Fate.MSUM, a=4 * self.head_dim, trf=2),
                Counter(at_once, birth=Birth.REUSE, trf=row_bytes, commit=block_bytes),
            ],
            Stream(packet),
            a=tile.at(2 * self.head_dim),
            trf=trf,
            out=out,
            out_dtype=DType.F32,
            contraction=Contraction(pack=packet // 16, lanes=rows.lanes, trf_read=2, depth=0),
            vector=self._across_splits(Vector(), Reduce.ADD),
            commit=Commit(
                lanes=rows.lanes,
                lane_stride=self.head_dim * 4,
                columns=packet,
                column_stride=4,
            ),
        )

    def _accumulate(self, total: Ref, part: Ref, size_bytes: int) -> None:
        self._exec(
            Context.MAIN,
            [Counter(size_bytes // 32, a=32, b=32, commit=32)],
            Stream(8, pair=True),
            a=total,
            b=part,
            dtype=DType.F32,
            out=total,
            vector=Vector((VectorOp(Alu.FMA, Op.ADD, y=Source.ZIP),)),
            commit=Commit(columns=8, column_stride=4),
        )

    def _store(self, rows: Rows, values: Ref, sums: Ref) -> None:
        """values / sums, rounded once to bf16, back to the features of the tokens."""
        vrf = self._load_vrf(sums, 2 * rows.count, "sums")
        result = self.emit.alloc(Memory.DM, rows.count * 2 * self.head_dim, "attended")
        self._exec(
            Context.MAIN,
            [
                Counter(rows.count, a=4 * self.head_dim, vrf=8, commit=2 * self.head_dim),
                Counter(self.head_dim // 8, a=32, commit=16),
            ],
            Stream(8),
            a=values,
            dtype=DType.F32,
            vrf=vrf,
            out=result,
            out_dtype=DType.BF16,
            vector=Vector((VectorOp(Alu.FP_DIV, Op.DIV, y=Source.VRF),)),
            commit=Commit(columns=8, column_stride=2),
        )
        self._move_rows(rows, self.out, result, outwards=True)

    def _exec(
        self, context: Context, counters: list[Counter], stream: Stream, **ports: Any
    ) -> None:
        self.emit.exec(context, counters, stream, valid_slices=self.turn.slices, **ports)

    def _load_vrf(self, source: Ref, elements: int, label: str, dtype: DType = DType.F32) -> Ref:
        return self.emit.load_vrf(source, elements, label, dtype, self.turn.slices)
