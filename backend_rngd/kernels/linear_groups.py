"""Matrix products of groups of slices that have tokens of their own.

Every group computes all features of its tokens, with weights of its own. They come from the layout
that all slices share: unit n of y's positions, which slice n mod R of a group computes, has the
rows of slice n (or of a chunk of them); unit n of K is source slice n (or one chunk of one).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from ..emitter import Activation, Emitter, Ref
from ..isa.dtypes import DType
from ..isa.instructions import Counter, Fate
from ..isa.layout import CHUNK
from ..isa.plan import SLICE_ADDRESS_BYTES, Memory
from ..isa.rules import SLICES_PER_PE
from ..tiling import MatmulTiling
from ..token_groups import group_loop
from .linear import CHUNK_BYTES, GROUP, TILE_FEATURES, Product
from .linear_blocks import BlockProduct


@dataclass(frozen=True)
class GroupedProduct(Product):
    """A product whose tokens are divided over groups of slices.

    A chunk of K is what a command can sum without the others: chunk c of all units, or, where
    units are chunks, the units of one number in each slice.
    """

    @property
    def parts(self) -> int:
        """All slices of a group sum all of K."""
        return 1

    @property
    def ring(self) -> int:
        return self.x.ring

    @cached_property
    def k_slices(self) -> int:
        """Source slices of a group."""
        return min(self.ring, self.x.slices_read)

    @property
    def k_chunks(self) -> int:
        return self.x.units if self._by_units else self.x.per_slice // CHUNK

    @cached_property
    def chunk_bytes(self) -> int:
        """Bytes of a chunk in a row of the register file."""
        return (1 if self._by_units else self.x.units) * self.k_slices * CHUNK_BYTES

    @property
    def loaded_row_bytes(self) -> int:
        """A row of a chunk has the source slices of one part of the layout."""
        return self.x.slices_read // self.tiling.k_split * self.stored_piece_bytes

    @property
    def _by_units(self) -> bool:
        return self.x.unit < self.x.per_slice

    @property
    def _layout_chunk_bytes(self) -> int:
        """Bytes of 16 rows of a chunk in HBM, in one part of the layout."""
        return GROUP * self.loaded_row_bytes

    def load(self, first: Ref, rows: int, chunk: int, chunks: int) -> Ref:
        """16 rows for every slice: [chunk][part][row]; all chunks where units are chunks."""
        assert rows == TILE_FEATURES
        parts, size = self.tiling.k_split, self._layout_chunk_bytes
        count = self.x.per_slice // CHUNK if self._by_units else chunks
        hbm_group = self.x.per_slice // CHUNK * size
        buffer = self.emit.alloc(Memory.DM, count * parts * size, "weights")
        slices = min(self.ring, self.y.slices_used * self.y.per_slice // self.y.unit)
        of_slice = slices, self.y.unit // GROUP * hbm_group, SLICE_ADDRESS_BYTES
        part_bytes = SLICES_PER_PE // parts * self.y.per_slice // GROUP * hbm_group
        loops = [(parts, part_bytes, size), (count, size, parts * size)]
        run = size
        if parts == 1:
            loops, run = [], count * size
        source = first if self._by_units else first.at(chunk * size)
        loops = [of_slice, group_loop(self.x.groups), *loops]
        for copy in range(self.ring // slices):
            place = buffer.at(copy * slices * SLICE_ADDRESS_BYTES)
            self.emit.dma(loops, run, self._of_copy(copy, source), place)
        return buffer

    def _of_copy(self, copy: int, weights: Ref) -> Ref:
        """Weights of the slices that have no units of their own: again those of the others."""
        return weights

    def weight_row(self, feature: int) -> Ref:
        """The first slice's row of weights for its output position `feature`."""
        unit, inside = divmod(feature, self.y.unit)
        hbm_group = self.x.per_slice // CHUNK * self._layout_chunk_bytes
        before = unit * self.ring * self.y.unit + inside
        return self.weight.at(before // GROUP * hbm_group)

    def loaded_at(self, weights: Ref, tile: int, chunk: int) -> Ref:
        assert tile == 0
        if self._by_units:
            per_unit = self.x.per_slice // CHUNK
            return weights.at(chunk * self.ring // per_unit * self.stored_piece_bytes)
        return weights.at(chunk * self.tiling.k_split * self._layout_chunk_bytes)

    def fill_counters(self, chunks: int) -> list[Counter]:
        piece = self.stored_piece_bytes
        if self._by_units:
            of_slice = self.x.per_slice // CHUNK
            sources = self.ring // of_slice
            return [
                Counter(chunks, a=sources * piece, trf=self.chunk_bytes),
                Counter(sources, a=piece, trf=of_slice * CHUNK_BYTES),
                Counter(of_slice, a=self._layout_chunk_bytes, trf=CHUNK_BYTES),
            ]
        parts, pieces = self.tiling.k_split, self.loaded_row_bytes // piece
        return [
            Counter(chunks, a=parts * self._layout_chunk_bytes, trf=self.chunk_bytes),
            Counter(parts, a=self._layout_chunk_bytes, trf=pieces * CHUNK_BYTES),
            Counter(pieces, a=piece, trf=CHUNK_BYTES),
        ]

    def stream_counters(self, chunks: int) -> list[Counter]:
        x, unit_row = self.x, self.k_slices * CHUNK_BYTES
        if self._by_units:
            units = Counter(chunks, fate=Fate.MSUM, a=x.unit_bytes, trf=unit_row)
            return [units, self.slice_counter]
        return [
            Counter(chunks, fate=Fate.MSUM, a=CHUNK_BYTES, trf=self.chunk_bytes),
            Counter(x.units, fate=Fate.MSUM, a=x.unit_bytes, trf=unit_row),
            self.slice_counter,
        ]

    def chunk_offset(self, chunk: int) -> int:
        return chunk * (self.x.unit_bytes if self._by_units else CHUNK_BYTES)

    def load_bias(self) -> Ref:
        assert self.bias is not None
        return load_units(self.emit, self.bias, self.y)

    def load_scale(self) -> Ref:
        assert self.scales is not None
        return load_units(self.emit, self.scales.weight, self.y, DType.F32)

    def zero_unused_slices(self) -> None:
        """Every slice computes something: units, or copies of them."""


@dataclass(frozen=True)
class JoinedProduct(GroupedProduct):
    """Two products of one x whose units are half of a group's slices each, in one buffer."""

    second: Ref | None = None
    """Weights of the second product, in the same layout as those of the first."""

    def _of_copy(self, copy: int, weights: Ref) -> Ref:
        assert self.second is not None
        return self.second.at(weights.offset - self.weight.offset) if copy else weights


def can_join(y: Activation) -> bool:
    """Whether two results like y fill the slices of a group."""
    return y.groups > 1 and 2 * y.slices_used == y.ring


def product_type(tiling: MatmulTiling, *, blocks: bool) -> type[Product]:
    """The kind of product that a tiling cuts; with `blocks` its weights have scales of blocks."""
    if blocks:
        assert tiling.groups == 1, "such products have no groups"
        return BlockProduct
    return GroupedProduct if tiling.groups > 1 else Product


def load_units(emit: Emitter, vector: Ref, y: Activation, dtype: DType = DType.BF16) -> Ref:
    """A parameter of one value per feature: [unit][position], the same in every group."""
    unit_bytes = dtype.bytes_for(y.unit)
    dm = emit.alloc(Memory.DM, y.units * unit_bytes, "vector")
    emit.dma(
        [
            group_loop(y.groups),
            (y.units, y.ring * unit_bytes, unit_bytes),
            (y.ring, unit_bytes, SLICE_ADDRESS_BYTES),
        ],
        unit_bytes,
        vector,
        dm,
    )
    return dm
