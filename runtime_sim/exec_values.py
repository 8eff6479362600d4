"""Executes tensor-unit passes: views built once per address, then a few numpy calls per run.

`bind_exec` turns a plan and its resolved addresses into a step that can run again and again; all
calls of a block with the same on-chip addresses share it. Addresses must have been checked.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..backend_rngd.isa.dtypes import DType
from ..backend_rngd.isa.instructions import Exec, Generate, Sink
from ..backend_rngd.isa.plan import ExecPlan, bitmap_bytes, plan_exec
from ..backend_rngd.isa.rules import DM_BYTES
from . import numerics
from .axes import Axis, Kind, Pass, axes_of, element_bytes
from .commit import Commit
from .contraction import RegisterRows, group_axes, product, whole_operand
from .memory import Box, ChipMemory, Tile
from .register_file import GRANULE_BYTES, LaneWindow, lane_granules, stored_granules
from .stream import StreamReader, Where
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
    bitmap: int = 0
    commit: int = 0

    @staticmethod
    def of(plan: ExecPlan, resolved: Sequence[int]) -> PortAddresses:
        """`resolved` is parallel to the plan's ports."""
        c = plan.command
        names = [] if c.generate else ["a"]
        names += ["b"] if c.stream.pair else []
        names += ["trf"] if c.contraction is not None else []
        names += ["vrf"] if plan.uses_vrf else []
        names += ["bitmap"] if c.switch.bitmap is not None else []
        return PortAddresses(**dict(zip([*names, "commit"], resolved, strict=True)))


@functools.lru_cache(maxsize=65536)
def pass_of(plan: ExecPlan) -> Pass:
    """The axes of `plan`, kept; what a register file stores in 4 bits counts as bytes."""
    c = plan.command
    if c.commit.sink != Sink.DM and c.stream_dtype == DType.I4:
        return axes_of(plan_exec(_in_bytes(c), "bytes"))
    return axes_of(plan)


def _in_bytes(c: Exec) -> Exec:
    """The same store with two 4-bit elements as one i8."""
    return replace(
        c,
        a=replace(c.a, dtype=DType.I8),
        stream=replace(c.stream, run=c.stream.run // 2, pad=c.stream.pad // 2),
        commit_port=replace(c.commit_port, dtype=DType.I8),
        commit=replace(c.commit, columns=c.commit.columns // 2),
    )


def bind_exec(
    plan: ExecPlan,
    resolved: Sequence[int],
    memory: ChipMemory,
    weights: WeightCache,
    where: Where,
) -> Step:
    """A step that executes `plan` at these addresses (parallel to `plan.ports`).

    The step raises SIM025, naming `where`, when a bitmap does not fit its command.
    """
    at = PortAddresses.of(plan, resolved)
    work = pass_of(plan)
    if plan.command.generate is not None:
        return _generate_step(work, at, memory, plan.command.generate)
    if plan.command.contraction is not None:
        return _ContractionStep(work, at, memory, weights, where).run
    if plan.command.commit.sink != Sink.DM:
        return _store_step(work, at, memory, where)
    return _stream_step(work, at, memory, where)


def _generate_step(work: Pass, at: PortAddresses, memory: ChipMemory, generate: Generate) -> Step:
    """Constants to data memory."""
    c = work.plan.command
    order = work.axes
    if generate.count_up:
        inner = [axis.n for axis in order if axis.kind != Kind.SLICE]
        numbers = np.arange(math.prod(inner), dtype=np.int64) + generate.value
        x = numbers.astype(np.int32).reshape((1,) * (len(order) - len(inner)) + tuple(inner))
    else:
        raw = numerics.raw_dtype(c.commit_port.dtype)
        pattern = np.array([generate.value], np.uint32).view(np.uint8)[: raw.itemsize]
        x = pattern.view(raw).reshape((1,) * len(order))
    commit = Commit(work, order, at.commit, memory, raw=True)
    return lambda: commit.write(x)


# --- streams without contraction ---


def _stream_step(work: Pass, at: PortAddresses, memory: ChipMemory, where: Where) -> Step:
    """Fetch, vector engine, commit to data memory."""
    c = work.plan.command
    order = work.axes
    raw = is_move(work)
    readers = [StreamReader(work, port, order, raw=raw) for port in range(1 + c.stream.pair)]
    streams = [
        reader.bind(memory.dm, DM_BYTES, address, where)
        for reader, address in zip(readers, (at.a, at.b), strict=False)
    ]
    reads = _boxes(work, at)
    owned = all(reader.owned for reader in readers)
    units = engine(work, order, [r.shape for r in readers], owned, at, memory)
    commit = Commit(work, order, at.commit, memory, raw)

    def run() -> None:
        for box in reads:
            if memory.tiles:
                memory.make_real(box)
        x = streams[0]()
        if units is not None:
            other = streams[1]() if len(streams) > 1 else None
            x = units.run(x, other)
        commit.write(x)

    return run


def _boxes(work: Pass, at: PortAddresses) -> list[Box]:
    """What is read from data memory."""
    c, slices = work.plan.command, work.plan.slices
    boxes = [
        Box(address + f.low, address + f.high, 0, slices)
        for f, address in zip(work.plan.footprints, (at.a, at.b)[: 1 + c.stream.pair], strict=False)
    ]
    if c.switch.bitmap is not None:
        boxes.append(Box(at.bitmap, at.bitmap + bitmap_bytes(c.switch.ring), 0, slices))
    return boxes


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

    return VectorProgram(work, order, shapes, owned, register)


# --- stores to a register file ---


def _store_step(work: Pass, at: PortAddresses, memory: ChipMemory, where: Where) -> Step:
    """Fetch and store to the TRF or VRF; a broadcast to the TRF is written once for all slices."""
    c = work.plan.command
    order = work.axes
    reader = StreamReader(work, 0, order, raw=True)
    stream = reader.bind(memory.dm, DM_BYTES, at.a, where)
    reads = _boxes(work, at)
    if c.commit.sink == Sink.VRF:
        target = store_target(work, at.commit, memory.vrf)

        def run() -> None:
            if memory.tiles:
                for box in reads:
                    memory.make_real(box)
            target[...] = stream()

        return run

    store = _TrfStore(work, at, memory)

    def run_trf() -> None:
        if memory.tiles:
            for box in reads:
                memory.make_real(box)
        store.write(stream())

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
        everywhere = memory.can_share and work.plan.slices == memory.slices
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
        self,
        work: Pass,
        at: PortAddresses,
        memory: ChipMemory,
        weights: WeightCache,
        where: Where,
    ) -> None:
        self._work, self._at, self._memory, self._weights = work, at, memory, weights
        self._where = where
        stream, rows = work.plan.footprints[:2]
        self._box = Box(at.a + stream.low, at.a + stream.high, 0, work.plan.slices)
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
            variant = _Contraction(
                self._work, shared, self._at, self._memory, self._weights, self._where
            )
            self._variants[shared] = variant
        variant.run(self._box)


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
        where: Where,
    ) -> None:
        c = work.plan.command
        groups = group_axes(work, shared)
        self._groups = groups
        self._memory, self._weights, self._address = memory, weights, at.a
        self._reads = _boxes(work, at)
        self._reader = StreamReader(work, 0, groups.stream, raw=False, repeat=True)
        self._stream = self._reader.bind(memory.dm, DM_BYTES, at.a, where)
        self._geometry = weights.intern(self._reader.geometry)
        self._window = rows_window(work, at, memory)
        self._window_slices = 1 if shared else work.plan.slices
        self._rows = RegisterRows(work, groups).bind(self._window, at.trf, self._window_slices)
        self._product = product(groups, not c.trf.dtype.is_float)
        order = groups.result
        self._engine = engine(work, order, [groups.result_shape], True, at, memory)
        self._commit = Commit(work, order, at.commit, memory, raw=False)

    def run(self, box: Box) -> None:
        tile = self._tile(box)
        if tile is None:
            operand = whole_operand(self._stream(), self._groups)
        else:
            operand = self._weights.operand(
                tile, self._address, self._geometry, self._reader, self._groups
            )
        self._window.load(self._window_slices)
        x = self._product(operand, self._rows())
        if self._engine is not None:
            x = self._engine.run(x)
        self._commit.write(x)

    def _tile(self, box: Box) -> Tile | None:
        """The tile that the stream is a part of, if its decoded copy can be used."""
        if self._reader.gathers:
            for read in self._reads:
                self._memory.make_real(read)
            return None
        return self._memory.tile_at(box)
