"""Which positions of a weight share a scale, in the terms of slices, chunks and groups of rows.

A format scales blocks of R rows and C columns. Where the columns of a block lie depends on how K is
spread: a block may be several slices, a part of one, or parts of two. A **cell** is what a product
sums before it multiplies: whole slices that stand side by side, or some chunks of one slice, all
of one block.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

NUMBERS = 8
"""f32 numbers of a flit: scales of a group of rows begin at one."""


@dataclass(frozen=True)
class ScaleCells:
    """How the K that a slice sums is cut into cells, and how many rows each scale is for."""

    slices: int
    """Source slices of a cell..."""
    chunks: int
    """...and chunks of K that it has of each of them."""
    slice_cells: int
    """Cells side by side..."""
    chunk_cells: int
    """...and in a slice; one if a cell has whole slices."""
    row_numbers: int
    """Scales of a cell for a group of rows: one, or as many as rows."""

    @property
    def count(self) -> int:
        return self.slice_cells * self.chunk_cells

    @property
    def per_row(self) -> bool:
        """Whether each row has scales of its own."""
        return self.row_numbers > 1

    @property
    def group_numbers(self) -> int:
        """Scales of a group of rows, [cell][row], with what fills the last flit."""
        return -(-self.count * self.row_numbers // NUMBERS) * NUMBERS

    def of_chunks(self, chunks: int) -> int:
        """Cells in so many chunks of a slice, which begin where one begins or are a part of one."""
        return max(1, chunks // self.chunks)

    def suits(self, chunks: int) -> bool:
        """Whether commands that sum so many chunks cut no cell in uneven parts."""
        return chunks % self.chunks == 0 or self.chunks % chunks == 0


def cells_of(
    rows: np.ndarray, columns: np.ndarray, parts: int, block: tuple[int, int]
) -> ScaleCells | None:
    """The largest cells for blocks of (R, C); None if a chunk of K has positions of two blocks.

    `rows` [group, row] and `columns` [slice, chunk, position] are the features of w, -1 for
    padding; the slices of K are in so many parts, each of which is summed apart.
    """
    shared = common_block(rows, block[0]) is not None
    row_numbers = 1 if shared else rows.shape[1]
    slices, chunks, positions = columns.shape
    slices //= parts
    for count in _divisors(slices):
        if common_block(columns.reshape(-1, count * chunks * positions), block[1]) is not None:
            return ScaleCells(count, chunks, slices // count, 1, row_numbers)
    for count in _divisors(chunks):
        if common_block(columns.reshape(-1, count * positions), block[1]) is not None:
            return ScaleCells(1, count, slices, chunks // count, row_numbers)
    return None


def common_block(features: np.ndarray, size: int) -> np.ndarray | None:
    """The block of `size` features that each row of positions belongs to: [rows].

    Positions without a feature (-1) go with any block; a row of them alone has -1. None if a row
    belongs to two blocks.
    """
    blocks = np.where(features < 0, -1, features // size)
    last: np.ndarray = blocks.max(axis=1)
    first = np.where(blocks < 0, np.iinfo(blocks.dtype).max, blocks).min(axis=1)
    return last if ((last < 0) | (first == last)).all() else None


def _divisors(value: int) -> list[int]:
    """The largest first."""
    return [d for d in range(value, 0, -1) if value % d == 0]
