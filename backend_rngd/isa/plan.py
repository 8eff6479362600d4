"""The decoder's product: a command with its index maps spelt out.

The value executor and the cycle model read plans and nothing else, so they cannot disagree
about what a command means. A plan does not know its registers: addresses are relative to the
ports' bases, and `footprint` gives the bytes around them that the command may touch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import IntEnum

from .dtypes import DType
from .instructions import (
    Birth,
    Context,
    Counter,
    Dma,
    Exec,
    Fate,
    Head,
    Indirect,
    Port,
    Side,
    Sink,
    Space,
)
from .rank_rules import check_dma_ranks
from .rules import (
    DM_BYTES,
    SLICES_PER_PE,
    TRF_BYTES,
    TRF_HALF_BYTES,
    VRF_BYTES,
    check_exec,
    result_dtype,
)

SLICE_ADDRESS_BYTES = 1 << 22
"""A slice's window in the DMA engine's view of data memory."""
REGION_SHIFT = 40
"""HBM addresses are region << REGION_SHIFT | offset; the loader gives each region its place."""


class Memory(IntEnum):
    HBM = 0
    DM = 1
    TRF = 2
    VRF = 3


@dataclass(frozen=True)
class Footprint:
    """Bytes [low, high) around a port's address, in slices [slice_low, slice_high)."""

    memory: Memory
    low: int
    high: int
    write: bool
    slice_low: int = 0
    slice_high: int = 1
    whole_region: bool = False
    """An indirect access can reach all of its HBM region."""


@dataclass(frozen=True)
class SliceAxis:
    """A bit field of the output slice: where its packets come from per step."""

    n: int
    slices: int
    bytes: int


@dataclass(frozen=True)
class ExecPlan:
    """An `Exec` command with its axes resolved.

    Results O[slice, out counters, lane, column]; `slice_axes` (outermost first) multiply to
    `slices`.
    """

    command: Exec
    slices: int
    """Slices that work: 64 << group, or fewer with `valid_slices`."""
    slice_axes: tuple[SliceAxis, ...]
    columns: int
    """Columns that leave the vector engine (before the commit pads or trims)."""
    lanes: int
    stream_dtype: DType
    result_dtype: DType
    footprints: tuple[Footprint, ...]
    """In the order of `ports`: one for each port used."""
    ports: tuple[Port, ...]

    @property
    def counters(self) -> tuple[Counter, ...]:
        return self.command.counters

    @property
    def out_counters(self) -> tuple[Counter, ...]:
        return tuple(c for c in self.counters if c.fate == Fate.OUT)

    @property
    def uses_vrf(self) -> bool:
        return self.command.vector.reads_vrf

    @property
    def steps(self) -> int:
        """Packets that meet the pipeline, re-use included."""
        return math.prod(c.n for c in self.counters)

    @property
    def fetched_steps(self) -> int:
        """Packets that each source slice fetches; an inter-transpose sends some elsewhere."""
        sent = math.prod(axis.n for axis in self.slice_axes if axis.bytes)
        return sent * math.prod(c.n for c in self.counters if c.birth == Birth.FETCH)

    @property
    def multiplications(self) -> int:
        """Products that the contraction engines make, padding included."""
        if self.command.contraction is None:
            return 0
        return self.slices * self.command.commit.lanes * self.steps * self.command.stream.elements


@dataclass(frozen=True)
class DmaPlan:
    """A `Dma` command with its extents resolved."""

    command: Dma
    bytes: int
    runs: int
    footprints: tuple[Footprint, ...]
    """Source, destination, and the index list when there is one."""


Plan = ExecPlan | DmaPlan


def plan_exec(command: Exec, where: str) -> ExecPlan:
    """Check the rules of `command` and resolve its maps. Raises: VED011."""
    check_exec(command, where)
    return _plan_exec(replace(command, head=Head(command.head.context)))


@functools.lru_cache(maxsize=65536)
def _plan_exec(c: Exec) -> ExecPlan:
    slices = c.valid_slices or SLICES_PER_PE << c.group
    columns = c.stream.elements
    if c.contraction is not None:
        columns >>= c.contraction.depth
    if c.vector.reduce_columns:
        columns = 1
    ports, footprints = zip(*_exec_footprints(c, slices), strict=True)
    return ExecPlan(
        command=c,
        slices=slices,
        slice_axes=slice_axes(c, slices),
        columns=columns,
        lanes=c.contraction.lanes if c.contraction else 1,
        stream_dtype=c.stream_dtype,
        result_dtype=result_dtype(c),
        footprints=footprints,
        ports=ports,
    )


def slice_axes(c: Exec, slices: int) -> tuple[SliceAxis, ...]:
    """The output slice as fields: above the ring, then digits and don't-cares inside it."""
    if c.switch.bitmap is not None:
        return (SliceAxis(slices, 1, 0),)  # the bitmap replaces it when packets are read
    ring_bits = c.switch.ring.bit_length() - 1
    axes = [SliceAxis(slices >> ring_bits, 1 << ring_bits, 0)]
    bit = ring_bits
    for digit in sorted(c.switch.digits, key=lambda d: -d.shift):
        gap = bit - (digit.shift + digit.bits)
        axes += [SliceAxis(1 << gap, 0, 0), SliceAxis(1 << digit.bits, digit.slices, digit.bytes)]
        bit = digit.shift
    axes.append(SliceAxis(1 << bit, 0, 0))
    return tuple(axis for axis in axes if axis.n > 1) or (SliceAxis(1, 0, 0),)


def _exec_footprints(c: Exec, slices: int) -> Iterable[tuple[Port, Footprint]]:
    s = c.stream
    reads = [k for k in c.counters if k.birth != Birth.REUSE]
    digits = [((1 << d.bits), d.bytes) for d in c.switch.digits]
    fetched = [] if c.generate else [(c.a, [k.a for k in reads])]
    fetched += [(c.b, [k.b for k in reads])] if s.pair else []
    for port, strides in fetched:
        size = port.dtype.bytes_for(1)
        run_bytes = port.dtype.bytes_for(s.run if s.run_step else 1)
        loops = [(k.n, stride) for k, stride in zip(reads, strides, strict=True)]
        low, high = _hull([*loops, *digits, (s.runs, s.run_stride)], max(size, run_bytes))
        yield port, Footprint(Memory.DM, low, high, False, 0, slices)
    if c.contraction is not None:
        # Replicated reads cover the packet; wider rows advance inside it.
        packet = c.trf.dtype.bytes_for(s.elements)
        low, high = _hull([(k.n, k.trf) for k in c.counters], min(packet, c.contraction.trf_read))
        yield c.trf, Footprint(Memory.TRF, low, high, False, 0, slices)
    if c.vector.reads_vrf:
        yield c.vrf, Footprint(Memory.VRF, *_vrf_hull(c), False, 0, slices)
    if c.switch.bitmap is not None:
        size = bitmap_bytes(c.switch.ring)
        yield Port(c.switch.bitmap, DType.I8), Footprint(Memory.DM, 0, size, False, 0, slices)
    yield c.commit_port, _commit_footprint(c, slices)


def bitmap_bytes(ring: int) -> int:
    """Bytes of a slice's bitmap: bit r of byte r div 8 stands for slice r of the ring."""
    return max(8, ring // 8)


def _vrf_hull(c: Exec) -> tuple[int, int]:
    columns = c.stream.elements >> (c.contraction.depth if c.contraction else 0)
    loops = [(k.n, k.vrf) for k in c.counters if k.fate != Fate.MSUM]
    lanes = c.commit.lanes if c.contraction else 1
    loops += [(lanes, c.vector.vrf_lane), (2 if c.stream.pair else 1, c.vector.vrf_pair)]
    return _hull([*loops, (columns, c.vector.vrf_column)], 4)


def _commit_footprint(c: Exec, slices: int) -> Footprint:
    out = [k for k in c.counters if k.fate == Fate.OUT]
    size = c.commit_port.dtype.bytes_for(1)
    if c.commit.sink == Sink.TRF:
        packet = c.commit_port.dtype.bytes_for(c.stream.elements)
        low, high = _hull([(k.n, k.trf) for k in out], packet)
        return Footprint(Memory.TRF, low, high, True, 0, slices)
    if c.commit.sink == Sink.VRF:
        low, high = _hull([(k.n, k.vrf) for k in out], 4 * c.stream.elements)
        return Footprint(Memory.VRF, low, high, True, 0, slices)
    loops = [(k.n, k.commit) for k in out]
    loops += [(c.commit.lanes, c.commit.lane_stride), (c.commit.columns, c.commit.column_stride)]
    low, high = _hull(loops, size)
    if c.commit_port.dtype.bits < 8:  # strides of 4-bit results count half bytes
        low, high = low // 2, -(-high // 2)
    return Footprint(Memory.DM, low, high, True, 0, slices)


def _hull(loops: Iterable[tuple[int, int]], size: int) -> tuple[int, int]:
    """Smallest [low, high) that holds `size` bytes at every combination of the loops."""
    low = high = 0
    for n, stride in loops:
        low += min(0, stride * (n - 1))
        high += max(0, stride * (n - 1))
    return low, high + size


def capacity_bytes(memory: Memory, trf_lanes: int = 1) -> int:
    """Bytes that a port can address in one slice (of one lane, for the TRF)."""
    return {
        Memory.DM: DM_BYTES,
        Memory.TRF: TRF_BYTES // trf_lanes,
        Memory.VRF: VRF_BYTES,
    }[memory]


def half_spans(trf_lanes: int, low: int, high: int) -> list[tuple[int, int, int]]:
    """A lane's bytes [low, high) cut where the register file's halves meet.

    As (half, low, high) from the first byte that the lane has in that half. Byte b of lane l is
    byte half · 32 KB + l · (32 KB / lanes) + b mod (32 KB / lanes) of the file, whatever wrote it
    and whatever reads it.
    """
    size = TRF_HALF_BYTES // trf_lanes
    spans = [(h, max(low - h * size, 0), min(high - h * size, size)) for h in (0, 1)]
    return [(h, first, end) for h, first, end in spans if first < end]


def plan_dma(command: Dma, where: str) -> DmaPlan:
    """Check the rules of `command` and resolve its extents. Raises: VED011."""
    check_dma_ranks(command, where)
    return _plan_dma(replace(command, head=Head(Context.DMA)))


@functools.lru_cache(maxsize=65536)
def _plan_dma(c: Dma) -> DmaPlan:
    runs = math.prod(c.n)
    footprints = [
        _side_footprint(c, c.source, False, c.indirect == Indirect.SOURCE),
        _side_footprint(c, c.destination, True, c.indirect == Indirect.DESTINATION),
    ]
    if c.index is not None:
        low, high = _hull(zip(c.n, c.index.strides, strict=True), 4)
        footprints.append(Footprint(Memory.HBM, low, high, False))
    return DmaPlan(c, runs * c.run, runs, tuple(footprints))


def _side_footprint(c: Dma, side: Side, write: bool, indirect: bool) -> Footprint:
    loops = list(zip(c.n, side.strides, strict=True))
    if side.space == Space.HBM:
        low, high = _hull(loops, c.run)
        return Footprint(Memory.HBM, low, high, write, whole_region=indirect)
    slice_loops, byte_loops = [], []
    for n, stride in loops:
        slices, local = split_dm_stride(stride)
        slice_loops.append((n, slices))
        byte_loops.append((n, local))
    low, high = _hull(byte_loops, c.run)
    slice_low, slice_high = _hull(slice_loops, 1)
    return Footprint(Memory.DM, low, high, write, slice_low, slice_high)


def split_dm_stride(stride: int) -> tuple[int, int]:
    """A DM address difference as (slices, bytes inside a slice)."""
    half = SLICE_ADDRESS_BYTES // 2
    slices = (stride + half) // SLICE_ADDRESS_BYTES
    return slices, stride - slices * SLICE_ADDRESS_BYTES
