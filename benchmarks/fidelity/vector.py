"""The vendor-like norm, activation, rotary embedding and embedding that the rows are held to.

Tokens are spread over the slices, a whole token in each: a DMA command brings rows of up to 8 KB,
or one longer row, to each of 64 slices. A tile is as many rows as take 64 KB of input per slice;
loads, passes and stores of neighbouring tiles overlap. Norm and activation of fewer than 64 tokens
spread each token over the idle slices; rotary embedding and embedding keep it whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from furiosa_llm.backend_rngd.emitter import Ref, power_of_two_at_least, power_of_two_at_most
from furiosa_llm.backend_rngd.isa.dtypes import DType
from furiosa_llm.backend_rngd.isa.instructions import (
    Alu,
    Commit,
    Context,
    Counter,
    Fate,
    Op,
    Placement,
    Reduce,
    Sink,
    Source,
    Stream,
    Vector,
    VectorOp,
)
from furiosa_llm.backend_rngd.isa.plan import SLICE_ADDRESS_BYTES, Memory
from furiosa_llm.backend_rngd.isa.rules import SLICES_PER_PE, VRF_BYTES

from .sketch import UNIT_BYTES, Sketch, rows_at_once

INPUT_BYTES = 65536
"""Input of one tile per slice."""
RUN = 8
"""bf16 elements of a packet: as f32 they fill a flit."""
CAST = Stream(RUN, cast=DType.F32)
PAIR = Stream(RUN, cast=DType.F32, pair=True)
TABLE_BYTES = 512
"""cos and sin of a token and a head of 128, in bf16."""


@dataclass(frozen=True)
class Spread:
    """How `tokens` lie in the slices: `rows` rows in each, a token over `share` slices."""

    tokens: int
    share: int

    @property
    def rows(self) -> int:
        return -(-self.tokens * self.share // SLICES_PER_PE)

    @property
    def slices(self) -> int:
        return min(SLICES_PER_PE, self.tokens * self.share)

    def tiles(self, row_bytes: int, most: int | None = None) -> list[int]:
        """Rows of each tile, about equal, for `row_bytes` of input per row and slice.

        `most` is what else limits the rows of a tile.
        """
        at_once = max(1, INPUT_BYTES // row_bytes)
        count = -(-self.rows // (at_once if most is None else min(at_once, most)))
        whole, rest = divmod(self.rows, count)
        return [whole + (i < rest) for i in range(count)]


def spread_wide(tokens: int, row_bytes: int) -> Spread:
    """Tokens that also use the slices which whole tokens would leave idle.

    No slice gets less than one unit of HBM.
    """
    share = max(1, SLICES_PER_PE // power_of_two_at_least(tokens))
    return Spread(tokens, min(share, max(1, power_of_two_at_most(row_bytes // UNIT_BYTES))))


@dataclass
class _Rows:
    """A tensor of whole tokens in HBM and its double buffer."""

    sketch: Sketch
    name: str
    spread: Spread
    row_bytes: int
    buffer_rows: int

    def __post_init__(self) -> None:
        rows = self.spread.rows
        self.hbm = self.sketch.hbm(self.name, rows * SLICES_PER_PE * self.row_bytes)
        size = self.buffer_rows * self.row_bytes
        self.buffers = [self.sketch.dm(size, self.name) for _ in range(2)]

    def load(self, turn: int, first: int, rows: int) -> None:
        for hbm, dm, size in self._pieces(turn, first, rows):
            self.sketch.copy_slices(hbm, dm, size, self.spread.slices)

    def store(self, turn: int, first: int, rows: int) -> None:
        for hbm, dm, size in self._pieces(turn, first, rows):
            self.sketch.copy_slices(dm, hbm, size, self.spread.slices)

    def _pieces(self, turn: int, first: int, rows: int) -> Iterator[tuple[Ref, Ref, int]]:
        """(in HBM, in the double buffer, bytes per slice) of each command for some rows."""
        at_once = rows_at_once(self.row_bytes)
        for row in range(0, rows, at_once):
            hbm = self.hbm.at((first + row) * SLICES_PER_PE * self.row_bytes)
            dm = self.buffers[turn % 2].at(row * self.row_bytes)
            yield hbm, dm, min(at_once, rows - row) * self.row_bytes


def _pipeline(
    tiles: list[int],
    load: Callable[[int, int, int], None],
    work: Callable[[int, int], None],
    store: Callable[[int, int, int], None],
) -> None:
    """The loads of a tile come before the passes of the one before it."""
    places = list(_places(tiles))
    load(0, *places[0])
    for turn, (first, rows) in enumerate(places):
        if turn + 1 < len(places):
            load(turn + 1, *places[turn + 1])
        work(turn, rows)
        store(turn, first, rows)


def _places(tiles: list[int]) -> Iterator[tuple[int, int]]:
    first = 0
    for rows in tiles:
        yield first, rows
        first += rows


# --- norm ---


def norm(features: int, tokens: int) -> bytes:
    """Mean square, its inverse root, and x · w · that."""
    sketch, spread = Sketch("norm"), spread_wide(tokens, 2 * features)
    row = features // spread.share * 2
    tiles = spread.tiles(row)
    x, y = (_Rows(sketch, name, spread, row, tiles[0]) for name in ("x", "y"))
    weight_hbm, weight = sketch.hbm("weight", features * 2), sketch.dm(row, "weight")
    tokens_at_once = spread.slices // spread.share

    def load(turn: int, first: int, rows: int) -> None:
        x.load(turn, first, rows)
        if turn == 0:
            sketch.emit.dma(
                [
                    (tokens_at_once, 0, spread.share * SLICE_ADDRESS_BYTES),
                    (spread.share, row, SLICE_ADDRESS_BYTES),
                ],
                row,
                weight_hbm,
                weight,
            )

    def work(turn: int, rows: int) -> None:
        _normalise(
            sketch, x.buffers[turn % 2], weight, y.buffers[turn % 2], rows, row, spread.share
        )

    _pipeline(tiles, load, work, y.store)
    return sketch.binary()


def _normalise(
    sketch: Sketch, x: Ref, weight: Ref, y: Ref, rows: int, row: int, share: int
) -> None:
    sums, inverse = sketch.dm(8 * rows, "sums"), sketch.dm(8 * rows, "inverse")
    packets = row // (2 * RUN)
    sketch.emit.exec(
        Context.MAIN,
        [Counter(rows, a=row, commit=8), Counter(packets, fate=Fate.VSUM, a=2 * RUN)],
        CAST,
        a=x,
        out=sums,
        out_dtype=DType.F32,
        vector=Vector(
            (VectorOp(Alu.MUL0, Op.MUL, y=Source.SELF),), reduce=Reduce.ADD, reduce_columns=True
        ),
        commit=Commit(columns=2, column_stride=4),
    )
    across = share > 1
    sketch.emit.exec(
        Context.MAIN,
        [Counter(rows, a=8, commit=8)],
        Stream(2),
        a=sums,
        dtype=DType.F32,
        out=inverse,
        vector=Vector(
            (
                VectorOp(Alu.FMA, Op.FMA, y=Source.IMM0, z=Source.IMM1),
                VectorOp(Alu.FPU, Op.SQRT),
                VectorOp(Alu.FP_DIV, Op.DIV, y=Source.IMM2, reverse=True),
            ),
            slice_reduce=Reduce.ADD if across else Reduce.NONE,
            slice_group=share,
            slice_placement=Placement.FIRST if across else Placement.LAST,
        ),
        commit=Commit(columns=2, column_stride=4),
    )
    vrf = sketch.emit.load_vrf(inverse, 2 * rows, "inverse")
    sketch.emit.exec(
        Context.MAIN,
        [
            Counter(rows, a=row, vrf=8, commit=row),
            Counter(packets, a=2 * RUN, b=2 * RUN, commit=2 * RUN),
        ],
        PAIR,
        a=x,
        b=weight,
        vrf=vrf,
        out=y,
        out_dtype=DType.BF16,
        vector=Vector(
            (
                VectorOp(Alu.MUL0, Op.MUL, y=Source.ZIP),
                VectorOp(Alu.MUL1, Op.MUL, y=Source.VRF),
            )
        ),
        commit=Commit(columns=RUN, column_stride=2),
    )


# --- activation ---


def activation(features: int, tokens: int) -> bytes:
    """silu(gate) · up."""
    sketch, spread = Sketch("activation"), spread_wide(tokens, 2 * features)
    row = -(-features // (spread.share * RUN)) * RUN * 2
    tiles = spread.tiles(2 * row)
    gate, up, y = (_Rows(sketch, n, spread, row, tiles[0]) for n in ("gate", "up", "y"))
    silu = (
        VectorOp(Alu.FPU, Op.SIGMOID, stash=True),
        VectorOp(Alu.MUL0, Op.MUL, y=Source.STASH),
    )

    def load(turn: int, first: int, rows: int) -> None:
        gate.load(turn, first, rows)
        up.load(turn, first, rows)

    def work(turn: int, rows: int) -> None:
        packets, g = rows * row // (2 * RUN), gate.buffers[turn % 2]
        _each(sketch, packets, CAST, Vector(silu), g, g)
        multiply = Vector((VectorOp(Alu.MUL0, Op.MUL, y=Source.ZIP),))
        _each(sketch, packets, PAIR, multiply, g, y.buffers[turn % 2], up.buffers[turn % 2])

    _pipeline(tiles, load, work, y.store)
    return sketch.binary()


def _each(
    sketch: Sketch,
    packets: int,
    stream: Stream,
    vector: Vector,
    a: Ref,
    out: Ref,
    b: Ref | None = None,
) -> None:
    step = 2 * RUN
    sketch.emit.exec(
        Context.MAIN,
        [Counter(packets, a=step, b=step if b else 0, commit=step)],
        stream,
        a=a,
        b=b,
        out=out,
        out_dtype=DType.BF16,
        vector=vector,
        commit=Commit(columns=RUN, column_stride=2),
    )


# --- rotary embedding ---


def rotary(widths: tuple[int, ...], head_dim: int, tokens: int) -> bytes:
    """x · cos + rotate_half(x) · sin for tensors (queries, keys) of the given widths."""
    sketch, spread = Sketch("rotary"), Spread(tokens, 1)
    angles_bytes = 2 * 4 * head_dim  # cos and sin of a token in the VRF, as f32
    tiles = spread.tiles(2 * sum(widths) + TABLE_BYTES, most=VRF_BYTES // angles_bytes)
    tensors = [_Rows(sketch, f"x{i}", spread, 2 * w, tiles[0]) for i, w in enumerate(widths)]
    results = [_Rows(sketch, f"y{i}", spread, 2 * w, tiles[0]) for i, w in enumerate(widths)]
    tables = _Rows(sketch, "tables", spread, 4 * head_dim, tiles[0])
    wide = tiles[0] * max(widths)
    temporary = [sketch.dm(wide * size, "rotary") for size in (2, 4, 4)]

    def load(turn: int, first: int, rows: int) -> None:
        for tensor in (tables, *tensors):
            tensor.load(turn, first, rows)

    def work(turn: int, rows: int) -> None:
        cos, sin = (
            _load_angles(sketch, tables.buffers[turn % 2].at(part), rows, head_dim)
            for part in (0, 2 * head_dim)
        )
        for x, y, width in zip(tensors, results, widths, strict=True):
            place = (x.buffers[turn % 2], y.buffers[turn % 2])
            _rotate(sketch, *place, temporary, cos, sin, rows, width, head_dim)

    def store(turn: int, first: int, rows: int) -> None:
        for result in results:
            result.store(turn, first, rows)

    _pipeline(tiles, load, work, store)
    return sketch.binary()


def _load_angles(sketch: Sketch, table: Ref, rows: int, head_dim: int) -> Ref:
    """cos or sin of a tile's tokens as f32 in the VRF, without the other between them."""
    vrf = sketch.emit.alloc(Memory.VRF, rows * head_dim * 4, "angles")
    sketch.emit.exec(
        Context.SUB,
        [
            Counter(rows, a=4 * head_dim, vrf=4 * head_dim),
            Counter(head_dim // RUN, a=2 * RUN, vrf=4 * RUN),
        ],
        CAST,
        a=table,
        out=vrf,
        out_dtype=DType.F32,
        commit=Commit(Sink.VRF, columns=RUN),
    )
    return vrf


def _rotate(
    sketch: Sketch,
    x: Ref,
    y: Ref,
    temporary: list[Ref],
    cos: Ref,
    sin: Ref,
    rows: int,
    width: int,
    head_dim: int,
) -> None:
    rotated, by_cos, by_sin = temporary
    heads, half = rows * width // head_dim, head_dim
    negate = Vector((VectorOp(Alu.MUL0, Op.MUL, y=Source.IMM0),), imm=(0xBF800000, 0, 0))
    for source, target, vector in ((x.at(half), rotated, negate), (x, rotated.at(half), Vector())):
        sketch.emit.exec(
            Context.MAIN,
            [
                Counter(heads, a=2 * head_dim, commit=2 * head_dim),
                Counter(half // (2 * RUN), a=2 * RUN, commit=2 * RUN),
            ],
            CAST if vector.used else Stream(RUN),
            a=source,
            out=target,
            out_dtype=DType.BF16,
            vector=vector,
            commit=Commit(columns=RUN, column_stride=2),
        )
    for source, angles, target in ((x, cos, by_cos), (rotated, sin, by_sin)):
        sketch.emit.exec(
            Context.MAIN,
            [
                Counter(rows, a=2 * width, vrf=4 * head_dim, commit=4 * width),
                Counter(width // head_dim, a=2 * head_dim, commit=4 * head_dim),
                Counter(head_dim // RUN, a=2 * RUN, vrf=4 * RUN, commit=4 * RUN),
            ],
            CAST,
            a=source,
            vrf=angles,
            out=target,
            out_dtype=DType.F32,
            vector=Vector((VectorOp(Alu.MUL0, Op.MUL, y=Source.VRF),), vrf_column=4),
            commit=Commit(columns=RUN, column_stride=4),
        )
    sketch.emit.exec(
        Context.MAIN,
        [Counter(rows * width // RUN, a=32, b=32, commit=16)],
        Stream(RUN, pair=True),
        a=by_cos,
        b=by_sin,
        dtype=DType.F32,
        out=y,
        out_dtype=DType.BF16,
        vector=Vector((VectorOp(Alu.FMA, Op.ADD, y=Source.ZIP),)),
        commit=Commit(columns=RUN, column_stride=2),
    )


# --- embedding ---


def embedding(features: int, vocabulary: int, tokens: int) -> bytes:
    """Ids become byte offsets on chip, go back to HBM, and name the rows of a gather."""
    sketch, spread = Sketch("embedding"), Spread(tokens, 1)
    row, id_bytes = 2 * features, -(-tokens // 2) * 8
    table = sketch.hbm("table", vocabulary * row)
    ids_hbm, offsets_hbm = sketch.hbm("ids", id_bytes), sketch.hbm("offsets", id_bytes)
    ids, offsets = sketch.dm(id_bytes, "ids"), sketch.dm(id_bytes, "offsets")
    y = _Rows(sketch, "y", spread, row, 1)
    sketch.copy_slices(ids_hbm, ids, id_bytes, 1)
    sketch.emit.exec(
        Context.MAIN,
        [Counter(id_bytes // 8, a=8, commit=8)],
        Stream(2),
        a=ids,
        dtype=DType.I32,
        out=offsets,
        vector=Vector((VectorOp(Alu.FXP_MUL, Op.IMUL, y=Source.IMM0),), imm=(row, 0, 0)),
        commit=Commit(columns=2, column_stride=4),
    )
    sketch.copy_slices(offsets, offsets_hbm, id_bytes, 1)
    for first in range(spread.rows):
        sketch.emit.gather(
            [(spread.slices, 0, SLICE_ADDRESS_BYTES, 4)],
            row,
            table,
            y.buffers[first % 2],
            index=offsets_hbm.at(first * SLICES_PER_PE * 4),
            row_bytes=row,
        )
        y.store(first, first, 1)
    return sketch.binary()
