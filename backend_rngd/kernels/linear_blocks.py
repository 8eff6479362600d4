"""Matrix products whose weights have scales of blocks: of some rows and of a part of K.

A command sums each cell of K (`isa.scale_cells`) in the contraction, in f32; the vector engine
multiplies that sum by the cell's scale and its reducer adds the cells. So K is walked cell by cell:
whole source slices, or some chunks of each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..emitter import Ref
from ..isa.dtypes import DType
from ..isa.instructions import (
    Birth,
    Commit,
    Context,
    Counter,
    Fate,
    Reduce,
    Sink,
    Stream,
)
from ..isa.layout import CHUNK
from ..isa.plan import Memory
from ..isa.scale_cells import ScaleCells
from .linear import CHUNK_BYTES, GROUP, Numbers, Product
from .rescale import RUN

CHUNK_DEPTH = CHUNK.bit_length() - 1
"""Levels of the adder tree that make one column of a chunk."""


class BlockProduct(Product):
    """A product whose scales have cells."""

    @property
    def cells(self) -> ScaleCells:
        assert self.scales is not None
        assert self.scales.cells is not None
        return self.scales.cells

    def fill_counters(self, chunks: int) -> list[Counter]:
        of_chunk, of_slice = self._in_file(chunks)
        return [
            Counter(chunks, a=GROUP * self.stored_chunk_bytes, trf=of_chunk),
            Counter(self.k_slices, a=self.stored_piece_bytes, trf=of_slice),
        ]

    def _in_file(self, chunks: int) -> tuple[int, int]:
        """Bytes from one chunk of K to the next in the register file, and from slice to slice.

        What is summed innermost are neighbours there: only then two packets of 32 B are multiplied
        at once.
        """
        if self.cells.slices > 1:
            return self.chunk_bytes, CHUNK_BYTES
        return CHUNK_BYTES, chunks * CHUNK_BYTES

    def x_counters(self) -> list[Counter]:
        slice_bytes = self.k_chunks * CHUNK_BYTES
        return [
            Counter(self.k_chunks, a=CHUNK_BYTES, trf=CHUNK_BYTES),
            Counter(self.k_slices, birth=Birth.SLICE, slices=1, trf=slice_bytes),
        ]

    # --- weights as the stream ---

    @property
    def weights_packet(self) -> tuple[Stream, int, int]:
        return Stream(CHUNK, lookup=self.lookup), CHUNK_BYTES, CHUNK_DEPTH

    def weight_counters(self, chunk_bytes: int, scale_bytes: int) -> list[Counter]:
        cells, piece, slice_bytes = self.cells, self.stored_piece_bytes, self.k_chunks * CHUNK_BYTES
        return [
            Counter(
                cells.slice_cells,
                fate=Fate.VSUM,
                a=cells.slices * piece,
                trf=cells.slices * slice_bytes,
                vrf=cells.chunk_cells * scale_bytes,
            ),
            Counter(
                cells.chunk_cells,
                fate=Fate.VSUM,
                a=cells.chunks * chunk_bytes,
                trf=cells.chunks * CHUNK_BYTES,
                vrf=scale_bytes,
            ),
            Counter(cells.slices, fate=Fate.MSUM, a=piece, trf=slice_bytes),
            Counter(cells.chunks, fate=Fate.MSUM, a=chunk_bytes, trf=CHUNK_BYTES),
        ]

    def reduces(self, chunks: int) -> Reduce:
        cells = self.cells
        several = cells.slice_cells * cells.of_chunks(chunks) > 1
        return Reduce.ADD if several else Reduce.NONE

    def load_numbers(self, source: Ref, rows: int) -> Numbers:
        """The scales of `rows` rows, which are whole groups or a part of one."""
        cells, group = self.cells, 4 * self.cells.group_numbers
        if rows >= GROUP or not cells.per_row:
            groups = max(1, rows // GROUP)
            vrf = self.emit.load_vrf(source, groups * cells.group_numbers, "scale")
            return Numbers(vrf, 4 if cells.per_row else 0, group, 4 * cells.row_numbers)
        vrf = self._gathered(source, [(cells.count, 4 * GROUP)], rows)
        return Numbers(vrf, 4, group, 4 * rows)

    # --- tokens as the stream ---

    def stream_counters(self, chunks: int) -> list[Counter]:
        cells = self.cells
        chunk_cells, (of_chunk, of_slice) = cells.of_chunks(chunks), self._in_file(chunks)
        # Scales of rows are loaded for the command, others for the tile.
        scale_bytes = 4 * cells.row_numbers
        stored = chunk_cells if cells.per_row else cells.chunk_cells
        of_cell = chunks // chunk_cells
        return [
            Counter(
                cells.slice_cells,
                birth=Birth.SLICE,
                fate=Fate.VSUM,
                slices=cells.slices,
                trf=cells.slices * of_slice,
                vrf=stored * scale_bytes,
            ),
            Counter(
                chunk_cells,
                fate=Fate.VSUM,
                a=of_cell * CHUNK_BYTES,
                trf=of_cell * of_chunk,
                vrf=scale_bytes,
            ),
            Counter(of_cell, fate=Fate.MSUM, a=CHUNK_BYTES, trf=of_chunk),
            Counter(cells.slices, birth=Birth.SLICE, fate=Fate.MSUM, slices=1, trf=of_slice),
        ]

    def load_tile_scales(self, source: Ref, chunks: tuple[int, int] | None) -> Ref:
        """The scales of a group's rows for the cells of (first, count) chunks, or for all."""
        cells = self.cells
        if chunks is None:
            return self.emit.load_vrf(source, cells.group_numbers, "scale")
        first, count = chunks
        cell_bytes = 4 * GROUP
        loops = [
            (cells.slice_cells, cells.chunk_cells * cell_bytes),
            (cells.of_chunks(count), cell_bytes),
            (GROUP // RUN, 4 * RUN),
        ]
        return self._gathered(source.at(first // cells.chunks * cell_bytes), loops, RUN)

    def _gathered(self, source: Ref, loops: Sequence[tuple[int, int]], run: int) -> Ref:
        """Runs of f32 in data memory, as loops (count, bytes) find them, dense in the VRF."""
        size = 4 * run * math.prod(n for n, _ in loops)
        vrf, counters = self.emit.alloc(Memory.VRF, size, "scale"), []
        for n, stride in loops:
            size //= n
            counters.append(Counter(n, a=stride, vrf=size))
        self.emit.exec(
            Context.SUB,
            counters,
            Stream(run),
            a=source,
            dtype=DType.F32,
            out=vrf,
            commit=Commit(Sink.VRF, columns=run),
        )
        return vrf
