"""How matrix products are cut: by rows of their weights, or by columns, whose sums ranks add up."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import TypeAlias

from xdsl.ir import SSAValue

from ..ir import nn, quant
from ..ir.dist_cut import CutAttr
from ..ir.provenance import module_path
from ..ir.types import dims_of, shape_of
from .cut_offers import Offer, Padding
from .scale_cuts import local_block, scale_of_input, scale_of_weight

Product: TypeAlias = nn.LinearOp | quant.LinearOp


def rows_offer(op: Product) -> Offer:
    """Any rows, best in whole blocks that share a scale."""
    rows = 1
    if isinstance(op, quant.LinearOp):
        rows = _block(op, shape_of(op.w)[0], 0)
    return Offer(len(dims_of(op.y)) - 1, block=rows)


def columns(op: Product, offer: Offer | None, ranks: int) -> CutAttr | None:
    """How the product takes its input in parts, if it is offered so; None if it does not."""
    last = len(dims_of(op.x)) - 1
    if offer is None or offer.dim != last:
        return None
    width = shape_of(op.x)[last]
    if isinstance(op, quant.LinearOp):
        offer = replace(offer, block=math.lcm(offer.block, _block(op, width, 1)))
    cut = offer.cut(width, ranks)
    assert cut.is_disjoint, "queries and rows of weights are on one rank each"
    if cut.is_padded and offer.padding == Padding.UNDEFINED:
        return None
    if isinstance(op, quant.LinearOp) and op.x_scale is not None:
        return None if scale_of_input(op.x, op.x_scale, cut) is None else cut
    return cut


def operands_by_columns(op: Product, cut: CutAttr) -> Iterator[tuple[SSAValue, CutAttr, str]]:
    """Operands that are cut if the input is cut so, and why."""
    name = module_path(op) or op.name
    yield op.x, cut, f"rows, because {name} takes its input in parts"
    yield op.w, cut.at(1), "columns, as its input comes; ranks add their sums"
    if isinstance(op, quant.LinearOp):
        w_scale = scale_of_weight(op, cut.at(1))
        if w_scale is not None:
            yield op.w_scale, w_scale, scale_reason(op, cut.at(1))
        if op.x_scale is not None:
            x_scale = scale_of_input(op.x, op.x_scale, cut)
            if x_scale is not None and x_scale[0] is not None:
                yield op.x_scale, x_scale[0], "scales of the groups of its columns"
    if op.bias is not None:
        size = shape_of(op.bias)[0]
        why = "on one rank, so that the sum over the ranks has it once"
        yield op.bias, on_first_rank(size, cut.ranks), why


def scale_reason(op: quant.LinearOp, cut: CutAttr) -> str:
    """Why a weight's scale is cut as it is where the weight is cut so."""
    direction = cut.dim.data
    names, block = ("rows", "columns")[direction], op.block[direction]
    part = local_block(cut, block)
    if part == block:
        return f"scales of the weight's {names}"
    return f"scales of the weight's {names}: in blocks of {part}, as ranks begin inside its {block}"


def local_blocks(op: quant.LinearOp, cut: CutAttr | None) -> tuple[int, int]:
    """Rows and columns that share a scale in each rank's part of the weight."""
    rows, columns = op.block
    if cut is None:
        return rows, columns
    return (
        (local_block(cut, rows), columns)
        if cut.dim.data == 0
        else (rows, local_block(cut, columns))
    )


def on_first_rank(size: int, ranks: int) -> CutAttr:
    """All on rank 0, zeros on the others."""
    return CutAttr(0, size, [[(0, size)], *([None] for _ in range(ranks - 1))])


def _block(op: quant.LinearOp, size: int, direction: int) -> int:
    """Rows or columns of a block; 1 if all of them share a scale."""
    block = op.block[direction]
    return block if block < size else 1
