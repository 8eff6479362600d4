"""Attention over the paged KV cache, for one or many query tokens per sequence.

The slices are divided over (sequence, kv head, split): each split holds a part of the keys, and
the innermost slices of a group combine their maxima and sums over the ring. Keys are the stream of
the first product, query rows stand in the register file; values are the stream of the second,
probabilities stand in the register file.

A tile of query rows walks the keys that it sees in segments, each with a softmax of its own; what
causality hides from all its rows is not walked. With one segment the second product divides by the
sums; else `attention_merge` joins the results.

Rows of one (sequence, kv head) are its G query heads times T tokens: row g · T + t, lanes along t;
with one token, lanes along g. Rows are padded to whole lanes with copies of the last head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from ..emitter import Activation, Emitter, Index, Ref, bits
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
from ..isa.layout import heads
from ..isa.plan import SLICE_ADDRESS_BYTES, Memory
from . import attention_masks
from .attention_masks import Masks
from .attention_moves import RowMoves
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
from .linear import NUMBER_BYTES

NO_LOOP = Index(0, None)
STRAIGHT_ROUNDS = 4
"""Rounds alike that are written out."""
LOOP_ROUNDS = 4
"""Rounds of a loop's body where there are more: the loop's fence costs a few percent of them."""


@dataclass(frozen=True)
class CacheScales:
    """What codes of keys and of values are times: f32 numbers, the same in every slice's memory."""

    keys: Ref
    values: Ref


@dataclass(frozen=True)
class Inputs:
    """HBM buffers that attention reads, each at the first sequence and token of the chunk."""

    cache: Ref
    cache_dtype: DType
    scales: CacheScales | None
    """Of a cache of codes."""
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
    padding; a single token is the last of its sequence. The result has the heads of q in plain
    order.

    One sequence's tokens may be dealt to groups of slices, a tile of rows to each in turn: the
    groups then work as on so many sequences, with keys of their own and tiles side by side.
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
        """Emit all rounds; the output's padding positions that are read are zero."""
        order = heads(self.q.order.heads, self.q.order.head_dim, rotary=False)
        out = self.emit.activation(
            order, self.q.tokens, "attention", groups=self.q.groups, deal=self.q.deal
        )
        self._zero_tail(out)
        tables = {key: self._table(*key) for key in self.inputs.key_index}
        for work in self._works():
            _RoundKernel(self, work, out, *tables[work.turn.splits, work.turn.keys]).run()
        return out

    def _table(self, splits: int, keys: int) -> tuple[Ref, Ref]:
        """The index of each slice's keys, and a packet of ones."""
        index = self.emit.alloc(Memory.DM, keys * 4, "key_index")
        self.emit.load_slices(self.inputs.key_index[splits, keys], index, keys * 4)
        return index, _ones(self.emit, index)

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
        dtype = self.inputs.cache_dtype
        return Work(self.emit, turn, self.q.order.padded, dtype, loop, loop_sequences)

    def _zero_tail(self, out: Activation) -> None:
        covered, slices = out.order.positions, out.slices_read
        if covered == slices * out.per_slice:
            return
        # Whole slices only: heads are written later, into the slices that they own.
        first = covered // out.per_slice
        self.emit.dma(
            [(slices - first, 0, SLICE_ADDRESS_BYTES)],
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
        self.tokens = self.whole.q.tokens * self.whole.q.groups // self.whole.sequences
        self.moves = RowMoves(self.work, self.whole.q, self.out, self.group, self.tokens)

    def run(self) -> None:
        kept = None
        if self.turn.keys * self.work.pitch <= KEY_TILE_BYTES:
            kept = self._load(Span(0, self.turn.keys))
        shared = Shared(
            self.whole.scale,
            self._cache_scale("keys"),
            self._cache_scale("values"),
            self._load,
            kept,
            self.masks,
            self.index,
            self.ones,
            self.positions,
        )
        for rows in row_tiles(self.group, self.tokens, self.head_dim):
            pitch = None if kept else self.work.pitch
            plan = segments(rows, self._seen(rows), self.head_dim, pitch)
            queries = self.moves.fill(rows)
            kernel = RowsKernel(self.work, shared, rows, plan, queries, self._seen_by_all(rows))
            self.moves.store(rows, kernel.attend())

    def _cache_scale(self, name: Literal["keys", "values"]) -> Ref | None:
        """The scale of codes in the VRF."""
        scales = self.inputs.scales
        if scales is None:
            return None
        scale = scales.keys if name == "keys" else scales.values
        return self.work.vrf(scale, NUMBER_BYTES // 4, f"{name}_scale")

    def _seen(self, rows: Rows) -> int:
        """Keys per slice that some row of the tile sees."""
        if self.tokens == 1:
            return self.turn.keys
        tokens = self.whole.q.groups * (rows.first_token + rows.tokens)
        return self.turn.up_to(self.whole.first_token + tokens)

    def _seen_by_all(self, rows: Rows) -> int:
        """Keys per slice that all rows of the tile see."""
        if self.tokens == 1:
            return 0
        tokens = self.whole.q.groups * rows.first_token
        return self.turn.within(self.whole.first_token + tokens + 1)

    # --- what is visible ---

    @cached_property
    def positions(self) -> Ref | None:
        """Of the sequence's tokens in the chunk, 8 B each, if they are several."""
        if self.tokens == 1:
            return None
        if self.whole.q.deal is not None:
            return self._dealt_positions(self.whole.q.deal * self.inputs.position_bytes)
        row_bytes = self.tokens * self.inputs.position_bytes
        return self.work.per_sequence(self.inputs.positions, row_bytes, row_bytes, "positions")

    def _dealt_positions(self, run_bytes: int) -> Ref:
        groups, slices = self.whole.q.groups, self.turn.splits * SLICE_ADDRESS_BYTES
        buffer = self.work.alloc(self.tokens * self.inputs.position_bytes, "positions")
        turns = self.tokens * self.inputs.position_bytes // run_bytes
        loops = [(groups, run_bytes, slices), (turns, groups * run_bytes, run_bytes)]
        self.emit.dma(loops, run_bytes, self.inputs.positions, buffer)
        return buffer

    @cached_property
    def masks(self) -> Masks:
        lengths = self.work.per_sequence(self.inputs.lengths, self.inputs.length_bytes, 8, "length")
        if self.tokens == 1:
            return attention_masks.single_token(self.work, self.index, lengths)
        # Tokens that are no padding see all keys before the chunk.
        first = self.turn.within(self.whole.first_token)
        return attention_masks.many_tokens(self.work, self.index, lengths, first)

    # --- keys and values ---

    def _load(self, span: Span) -> Tile:
        """Keys and values from the cache, what may not be read zero."""
        turn, pitch = self.turn, self.work.pitch
        buffer = self.work.alloc(span.count * pitch, "keys_values")
        table = self.work.at(self.inputs.block_table, self.inputs.table_row_bytes)
        runs = [(span.count // KEY_UNIT, 0, KEY_UNIT * pitch, turn.unit * 4)]
        runs += [(KEY_UNIT, 0, pitch, 4)]
        head_bytes = turn.splits * SLICE_ADDRESS_BYTES
        # A slot's heads follow each other: one run in HBM, however many slices they go to.
        self.emit.gather(
            [
                (turn.sequences, 0, turn.kv_heads * head_bytes, self.inputs.table_row_bytes),
                (turn.splits, 0, SLICE_ADDRESS_BYTES, KEY_UNIT * 4),
                *(runs if turn.splits > 1 else [(span.count, 0, pitch, 4)]),
                (turn.kv_heads, pitch, head_bytes, 0),
            ],
            pitch,
            self.inputs.cache.at(turn.first_head * pitch),
            buffer,
            index=table.at(span.first * turn.splits * 4),
            row_bytes=self.whole.kv_heads * pitch,
        )
        attention_masks.apply_select(self.work, self.masks, buffer, pitch, span)
        return Tile(span, pitch, buffer)
