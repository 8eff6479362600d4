"""Matrix products with weights in the register file and tokens as the stream.

A tile is 16 output features per slice, feature 8 · row + lane in that row of that lane, and as many
positions of K as half of the register file holds: filling one half (sub) hides behind the product
of the other (main). One command streams every token's positions from all slices over the ring and
leaves [token][16] in each slice. Sums over several tiles of K, biases and residuals are f32 slots
[token][16] that the sub context adds up and rounds, so main does nothing but multiply.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ..emitter import Activation, Emitter, Index, Ref
from ..isa.dtypes import DType
from ..isa.instructions import (
    Birth,
    Commit,
    Context,
    Contraction,
    Counter,
    Digit,
    Fate,
    Reduce,
    Sink,
    Stream,
    Switch,
    Topology,
    Vector,
    VectorOp,
)
from ..isa.layout import CHUNK
from ..isa.plan import SLICE_ADDRESS_BYTES, Memory
from ..isa.rules import LANES, SLICES_PER_PE, VRF_BYTES
from ..token_groups import BANK_LINE_BYTES
from .elementwise import BINARY, UNARY
from .linear import CHUNK_BYTES, TILE_FEATURES, Product
from .rescale import ADD_VRF, MULTIPLY_VRF, feature_scales

SLOT_ROW_BYTES = 4 * TILE_FEATURES
"""f32 results of one token and tile."""
LEAST_COPIED_TOKENS = 48
"""Fewer tokens than this may all be fetched from one bank; the limit of the machine is 64."""
LEAST_EXCHANGED_TOKENS = 128
"""Parts of K for fewer tokens are added over the switch: decode steps have no DMA left."""
SLOTS_BYTES = 32768
"""Slots that are added at a time, beside the sum of those before, take at most so much..."""
LEAST_SLOTS = 2
"""...but are at least these."""
LOOP_PRODUCTS = 160
"""Products of one kernel beyond which its tiles are repeated instead of written out."""
BODY_PRODUCTS = 32
"""Products of the body of such a loop."""


Write = Callable[[Ref], None]
"""Emits commands that write f32 [token][16] at a place."""


@dataclass(frozen=True)
class Tile:
    """16 output features of every slice, from position `offset` of y; a place moves in loops."""

    number: int
    weights: Callable[[Product, int, int], Ref]
    """A product's weights for (chunk, chunks): [chunk][row of the tile]."""
    moved: Callable[[Ref, int], Ref]
    """The place in the loop's turn, where features have so many bytes."""

    def of(self, y: Activation) -> Ref:
        """Where the tile stands in an activation."""
        return self.moved(y.place(self.number * TILE_FEATURES), y.dtype.bytes_for(1))

    def of_vector(self, vector: Ref, size: int = 2) -> Ref:
        """Where it stands in values of the slice's features, of `size` bytes each."""
        return self.moved(vector.at(self.number * TILE_FEATURES * size), size)


def tokens_stream(product: Product) -> None:
    """Emit the product."""
    stream = TokensStream(product)
    for tile in tiles([product]):
        stream.tile(tile)


def gated(gate: Product, up: Product, activation: str) -> None:
    """gate.y = activation(gate) · up, tile by tile: no f32 tensor is wider than a tile.

    Both products have one x and one tiling.
    """
    emit, y, location = gate.emit, gate.y, gate.emit.location
    first = TokensStream(gate)
    second = TokensStream(up, first.x)
    for tile in tiles([gate, up]):
        gates, ups = first.summed(tile), second.summed(tile)
        emit.location = location
        active, out = _slots(emit, y.tokens, 1), _slots(emit, y.tokens, 1)
        _elementwise(emit, y.tokens, UNARY[activation], gates, None, active)
        _elementwise(emit, y.tokens, (BINARY["nn.mul"],), active, ups, out)
        _round(emit, y, out, tile.of(y))


def _slots(emit: Emitter, tokens: int, count: int) -> Ref:
    return emit.alloc(Memory.DM, count * tokens * SLOT_ROW_BYTES, "tile_sums")


# --- tiles ---


def tiles(products: Sequence[Product]) -> Iterator[Tile]:
    """The tiles of products that share y's layout and one tiling; many are a loop."""
    p = products[0]
    t = p.tiling
    count = p.tiles
    per_load = t.load_rows // TILE_FEATURES
    per_tile = len(products) * -(-p.k_chunks // t.command_chunks)
    body = max(1, BODY_PRODUCTS // (per_tile * per_load))
    many = count * per_tile > LOOP_PRODUCTS and t.groups == 1  # units do not follow each other
    turns = count // per_load // body if many else 0
    if turns > 1:
        step = body * per_load * TILE_FEATURES
        for turn in p.emit.loop(turns, straight=1):
            for number in range(body):
                moved = functools.partial(_moved, turn, step)
                yield from _load_tiles(products, number * per_load, per_load, moved)
    first = turns * body * per_load if turns > 1 else 0
    for tile in range(first, count, per_load):
        yield from _load_tiles(products, tile, min(per_load, count - tile), lambda ref, _: ref)


def _locate(p: Product) -> None:
    """What follows belongs to this product."""
    if p.location is not None:
        p.emit.location = p.location


def _moved(turn: Index, features: int, ref: Ref, bytes_each: int) -> Ref:
    """A place that goes on by so many features each turn."""
    return ref.moved(turn, features * bytes_each)


def _load_tiles(
    products: Sequence[Product], first: int, count: int, moved: Callable[[Ref, int], Ref]
) -> Iterator[Tile]:
    """Tiles first … first + count - 1, whose weights come together (if in whole rows)."""
    t, k_chunks = products[0].tiling, products[0].k_chunks
    kept: dict[int, Ref] = {}

    def row_of(p: Product, tile: int) -> Ref:
        return moved(p.weight_row(tile * TILE_FEATURES), p.stored_row_bytes)

    if t.load_chunks == k_chunks:
        rows = count * TILE_FEATURES
        for p in products:
            _locate(p)
            kept[id(p)] = p.load(row_of(p, first), rows, 0, k_chunks)
    for number in range(count):
        tile = first + number
        loads: dict[tuple[int, int], Ref] = {}

        def weights(
            p: Product,
            chunk: int,
            chunks: int,
            *,
            tile: int = tile,
            number: int = number,
            loads: dict[tuple[int, int], Ref] = loads,
        ) -> Ref:
            """Weights from `chunk`; a load of some chunks serves the commands inside it."""
            if kept:
                return p.loaded_at(kept[id(p)], number, chunk)
            begin = chunk // t.load_chunks * t.load_chunks
            if (id(p), begin) not in loads:
                size = min(t.load_chunks, k_chunks - begin)
                loads[id(p), begin] = p.load(row_of(p, tile), TILE_FEATURES, begin, size)
            return p.loaded_at(loads[id(p), begin], 0, chunk - begin)

        yield Tile(tile, weights, moved)


# --- one product ---


@dataclass(frozen=True)
class Rows:
    """Token rows in the slices' data memory, `stride` bytes apart."""

    ref: Ref
    stride: int


def _rows_to_stream(p: Product) -> Rows:
    """Rows whose chunks do not all lie in one bank of data memory.

    A row of accesses to one bank keeps the DMA engine out of it for the whole product, so rows of
    whole lines get a copy with a gap after each.
    """
    x = p.x
    if x.groups > 1 or x.row_bytes % BANK_LINE_BYTES or x.tokens < LEAST_COPIED_TOKENS:
        return Rows(x.ref, x.row_bytes)
    stride = x.row_bytes + CHUNK_BYTES
    copy = p.emit.alloc(Memory.DM, x.tokens * stride, "rows")
    p.emit.exec(
        Context.SUB,
        [
            Counter(x.tokens, a=x.row_bytes, commit=stride),
            Counter(p.k_chunks, a=CHUNK_BYTES, commit=CHUNK_BYTES),
        ],
        Stream(CHUNK),
        a=x.ref,
        out=copy,
        commit=Commit(columns=CHUNK, column_stride=2),
        valid_slices=x.slices_read,
    )
    return Rows(copy, stride)


@dataclass(frozen=True)
class Operand:
    """What the vector engine does to f32 sums with numbers in the VRF."""

    op: VectorOp
    vrf: Ref
    feature_bytes: int = 4
    """From a feature's to the next; 0 if all 16 have the same."""
    token_bytes: int = 0
    """From a token's to the next."""
    reduce: Reduce = Reduce.NONE
    """What adds up the results of several sums."""


class TokensStream:
    """The tiles of one product."""

    def __init__(self, product: Product, x: Rows | None = None) -> None:
        """`x` is where the tokens are streamed from, if another product has arranged that."""
        self.p = product
        self.emit = product.emit
        self.x = x or _rows_to_stream(product)
        self.bias = None
        if product.bias is not None:
            self.bias = product.load_bias()
        self.scale: Ref | None = None
        self.token_scales: Ref | None = None
        if product.scales is not None:
            self.scale = feature_scales(product)
            if product.scales.tokens is not None:
                self.token_scales = self.emit.load_vrf(
                    product.scales.tokens, 2 * product.x.tokens, "token_scales"
                )
        self._loaded: tuple[Tile, tuple[int, int] | None, Ref] | None = None
        """The scales in the VRF: of a tile and all chunks, or of some."""

    def tile(self, tile: Tile) -> None:
        """Compute the tile's features of y."""
        y = self.p.y
        commands = self._chunks()
        if self._adds_residual_at_once:
            self._multiply_and_add(tile, commands[0])
            return
        if y.dtype == DType.BF16 and self._ends_in_slots:
            summed = self.summed(tile)
            _round(self.emit, y, summed, tile.of(y))
            return
        out = tile.of(y)
        if len(commands) == 1 and self.p.parts == 1 and not self._ends_in_slots:
            self._multiply(tile, commands[0], out, y.dtype, y.row_bytes)
        elif self._exchanges_parts and not self._ends_in_slots:
            partial = _slots(self.emit, y.tokens, 1)
            products = [self._product(tile, chunks) for chunks in commands]
            self._add_up(products, partial, SLOT_ROW_BYTES)
            self._exchange(partial, out, y.dtype, y.row_bytes)
        elif y.dtype == DType.F32:
            self._sum_into(tile, out, y.row_bytes)
        else:
            _round(self.emit, y, self.summed(tile), out)

    def summed(self, tile: Tile) -> Ref:
        """The tile in f32, bias and residual included: [token][16]."""
        _locate(self.p)
        out = _slots(self.emit, self.p.y.tokens, 1)
        self._sum_into(tile, out, SLOT_ROW_BYTES)
        return out

    @property
    def _adds_residual_at_once(self) -> bool:
        """Whether one command sums all of K, so that it can add the residual too."""
        p = self.p
        alone = p.residual is not None and self.bias is None and p.y.dtype == DType.BF16
        return alone and p.scales is None and p.parts == 1 and len(self._chunks()) == 1

    @property
    def _exchanges_parts(self) -> bool:
        return self.p.parts > 1 and self.p.y.tokens >= LEAST_EXCHANGED_TOKENS

    @property
    def _ends_in_slots(self) -> bool:
        """Whether anything becomes of the sum over all of K."""
        adds = self.bias is not None or self.p.residual is not None
        return adds or self.token_scales is not None

    def _chunks(self) -> list[tuple[int, int]]:
        """(first chunk, chunks) of each product command."""
        step, count = self.p.tiling.command_chunks, self.p.k_chunks
        return [(first, min(step, count - first)) for first in range(0, count, step)]

    def _sum_into(self, tile: Tile, out: Ref, out_row_bytes: int) -> None:
        products = [self._product(tile, chunks) for chunks in self._chunks()]
        addends = self._addends(tile)
        if self.p.parts == 1 and self.token_scales is None:
            # What groups add comes from HBM, and is not to keep weights from coming.
            late = self.p.y.groups > 1
            writes = [*products, *addends] if late else [*addends, *products]
            self._add_up(writes, out, out_row_bytes)
            return

        def all_of_k(place: Ref) -> None:
            sums = _slots(self.emit, self.p.y.tokens, 1)
            self._add_up(products, sums, SLOT_ROW_BYTES)
            if self.token_scales is None:
                self._join_parts(sums, place)
                return
            if self.p.parts > 1:
                joined = _slots(self.emit, self.p.y.tokens, 1)
                self._join_parts(sums, joined)
                sums = joined
            self._scale_tokens(sums, self.token_scales, place)

        self._add_up([*addends, all_of_k], out, out_row_bytes)

    def _join_parts(self, partial: Ref, place: Ref) -> None:
        if self._exchanges_parts:
            self._exchange(partial, place, DType.F32, SLOT_ROW_BYTES)
        else:
            self._combine(partial, place)

    def _multiplied(self, tile: Tile, chunks: tuple[int, int]) -> Operand | None:
        """What sums over (first, count) chunks of the tile are multiplied by.

        It is in one place for all commands of the tile, unless rows have scales of their own for
        their parts of K: then each command has a place.
        """
        scales = self.p.scales
        if self.scale is None or scales is None:
            return None
        cells = scales.cells
        own = chunks if cells is not None and cells.per_row else None
        if self._loaded is None or self._loaded[:2] != (tile, own):
            place = tile.of_vector(self.scale, scales.feature_bytes)
            self._loaded = tile, own, self.p.load_tile_scales(place, own)
        vrf = self._loaded[2]
        reduce = self.p.reduces(chunks[1])
        if cells is None or cells.per_row:
            return Operand(MULTIPLY_VRF, vrf, reduce=reduce)
        return Operand(MULTIPLY_VRF, vrf.at(chunks[0] // cells.chunks * 4), 0, reduce=reduce)

    def _product(self, tile: Tile, chunks: tuple[int, int]) -> Write:
        return lambda place: self._multiply(tile, chunks, place, DType.F32, SLOT_ROW_BYTES)

    def _addends(self, tile: Tile) -> list[Write]:
        found: list[Write] = []
        bias, residual = self.bias, self.p.residual
        if bias is not None:
            found.append(lambda place: self._widen(tile.of_vector(bias), 0, place))
        if residual is not None:
            x = residual
            found.append(lambda place: self._widen(tile.of(x), x.row_bytes, place))
        return found

    def _add_up(self, writes: Sequence[Write], out: Ref, out_row_bytes: int) -> None:
        """The sum of what `writes` write, a few at a time."""
        tokens = self.p.y.tokens
        if len(writes) == 1 and out_row_bytes == SLOT_ROW_BYTES:
            writes[0](out)
            return
        at_a_time = max(LEAST_SLOTS, SLOTS_BYTES // (tokens * SLOT_ROW_BYTES))
        groups = [writes[i : i + at_a_time] for i in range(0, len(writes), at_a_time)]
        slots, count = _slots(self.emit, tokens, len(groups[0])), 0
        for number, group in enumerate(groups):
            for write in group:
                write(slots.at(count * tokens * SLOT_ROW_BYTES))
                count += 1
            if number + 1 < len(groups):
                after = _slots(self.emit, tokens, 1 + len(groups[number + 1]))
                self._sum(slots, count, after, SLOT_ROW_BYTES)
                slots, count = after, 1
        self._sum(slots, count, out, out_row_bytes)

    # --- commands ---

    def _fill(self, tile: Tile, first: int, count: int) -> Ref:
        """The tile's weights for `count` chunks of K into the slices' own register files."""
        p = self.p
        weights = tile.weights(p, first, count)
        k_bytes = count * p.chunk_bytes
        trf = self.emit.trf(TILE_FEATURES * k_bytes)
        self.emit.exec(
            Context.SUB if p.lookup is None else Context.MAIN,
            [
                Counter(TILE_FEATURES // LANES, a=LANES * p.loaded_row_bytes, trf=k_bytes),
                Counter(LANES, a=p.loaded_row_bytes, lanes=1),
                *p.fill_counters(count),
            ],
            Stream(CHUNK, lookup=p.lookup),
            a=weights,
            dtype=p.weight_dtype,
            out=trf,
            commit=Commit(Sink.TRF, columns=CHUNK),
            trf_lanes=LANES,
        )
        return trf

    def _multiply(
        self, tile: Tile, chunks: tuple[int, int], out: Ref, dtype: DType, out_row_bytes: int
    ) -> None:
        trf, operand = self._fill(tile, *chunks), self._multiplied(tile, chunks)
        self._multiply_tokens(chunks, trf, (0, self.p.x.tokens), out, dtype, out_row_bytes, operand)

    def _multiply_and_add(self, tile: Tile, chunks: tuple[int, int]) -> None:
        """The product and the residual, for as many tokens at a time as half of the VRF holds."""
        y, x = self.p.y, self.p.residual
        assert x is not None
        trf = self._fill(tile, *chunks)
        residual, out = tile.of(x), tile.of(y)
        step = VRF_BYTES // 2 // SLOT_ROW_BYTES
        for first in range(0, y.tokens, step):
            count = min(step, y.tokens - first)
            vrf = self._addends_in_vrf(residual.at(first * x.row_bytes), x.row_bytes, count)
            add = Operand(ADD_VRF, vrf, token_bytes=SLOT_ROW_BYTES)
            place = out.at(first * y.row_bytes)
            self._multiply_tokens(chunks, trf, (first, count), place, y.dtype, y.row_bytes, add)

    def _addends_in_vrf(self, source: Ref, row_bytes: int, tokens: int) -> Ref:
        """bf16 [token][16] as f32 in the VRF."""
        vrf = self.emit.alloc(Memory.VRF, tokens * SLOT_ROW_BYTES, "residual")
        self.emit.exec(
            Context.SUB,
            [
                Counter(tokens, a=row_bytes, vrf=SLOT_ROW_BYTES),
                Counter(TILE_FEATURES // 8, a=16, vrf=32),
            ],
            Stream(8, cast=DType.F32),
            a=source,
            out=vrf,
            out_dtype=DType.F32,
            commit=Commit(Sink.VRF, columns=8),
        )
        return vrf

    def _multiply_tokens(
        self,
        chunks: tuple[int, int],
        trf: Ref,
        tokens: tuple[int, int],
        out: Ref,
        dtype: DType,
        out_row_bytes: int,
        operand: Operand | None,
    ) -> None:
        """The product of some tokens (first, count), and what `operand` makes of it."""
        p = self.p
        first, count = chunks
        size = dtype.bytes_for(1)
        after, vrf_bytes, token_bytes = Vector(), 0, 0
        if operand is not None:
            vrf_bytes, token_bytes = operand.feature_bytes, operand.token_bytes
            after = Vector((operand.op,), reduce=operand.reduce, vrf_lane=vrf_bytes)
        self.emit.exec(
            Context.MAIN,
            [
                Counter(
                    tokens[1],
                    a=self.x.stride,
                    vrf=token_bytes,
                    commit=out_row_bytes,
                ),
                *p.stream_counters(count),
                Counter(
                    TILE_FEATURES // LANES,
                    birth=Birth.REUSE,
                    trf=count * p.chunk_bytes,
                    vrf=LANES * vrf_bytes,
                    commit=LANES * size,
                ),
            ],
            Stream(CHUNK),
            a=self.x.ref.at(p.chunk_offset(first) + tokens[0] * self.x.stride),
            trf=trf,
            vrf=operand.vrf if operand else None,
            vector=after,
            out=out,
            out_dtype=dtype,
            switch=Switch(Topology.BROADCAST01, p.ring),
            contraction=Contraction(
                lanes=LANES, trf_read=CHUNK_BYTES, depth=CHUNK.bit_length() - 1
            ),
            commit=Commit(lanes=LANES, lane_stride=size),
        )

    def _scale_tokens(self, sums: Ref, scales: Ref, out: Ref) -> None:
        """A slot times what the VRF holds for each token, in 8 bytes."""
        self.emit.exec(
            Context.SUB,
            [
                Counter(self.p.y.tokens, a=SLOT_ROW_BYTES, vrf=8, commit=SLOT_ROW_BYTES),
                Counter(TILE_FEATURES // 8, a=32, commit=32),
            ],
            Stream(8),
            a=sums,
            dtype=DType.F32,
            vrf=scales,
            out=out,
            vector=Vector((MULTIPLY_VRF,)),
            commit=Commit(columns=8, column_stride=4),
        )

    def _widen(self, source: Ref, row_bytes: int, out: Ref) -> None:
        """bf16 [token][16], or one row for all tokens, as an f32 slot."""
        self.emit.exec(
            Context.SUB,
            [
                Counter(self.p.y.tokens, a=row_bytes, commit=SLOT_ROW_BYTES),
                Counter(TILE_FEATURES // 8, a=16, commit=32),
            ],
            Stream(8, cast=DType.F32),
            a=source,
            out=out,
            out_dtype=DType.F32,
            commit=Commit(columns=8, column_stride=4),
        )

    def _sum(self, slots: Ref, count: int, out: Ref, out_row_bytes: int) -> None:
        tokens = self.p.y.tokens
        self.emit.exec(
            Context.SUB,
            [
                Counter(tokens, a=SLOT_ROW_BYTES, commit=out_row_bytes),
                Counter(TILE_FEATURES // 8, a=32, commit=32),
                Counter(count, fate=Fate.VSUM, a=tokens * SLOT_ROW_BYTES),
            ],
            Stream(8),
            a=slots,
            dtype=DType.F32,
            out=out,
            vector=Vector(reduce=Reduce.ADD) if count > 1 else Vector(),
            commit=Commit(columns=8, column_stride=4),
        )

    def _combine(self, partial: Ref, out: Ref) -> None:
        """Add the parts of K: slice s of every part gets the sum over slices s of all parts.

        The switch brings them, in 64 cycles per packet.
        """
        p = self.p
        self.emit.exec(
            Context.SUB,
            [
                Counter(2 * p.y.tokens, a=32, commit=32),
                Counter(p.parts, birth=Birth.SLICE, slices=p.ring, fate=Fate.VSUM),
            ],
            Stream(8),
            a=partial,
            dtype=DType.F32,
            out=out,
            switch=Switch(
                Topology.BROADCAST1,
                SLICES_PER_PE,
                (Digit(0, p.ring.bit_length() - 1, slices=1),),
            ),
            vector=Vector(reduce=Reduce.ADD),
            commit=Commit(columns=8, column_stride=4),
        )

    def _exchange(self, partial: Ref, out: Ref, dtype: DType, out_row_bytes: int) -> None:
        """As `_combine`: DMA makes neighbours of the slices to be added, and takes sums back."""
        p, emit, tokens = self.p, self.emit, self.p.y.tokens
        size, row_bytes = tokens * SLOT_ROW_BYTES, dtype.bytes_for(TILE_FEATURES)
        apart = (p.parts, p.ring * SLICE_ADDRESS_BYTES), (p.ring, SLICE_ADDRESS_BYTES)
        beside = SLICE_ADDRESS_BYTES, p.parts * SLICE_ADDRESS_BYTES
        slices = [(n, far, near) for (n, far), near in zip(apart, beside, strict=True)]
        neighbours, sums = _slots(emit, tokens, 1), _slots(emit, tokens, 1)
        emit.dma(slices, size, partial, neighbours)
        emit.exec(
            Context.MAIN,
            [Counter(2 * tokens, a=32, commit=row_bytes // 2)],
            Stream(8),
            a=neighbours,
            dtype=DType.F32,
            out=sums,
            out_dtype=dtype,
            vector=Vector(slice_reduce=Reduce.ADD, slice_group=p.parts),
            commit=Commit(columns=8, column_stride=dtype.bytes_for(1)),
        )
        back = [(n, near, far) for n, far, near in slices]
        if out_row_bytes == row_bytes:
            emit.dma(back, tokens * row_bytes, sums, out)
        else:
            emit.dma([*back, (tokens, row_bytes, out_row_bytes)], row_bytes, sums, out)


def _round(emit: Emitter, y: Activation, source: Ref, out: Ref) -> None:
    """An f32 slot to bf16 [token][16] inside y; the fetch adapter rounds."""
    assert y.dtype == DType.BF16, y.dtype
    emit.exec(
        Context.SUB,
        [
            Counter(y.tokens, a=SLOT_ROW_BYTES, commit=y.row_bytes),
            Counter(TILE_FEATURES // 8, a=32, commit=16),
        ],
        Stream(8, cast=DType.BF16),
        a=source,
        dtype=DType.F32,
        out=out,
        out_dtype=DType.BF16,
        commit=Commit(columns=8, column_stride=2),
    )


def _elementwise(
    emit: Emitter, tokens: int, ops: tuple[VectorOp, ...], x: Ref, other: Ref | None, out: Ref
) -> None:
    """An operator on f32 slots."""
    emit.exec(
        Context.SUB,
        [Counter(tokens * TILE_FEATURES // 8, a=32, b=32 if other else 0, commit=32)],
        Stream(8, pair=other is not None),
        a=x,
        b=other,
        dtype=DType.F32,
        out=out,
        vector=Vector(ops),
        commit=Commit(columns=8, column_stride=4),
    )
