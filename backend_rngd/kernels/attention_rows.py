"""Attention of one tile of query rows: scores, softmax and weighted values, segment by segment."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..emitter import Ref, bits
from ..isa.dtypes import DType
from ..isa.instructions import (
    Alu,
    Birth,
    Commit,
    Context,
    Contraction,
    Counter,
    Fate,
    Fold,
    Op,
    Reduce,
    Sink,
    Source,
    Stream,
    Vector,
    VectorOp,
)
from ..isa.rules import TRANSPOSER_ROWS
from . import attention_merge
from .attention_masks import Masks, token_bias
from .attention_merge import Partial
from .attention_tiling import MASK_BYTES, MASK_KEYS, Rows, Segments, Span
from .attention_work import Work

ONES = 32
"""bf16 ones of a packet, which sums probabilities."""
POSITION_BYTES = 8
"""Of a token's position in data memory."""
ROWS_AT_ONCE = (4, 2, 1)
"""Register-file rows per lane that a packet of values can meet: their sums fill the accumulator."""


@dataclass(frozen=True)
class Tile:
    """[key][K | V] of each slice in memory, `pitch` bytes apart."""

    span: Span
    pitch: int
    ref: Ref

    def part(self, span: Span) -> Tile:
        """Some of the keys."""
        return Tile(span, self.pitch, self.ref.at((span.first - self.span.first) * self.pitch))


@dataclass(frozen=True)
class Probabilities:
    """exp(score - maximum) of a span's keys in the register file, [row block][key] in bf16."""

    span: Span
    trf: Ref


@dataclass(frozen=True)
class Shared:
    """What all tiles of rows of a round use."""

    scale: float
    keys_scale: Ref | None
    """In the VRF, if keys and values are codes."""
    values_scale: Ref | None
    load: Callable[[Span], Tile]
    """Brings keys and values into memory."""
    kept: Tile | None
    """All keys and values of the round, if they fit."""
    masks: Masks
    index: Ref
    ones: Ref
    positions: Ref | None
    """Of the sequence's tokens in the chunk, if they are several."""


@dataclass(frozen=True)
class RowsKernel:
    """The commands of one tile of rows."""

    work: Work
    shared: Shared
    rows: Rows
    plan: Segments
    queries: Ref
    """Register file, [row block][head_dim]."""
    seen_by_all: int
    """Keys of each slice from which on causality may hide some from some rows."""

    @property
    def packet(self) -> int:
        """Elements of a key or value that are multiplied at a time, as bf16."""
        return 32 if self.work.head_dim % 32 == 0 else 16

    @property
    def part_bytes(self) -> int:
        return self.rows.count * self.work.head_dim * 4

    def attend(self) -> Ref:
        """[row][head_dim] bf16: the softmax of the rows over the keys they see, times V."""
        attended = self.work.alloc(self.part_bytes // 2, "attended")
        if len(self.plan.spans) > 1:
            self._merge_segments(attended)
            return attended
        inverse = self.work.alloc(self.rows.count * 4, "inverse_sums")
        maxima = self.work.alloc(self.rows.count * 4, "maxima")
        p, tile = self._softmax(self.plan.spans[0], maxima, inverse, invert=True)
        self._weigh(tile, p, attended, self.work.vrf(inverse, self.rows.count, "inverse_sums"))
        return attended

    def _merge_segments(self, attended: Ref) -> None:
        """As many segments at a time as `plan` says; what they give is the next ones' first."""
        together, left = self.plan.together, list(self.plan.spans)
        partial, carried = self._partial(min(together, len(left))), 0
        while True:
            now, left = left[: partial.segments - carried], left[partial.segments - carried :]
            for i, span in enumerate(now, carried):
                maxima, sums = partial.statistics(i, self.rows)
                p, tile = self._softmax(span, maxima, sums, invert=False)
                self._weigh(tile, p, partial.results.at(i * self.part_bytes), None)
            if not left:
                break
            following, carried = self._partial(min(together, len(left) + 1)), 1
            maxima, sums = following.statistics(0, self.rows)
            weights = attention_merge.weights(self.work, self.rows, partial, maxima, sums)
            out = following.results
            attention_merge.weighted(self.work, self.rows, partial, weights, out, DType.F32)
            partial = following
        shares = attention_merge.shares(self.work, self.rows, partial)
        attention_merge.weighted(self.work, self.rows, partial, shares, attended, DType.BF16)

    def _partial(self, count: int) -> Partial:
        return Partial(
            self.work.alloc(count * self.rows.count * 4, "maxima"),
            self.work.alloc(count * self.rows.count * 4, "sums"),
            self.work.alloc(count * self.part_bytes, "weighted_values"),
            count,
        )

    # --- softmax of a segment ---

    def _softmax(
        self, span: Span, maxima: Ref, sums: Ref, *, invert: bool
    ) -> tuple[Probabilities, Tile]:
        """Probabilities of the span's keys, not normalised, and the tile with its values.

        `sums` gets the sums of the probabilities as rounded, or their inverse.
        """
        tile = self.shared.kept.part(span) if self.shared.kept else self.shared.load(span)
        scores = self.work.alloc(span.count * self.rows.count * 4, "scores")
        self._scores(tile, scores)
        self._row_maxima(span, scores, maxima)
        p = self._fill(span, self._exponentials(span, scores, maxima))
        self._row_sums(p, sums, invert=invert)
        return p, tile

    def _scores(self, tile: Tile, scores: Ref) -> None:
        """[key][row] f32: scale · q · k, with a bias where keys may be hidden.

        The VRF has one operand for a pass. With codes it is their scale: the bias follows.
        """
        free, hidden = tile.span.split(self.seen_by_all)
        codes = self.shared.keys_scale is not None
        if codes:
            self._score_keys(tile, scores, None)
        elif free.count:
            self._score_keys(tile.part(free), scores, None)
        for part, bias in self._biases(hidden):
            place = scores.at((part.first - tile.span.first) * self.rows.count * 4)
            if codes:
                self._add_bias(part, place, bias)
            else:
                self._score_keys(tile.part(part), place, bias)

    def _biases(self, hidden: Span) -> Iterator[tuple[Span, Ref]]:
        """Keys that may be hidden, and their bias in the VRF: [key] for one token, else
        [key][token]."""
        rows, work, masks = self.rows, self.work, self.shared.masks
        if rows.tokens == 1:
            assert masks.bias is not None
            for part in hidden.at_most(MASK_KEYS):
                bias = masks.bias.at((part.first - masks.first) * 4)
                yield part, work.vrf(bias, part.count, "bias")
            return
        assert self.shared.positions is not None
        positions = self.shared.positions.at(rows.first_token * POSITION_BYTES)
        for part in hidden.at_most(MASK_BYTES // (4 * rows.tokens)):
            bias = token_bias(work, rows, self.shared.index, positions, part)
            yield part, work.vrf(bias, part.count * rows.tokens, "bias")

    def _add_bias(self, span: Span, scores: Ref, bias: Ref) -> None:
        """Scores of the span's keys plus their bias, in place."""
        rows, by_token = self.rows, self.rows.tokens > 1
        heads, blocks = rows.blocks // rows.token_blocks, rows.token_blocks
        lanes_bytes = rows.lanes * 4
        self.work.exec(
            Context.MAIN,
            [
                Counter(span.count, a=rows.count * 4, vrf=4 * rows.tokens, commit=rows.count * 4),
                Counter(heads, a=blocks * lanes_bytes, commit=blocks * lanes_bytes),
                Counter(blocks, a=lanes_bytes, vrf=lanes_bytes * by_token, commit=lanes_bytes),
            ],
            Stream(rows.lanes),
            a=scores,
            dtype=DType.F32,
            vrf=bias,
            out=scores,
            vector=Vector(
                (VectorOp(Alu.FMA, Op.ADD, y=Source.VRF),), vrf_column=4 if by_token else 0
            ),
            commit=Commit(columns=rows.lanes, column_stride=4),
        )

    def _score_keys(self, tile: Tile, scores: Ref, bias: Ref | None) -> None:
        """The product for some keys; `bias` is [key] for one token, else [key][token]."""
        rows, packet, head_bytes = self.rows, self.packet, 2 * self.work.head_dim
        keys_scale = self.shared.keys_scale
        ops: tuple[VectorOp, ...]
        if keys_scale is not None:
            scale_codes = VectorOp(Alu.MUL0, Op.MUL, y=Source.VRF)
            ops = (scale_codes, VectorOp(Alu.MUL1, Op.MUL, y=Source.IMM0))
        elif bias is not None:
            ops = (VectorOp(Alu.FMA, Op.FMA, y=Source.IMM0, z=Source.VRF),)
        else:
            ops = (VectorOp(Alu.MUL0, Op.MUL, y=Source.IMM0),)
        by_token = bias is not None and rows.tokens > 1
        heads, blocks = rows.blocks // rows.token_blocks, rows.token_blocks
        self.work.exec(
            Context.MAIN,
            [
                Counter(
                    tile.span.count,
                    a=tile.pitch,
                    vrf=4 * rows.tokens if bias is not None else 0,
                    commit=rows.count * 4,
                ),
                Counter(
                    self.work.head_dim // packet,
                    fate=Fate.MSUM,
                    a=self.work.dtype.bytes_for(packet),
                    trf=2 * packet,
                ),
                Counter(
                    heads,
                    birth=Birth.REUSE,
                    trf=blocks * head_bytes,
                    commit=blocks * rows.lanes * 4,
                ),
                Counter(
                    blocks,
                    birth=Birth.REUSE,
                    trf=head_bytes,
                    vrf=4 * rows.lanes if by_token else 0,
                    commit=rows.lanes * 4,
                ),
            ],
            self.work.cached(packet),
            a=tile.ref,
            dtype=self.work.dtype,
            trf=self.queries,
            vrf=bias if keys_scale is None else keys_scale,
            out=scores,
            out_dtype=DType.F32,
            contraction=Contraction(
                pack=packet // 16,
                lanes=rows.lanes,
                trf_read=2 * packet,
                depth=packet.bit_length() - 1,
            ),
            vector=Vector(
                ops,
                imm=(bits(self.shared.scale), 0, 0),
                vrf_lane=4 if by_token else 0,
            ),
            commit=Commit(lanes=rows.lanes, lane_stride=4),
        )

    def _row_maxima(self, span: Span, scores: Ref, maxima: Ref) -> None:
        """f32 per row: the largest score of the span over all splits."""
        rows = self.rows
        self.work.exec(
            Context.MAIN,
            [
                Counter(rows.blocks, a=rows.lanes * 4, commit=rows.lanes * 4),
                Counter(span.count, fate=Fate.VSUM, a=rows.count * 4),
            ],
            Stream(rows.lanes),
            a=scores,
            dtype=DType.F32,
            out=maxima,
            vector=self.work.across_splits(Vector(reduce=Reduce.MAX), Reduce.MAX),
            commit=Commit(columns=rows.lanes, column_stride=4),
        )

    def _exponentials(self, span: Span, scores: Ref, maxima: Ref) -> Ref:
        """exp(score - maximum) as bf16, turned to [row][key]."""
        rows, row_bytes = self.rows, span.count * 2
        probabilities = self.work.alloc(rows.count * row_bytes, "probabilities")
        self.work.exec(
            Context.MAIN,
            [
                Counter(
                    rows.blocks,
                    a=rows.lanes * 4,
                    vrf=rows.lanes * 4,
                    commit=rows.lanes * row_bytes,
                ),
                Counter(span.count, a=rows.count * 4, commit=2),
            ],
            Stream(rows.lanes),
            a=scores,
            dtype=DType.F32,
            vrf=self.work.vrf(maxima, rows.count, "maxima"),
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

    def _fill(self, span: Span, probabilities: Ref) -> Probabilities:
        """The probabilities in the register file, [row block][key]."""
        rows, row_bytes = self.rows, span.count * 2
        trf = self.work.emit.trf(rows.count * row_bytes)
        self.work.exec(
            Context.SUB,
            [
                Counter(rows.blocks, a=rows.lanes * row_bytes, trf=row_bytes),
                Counter(rows.lanes, a=row_bytes, lanes=1),
                Counter(span.count // 8, a=16, trf=16),
            ],
            Stream(8),
            a=probabilities,
            out=trf,
            commit=Commit(Sink.TRF, columns=8),
            trf_lanes=rows.lanes,
        )
        return Probabilities(span, trf)

    def _row_sums(self, p: Probabilities, sums: Ref, *, invert: bool) -> None:
        """f32 per row: the probabilities times ones, over all splits; or one over that.

        With codes as values the sums are divided by their scale: what is divided by sums, or
        multiplied by their inverse, is then times the scale.
        """
        rows, span = self.rows, p.span
        packet = next(n for n in (ONES, 16, 8) if span.count % n == 0)
        values_scale = self.shared.values_scale
        if values_scale is not None:
            divide = VectorOp(Alu.FP_DIV, Op.DIV, y=Source.VRF, reverse=invert)
            vector = Vector((divide,))
        elif invert:
            vector = Vector((attention_merge.INVERT,), imm=attention_merge.ONE)
        else:
            vector = Vector()
        self.work.exec(
            Context.MAIN,
            [
                Counter(rows.blocks, trf=span.count * 2, commit=rows.lanes * 4),
                Counter(span.count // packet, fate=Fate.MSUM, trf=2 * packet),
            ],
            Stream(packet),
            a=self.shared.ones,
            trf=p.trf,
            vrf=values_scale,
            out=sums,
            out_dtype=DType.F32,
            contraction=Contraction(
                pack=2 if packet == ONES else 1,
                lanes=rows.lanes,
                trf_read=2 * packet,
                depth=packet.bit_length() - 1,
            ),
            vector=self.work.across_splits(vector, Reduce.ADD),
            commit=Commit(lanes=rows.lanes, lane_stride=4),
        )

    # --- values ---

    def _weigh(self, tile: Tile, p: Probabilities, out: Ref, inverse: Ref | None) -> None:
        """[row][head_dim]: probabilities · values, over the span's keys and all splits.

        In f32; or times `inverse` of each row and rounded to bf16. A packet holds neighbouring
        values of one key, the keys are summed in time.
        """
        rows, packet, span = self.rows, self.packet, p.span
        at_once = next(n for n in ROWS_AT_ONCE if rows.blocks % n == 0)
        dtype = DType.F32 if inverse is None else DType.BF16
        size = dtype.bytes_for(1)
        row_bytes, out_bytes = span.count * 2, self.work.head_dim * size
        vrf_block = rows.lanes * 4 if inverse is not None else 0
        ops = () if inverse is None else (VectorOp(Alu.MUL0, Op.MUL, y=Source.VRF),)
        self.work.exec(
            Context.MAIN,
            [
                Counter(
                    rows.blocks // at_once,
                    trf=at_once * row_bytes,
                    vrf=at_once * vrf_block,
                    commit=at_once * rows.lanes * out_bytes,
                ),
                Counter(
                    self.work.head_dim // packet,
                    a=self.work.dtype.bytes_for(packet),
                    commit=packet * size,
                ),
                Counter(tile.span.count, fate=Fate.MSUM, a=tile.pitch, trf=2),
                Counter(
                    at_once,
                    birth=Birth.REUSE,
                    trf=row_bytes,
                    vrf=vrf_block,
                    commit=rows.lanes * out_bytes,
                ),
            ],
            self.work.cached(packet),
            a=tile.ref.at(tile.pitch // 2),
            dtype=self.work.dtype,
            trf=p.trf,
            vrf=inverse,
            out=out,
            out_dtype=dtype,
            contraction=Contraction(
                pack=packet // 16, lanes=rows.lanes, trf_read=2, depth=0, fold=Fold.SEQUENTIAL
            ),
            vector=self.work.across_splits(
                Vector(ops, vrf_lane=4 if inverse is not None else 0), Reduce.ADD
            ),
            commit=Commit(
                lanes=rows.lanes,
                lane_stride=out_bytes,
                columns=packet,
                column_stride=size,
            ),
        )
