"""A contraction as one matrix product.

Axes fall into five groups by what they move: *batch* (stream and register file), *rows* (stream
alone), *columns* (register file alone), *terms* (summed) and the rest. Operands are decoded in
that order, so a product is `[batch, rows, terms] @ [batch, terms, columns]`. Slices are a batch,
unless all slices hold the same register rows: then they are more rows of one flat product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..backend_rngd.isa.instructions import Fate
from . import numerics
from .axes import Axis, Kind, Pass
from .register_file import LaneWindow

Array = np.ndarray


@dataclass(frozen=True)
class Groups:
    """The axes of a contraction by role, and whether slices share the register file."""

    shared: bool
    batch: tuple[Axis, ...]
    slices: tuple[Axis, ...]
    """Slice axes along which the stream differs."""
    rows: tuple[Axis, ...]
    same: tuple[Axis, ...]
    """Slice axes along which the stream does not differ."""
    columns: tuple[Axis, ...]
    terms: tuple[Axis, ...]
    still: tuple[Axis, ...]
    """Axes that move neither operand."""

    @property
    def stream(self) -> tuple[Axis, ...]:
        return (*self.batch, *self.slices, *self.rows, *self.terms)

    @property
    def register(self) -> tuple[Axis, ...]:
        slices = () if self.shared else (*self.slices, *self.same)
        return (*self.batch, *slices, *self.columns, *self.terms)

    @property
    def result(self) -> tuple[Axis, ...]:
        """Axes of the product, in order; along those that it does not know it has size 1."""
        known = (*self.batch, *self.slices, *self.rows, *self.same, *self.columns)
        return (*known, *self.still)

    @property
    def result_shape(self) -> tuple[int, ...]:
        same = [1 if self.shared else axis.n for axis in self.same]
        before = [axis.n for axis in (*self.batch, *self.slices, *self.rows)]
        return (*before, *same, *(a.n for a in self.columns), *(1 for _ in self.still))


def group_axes(work: Pass, shared: bool) -> Groups:
    """Sort the axes of a contraction; `shared`: all slices hold the same register rows."""
    others = [*work.counters, *work.lanes, *work.packet.axes]
    out = [axis for axis in others if axis.fate != Fate.MSUM]

    def pick(stream: bool, register: bool) -> tuple[Axis, ...]:
        return tuple(a for a in out if (a.fetched, a.picks_rows) == (stream, register))

    return Groups(
        shared=shared,
        batch=pick(True, True),
        slices=tuple(axis for axis in work.slices if axis.fetched),
        rows=pick(True, False),
        same=tuple(axis for axis in work.slices if not axis.fetched),
        columns=pick(False, True),
        terms=tuple(axis for axis in others if axis.fate == Fate.MSUM),
        still=pick(False, False),
    )


def size(axes: Sequence[Axis]) -> int:
    return math.prod(axis.n for axis in axes)


@dataclass(frozen=True)
class StreamOperand:
    """A decoded stream as [batch, slices, rows, terms], zeros at its end cut off.

    With batch 1, `values` is [slices · rows, terms] without the last rows that are all zero.
    """

    values: Array

    @property
    def bytes(self) -> int:
        return self.values.nbytes


def whole_operand(values: Array, groups: Groups) -> StreamOperand:
    """The operand with every row."""
    if groups.batch:
        shape = (size(groups.batch), size(groups.slices), size(groups.rows), size(groups.terms))
        return StreamOperand(values.reshape(shape))
    return StreamOperand(values.reshape(-1, size(groups.terms)))


def trimmed_operand(values: Array, groups: Groups) -> StreamOperand:
    """The operand without trailing rows of zeros: padding of a weight to whole slices.

    Their products are zero (also with NaN on the other side, where a machine would give NaN).
    """
    operand = whole_operand(values, groups)
    if groups.batch:
        return operand
    used = np.flatnonzero(operand.values.any(axis=1))
    rows = size(groups.rows)
    last = int(used[-1]) + 1 if len(used) else 0
    kept = -(-last // rows) * rows
    if kept == len(operand.values):
        return operand
    return StreamOperand(operand.values[:kept].copy())


Product = Callable[[StreamOperand, Array], Array]


def product(groups: Groups, integer: bool) -> Product:
    """A function of the stream operand and the register rows that gives the sums.

    Register rows come decoded, in the order of `groups.register`. The result has the shape
    `groups.result_shape`; f32, or i32 that wraps for integer operands.
    """
    b, s, m = size(groups.batch), size(groups.slices), size(groups.rows)
    same = 1 if groups.shared else size(groups.same)
    n, k = size(groups.columns), size(groups.terms)
    shape = groups.result_shape

    def flat(stream: StreamOperand, rows: Array) -> Array:
        # [slices · rows, terms] @ [terms, columns]
        out = np.empty((s * m, same * n), stream.values.dtype)
        used = len(stream.values)
        np.matmul(stream.values, rows.reshape(same * n, k).T, out=out[:used])
        out[used:] = 0
        return out.reshape(shape)

    def by_slice(stream: StreamOperand, rows: Array) -> Array:
        out = np.empty((s, m, same * n), stream.values.dtype)
        used = len(stream.values) // m
        left = stream.values.reshape(used, m, k)
        right = rows.reshape(s, same * n, k)[:used].transpose(0, 2, 1)
        np.matmul(left, right, out=out[:used])
        out[used:] = 0
        return out.reshape(shape)

    def batched(stream: StreamOperand, rows: Array) -> Array:
        if groups.shared:
            left = stream.values.reshape(b, s * m, k)
            right = rows.reshape(b, n, k)
        else:
            left = stream.values.reshape(b * s, m, k)
            right = rows.reshape(b * s, same * n, k)
        sums: Array = np.matmul(left, right.transpose(0, 2, 1))
        return sums.reshape(shape)

    if groups.batch:
        chosen: Product = batched
    elif groups.shared or s == 1:
        chosen = flat
    else:
        chosen = by_slice
    return _wrapping(chosen) if integer else chosen


def _wrapping(chosen: Product) -> Product:
    """Integer products in f64, which is exact here: at most 2**30 each and 2**20 terms."""

    def multiply(stream: StreamOperand, rows: Array) -> Array:
        wide = StreamOperand(stream.values.astype(np.float64))
        return chosen(wide, rows.astype(np.float64)).astype(np.int64).astype(np.int32)

    return multiply


class RegisterRows:
    """Reads a contraction's register rows, decoded, in the order of its groups."""

    def __init__(self, work: Pass, groups: Groups) -> None:
        c = work.plan.command
        self._dtype = c.trf.dtype
        self._decode = numerics.decoder(self._dtype)
        axes = groups.register
        self._shape = tuple(axis.n for axis in axes)
        self._axes = axes

    def bind(self, window: LaneWindow, address: int, slices: int) -> Callable[[], Array]:
        """A function that gives the rows, decoded; the first `slices` slices have them all."""
        if self._dtype.bits >= 8:
            view = self.view(window, address)
            return lambda: self._decode(view)
        axes, shape = self._axes, self._shape
        strides = tuple(
            axis.trf
            if axis.kind in (Kind.COLUMN, Kind.TERM)
            else 2 * (axis.trf + axis.lanes * window.lane_bytes)
            for axis in axes
        )

        def halves() -> Array:
            content = numerics.nibbles(window.buffer[:slices], True)
            start = 2 * (window.start + address)
            return self._decode(np.ndarray(shape, np.int8, content, start, strides))

        return halves

    def view(self, window: LaneWindow, address: int) -> Array:
        """The raw rows in place; `window` has them all."""
        raw = numerics.raw_dtype(self._dtype)
        strides = tuple(axis.trf + axis.lanes * window.lane_bytes for axis in self._axes)
        return np.ndarray(self._shape, raw, window.buffer, window.start + address, strides)
