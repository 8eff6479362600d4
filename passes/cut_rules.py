"""How a cut of an op's result follows from cuts of its operands, op by op.

A rule says along which dimension each operand is cut when the result is cut along one: `None` for
an operand that is needed whole. An op without a rule for that dimension works on whole tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from xdsl.ir import Operation, SSAValue

from ..ir import nn, paged, quant
from ..ir.dist_cut import CutAttr
from ..ir.types import Dims, dims_of
from .scale_cuts import scale_of_input, scale_of_weight


def operand_cuts(op: Operation, cut: CutAttr) -> tuple[CutAttr | None, ...] | None:
    """The cuts of the operands from which the op gives its result cut so; None if none do."""
    match op:
        case nn.ReshapeOp():
            through = reshaped(cut, dims_of(op.y), dims_of(op.x))
            return None if through is None else (through,)
        case quant.QuantizeOp() | quant.DequantizeOp():
            scale = scale_of_input(op.y, op.scale, cut)
            return None if scale is None else (cut, *scale)
        case quant.DynamicScaleOp():
            return _measured(op, cut)
        case quant.LinearOp() if cut.dim.data == len(dims_of(op.y)) - 1:
            rows = cut.at(0)
            values = {op.w: rows, op.w_scale: scale_of_weight(op, rows), op.bias: rows}
            return tuple(values.get(operand) for operand in op.operands)
    dims = operand_dims(op, cut.dim.data)
    if dims is None:
        return None
    return tuple(None if dim is None else cut.at(dim) for dim in dims)


def _measured(op: quant.DynamicScaleOp, cut: CutAttr) -> tuple[CutAttr] | None:
    """Groups of a token that are whole on their ranks."""
    *outer, groups = dims_of(op.y)
    if cut.dim.data < len(outer):
        return (cut,)
    return None if groups == 1 else (cut.scaled(op.group.value.data),)


def operand_dims(op: Operation, dim: int) -> tuple[int | None, ...] | None:
    """The dimension of each operand that goes with `dim` of the result."""
    last = len(dims_of(op.results[0])) - 1
    match op:
        case nn.UnaryOp() | nn.CastOp():
            return (dim,)
        case nn.BinaryOp() | nn.ExpandOp():
            return tuple(_aligned(op.results[0], operand, dim) for operand in op.operands)
        case nn.LinearOp() if dim == last:
            return (None, 0, 0)[: len(op.operands)]
        case nn.RmsNormOp() if dim != last:
            return (dim, None)
        case nn.RopeOp() if dim == 1:
            return (dim, None)
        case nn.TransposeOp():
            pair = (op.dim0.value.data, op.dim1.value.data)
            return (pair[1 - pair.index(dim)] if dim in pair else dim,)
        case nn.SliceOp() | nn.ConcatOp() if dim != op.dim.value.data:
            return (dim,) * len(op.operands)
        case nn.MeanOp():
            return _mean_dims(op, dim)
        case paged.WriteOp() if dim == 1:
            return (1, 1, 1, None)
        case paged.LastTokenOp() if dim == 2:
            return (2, None)
        case _:
            return None


def _aligned(result: SSAValue, operand: SSAValue, dim: int) -> int | None:
    """Broadcasting aligns at the right; an operand of size 1 there is the same for all ranks."""
    dims = dims_of(operand)
    index = dim - len(dims_of(result)) + len(dims)
    return None if index < 0 or dims[index] != dims_of(result)[dim] else index


def _mean_dims(op: nn.MeanOp, dim: int) -> tuple[int | None, ...] | None:
    gone = op.dims.get_values()
    if op.keepdim is not None:
        return None if dim in gone else (dim,)
    kept = [index for index in range(len(dims_of(op.x))) if index not in gone]
    return (kept[dim],)


# --- reshapes ---


@dataclass(frozen=True)
class Place:
    """Where a dimension stands in the row-major run of elements that a reshape regroups."""

    inner: int
    """Elements that one step of the dimension covers."""
    group: tuple[int, ...]
    """Dimensions of the other side that may stand for it, outermost first, and how many elements
    a step of each covers."""
    inner_of_group: tuple[int, ...]


def reshaped(cut: CutAttr, before: Dims, after: Dims) -> CutAttr | None:
    """The cut, of a tensor of dims `before`, when it is reshaped to `after`."""
    place = _place(before, after, cut.dim.data)
    if place is None:
        return None
    flat = cut.scaled(place.inner)
    for dim, inner in zip(place.group, place.inner_of_group, strict=True):
        divided = flat.divided(inner)
        if divided is not None:
            return divided.at(dim)
    return None


def reshaped_unit(dim: int, unit: int, before: Dims, after: Dims) -> tuple[int, int] | None:
    """(dimension, unit) after the reshape, for runs of `unit` steps of `dim` before it."""
    place = _place(before, after, dim)
    if place is None:
        return None
    inner = place.inner_of_group[0]
    return place.group[0], math.lcm(unit * place.inner, inner) // inner


def _place(before: Dims, after: Dims, dim: int) -> Place | None:
    """None if outer dimensions of more than one element are regrouped with `dim`."""
    for old, new in _groups(before, after):
        if dim not in old:
            continue
        outer = before[old[0] : dim]
        if any(size != 1 for size in outer):
            return None
        choices = [new[0]]
        while after[choices[-1]] == 1 and choices[-1] + 1 in new:
            choices.append(choices[-1] + 1)
        inner = tuple(_product(after[choice + 1 : new[-1] + 1]) for choice in choices)
        return Place(_product(before[dim + 1 : old[-1] + 1]), tuple(choices), inner)
    return None


def _groups(before: Dims, after: Dims) -> list[tuple[list[int], list[int]]]:
    """The smallest runs of dimensions that hold the same elements on both sides; none if dynamic
    dimensions are regrouped."""
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) and j < len(after):
        old, new = [i], [j]
        while before[i] != after[j] and _volume(before, old) != _volume(after, new):
            if _volume(before, old) < _volume(after, new):
                old.append(old[-1] + 1)
            else:
                new.append(new[-1] + 1)
        i, j = old[-1] + 1, new[-1] + 1
        groups.append((old, new))
    groups[-1][0].extend(range(i, len(before)))
    groups[-1][1].extend(range(j, len(after)))
    moved = any(
        isinstance(size, str)
        for old, new in groups
        if [before[i] for i in old] != [after[j] for j in new]
        for size in (*(before[i] for i in old), *(after[j] for j in new))
    )
    return [] if moved else groups


def _volume(dims: Dims, indices: Sequence[int]) -> int:
    return _product(tuple(dims[index] for index in indices))


def _product(dims: Dims) -> int:
    return math.prod(dim for dim in dims if isinstance(dim, int))
