"""Matrix products: what a product needs, how its weights come into memory, and which kernel runs.

N is spread over the slices. `RowsLayout` holds weights in groups of 16 rows and K in chunks of 16
positions per source slice, so 16 rows of any range of chunks are one run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from xdsl.dialects.builtin import LocationAttr

from ..emitter import Activation, ActivationShape, Emitter, Ref, power_of_two_at_least
from ..isa.cost import dma_cost
from ..isa.dtypes import DType
from ..isa.instructions import (
    Birth,
    Context,
    Counter,
    Dma,
    Fate,
    Head,
    Reduce,
    Side,
    Space,
    Stream,
)
from ..isa.layout import CHUNK, scale_cells
from ..isa.machine import load_machine
from ..isa.plan import SLICE_ADDRESS_BYTES, Memory, plan_dma
from ..isa.rules import LANES, SLICES_PER_PE
from ..isa.scale_cells import ScaleCells
from ..tiling import MatmulTiling, Role

CHUNK_BYTES = 2 * CHUNK
"""A chunk as bf16: of activations, and of weights in the register file or the stream."""
GROUP = CHUNK
"""Rows of weights that stand together in HBM, chunk of K by chunk of K."""
TILE_FEATURES = 2 * LANES
"""Features per slice whose weights stand in the register file at a time: two rows per lane."""

NUMBER_BYTES = 8
"""Of a scale that stands alone in data memory."""

PACKET = 32
"""bf16 elements of a 64 B packet."""
TURN_BYTES = 8192
"""Weights that a slice gets at a time where only some of the slices get any."""


@dataclass(frozen=True)
class MatmulShape:
    """What a tiling depends on."""

    tokens: int
    per_slice: int
    """Output positions of a slice."""
    slices_read: int
    """Slices whose output positions the next product reads: those that hold features."""
    k_slices: int
    """Slices that hold the positions of K."""
    k_chunks: int
    """Chunks of 16 positions of K in each of them."""
    dtype: DType = DType.BF16
    weight_dtype: DType = DType.BF16
    may_repeat: bool = False
    """Whether slices without features may hold copies of others, as those of heads may."""
    groups: int = 1
    """Groups of slices that have tokens of their own, so many each."""
    k_units: int = 1
    """Units of K in a slice of such a group (`token_groups`)..."""
    by_chunk: bool = False
    """...which are chunks."""
    cells: ScaleCells | None = None
    """Of scales of blocks."""

    @property
    def k(self) -> int:
        return self.k_slices * self.k_chunks * CHUNK

    @property
    def parts(self) -> int:
        """Parts into which the slices divide K: as many as keep all of them busy."""
        if not self.may_repeat or self.k_slices != SLICES_PER_PE:
            return 1
        return SLICES_PER_PE // power_of_two_at_least(self.slices_read)


def shape_of_product(
    x: ActivationShape,
    y: ActivationShape,
    weight_dtype: DType,
    may_repeat: bool,
    block: tuple[int, int] | None = None,
) -> MatmulShape:
    """The shape of y = x · wᵀ; rows and columns of w in a `block` share a scale."""
    shape = MatmulShape(
        tokens=x.tokens,
        per_slice=y.per_slice,
        slices_read=y.slices_read,
        k_slices=x.slices_read,
        k_chunks=x.per_slice // CHUNK,
        dtype=y.dtype,
        weight_dtype=weight_dtype,
        may_repeat=may_repeat,
        groups=x.groups,
        k_units=x.units,
        by_chunk=x.unit < x.per_slice,
    )
    if block is None:
        return shape
    cells = scale_cells(y.order, x.order, y.per_slice, shape.k, shape.parts, block)
    assert cells is not None, "others are refused before"
    return replace(shape, cells=cells)


@dataclass(frozen=True)
class Scales:
    """What turns sums over codes into results, all of it in f32."""

    weight: Ref
    """Of each row of weights, in HBM as `ScaleLayout`; of blocks, as `BlockScaleLayout`."""
    number: Ref | None = None
    """Of all inputs, in data memory: one number in 8 bytes."""
    tokens: Ref | None = None
    """Of each token, in data memory: 8 bytes each."""
    cells: ScaleCells | None = None
    """Of scales of blocks."""

    @property
    def feature_bytes(self) -> int:
        """Bytes of a slice's scales of weights from one of its features to the next, on average."""
        return 4 if self.cells is None else 4 * self.cells.group_numbers // GROUP

    def bytes_before(self, feature: int) -> int:
        """Bytes of a slice's scales of weights before those of a feature."""
        if self.cells is None:
            return 4 * feature
        group, row = divmod(feature, GROUP)
        return 4 * (group * self.cells.group_numbers + row * self.cells.per_row)


@dataclass(frozen=True)
class Numbers:
    """f32 numbers of a load's rows in the VRF."""

    vrf: Ref
    row: int
    """Bytes from one row's to the next..."""
    group: int
    """...and from one group of 16 rows to the next."""
    cell: int = 0
    """Bytes from one cell's to the next, if sums of cells have scales of their own."""


@dataclass(frozen=True)
class Product:
    """y = (x · wᵀ) · scales + bias + residual.

    `weight` lies as `RowsLayout` of `weight_dtype`, `bias` as `VectorLayout`. Weights that are
    codes of 8 bits are looked up as bf16, which the main context does: in the stream if they are
    it, else on the way to the register file.
    """

    emit: Emitter
    x: Activation
    weight: Ref
    y: Activation
    tiling: MatmulTiling
    bias: Ref | None = None
    residual: Activation | None = None
    zeros: Ref | None = None
    """HBM zeros, enough for a slice of y; needed when not every slice gets weights."""
    weight_dtype: DType = DType.BF16
    scales: Scales | None = None
    location: LocationAttr | None = None
    """Of its commands, where products take turns."""

    @property
    def tiles(self) -> int:
        """Tiles of 16 features per slice."""
        return self.y.units * self.y.unit // TILE_FEATURES

    @property
    def parts(self) -> int:
        """Parts of K, each summed by slices of its own."""
        return self.tiling.k_split

    @property
    def ring(self) -> int:
        """Slices of a part: they exchange their positions of x."""
        return SLICES_PER_PE // self.parts

    @cached_property
    def k_slices(self) -> int:
        """Source slices of a part."""
        return min(self.ring, self.x.slices_read)

    @property
    def k_chunks(self) -> int:
        return self.x.per_slice // CHUNK

    @cached_property
    def chunk_bytes(self) -> int:
        """Bytes of one chunk of K of all source slices of a part, in a row of the register file."""
        return self.k_slices * CHUNK_BYTES

    @property
    def row_bytes(self) -> int:
        """Bytes of a part's row in the register file."""
        return self.k_chunks * self.chunk_bytes

    @property
    def stored_piece_bytes(self) -> int:
        """Bytes of a chunk of one source slice, in a row of weights in memory."""
        return self.weight_dtype.bytes_for(CHUNK)

    @property
    def stored_chunk_bytes(self) -> int:
        """Bytes of one chunk of K of all source slices of a part, in a row of weights in memory."""
        return self.k_slices * self.stored_piece_bytes

    @property
    def stored_row_bytes(self) -> int:
        """Bytes of a part's row of weights in memory."""
        return self.k_chunks * self.stored_chunk_bytes

    @property
    def lookup(self) -> DType | None:
        """What the table gives for weights that are codes."""
        return None if self.weight_dtype == DType.BF16 else DType.BF16

    @property
    def loaded_slices(self) -> int:
        """Slices that weights are loaded for."""
        return SLICES_PER_PE if self.tiling.every_slice else self.y.slices_read

    def load(self, first: Ref, rows: int, chunk: int, chunks: int) -> Ref:
        """`rows` rows of weights, for `chunks` chunks of K from `chunk`.

        `first` is where the first of them lies in HBM; they begin a group of 16 rows or are a
        part of one. In memory they are dense: [group][chunk][row of the group].
        """
        emit, t = self.emit, self.tiling
        group, row = min(rows, GROUP), self.stored_chunk_bytes
        hbm_chunk = GROUP * row
        hbm_group = self.k_chunks * hbm_chunk
        buffer = emit.alloc(Memory.DM, rows * chunks * row, "weights")
        loops = [
            (rows // group, hbm_group, group * chunks * row),
            (chunks, hbm_chunk, group * row),
            (group, row, row),
        ]
        run = row
        while loops and (loops[-1][0] == 1 or loops[-1][1:] == (run, run)):
            run *= loops.pop()[0]
        # The parts of K follow each other in HBM, as their slices do.
        slice_bytes = self.y.per_slice // GROUP * hbm_group
        slice_loop = (self.loaded_slices, slice_bytes, SLICE_ADDRESS_BYTES)
        nests = [([*loops, slice_loop] if t.run_per_row else [slice_loop, *loops], run)]
        turns = run // TURN_BYTES
        if self.loaded_slices < SLICES_PER_PE and turns * TURN_BYTES == run:
            # A long run for each of some slices may pass unevenly over HBM's channels; so may
            # short turns, if what lies between two slices is a large power of two.
            nests.append(([*loops, (turns, TURN_BYTES, TURN_BYTES), slice_loop], TURN_BYTES))
        if len(nests) > 1:
            nests.sort(key=lambda nest: _shared_load_cycles(*nest))
        loops, run = nests[0]
        emit.dma(loops, run, first.at(chunk * hbm_chunk), buffer)
        return buffer

    def loaded_at(self, weights: Ref, tile: int, chunk: int) -> Ref:
        """Where a tile's weights from a chunk on lie in a load of some."""
        before = tile * self.stored_row_bytes + chunk * self.stored_chunk_bytes
        return weights.at(TILE_FEATURES * before)

    def fill_counters(self, chunks: int) -> list[Counter]:
        """The walk over a row of loaded weights that puts it in the register file."""
        return [
            Counter(chunks, a=TILE_FEATURES * self.stored_chunk_bytes, trf=self.chunk_bytes),
            Counter(self.k_slices, a=self.stored_piece_bytes, trf=CHUNK_BYTES),
        ]

    @property
    def loaded_row_bytes(self) -> int:
        """Bytes from one row of loaded weights to the next."""
        return self.stored_chunk_bytes

    def stream_counters(self, chunks: int) -> list[Counter]:
        """The walk over the positions of a token, of all source slices."""
        return [
            Counter(chunks, fate=Fate.MSUM, a=CHUNK_BYTES, trf=self.chunk_bytes),
            self.slice_counter,
        ]

    @property
    def slice_counter(self) -> Counter:
        """The walk over source slices, whose pieces of a chunk stand together."""
        return Counter(self.k_slices, birth=Birth.SLICE, fate=Fate.MSUM, slices=1, trf=CHUNK_BYTES)

    def x_counters(self) -> list[Counter]:
        """The walk over a token's positions that puts them in the register file."""
        slices = Counter(self.k_slices, birth=Birth.SLICE, slices=1, trf=CHUNK_BYTES)
        return [Counter(self.k_chunks, a=CHUNK_BYTES, trf=self.chunk_bytes), slices]

    @property
    def weights_packet(self) -> tuple[Stream, int, int]:
        """The stream of weights, bytes of the register row that a packet meets, and the tree."""
        return Stream(PACKET, lookup=self.lookup), 2 * PACKET, PACKET.bit_length() - 1

    def weight_counters(self, chunk_bytes: int, scale_bytes: int) -> list[Counter]:
        """The walk over a row of loaded weights, whose chunks are so far apart.

        Scales of neighbouring cells, if there are any, are `scale_bytes` apart.
        """
        return [
            Counter(self.k_chunks, fate=Fate.MSUM, a=chunk_bytes, trf=self.chunk_bytes),
            Counter(
                self.chunk_bytes // (2 * PACKET),
                fate=Fate.MSUM,
                a=self.weight_dtype.bytes_for(PACKET),
                trf=2 * PACKET,
            ),
        ]

    def reduces(self, chunks: int) -> Reduce:
        """What adds up sums over so many chunks of K when they have been multiplied."""
        return Reduce.NONE

    def load_numbers(self, source: Ref, rows: int) -> Numbers:
        """The scales of `rows` rows, from f32 in data memory."""
        return Numbers(self.emit.load_vrf(source, rows, "scale"), 4, 4 * GROUP)

    def load_tile_scales(self, source: Ref, chunks: tuple[int, int] | None) -> Ref:
        """The scales of a tile's features."""
        return self.emit.load_vrf(source, TILE_FEATURES, "scale")

    def chunk_offset(self, chunk: int) -> int:
        """Bytes from a token's first position to those of a chunk."""
        return chunk * CHUNK_BYTES

    def load_bias(self) -> Ref:
        """The bias of a slice's features."""
        assert self.bias is not None
        return load_vector(self.emit, self.bias, self.y.per_slice)

    def load_scale(self) -> Ref:
        """What the sums of a slice's features are multiplied by, f32.

        The parts of K have copies, but those of blocks have scales of their own.
        """
        assert self.scales is not None
        size = self.scales.bytes_before(self.y.per_slice)
        dm = self.emit.alloc(Memory.DM, size, "scale")
        part_bytes = 0 if self.scales.cells is None else self.ring * size
        part = self.parts, part_bytes, self.ring * SLICE_ADDRESS_BYTES
        self.emit.dma([part, (self.ring, size, SLICE_ADDRESS_BYTES)], size, self.scales.weight, dm)
        return dm

    def weight_row(self, feature: int) -> Ref:
        """Where a slice's row of weights for its output position `feature` lies in HBM."""
        group, row = divmod(feature, GROUP)
        before = group * GROUP * self.stored_row_bytes + row * self.stored_chunk_bytes
        return self.weight.at(before)

    def zero_unused_slices(self) -> None:
        """Give the slices that no weights are loaded for the zeros that readers of y expect."""
        if self.loaded_slices == SLICES_PER_PE:
            return
        assert self.zeros is not None
        first = self.loaded_slices
        self.emit.dma(
            [(SLICES_PER_PE - first, 0, SLICE_ADDRESS_BYTES)],
            self.y.size_bytes,
            self.zeros,
            self.y.ref.at(first * SLICE_ADDRESS_BYTES),
        )


def _shared_load_cycles(loops: Sequence[tuple[int, int, int]], run: int) -> int:
    """Cycles of a load from HBM while all PEs of the card load."""
    machine = load_machine()
    n, source, destination = zip(*loops, strict=True)
    sides = Side(Space.HBM, 0, source), Side(Space.DM, 0, destination)
    command = Dma(Head(Context.DMA), n, run, *sides)
    return dma_cost(plan_dma(command, ""), machine, machine.chip.pes).total_cycles


def load_vector(emit: Emitter, vector: Ref, per_slice: int) -> Ref:
    """A parameter of one value per feature, bf16 [C] in the slices' data memory."""
    dm = emit.alloc(Memory.DM, per_slice * 2, "vector")
    emit.load_slices(vector, dm, per_slice * 2)
    return dm


def linear(product: Product) -> None:
    """Emit the product, summed in f32 and rounded once to y's type."""
    from .linear_tokens import tokens_stream
    from .linear_weights import weights_stream

    product.zero_unused_slices()
    if product.tiling.role == Role.WEIGHTS:
        assert product.residual is None, "only the other kernel adds one"
        weights_stream(product)
    else:
        tokens_stream(product)
