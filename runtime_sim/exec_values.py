"""Executes tensor-unit passes: views built once per address, then a few numpy calls per run.

`bind_exec` turns a plan and its resolved addresses into a step that can run again and again; all
calls of a block with the same on-chip addresses share it. Addresses must have been checked.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..backend_rngd.isa.instructions import Fate, Sink
from ..backend_rngd.isa.plan import ExecPlan, Footprint
from ..backend_rngd.isa.rules import DM_BYTES
from . import numerics
from .axes import Axis, Kind, Pass, axes_of, element_bytes
from .contraction import RegisterRows, group_axes, product, whole_operand
from .memory import ChipMemory
from .register_file import GRANULE_BYTES, LaneWindow, lane_granules, stored_granules
from .stream import StreamReader
from .vector import VectorProgram
from .weights import WeightCache

Array = np.ndarray
Step = Callable[[], None]


@dataclass(frozen=True)
class PortAddresses:
    """The byte addresses of a pass's ports, and what each may touch."""

    a: int = 0
    b: int = 0
    trf: int = 0
    vrf: int = 0
    commit: int = 0

    @staticmethod
    def of(plan: ExecPlan, resolved: Sequence[int]) -> PortAddresses:
        """`resolved` is parallel to the plan's ports."""
        c = plan.command
        names = ["a"]
        names += ["b"] if c.stream.pair else []
        names += ["trf"] if c.contraction is not None else []
        names += ["vrf"] if plan.uses_vrf else []
        return PortAddresses(**dict(zip([*names, "commit"], resolved, strict=True)))


@functools.lru_cache(maxsize=65536)
def pass_of(plan: ExecPlan) -> Pass:
    """The axes of `plan`, kept."""
    return axes_of(plan)


def bind_exec(
    plan: ExecPlan, resolved: Sequence[int], memory: ChipMemory, weights: WeightCache
) -> Step:
    """A step that executes `plan` at these addresses (parallel to `plan.ports`)."""
    at = PortAddresses.of(plan, resolved)
    work = pass_of(plan)
    if plan.command.contraction is not None:
        return _ContractionStep(work, at, memory, weights).run
    if plan.command.commit.sink != Sink.DM:
        return _store_step(work, at, memory)
    return _stream_step(work, at, memory)


# --- streams without contraction ---


def _stream_step(work: Pass, at: PortAddresses, memory: ChipMemory) -> Step:
    """Fetch, vector engine, commit to data memory."""
    c = work.plan.command
    order = work.axes
    raw = is_move(work)
    readers = [StreamReader(work, port, order, raw=raw) for port in range(1 + c.stream.pair)]
    views = [
        reader.view(memory.dm, DM_BYTES, address)
        for reader, address in zip(readers, (at.a, at.b), strict=False)
    ]
    reads = [
        (address + f.low, address + f.high)
        for f, address in zip(work.plan.footprints, (at.a, at.b)[: len(readers)], strict=False)
    ]
    owned = all(reader.owned for reader in readers)
    units = engine(work, order, [r.shape for r in readers], owned, at, memory)
    commit = Commit(work, order, at, memory, raw)

    def run() -> None:
        for low, high in reads:
            if memory.tiles:
                memory.make_real(low, high)
        x = readers[0].read(views[0])
        if units is not None:
            other = readers[1].read(views[1]) if len(readers) > 1 else None
            x = units.run(x, other)
        commit.write(x)

    return run


def is_move(work: Pass) -> bool:
    """Whether elements pass unchanged."""
    c = work.plan.command
    return not (c.vector.used or c.commit.relu) and work.plan.stream_dtype == c.commit_port.dtype


def engine(
    work: Pass,
    order: Sequence[Axis],
    shapes: Sequence[tuple[int, ...]],
    owned: bool,
    at: PortAddresses,
    memory: ChipMemory,
) -> VectorProgram | None:
    vector = work.plan.command.vector
    if not vector.used:
        return None

    def register(shape: tuple[int, ...], strides: tuple[int, ...], group: int) -> Array:
        start = at.vrf + group * vector.vrf_pair
        return np.ndarray(shape, np.int32, memory.vrf, start, strides)

    return VectorProgram(vector, order, shapes, owned, register)


class Commit:
    """Cast and write to data memory: results with one dimension per axis of `order`."""

    def __init__(
        self, work: Pass, order: Sequence[Axis], at: PortAddresses, memory: ChipMemory, raw: bool
    ) -> None:
        c = work.plan.command
        self._memory = memory
        self._encode = None if raw else numerics.encoder(c.commit_port.dtype)
        # The last unit may have seen the bits as another type of 32 bits.
        self._result = np.float32 if work.plan.result_dtype.is_float else np.int32
        self._relu = c.commit.relu
        footprint = work.plan.footprints[-1]
        self._span = (at.commit + footprint.low, at.commit + footprint.high)
        self._whole = _fills(work, footprint) and work.plan.slices == memory.slices
        self._columns: tuple[int, ...] = ()
        if work.splits_columns:
            columns = [axis for axis in work.packet.axes if axis.kind == Kind.COLUMN]
            self._columns = tuple(order.index(axis) for axis in columns)
        self._kept = work.kept_columns
        out = [axis for axis in order if axis.kind != Kind.COLUMN or not self._columns]
        shape = [axis.n if axis.fate == Fate.OUT else 1 for axis in out]
        strides = [axis.out for axis in out]
        if self._columns:
            shape.append(self._kept)
            strides.append(c.commit.column_stride)
        dtype = numerics.raw_dtype(c.commit_port.dtype)
        self._target = np.ndarray(tuple(shape), dtype, memory.dm, at.commit, tuple(strides))
        self._zeros = self._zero_columns(work, at, dtype)
        self._full_shape = tuple(axis.n if axis.fate == Fate.OUT else 1 for axis in order)

    def _zero_columns(self, work: Pass, at: PortAddresses, dtype: np.dtype[np.generic]) -> Array:
        c = work.plan.command
        axes = [*work.slices, *work.counters, *work.lanes]
        shape = [axis.n if axis.fate == Fate.OUT else 1 for axis in axes]
        skipped = work.kept_columns if work.zero_columns else 0
        start = at.commit + skipped * c.commit.column_stride
        return np.ndarray(
            (*shape, work.zero_columns),
            dtype,
            self._memory.dm,
            start,
            (*(axis.out for axis in axes), c.commit.column_stride),
        )

    @property
    def targets(self) -> tuple[Array, Array]:
        """Views of the bytes that are written: results, and the zeros beside them."""
        return self._target, self._zeros

    def write(self, x: Array) -> None:
        if self._encode is not None:
            x = x.view(self._result)
            if self._relu:
                x = numerics.relu(x)
            x = self._encode(x)
        if self._columns:
            x = self._merged(x)
        if self._memory.tiles:
            self._memory.overwrite(*self._span, self._whole)
        self._target[...] = x
        if self._zeros.size:
            self._zeros[...] = 0

    def _merged(self, x: Array) -> Array:
        """Column axes joined into one at the end, cut to the columns that are kept."""
        x = np.broadcast_to(x, self._full_shape)
        last = range(x.ndim - len(self._columns), x.ndim)
        x = np.moveaxis(x, self._columns, tuple(last))
        return x.reshape((*x.shape[: last.start], -1))[..., : self._kept]


def _fills(work: Pass, footprint: Footprint) -> bool:
    """Whether a commit writes every byte of its footprint."""
    c = work.plan.command
    written = element_bytes(c.commit_port.dtype) * c.commit.columns * c.commit.lanes
    for k in c.counters:
        written *= k.n if k.fate == Fate.OUT else 1
    return written == footprint.high - footprint.low


# --- stores to a register file ---


def _store_step(work: Pass, at: PortAddresses, memory: ChipMemory) -> Step:
    """Fetch and store to the TRF or VRF; a broadcast to the TRF is written once for all slices."""
    c = work.plan.command
    order = work.axes
    reader = StreamReader(work, 0, order, raw=True)
    source = reader.view(memory.dm, DM_BYTES, at.a)
    footprint = work.plan.footprints[0]
    low, high = at.a + footprint.low, at.a + footprint.high
    if c.commit.sink == Sink.VRF:
        target = store_target(work, at.commit, memory.vrf)

        def run() -> None:
            if memory.tiles:
                memory.make_real(low, high)
            target[...] = reader.read(source)

        return run

    store = _TrfStore(work, at, memory)

    def run_trf() -> None:
        if memory.tiles:
            memory.make_real(low, high)
        store.write(reader.read(source))

    return run_trf


def store_target(
    work: Pass, start: int, register_file: Array, lane_bytes: int = 0, *, once: bool = False
) -> Array:
    """The register file's elements that a store writes: in every slice, or in the first `once`."""
    return np.ndarray(
        tuple(1 if once and axis.kind == Kind.SLICE else axis.n for axis in work.axes),
        numerics.raw_dtype(work.plan.stream_dtype),
        register_file,
        start,
        tuple(axis.out + axis.lanes * lane_bytes for axis in work.axes),
    )


def store_window(work: Pass, at: PortAddresses, memory: ChipMemory) -> LaneWindow:
    """The part of the TRF that a store writes."""
    footprint = work.plan.footprints[-1]
    lanes = work.plan.command.trf_lanes
    return memory.lane_window(lanes, at.commit + footprint.low, at.commit + footprint.high)


class _TrfStore:
    """A store to the TRF, and what it does to the flags of granules that all slices share."""

    def __init__(self, work: Pass, at: PortAddresses, memory: ChipMemory) -> None:
        self._memory = memory
        row_bytes = work.plan.command.commit.columns * element_bytes(work.plan.stream_dtype)
        steps = [(axis.n, axis.out, axis.lanes) for axis in work.counters]
        aligned = not any(v % GRANULE_BYTES for v in (at.commit, row_bytes, *(s[1] for s in steps)))
        broadcast = not any(axis.fetched for axis in work.slices)
        everywhere = work.plan.slices == memory.slices
        self._shared = aligned and broadcast and everywhere
        self._slices = 1 if self._shared else work.plan.slices
        lanes = work.plan.command.trf_lanes
        if self._shared:
            self._fills = stored_granules(lanes, at.commit, row_bytes, steps)
        else:
            used = range(
                sum(min(0, by * (n - 1)) for n, _, by in steps),
                sum(max(0, by * (n - 1)) for n, _, by in steps) + 1,
            )
            footprint = work.plan.footprints[-1]
            low, high = at.commit + footprint.low, at.commit + footprint.high
            self._touches = list(lane_granules(lanes, used, low, high))
        self._window = store_window(work, at, memory)
        start, lane_bytes = self._window.start + at.commit, self._window.lane_bytes
        self._target = store_target(work, start, self._window.buffer, lane_bytes, once=self._shared)

    def write(self, packets: Array) -> None:
        if self._shared:
            self._memory.shared[self._fills] = True
        else:
            for granules in self._touches:
                self._memory.unshare(granules)
        self._window.load(self._slices)
        self._target[...] = packets
        self._window.store(self._slices)


# --- contractions ---


class _ContractionStep:
    """A contraction at fixed addresses; compiled for shared and for separate register rows."""

    def __init__(
        self, work: Pass, at: PortAddresses, memory: ChipMemory, weights: WeightCache
    ) -> None:
        self._work, self._at, self._memory, self._weights = work, at, memory, weights
        stream, rows = work.plan.footprints[:2]
        self._span = (at.a + stream.low, at.a + stream.high)
        c = work.plan.command
        low, high = at.trf + rows.low, at.trf + rows.high
        used = range(c.commit.lanes)
        self._granules = list(lane_granules(c.file_lanes, used, low, high))
        self._flags = [granules.of(memory.shared) for granules in self._granules]
        self._variants: dict[bool, _Contraction] = {}

    def run(self) -> None:
        shared = all(flags.all() for flags in self._flags)
        if not shared:
            for granules in self._granules:
                self._memory.unshare(granules)
        variant = self._variants.get(shared)
        if variant is None:
            variant = _Contraction(self._work, shared, self._at, self._memory, self._weights)
            self._variants[shared] = variant
        variant.run(self._span)


def rows_window(work: Pass, at: PortAddresses, memory: ChipMemory) -> LaneWindow:
    """The part of the TRF that a contraction reads."""
    footprint = work.plan.footprints[1]
    lanes = work.plan.command.file_lanes
    return memory.lane_window(lanes, at.trf + footprint.low, at.trf + footprint.high)


class _Contraction:
    """The product, the vector engine and the commit, all in the product's order of axes."""

    def __init__(
        self,
        work: Pass,
        shared: bool,
        at: PortAddresses,
        memory: ChipMemory,
        weights: WeightCache,
    ) -> None:
        c = work.plan.command
        groups = group_axes(work, shared)
        self._groups = groups
        self._memory, self._weights, self._address = memory, weights, at.a
        self._reader = StreamReader(work, 0, groups.stream, raw=False, repeat=True)
        self._stream = self._reader.view(memory.dm, DM_BYTES, at.a)
        self._geometry = weights.intern(self._reader.geometry)
        self._registers = RegisterRows(work, groups)
        self._window = rows_window(work, at, memory)
        self._window_slices = 1 if shared else work.plan.slices
        self._rows = self._registers.view(self._window, at.trf)
        self._product = product(groups, not c.trf.dtype.is_float)
        order = groups.result
        self._engine = engine(work, order, [groups.result_shape], True, at, memory)
        self._commit = Commit(work, order, at, memory, raw=False)

    def run(self, span: tuple[int, int]) -> None:
        tile = self._memory.tile_at(*span)
        if tile is None:
            values = self._reader.read(self._stream)
            operand = whole_operand(values, self._groups)
        else:
            operand = self._weights.operand(
                tile, self._address, self._geometry, self._reader, self._groups
            )
        self._window.load(self._window_slices)
        x = self._product(operand, self._registers.decode(self._rows))
        if self._engine is not None:
            x = self._engine.run(x)
        self._commit.write(x)
