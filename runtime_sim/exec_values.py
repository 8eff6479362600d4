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
from ..backend_rngd.isa.plan import ExecPlan, Footprint, Memory, capacity_bytes
from ..backend_rngd.isa.rules import DM_BYTES
from . import numerics
from .axes import Axis, Kind, Pass, axes_of, element_bytes
from .contraction import RegisterRows, group_axes, product, whole_operand
from .memory import GRANULE_BYTES, ChipMemory
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
    register = _TrfStore(work, at, memory) if c.commit.sink == Sink.TRF else None
    target = store_target(work, at, memory, once=register is not None and register.shared)

    def run() -> None:
        if memory.tiles:
            memory.make_real(low, high)
        if register is not None:
            register.before()
        target[...] = reader.read(source)

    return run


def store_target(work: Pass, at: PortAddresses, memory: ChipMemory, *, once: bool) -> Array:
    """The register file's elements that a store writes: in every slice, or in the first `once`."""
    sink = work.plan.command.commit.sink
    return np.ndarray(
        tuple(1 if once and axis.kind == Kind.SLICE else axis.n for axis in work.axes),
        numerics.raw_dtype(work.plan.stream_dtype),
        memory.trf if sink == Sink.TRF else memory.vrf,
        at.commit,
        tuple(axis.out for axis in work.axes),
    )


class _TrfStore:
    """What a store does to the flags that say which granules all slices share."""

    def __init__(self, work: Pass, at: PortAddresses, memory: ChipMemory) -> None:
        self._memory = memory
        row_bytes = work.plan.command.commit.columns * element_bytes(work.plan.stream_dtype)
        steps = [(axis.n, axis.out) for axis in work.counters]
        aligned = not any(v % GRANULE_BYTES for v in (at.commit, row_bytes, *(s for _, s in steps)))
        broadcast = not any(axis.fetched for axis in work.slices)
        everywhere = work.plan.slices == memory.slices
        self.shared = aligned and broadcast and everywhere
        if self.shared:
            self._flags = np.ndarray(
                (*(n for n, _ in steps), row_bytes // GRANULE_BYTES),
                np.bool_,
                memory.shared,
                at.commit // GRANULE_BYTES,
                (*(s // GRANULE_BYTES for _, s in steps), 1),
            )
        else:
            low = at.commit + sum(min(0, s * (n - 1)) for n, s in steps)
            high = at.commit + sum(max(0, s * (n - 1)) for n, s in steps) + row_bytes
            self._numbers = np.arange(low // GRANULE_BYTES, -(-high // GRANULE_BYTES))
            self._flags = memory.shared[self._numbers[0] : self._numbers[-1] + 1]

    def before(self) -> None:
        """Called before the bytes are written."""
        if self.shared:
            self._flags[...] = True
        else:
            self._memory.unshare(self._flags, self._numbers)


# --- contractions ---


class _ContractionStep:
    """A contraction at fixed addresses; compiled for shared and for separate register rows."""

    def __init__(
        self, work: Pass, at: PortAddresses, memory: ChipMemory, weights: WeightCache
    ) -> None:
        self._work, self._at, self._memory, self._weights = work, at, memory, weights
        stream, rows = work.plan.footprints[:2]
        self._span = (at.a + stream.low, at.a + stream.high)
        self._flags, self._numbers = self._granules(at.trf + rows.low, at.trf + rows.high)
        self._variants: dict[bool, _Contraction] = {}

    def _granules(self, low: int, high: int) -> tuple[Array, Array]:
        """Flags and numbers of the granules that each lane reads, [lanes, granules]."""
        c = self._work.plan.command
        assert c.contraction is not None
        first, end = low // GRANULE_BYTES, -(-high // GRANULE_BYTES)
        lane = capacity_bytes(Memory.TRF, c.contraction.lanes) // GRANULE_BYTES
        shape = (c.commit.lanes, end - first)
        flags = np.ndarray(shape, np.bool_, self._memory.shared, first, (lane, 1))
        numbers = np.arange(c.commit.lanes)[:, None] * lane + np.arange(first, end)
        return flags, numbers

    def run(self) -> None:
        shared = bool(self._flags.all())
        if not shared:
            self._memory.unshare(self._flags, self._numbers)
        variant = self._variants.get(shared)
        if variant is None:
            variant = _Contraction(self._work, shared, self._at, self._memory, self._weights)
            self._variants[shared] = variant
        variant.run(self._span)


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
        self._rows = self._registers.view(memory.trf, at.trf)
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
        x = self._product(operand, self._registers.decode(self._rows))
        if self._engine is not None:
            x = self._engine.run(x)
        self._commit.write(x)
