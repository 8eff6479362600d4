"""The vendor-like attention over a paged cache that the silicon rows are held to.

Slices are divided over kv heads and splits of the keys; the reducer joins the splits. A DMA
command gathers 8 KB of keys or values to each slice. Decode works on rounds of at most 2,048 keys
while the next round is gathered. Prefill walks its query rows in tiles against all keys, the upper
triangle included; masking costs nothing (the machine has a valid-count generator, which the
instruction set here lacks), so the commands have none.
"""

from __future__ import annotations

from dataclasses import dataclass

from furiosa_llm.backend_rngd.emitter import Index, Ref, power_of_two_at_least
from furiosa_llm.backend_rngd.isa.dtypes import DType
from furiosa_llm.backend_rngd.isa.instructions import (
    Alu,
    Birth,
    Commit,
    Context,
    Contraction,
    Counter,
    Fate,
    Fold,
    Op,
    Placement,
    Reduce,
    Sink,
    Source,
    Stream,
    Switch,
    Topology,
    Vector,
    VectorOp,
)
from furiosa_llm.backend_rngd.isa.plan import SLICE_ADDRESS_BYTES
from furiosa_llm.backend_rngd.isa.rules import LANES, SLICES_PER_PE

from .sketch import COMMAND_BYTES, Sketch

ROUND_KEYS = 2048
"""Keys of all sequences of a decode round, for 8 kv heads; fewer heads have more splits."""
CALL_KEYS = 131072
CALL_SEQUENCES = 64
"""One run of the decode block: its queries are loaded and its results stored together."""
SPLIT_KEYS = 64
"""Keys per slice below which prefill spreads query rows over slices instead."""
MAX_SPLITS = 8
"""Slices that share the keys of prefill at most: query rows reach them over a ring."""
HALF_REGISTERS = 32768
ROWS = 128
"""Query rows of a prefill tile at most: they fill half of the register file."""
STRAIGHT_TILES = 64
REPEAT_TILES = 16
KEY_UNIT = 8
SLOTS = 1 << 18
"""Slots of the cache; times do not depend on it."""
SCALE = Vector((VectorOp(Alu.MUL0, Op.MUL, y=Source.IMM0),), imm=(0x3DB504F3, 0, 0))


@dataclass(frozen=True)
class Heads:
    """Query and kv heads of one PE."""

    query: int
    kv: int
    size: int

    @property
    def group(self) -> int:
        """Query heads to a kv head."""
        return self.query // self.kv

    @property
    def bytes(self) -> int:
        """A row of one head."""
        return 2 * self.size


@dataclass
class _Block:
    """Passes that decode and prefill share, over `keys` keys per slice and some query rows.

    Scores lie as [sequence][key][row], probabilities as [sequence][row][key].
    """

    sketch: Sketch
    heads: Heads
    splits: int
    parts: int
    """Groups of slices that hold the same keys."""

    def __post_init__(self) -> None:
        kv = self.heads.kv
        self.cache = self.sketch.hbm("cache", SLOTS * kv * 2 * self.heads.bytes)
        self.switch = Switch(Topology.BROADCAST1, self.splits) if self.splits > 1 else Switch()
        self.slices = kv * self.parts * self.splits

    def gather(self, index: Ref, to: Ref, value: int, keys: int, first: int, count: int) -> None:
        """Keys (or values, `value` = 1) [first, first + count) of each split of `keys`."""
        row, split = self.heads.bytes, SLICE_ADDRESS_BYTES
        self.sketch.emit.gather(
            [
                (self.heads.kv, 2 * row, self.parts * self.splits * split, 0),
                (self.parts, 0, self.splits * split, 0),
                (self.splits, 0, split, keys * 4),
                (count, 0, row, 4),
            ],
            row,
            self.cache.at(value * row),
            to,
            index=index.at(first * 4),
            row_bytes=self.heads.kv * 2 * row,
        )

    def exec(self, context: Context, counters: list[Counter], stream: Stream, **kw: object) -> None:
        self.sketch.emit.exec(context, counters, stream, valid_slices=self.slices, **kw)  # type: ignore[arg-type]

    def across(self, vector: Vector, reduce: Reduce) -> Vector:
        from dataclasses import replace

        if self.splits == 1:
            return vector
        return replace(vector, slice_reduce=reduce, slice_group=self.splits)

    def scores(
        self, keys: Ref, trf: Ref, out: Ref, n: int, count: int, total: int, rows: int, lanes: int
    ) -> None:
        """scale · q · k for `count` keys of each of n sequences that have `total` per slice."""
        row = self.heads.bytes
        blocks = rows // lanes
        self.exec(
            Context.MAIN,
            [
                Counter(n, a=count * row, trf=blocks * row, commit=total * rows * 4),
                Counter(count, a=row, commit=rows * 4),
                Counter(self.heads.size // 32, fate=Fate.MSUM, a=64, trf=64),
                Counter(blocks, birth=Birth.REUSE, trf=row, commit=lanes * 4),
            ],
            Stream(32),
            a=keys,
            trf=trf,
            out=out,
            out_dtype=DType.F32,
            contraction=Contraction(lanes=lanes),
            vector=SCALE,
            commit=Commit(lanes=lanes, lane_stride=4),
        )

    def softmax(self, scores: Ref, n: int, keys: int, rows: int, lanes: int) -> tuple[Ref, Ref]:
        """(probabilities, their sums in 8 bytes per row), of maxima over all splits."""
        sketch, blocks = self.sketch, rows // lanes
        maxima = sketch.dm(n * rows * 4, "maxima")
        self.exec(
            Context.MAIN,
            [
                Counter(n, a=keys * rows * 4, commit=rows * 4),
                Counter(blocks, a=lanes * 4, commit=lanes * 4),
                Counter(keys, fate=Fate.VSUM, a=rows * 4),
            ],
            Stream(lanes),
            a=scores,
            dtype=DType.F32,
            out=maxima,
            vector=self.across(Vector(reduce=Reduce.MAX), Reduce.MAX),
            commit=Commit(columns=lanes, column_stride=4),
        )
        vrf = sketch.emit.load_vrf(maxima, n * rows, "maxima", DType.F32, self.slices)
        probabilities = sketch.dm(n * rows * keys * 2, "probabilities")
        self.exec(
            Context.MAIN,
            [
                Counter(n, a=keys * rows * 4, vrf=rows * 4, commit=rows * keys * 2),
                Counter(blocks, a=lanes * 4, vrf=lanes * 4, commit=lanes * keys * 2),
                Counter(keys, a=rows * 4, commit=2),
            ],
            Stream(lanes),
            a=scores,
            dtype=DType.F32,
            vrf=vrf,
            out=probabilities,
            out_dtype=DType.BF16,
            vector=Vector(
                (VectorOp(Alu.FMA, Op.SUB, y=Source.VRF), VectorOp(Alu.EXP, Op.EXP)), vrf_column=4
            ),
            commit=Commit(
                columns=lanes, column_stride=keys * 2, transpose_rows=4, transpose_columns=8
            ),
        )
        sums = sketch.dm(n * rows * 8, "sums")
        self.exec(
            Context.MAIN,
            [
                Counter(n * rows, a=keys * 2, commit=8),
                Counter(keys // 8, fate=Fate.VSUM, a=16),
            ],
            Stream(8, cast=DType.F32),
            a=probabilities,
            out=sums,
            out_dtype=DType.F32,
            vector=self.across(Vector(reduce=Reduce.ADD, reduce_columns=True), Reduce.ADD),
            commit=Commit(columns=2, column_stride=4),
        )
        return probabilities, sums

    def fill_probabilities(self, source: Ref, n: int, keys: int, rows: int, lanes: int) -> Ref:
        trf = self.sketch.emit.trf(n * rows * keys * 2)
        blocks = n * rows // lanes
        self.exec(
            Context.SUB,
            [
                Counter(blocks, a=lanes * keys * 2, trf=keys * 2),
                Counter(lanes, a=keys * 2, lanes=1),
                Counter(keys // 8, a=16, trf=16),
            ],
            Stream(8),
            a=source,
            out=trf,
            commit=Commit(Sink.TRF, columns=8),
            trf_lanes=lanes,
        )
        return trf

    def weigh(
        self,
        values: Ref,
        trf: Ref,
        out: Ref,
        n: int,
        count: int,
        total: int,
        rows: int,
        lanes: int,
        sums: Ref | None = None,
    ) -> None:
        """Probabilities times values, over all splits: [sequence][row][head size] in f32.

        With `sums` in the VRF the results are divided by them and rounded to bf16.
        """
        row, blocks = self.heads.bytes, rows // lanes
        at_once = min(4, blocks)
        dtype = DType.BF16 if sums else DType.F32
        size = dtype.bits // 8
        block_bytes = lanes * self.heads.size * size
        ops = (VectorOp(Alu.FP_DIV, Op.DIV, y=Source.VRF),) if sums else ()
        step = 8 * lanes if sums else 0
        self.exec(
            Context.MAIN,
            [
                Counter(n, a=count * row, trf=blocks * total * 2, commit=blocks * block_bytes),
                Counter(
                    blocks // at_once,
                    trf=at_once * total * 2,
                    vrf=at_once * step,
                    commit=at_once * block_bytes,
                ),
                Counter(self.heads.size // 32, a=64, commit=32 * size),
                Counter(count, fate=Fate.MSUM, a=row, trf=2),
                Counter(at_once, birth=Birth.REUSE, trf=total * 2, vrf=step, commit=block_bytes),
            ],
            Stream(32),
            a=values,
            trf=trf,
            vrf=sums,
            out=out,
            out_dtype=dtype,
            contraction=Contraction(lanes=lanes, trf_read=2, depth=0, fold=Fold.SEQUENTIAL),
            vector=self.across(
                Vector(ops, vrf_lane=8 if sums else 0, slice_placement=Placement.FIRST),
                Reduce.ADD,
            ),
            commit=Commit(
                lanes=lanes,
                lane_stride=self.heads.size * size,
                columns=32,
                column_stride=size,
            ),
        )

    def load_sums(self, sums: Ref, rows: int) -> Ref:
        return self.sketch.emit.load_vrf(sums, 2 * rows, "sums", DType.F32, self.slices)

    def divide(self, values: Ref, sums: Ref, out: Ref, rows: int) -> None:
        vrf = self.load_sums(sums, rows)
        self.exec(
            Context.MAIN,
            [
                Counter(rows, a=2 * self.heads.bytes, vrf=8, commit=self.heads.bytes),
                Counter(self.heads.size // 8, a=32, commit=16),
            ],
            Stream(8),
            a=values,
            dtype=DType.F32,
            vrf=vrf,
            out=out,
            out_dtype=DType.BF16,
            vector=Vector((VectorOp(Alu.FP_DIV, Op.DIV, y=Source.VRF),)),
            commit=Commit(columns=8, column_stride=2),
        )

    def fill_queries(self, source: Ref, blocks: int, lanes: int) -> Ref:
        """Rows of the first slice of each group to the register files of all its splits."""
        row = self.heads.bytes
        trf = self.sketch.emit.trf(blocks * lanes * row)
        self.exec(
            Context.SUB,
            [
                Counter(blocks, a=lanes * row, trf=row),
                Counter(lanes, a=row, lanes=1),
                Counter(self.heads.size // 16, a=32, trf=32),
            ],
            Stream(16),
            a=source,
            out=trf,
            commit=Commit(Sink.TRF, columns=16),
            switch=self.switch,
            trf_lanes=lanes,
        )
        return trf


# --- decode ---


def decode(heads: Heads, sequences: int, cached: int) -> bytes:
    """`sequences` tokens, each with `cached` tokens before it."""
    most = max(1, min(CALL_SEQUENCES, CALL_KEYS // cached))
    calls = -(-sequences // most)
    sketch = Sketch("decode")
    _Decode(sketch, heads, -(-sequences // calls), cached).emit_all()
    return sketch.binary(calls)


class _Decode:
    """One run of the decode block; query heads of a kv head stand in the lanes."""

    def __init__(self, sketch: Sketch, heads: Heads, sequences: int, cached: int) -> None:
        splits = SLICES_PER_PE // heads.kv
        self.block = _Block(sketch, heads, splits, 1)
        self.sketch, self.heads, self.sequences = sketch, heads, sequences
        self.keys = -(-cached // (splits * KEY_UNIT)) * KEY_UNIT
        """Keys per slice and sequence."""
        at_once = ROUND_KEYS * 8 // SLICES_PER_PE
        self.tile = min(self.keys, at_once)
        self.n = max(1, min(sequences, at_once // self.keys))
        self.lanes = power_of_two_at_least(heads.group)
        row = heads.bytes
        self.index = sketch.hbm("block_table", sequences * self.keys * splits * 4)
        query_bytes = sequences * heads.kv * self.lanes * row
        self.q_hbm, self.y_hbm = sketch.hbm("q", query_bytes), sketch.hbm("y", query_bytes)
        self.q = sketch.dm(sequences * self.lanes * row, "queries")
        self.y = sketch.dm(sequences * self.lanes * row, "attended")
        size = self.n * self.tile * row
        self.buffers = [[sketch.dm(size, "cache") for _ in range(2)] for _ in range(2)]

    def emit_all(self) -> None:
        tiles = self._tiles()
        self._gather(0, *tiles[0])
        self._move_queries(self.q_hbm, self.q, inwards=True)
        scores = probabilities = trf = sums = total = None
        for turn, (first, n, value, key) in enumerate(tiles):
            if turn + 1 < len(tiles):
                self._gather(turn + 1, *tiles[turn + 1])
            buffer = self._buffer(turn, value)
            rows, count = self.lanes, min(self.tile, self.keys - key)
            last = key + count == self.keys
            if value == 0:
                if key == 0:
                    place = self.q.at(first * rows * self.heads.bytes)
                    queries = self.block.fill_queries(place, n, rows)
                    scores = self.sketch.dm(n * self.keys * rows * 4, "scores")
                assert scores is not None
                self.block.scores(
                    buffer, queries, scores.at(key * rows * 4), n, count, self.keys, rows, rows
                )
                if last:
                    probabilities, sums = self.block.softmax(scores, n, self.keys, rows, rows)
                continue
            if key == 0:
                assert probabilities is not None
                trf = self.block.fill_probabilities(probabilities, n, self.keys, rows, rows)
            part = self.sketch.dm(n * rows * self.heads.size * 4, "weighted")
            assert trf is not None
            self.block.weigh(buffer, trf.at(key * 2), part, n, count, self.keys, rows, rows)
            if key:
                assert total is not None
                self._accumulate(total, part, n * rows * self.heads.size)
            else:
                total = part
            if last:
                assert total is not None
                assert sums is not None
                place = self.y.at(first * rows * self.heads.bytes)
                self.block.divide(total, sums, place, n * rows)
        self._move_queries(self.q_hbm, self.y, inwards=False)

    def _tiles(self) -> list[tuple[int, int, int, int]]:
        """(first sequence, sequences, key or value, first key of the tile), in order."""
        return [
            (first, min(self.n, self.sequences - first), value, key)
            for first in range(0, self.sequences, self.n)
            for value in (0, 1)
            for key in range(0, self.keys, self.tile)
        ]

    def _buffer(self, turn: int, value: int) -> Ref:
        return self.buffers[value][turn % 2 if self.tile < self.keys else turn // 2 % 2]

    def _gather(self, turn: int, first: int, n: int, value: int, key: int) -> None:
        """A tile's keys or values; each command brings up to 8 KB to a slice."""
        buffer, row = self._buffer(turn, value), self.heads.bytes
        count = min(self.tile, self.keys - key)
        at_once = max(1, COMMAND_BYTES // row)
        sequence_index = self.keys * self.block.splits * 4
        if count < at_once:
            for some in range(0, n, at_once // count):
                self._gather_sequences(
                    self.index.at((first + some) * sequence_index),
                    buffer.at(some * count * row),
                    value,
                    min(at_once // count, n - some),
                )
            return
        for sequence in range(n):
            for start in range(0, count, at_once):
                self.block.gather(
                    self.index.at((first + sequence) * sequence_index),
                    buffer.at((sequence * count + start) * row),
                    value,
                    self.keys,
                    key + start,
                    min(at_once, count - start),
                )

    def _gather_sequences(self, index: Ref, to: Ref, value: int, n: int) -> None:
        row, split = self.heads.bytes, SLICE_ADDRESS_BYTES
        self.sketch.emit.gather(
            [
                (n, 0, self.keys * row, self.keys * self.block.splits * 4),
                (self.heads.kv, 2 * row, self.block.splits * split, 0),
                (self.block.splits, 0, split, self.keys * 4),
                (self.keys, 0, row, 4),
            ],
            row,
            self.block.cache.at(value * row),
            to,
            index=index,
            row_bytes=self.heads.kv * 2 * row,
        )

    def _move_queries(self, hbm: Ref, dm: Ref, *, inwards: bool) -> None:
        """Query rows between HBM and the first slice of each kv head."""
        run = self.lanes * self.heads.bytes
        there, here = self.heads.kv * run, self.block.splits * SLICE_ADDRESS_BYTES
        loops = [(self.sequences, there, run), (self.heads.kv, run, here)]
        if inwards:
            self.sketch.emit.dma(loops, run, hbm, dm)
        else:
            self.sketch.emit.dma([(n, d, h) for n, h, d in loops], run, dm, hbm)

    def _accumulate(self, total: Ref, part: Ref, count: int) -> None:
        self.block.exec(
            Context.MAIN,
            [Counter(count // 8, a=32, b=32, commit=32)],
            Stream(8, pair=True),
            a=total,
            b=part,
            dtype=DType.F32,
            out=total,
            vector=Vector((VectorOp(Alu.FMA, Op.ADD, y=Source.ZIP),)),
            commit=Commit(columns=8, column_stride=4),
        )


# --- prefill ---


def prefill(heads: Heads, tokens: int) -> bytes:
    """A prompt of `tokens` tokens that attend to each other."""
    sketch = Sketch("prefill")
    _Prefill(sketch, heads, tokens).emit_all()
    return sketch.binary()


class _Prefill:
    """All keys stay in memory; tiles of query rows pass over them."""

    def __init__(self, sketch: Sketch, heads: Heads, tokens: int) -> None:
        most = SLICES_PER_PE // heads.kv
        splits = min(most, MAX_SPLITS, power_of_two_at_least(-(-tokens // SPLIT_KEYS)))
        self.sketch, self.heads = sketch, heads
        self.block = _Block(sketch, heads, splits, most // splits)
        self.keys = -(-tokens // (splits * KEY_UNIT)) * KEY_UNIT
        rows = heads.group * (-(-tokens // LANES) * LANES) // self.block.parts
        fit = HALF_REGISTERS // (2 * self.keys) // (4 * LANES) * 4 * LANES
        self.rows = max(LANES, min(ROWS, fit, -(-rows // LANES) * LANES))
        self.tiles = -(-rows // self.rows)
        self.groups = heads.kv * self.block.parts
        self.row = heads.bytes
        self.tile_bytes = self.groups * self.rows * self.row
        self.index = sketch.hbm("block_table", self.keys * splits * 4)
        self.q_hbm = sketch.hbm("q", self.tiles * self.tile_bytes)
        self.y_hbm = sketch.hbm("y", self.tiles * self.tile_bytes)
        self.cache = [sketch.dm(self.keys * self.row, name) for name in ("keys", "values")]
        self.q = [sketch.dm(self.rows * self.row, "queries") for _ in range(2)]
        self.y = [sketch.dm(self.rows * self.row, "attended") for _ in range(2)]

    def _gather(self, value: int) -> None:
        """All keys or all values."""
        at_once = COMMAND_BYTES // self.row
        for first in range(0, self.keys, at_once):
            to, count = self.cache[value].at(first * self.row), min(at_once, self.keys - first)
            self.block.gather(self.index, to, value, self.keys, first, count)
        self._gathered = value == 1

    def emit_all(self) -> None:
        self._gather(0)
        if self.tiles <= STRAIGHT_TILES:
            self._run(self.tiles, self.q_hbm, self.y_hbm)
            return
        self._gather(1)
        turns, rest = divmod(self.tiles, REPEAT_TILES)
        with self.sketch.repeat(turns) as turn:
            self._run(REPEAT_TILES, *self._moved(turn))
        if rest:
            done = turns * REPEAT_TILES * self.tile_bytes
            self._run(rest, self.q_hbm.at(done), self.y_hbm.at(done))

    def _moved(self, turn: Index) -> tuple[Ref, Ref]:
        step = REPEAT_TILES * self.tile_bytes
        return self.q_hbm.moved(turn, step), self.y_hbm.moved(turn, step)

    def _run(self, tiles: int, q: Ref, y: Ref) -> None:
        """Straight code for some tiles; the next tile's queries come in during softmax."""
        size = self.rows * self.row
        group = (self.groups, size, self.block.splits * SLICE_ADDRESS_BYTES)

        def load(tile: int) -> None:
            place = q.at(tile * self.tile_bytes)
            self.sketch.emit.dma([group], size, place, self.q[tile % 2])

        def fill(tile: int) -> Ref:
            return self.block.fill_queries(self.q[tile % 2], self.rows // LANES, LANES)

        def scores(queries: Ref) -> Ref:
            out = self.sketch.dm(self.keys * self.rows * 4, "scores")
            self.block.scores(self.cache[0], queries, out, *shape)
            return out

        shape = (1, self.keys, self.keys, self.rows, LANES)
        load(0)
        of_tile = scores(fill(0))
        if not self._gathered:
            self._gather(1)
        if tiles > 1:
            load(1)
            queries = fill(1)
        for tile in range(tiles):
            if tile + 2 < tiles:
                load(tile + 2)
            probabilities, sums = self.block.softmax(of_tile, 1, self.keys, self.rows, LANES)
            trf = self.block.fill_probabilities(probabilities, 1, self.keys, self.rows, LANES)
            divisor = self.block.load_sums(sums, self.rows)
            if tile + 1 < tiles:
                # The next scores keep the main context busy while registers are filled.
                of_tile = scores(queries)
            if tile + 2 < tiles:
                queries = fill(tile + 2)
            result = self.y[tile % 2]
            self.block.weigh(self.cache[1], trf, result, *shape, sums=divisor)
            n, hbm, dm = group
            place = y.at(tile * self.tile_bytes)
            self.sketch.emit.dma([(n, dm, hbm)], size, result, place)
