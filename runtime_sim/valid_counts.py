"""Which elements the vector engine's reducer takes: the valid count generator.

Gates and the clipper depend on slice, counters and columns alone, so the answer is known before
anything runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ..backend_rngd.isa.instructions import Clipper, Gate, ValidDim, Vector
from ..backend_rngd.isa.rules import TRF_BYTES
from .axes import Axis, Kind

Array = np.ndarray


def valid_elements(vector: Vector, order: Sequence[Axis]) -> Array | None:
    """bool with one dimension per axis of `order`; None when every element is valid."""
    masks = [_open(gate, ValidDim.GATE0 + i, order) for i, gate in enumerate(vector.gates)]
    masks += [] if vector.clipper is None else [_kept(vector.clipper, order)]
    if not masks:
        return None
    valid = np.ones((1,) * len(order), np.bool_)
    for mask in masks:
        valid = valid & mask
    return valid


def _open(gate: Gate, dim: int, order: Sequence[Axis]) -> Array:
    part = _total(order, lambda axis: axis.trf // TRF_BYTES * (axis.kind == Kind.SLICE)) & gate.mask
    inside = _index(order, dim) < gate.bound
    at_bound = part >= gate.slice_bound if gate.time_major else part == gate.slice_bound
    opened: Array = (part < gate.slice_bound) | (at_bound & inside)
    return opened


def _kept(clipper: Clipper, order: Sequence[Axis]) -> Array:
    counts = np.clip(clipper.size - _index(order, ValidDim.PACKET), 0, clipper.span)
    kept: Array = _total(order, lambda axis: axis.column) < counts
    return kept


def _index(order: Sequence[Axis], dim: int) -> Array:
    return _total(order, lambda axis: axis.valid_step * (axis.valid_dim == dim))


def _total(order: Sequence[Axis], step: Callable[[Axis], int]) -> Array:
    """Sum over all axes of the step number times `step`."""
    total = np.zeros((1,) * len(order), np.int64)
    for i, axis in enumerate(order):
        shape = [1] * len(order)
        shape[i] = axis.n
        if step(axis):
            total = total + (np.arange(axis.n) * step(axis)).reshape(shape)
    return total
