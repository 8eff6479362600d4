"""How scales are cut with the weights that they belong to.

Blocks of a weight share a scale. Where the boundary between two ranks lies inside a block, all of a
rank's blocks become smaller, so that each of them lies in one block of the whole weight, and the
scale is there once for each: the part of `[a, b]` may be `[a, a, a, b]`.
"""

from __future__ import annotations

from math import gcd

from xdsl.ir import SSAValue

from ..ir import quant
from ..ir.dist_cut import CutAttr, Range
from ..ir.types import dims_of, shape_of


def local_block(cut: CutAttr, block: int) -> int:
    """Rows or columns that share a scale in each rank's part: the most that do on all ranks.

    `cut` is the weight's, along the dimension of the block; `block` may be partial at its end.
    """
    if block >= cut.whole_size:
        return cut.local_size
    if cut.divided(block) is not None:
        return block
    steps = [step for rank in range(cut.ranks) for step in _steps(cut, rank, block)]
    return gcd(*steps) or cut.local_size


def _steps(cut: CutAttr, rank: int, block: int) -> list[int]:
    """What a rank's blocks divide: places in its part where a slot or a block begins."""
    begins = [slot * cut.length.data for slot in range(cut.local_size // cut.length.data)]
    inside = (
        begin + boundary - start
        for begin, (start, stop) in cut.pieces(rank)
        for boundary in range(start - start % block + block, stop, block)
    )
    return [*begins, *inside]


def scale_cut(cut: CutAttr, block: int, dim: int) -> CutAttr:
    """The cut of a scale along its dimension `dim`, for the blocks of `local_block`.

    `block` is smaller than the dimension of the weight. What is padding there has no scale, which
    is zero, or as near to it as the scale's type comes.
    """
    aligned = cut.divided(block)
    if aligned is not None:
        return aligned.at(dim)
    local = local_block(cut, block)
    ranks = [_cells(cut, rank, local, block) for rank in range(cut.ranks)]
    return CutAttr(dim, 1, ranks)


def _cells(cut: CutAttr, rank: int, local: int, block: int) -> list[Range | None]:
    """The scale of each of a rank's blocks."""
    cells: list[Range | None] = [None] * -(-cut.local_size // local)
    for begin, (start, stop) in cut.pieces(rank):
        for first in range(start, stop, local):
            cell = first // block
            cells[(begin + first - start) // local] = (cell, cell + 1)
    return cells


def scale_of_weight(op: quant.LinearOp, cut: CutAttr) -> CutAttr | None:
    """The cut of the scale of a weight that is cut so; None if every rank needs all of it."""
    direction = cut.dim.data
    block = op.block[direction]
    if block >= cut.whole_size:
        return None
    dim = quant.grid_dim(shape_of(op.w_scale), 0 if direction == 0 else 1)
    assert dim is not None, "a scale of several blocks has a dimension for them"
    return scale_cut(cut, block, dim)


def scale_of_input(x: SSAValue, scale: SSAValue, cut: CutAttr) -> tuple[CutAttr | None] | None:
    """The cut of the scale of a value that is cut so: (None,) if every rank needs all of it, None
    if boundaries lie inside groups."""
    if all(size == 1 for size in dims_of(scale)):
        return (None,)
    *outer, width = dims_of(x)
    by_column = dims_of(scale) == (width,)
    if cut.dim.data < len(outer):
        return (None,) if by_column else (cut,)
    group = group_of(x, scale)
    if group is None:
        return (None,)
    divided = cut.divided(group)
    return None if divided is None else (divided.at(0) if by_column else divided,)


def group_of(x: SSAValue, scale: SSAValue) -> int | None:
    """Neighbours in the last dimension of x that share a scale; None if all of a token do."""
    width = dims_of(x)[-1]
    groups = 1 if all(size == 1 for size in dims_of(scale)) else dims_of(scale)[-1]
    assert isinstance(width, int)
    assert isinstance(groups, int)
    return None if groups == 1 else width // groups
