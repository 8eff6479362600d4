"""A pass as a list of axes: how far one step of each loop moves every operand.

The value executor turns a plan into strided views, and an axis says for each memory what its
stride is. Slices, counters, lanes, columns and the terms of the adder tree are all axes, so one
list describes fetch, register files and commit, and the order of axes is free to choose.

Strides are bytes. A fetch also moves over source slices, whose distance depends on the buffer
that is read (data memory, or a copy of one tile).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import Enum

from ..backend_rngd.isa.dtypes import DType
from ..backend_rngd.isa.instructions import Birth, Exec, Fate, Reduce, Sink, ValidDim
from ..backend_rngd.isa.plan import ExecPlan
from ..backend_rngd.isa.rules import DM_BYTES, TRF_BYTES, VRF_BYTES

SINK_BYTES = {Sink.DM: DM_BYTES, Sink.TRF: TRF_BYTES, Sink.VRF: VRF_BYTES}
"""Bytes between slices in each sink's memory."""


class Kind(Enum):
    SLICE = "slice"
    COUNTER = "counter"
    LANE = "lane"
    COLUMN = "column"
    TERM = "term"
    """Elements of a packet that the adder tree sums."""


@dataclass(frozen=True)
class Axis:
    """One loop of `n` steps."""

    kind: Kind
    n: int
    fate: Fate = Fate.OUT
    source_slices: int = 0
    a: int = 0
    b: int = 0
    trf: int = 0
    vrf: int = 0
    out: int = 0
    lanes: int = 0
    """Lanes of the register file per step: of what is read, or of what is stored there."""
    column: int = 0
    """Columns per step, for an axis of columns."""
    valid_dim: ValidDim = ValidDim.NONE
    valid_step: int = 0
    """What a step adds to the index of `valid_dim`."""
    grouped: bool = False
    """A part of the slice number that the inter-slice reducer folds."""

    @property
    def fetched(self) -> bool:
        """Whether the stream differs along this axis."""
        return bool(self.source_slices or self.a or self.b)

    @property
    def picks_rows(self) -> bool:
        """Whether the register rows that meet the stream differ along this axis."""
        return bool(self.trf or self.lanes)

    def fetch_stride(self, port: int, slice_bytes: int) -> int:
        """Bytes per step in a buffer with `slice_bytes` between slices; port 0 is A, 1 is B."""
        return self.source_slices * slice_bytes + (self.b if port else self.a)


@dataclass(frozen=True)
class Packet:
    """How a packet's elements become columns (and terms, with a contraction).

    `axes` index the elements, outermost first. If `direct`, their strides are memory strides;
    otherwise the packet is first read run by run and filled with zeros up to `elements`, and the
    axes' strides count elements of that.
    """

    axes: tuple[Axis, ...]
    direct: bool
    elements: int


@dataclass(frozen=True)
class Pass:
    """The axes of a plan (those of one step left out), and what its commit does about columns."""

    plan: ExecPlan
    slices: tuple[Axis, ...]
    counters: tuple[Axis, ...]
    lanes: tuple[Axis, ...]
    packet: Packet
    kept_columns: int
    """Columns that the commit takes from those that leave the vector engine."""
    zero_columns: int
    """Columns that the commit adds; they are zero."""

    @property
    def axes(self) -> tuple[Axis, ...]:
        return (*self.slices, *self.counters, *self.lanes, *self.packet.axes)

    @property
    def splits_columns(self) -> bool:
        """Whether the kept columns are no rectangle of the column axes."""
        c = self.plan.command
        columns = [axis.n for axis in self.packet.axes if axis.kind == Kind.COLUMN]
        return not c.vector.reduce_columns and math.prod(columns) != self.kept_columns


def axes_of(plan: ExecPlan) -> Pass:
    """The axes of `plan`."""
    c = plan.command
    kept = min(plan.columns, c.commit.columns)
    if c.commit.sink != Sink.DM:
        kept = plan.columns
    zeros = c.commit.columns - kept if c.commit.sink == Sink.DM else 0
    packet = _contracted(c, kept) if c.contraction is not None else _streamed(c, kept)
    return Pass(
        plan,
        # One axis stays: numpy turns results without dimensions into scalars.
        _longer(_slice_axes(plan)) or (Axis(Kind.SLICE, 1),),
        _longer(_counter_axes(c)),
        _longer(_lane_axes(c)),
        replace(packet, axes=_longer(packet.axes)),
        kept,
        zeros,
    )


def _longer(axes: Iterable[Axis]) -> tuple[Axis, ...]:
    return tuple(axis for axis in axes if axis.n > 1)


def _slice_axes(plan: ExecPlan) -> Iterable[Axis]:
    c = plan.command
    weight = plan.slices
    group = c.vector.slice_group if c.vector.slice_reduce != Reduce.NONE else 1
    for axis in plan.slice_axes:
        weight //= axis.n
        inner = min(axis.n, max(1, group // weight))
        whole = Axis(
            Kind.SLICE,
            axis.n // inner,
            source_slices=axis.slices * inner,
            a=axis.bytes * inner,
            b=axis.bytes * inner,
            trf=weight * inner * TRF_BYTES,
            vrf=weight * inner * VRF_BYTES,
            out=weight * inner * SINK_BYTES[c.commit.sink],
        )
        yield whole
        yield replace(
            whole,
            n=inner,
            source_slices=axis.slices,
            a=axis.bytes,
            b=axis.bytes,
            trf=weight * TRF_BYTES,
            vrf=weight * VRF_BYTES,
            out=weight * SINK_BYTES[c.commit.sink],
            grouped=True,
        )


def _counter_axes(c: Exec) -> Iterable[Axis]:
    for k in c.counters:
        fetched = k.birth != Birth.REUSE
        out = {
            Sink.DM: k.commit,
            Sink.TRF: k.trf,
            Sink.VRF: k.vrf,
        }[c.commit.sink]
        yield Axis(
            Kind.COUNTER,
            k.n,
            k.fate,
            source_slices=k.slices if k.birth == Birth.SLICE else 0,
            a=k.a if fetched else 0,
            b=k.b if fetched and c.stream.pair else 0,
            trf=k.trf if c.contraction is not None else 0,
            vrf=k.vrf if k.fate != Fate.MSUM else 0,
            out=out if k.fate == Fate.OUT else 0,
            lanes=k.lanes,
            valid_dim=k.valid_dim,
            valid_step=k.valid_step,
        )


def _lane_axes(c: Exec) -> Iterable[Axis]:
    """Only lanes that are committed: what the others hold may be anything."""
    if c.contraction is None:
        return
    yield Axis(
        Kind.LANE,
        c.commit.lanes,
        lanes=1,
        vrf=c.vector.vrf_lane,
        out=c.commit.lane_stride,
    )


def element_steps(c: Exec) -> tuple[int, int]:
    """Bytes between neighbouring elements of a run, in ports A and B."""
    s = c.stream
    return s.run_step * element_bytes(c.a.dtype), s.run_step * element_bytes(c.b.dtype)


def element_bytes(dtype: DType) -> int:
    return max(1, dtype.bits // 8)


def gathers(c: Exec) -> bool:
    """Whether packets are not a strided view of data memory: halves of bytes, or a bitmap's."""
    return c.a.dtype.bits < 8 or c.switch.bitmap is not None


def _is_linear(c: Exec) -> bool:
    """Whether the packet's elements are one run in every port."""
    s = c.stream
    ports = element_steps(c)[: 2 if s.pair else 1]
    return s.runs == 1 or all(s.run_stride == s.run * step for step in ports)


def _column_axis(c: Exec, n: int, unit: int, a: int, b: int, trf: int = 0) -> Axis:
    """`n` columns, `unit` apart."""
    out_step = {
        Sink.DM: c.commit.column_stride,
        Sink.TRF: element_bytes(c.commit_port.dtype),
        Sink.VRF: 4,
    }[c.commit.sink]
    return Axis(
        Kind.COLUMN,
        n,
        Fate.VSUM if c.vector.reduce_columns else Fate.OUT,
        a=a,
        b=b,
        trf=trf,
        vrf=c.vector.vrf_column * unit,
        out=0 if c.vector.reduce_columns else out_step * unit,
        column=unit,
    )


def _streamed(c: Exec, kept: int) -> Packet:
    """The packet of a pass without contraction: every element is a column."""
    s = c.stream
    needed = s.elements if c.vector.reduce_columns else kept
    a, b = element_steps(c)
    if gathers(c):
        return Packet((_column_axis(c, needed, 1, 1, 1),), False, max(needed, s.valid))
    if needed <= s.valid and (_is_linear(c) or needed <= s.run):
        return Packet((_column_axis(c, needed, 1, a, b),), True, needed)
    if needed <= s.valid and needed % s.run == 0:
        outer = _column_axis(c, needed // s.run, s.run, s.run_stride, s.run_stride)
        return Packet((outer, _column_axis(c, s.run, 1, a, b)), True, needed)
    # Strides of a packet that is read first are those of the buffer it is read to.
    return Packet((_column_axis(c, needed, 1, 1, 1),), False, max(needed, s.valid))


def _contracted(c: Exec, kept: int) -> Packet:
    """The packet of a contraction: x = column · 2**depth + term, rows repeat each trf_read."""
    k, s = c.contraction, c.stream
    assert k is not None
    tree = 1 << k.depth
    row = k.trf_read * 8 // c.trf.dtype.bits
    direct = s.valid == s.elements and _is_linear(c) and not gathers(c)
    a = element_steps(c)[0] if direct else 1
    size = element_bytes(c.trf.dtype)
    if row >= tree:
        repeats, columns = s.elements // row, row // tree
        if not c.vector.reduce_columns:
            repeats, columns = _trim(columns, kept)
        axes = (
            _column_axis(c, repeats, row // tree, a * row, 0),
            _column_axis(c, columns, 1, a * tree, 0, trf=size * tree),
            Axis(Kind.TERM, tree, Fate.MSUM, a=a, trf=size),
        )
    else:
        columns = s.elements // tree
        axes = (
            _column_axis(c, columns if c.vector.reduce_columns else kept, 1, a * tree, 0),
            Axis(Kind.TERM, tree // row, Fate.MSUM, a=a * row),
            Axis(Kind.TERM, row, Fate.MSUM, a=a, trf=size),
        )
    return Packet(axes, direct, s.elements)


def _trim(inner: int, kept: int) -> tuple[int, int]:
    """The smallest rectangle of columns that holds the first `kept`."""
    if kept <= inner:
        return 1, kept
    return -(-kept // inner), inner
