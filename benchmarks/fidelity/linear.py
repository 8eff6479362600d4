"""The vendor-like matrix product y[M, N] = x[M, K] · w[N, K]ᵀ that the silicon rows are held to.

K is spread over the 4 slices of a group, whose partial sums the inter-slice reducer adds; N is
spread over the 16 groups. Weights stream, 16 tokens stand in half of the register file. A weight
tile takes 128 KB per slice, two are in memory; it is loaded by commands of 8 KB per slice, and
all tokens pass over it before the next. Tokens that do not fit beside the tiles are a further run
over all weights. Where a quarter of K does not fit a register-file lane, K is cut into tiles of at
most 1,024 per slice, whose sums the vector engine adds up in f32.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from furiosa_llm.backend_rngd.emitter import Index, Ref
from furiosa_llm.backend_rngd.isa.dtypes import DType
from furiosa_llm.backend_rngd.isa.instructions import (
    Alu,
    Birth,
    Commit,
    Context,
    Contraction,
    Counter,
    Digit,
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
from furiosa_llm.backend_rngd.isa.plan import SLICE_ADDRESS_BYTES
from furiosa_llm.backend_rngd.isa.rules import LANES, SLICES_PER_PE

from .sketch import COMMAND_BYTES, Sketch, rows_at_once

SHARE = 4
"""Slices that share K; the ring brings each of them its quarter of a token."""
GROUPS = SLICES_PER_PE // SHARE
PASS_TOKENS = 2 * LANES
"""Two register-file rows per lane: as many as a packet meets for free."""
K_TILE = 1024
"""Elements per slice that 16 tokens may have in half of the register file."""
TILE_BYTES = 131072
TOKEN_BYTES = 131072
"""Tokens of one run over the weights, per slice."""
STORE_PASSES = 4
"""Passes whose results leave together: 64 tokens."""
STRAIGHT_PASSES = 440
"""Products of a block that is written out; beyond it the tiles are a repeat."""
REPEAT_PASSES = 128
PACKET = 32


def linear(k: int, n: int, tokens: int) -> bytes:
    """The binary: runs over all weights, as many as the tokens need."""
    part = _ceil(k, SHARE * PACKET) * PACKET
    most = max(1, TOKEN_BYTES // (2 * part) // STORE_PASSES * STORE_PASSES) * PASS_TOKENS
    runs = _ceil(tokens, most)
    sketch = Sketch("linear")
    _Product(sketch, part, n, _ceil(tokens, runs)).emit_all()
    return sketch.binary(runs)


@dataclass
class _Product:
    """One run over the weights; `part` is K per slice, padded."""

    sketch: Sketch
    part: int
    n: int
    tokens: int
    _resident: dict[int, Ref] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.k_tiles = _ceil(self.part, K_TILE)
        self.k_tile = _ceil(self.part, self.k_tiles * PACKET) * PACKET
        self.rows = _ceil(self.n, GROUPS)
        fit = TILE_BYTES // (2 * self.k_tile) // 16 * 16
        self.tile_rows = min(self.rows, fit)
        self.tiles = _ceil(self.rows, self.tile_rows)
        self.passes = _ceil(self.tokens, PASS_TOKENS)
        self.pass_tokens = LANES if self.tokens <= LANES else PASS_TOKENS
        group_tokens = min(self.passes, STORE_PASSES) * self.pass_tokens
        self.joined = max(1, COMMAND_BYTES // (self.tile_rows * group_tokens * 2))
        """Tiles whose results leave together."""
        self.row_bytes = self.k_tile * self.k_tiles * 2
        x_bytes = self.passes * SLICES_PER_PE * self.row_bytes
        w_bytes = SLICES_PER_PE * self.tiles * self.k_tiles * self._tile_bytes(0)
        y_bytes = GROUPS * self.tiles * self.tile_rows * self.passes * PASS_TOKENS * 2
        self.x_hbm = self.sketch.hbm("x", x_bytes)
        self.w_hbm = self.sketch.hbm("w", w_bytes)
        self.y_hbm = self.sketch.hbm("y", y_bytes)
        self.x = self.sketch.dm(self.passes * self.row_bytes, "x")
        tile = self._tile_bytes(0)
        self.weights = [self.sketch.dm(tile, "weights") for _ in range(2)]
        y = self.joined * self.tile_rows * group_tokens * 2
        self.y = [self.sketch.dm(y, "y") for _ in range(2)]
        if self.k_tiles > 1:
            sums = self.tile_rows * group_tokens * 4
            groups = _ceil(self.passes, STORE_PASSES)
            self.sums = [self.sketch.dm(sums, "sums") for _ in range(groups)]
            self.partial = [self.sketch.dm(sums, "partial") for _ in range(2)]

    def emit_all(self) -> None:
        """Weights of the first tile, tokens, then tile after tile."""
        self._load_weights(0, self.w_hbm)
        self._load_tokens()
        at_once = max(2, REPEAT_PASSES // self.passes // 2 * 2)
        straight = self.tiles * self.k_tiles * self.passes <= STRAIGHT_PASSES
        if straight or self.k_tiles > 1 or self.tiles <= 2 * at_once:
            self._run(0, self.tiles, self.w_hbm, self.y_hbm)
            return
        turns = (self.tiles - 1) // at_once
        with self.sketch.repeat(turns) as turn:
            self._turn(turn, at_once)
        self._run(turns * at_once, self.tiles, self.w_hbm, self.y_hbm)

    def _turn(self, turn: Index, tiles: int) -> None:
        w = self.w_hbm.moved(turn, tiles * SLICES_PER_PE * self._tile_bytes(0))
        y = self.y_hbm.moved(turn, tiles * self._y_tile_bytes)
        self._run(0, tiles, w, y, more=True)

    def _tile_rows(self, tile: int) -> int:
        return min(self.tile_rows, self.rows - tile * self.tile_rows)

    def _tile_bytes(self, tile: int) -> int:
        return self._tile_rows(tile) * self.k_tile * 2

    @property
    def _y_tile_bytes(self) -> int:
        return GROUPS * self.tile_rows * self.passes * PASS_TOKENS * 2

    # --- transfers ---

    def _load_weights(self, step: int, w: Ref) -> None:
        """The tile of a step (row tile, k tile) into its buffer, 8 KB per slice at a time."""
        tile = step // self.k_tiles
        source = w.at(step * SLICES_PER_PE * self._tile_bytes(0))
        row = self.k_tile * 2
        at_once = rows_at_once(row)
        for first in range(0, self._tile_rows(tile), at_once):
            rows = min(at_once, self._tile_rows(tile) - first)
            self.sketch.copy_slices(
                source.at(first * row * SLICES_PER_PE),
                self.weights[step % 2].at(first * row),
                rows * row,
            )

    def _load_tokens(self) -> None:
        """A token in each group of 4 slices, a quarter of it in each."""
        at_once = rows_at_once(self.row_bytes)
        slices = min(SLICES_PER_PE, SHARE * _ceil(self.tokens, LANES) * LANES)
        for first in range(0, self.passes, at_once):
            rows = min(at_once, self.passes - first)
            self.sketch.emit.dma(
                [
                    (rows, SLICES_PER_PE * self.row_bytes, self.row_bytes),
                    (slices, self.row_bytes, SLICE_ADDRESS_BYTES),
                ],
                self.row_bytes,
                self.x_hbm.at(first * SLICES_PER_PE * self.row_bytes),
                self.x.at(first * self.row_bytes),
            )

    def _store(self, source: Ref, y: Ref, size_bytes: int) -> None:
        """Results of one slice of each group; the reducer left copies in the others."""
        self.sketch.emit.dma(
            [(GROUPS, SHARE * SLICE_ADDRESS_BYTES, size_bytes)], size_bytes, source, y
        )

    # --- products ---

    def _run(self, first: int, end: int, w: Ref, y: Ref, more: bool = False) -> None:
        """Row tiles [first, end), whose first is in memory; `more` also loads the one after."""
        steps = range(first * self.k_tiles, end * self.k_tiles)
        for step in steps:
            if step + 1 < steps.stop or more:
                self._load_weights(step + 1, w)
            tile, k_tile = divmod(step, self.k_tiles)
            for group in range(0, self.passes, STORE_PASSES):
                passes = range(group, min(group + STORE_PASSES, self.passes))
                self._group(tile, k_tile, passes, y, last=tile + 1 == end)

    def _group(self, tile: int, k_tile: int, passes: range, y: Ref, *, last: bool) -> None:
        """Up to 4 passes over a tile, and what becomes of their results."""
        rows, tokens = self._tile_rows(tile), len(passes) * self.pass_tokens
        number = passes.start // STORE_PASSES
        in_store = tile % self.joined
        turn = (tile // self.joined) * _ceil(self.passes, STORE_PASSES) + number
        result = self.y[turn % 2].at(in_store * self.tile_rows * tokens * 2)
        out, dtype = result, DType.BF16
        if self.k_tiles > 1:
            out = self.sums[number] if k_tile == 0 else self.partial[number % 2]
            dtype = DType.F32
        size = dtype.bits // 8
        trf = self._fill(passes.start, k_tile)
        for i, at in enumerate(passes):
            following = self._fill(at + 1, k_tile) if at + 1 in passes else None
            place = out.at(i * self.pass_tokens * size)
            self._multiply(self._buffer(tile, k_tile), rows, trf, place, tokens, dtype)
            trf = following or trf
        final = k_tile + 1 == self.k_tiles
        if k_tile:
            self._add(self.sums[number], out, result if final else None, rows * tokens)
        if final and (in_store + 1 == self.joined or last):
            stored = (in_store * self.tile_rows + rows) * tokens * 2
            place = self.y[turn % 2]
            self._store(place, y.at((tile - in_store) * self._y_tile_bytes), stored)

    def _buffer(self, tile: int, k_tile: int) -> Ref:
        return self.weights[(tile * self.k_tiles + k_tile) % 2]

    def _fill(self, at: int, k_tile: int) -> Ref:
        """16 tokens into every slice's register file, each slice its own quarter of K."""
        if self.passes == 1 and k_tile in self._resident:
            return self._resident[k_tile]
        trf = self.sketch.emit.trf(PASS_TOKENS * self.k_tile * 2)
        rows = self.pass_tokens // LANES
        self.sketch.emit.exec(
            Context.SUB,
            [
                Counter(self.k_tile // 16, a=32, trf=32),
                Counter(rows, birth=Birth.SLICE, slices=LANES * SHARE, trf=self.k_tile * 2),
                Counter(LANES, birth=Birth.SLICE, slices=SHARE, lanes=1),
            ],
            Stream(16),
            a=self.x.at(at * self.row_bytes + k_tile * self.k_tile * 2),
            out=trf,
            commit=Commit(Sink.TRF, columns=16),
            switch=Switch(Topology.BROADCAST1, SLICES_PER_PE, (Digit(shift=0, bits=2, slices=1),)),
        )
        if self.passes == 1 and self.k_tiles == 1:
            self._resident[k_tile] = trf
        return trf

    def _multiply(
        self, weights: Ref, rows: int, trf: Ref, out: Ref, tokens: int, dtype: DType
    ) -> None:
        size = dtype.bits // 8
        self.sketch.emit.exec(
            Context.MAIN,
            [
                Counter(rows, a=self.k_tile * 2, commit=tokens * size),
                Counter(self.k_tile // PACKET, fate=Fate.MSUM, a=64, trf=64),
                Counter(
                    self.pass_tokens // LANES,
                    birth=Birth.REUSE,
                    trf=self.k_tile * 2,
                    commit=LANES * size,
                ),
            ],
            Stream(PACKET),
            a=weights,
            trf=trf,
            out=out,
            out_dtype=dtype,
            contraction=Contraction(lanes=LANES),
            vector=Vector(slice_reduce=Reduce.ADD, slice_group=SHARE),
            commit=Commit(lanes=LANES, lane_stride=size),
        )

    def _add(self, sums: Ref, partial: Ref, result: Ref | None, count: int) -> None:
        """sums += partial; the last one rounds to bf16."""
        self.sketch.emit.exec(
            Context.MAIN,
            [Counter(count // 8, a=32, b=32, commit=16 if result else 32)],
            Stream(8, pair=True),
            a=sums,
            b=partial,
            dtype=DType.F32,
            out=result or sums,
            out_dtype=DType.BF16 if result else DType.F32,
            vector=Vector((VectorOp(Alu.FMA, Op.ADD, y=Source.ZIP),)),
            commit=Commit(columns=8, column_stride=2 if result else 4),
        )


def _ceil(value: int, unit: int) -> int:
    return -(-value // unit)
