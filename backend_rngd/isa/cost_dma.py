"""Cycles and traffic of a DMA command, from its plan and the machine's numbers.

A command is a startup cost and the reads and writes of its requests: they overlap between two
memories and add up inside one. The engine asks for one unit of 256 B per cycle; HBM's channels and
the memory networks of the slices may be slower. `docs/cycles.md` has the formulas. An address in a
register counts as a multiple of 512 MB, so the cost depends on the command alone.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from .hbm_channels import channel_cycles, spread_cycles
from .instructions import Dma, Indirect, Side, Space
from .machine import Machine
from .plan import DmaPlan, split_dm_stride

Loop = tuple[int, int]


@dataclass(frozen=True)
class DmaCost:
    """Cycles and traffic of one DMA command."""

    read_cycles: int
    write_cycles: int
    hbm_bytes_read: int
    """Index lists included."""
    hbm_bytes_written: int
    requests: int
    """Units of at most 256 B that the engine asks for, on one side."""
    startup_cycles: int
    total_cycles: int


@dataclass(frozen=True)
class _Half:
    """One side of a DMA command with its merged loops (n, stride in bytes)."""

    side: Side
    write: bool
    loops: tuple[Loop, ...]
    run: int
    row_bytes: int
    """Bytes per row number of an indirect side; 0 without one."""
    address_runs: int
    """Pieces of memory that are contiguous on this side, in the order of the loops."""

    @property
    def runs(self) -> int:
        return math.prod(n for n, _ in self.loops)


def dma_cost(plan: DmaPlan, machine: Machine, sharers: int = 1) -> DmaCost:
    """Cycles of `plan` on `machine` while `sharers` PEs load from HBM.

    Computed once per shape: where a region or a buffer lies does not matter, except for what it
    leaves of a unit and which slice it starts in.
    """
    c = plan.command
    source, destination = (_placeless(side, machine) for side in (c.source, c.destination))
    return _dma_cost(replace(c, source=source, destination=destination), machine, sharers)


def _placeless(side: Side, machine: Machine) -> Side:
    if side.space == Space.HBM:
        base = side.base % machine.hbm.unit_bytes
    else:
        window = machine.dm.slice_window_bytes
        slices, local = divmod(side.base, window)
        base = slices * window + local % machine.dma.dm_write_alignment_bytes
    return Side(side.space, base, side.strides, peer=side.peer)


@functools.lru_cache(maxsize=65536)
def _dma_cost(c: Dma, machine: Machine, sharers: int) -> DmaCost:
    reading, writing = _halves(c)
    requests = reading.runs * _ceil(reading.run, machine.hbm.unit_bytes)
    index_bytes, index_cycles = _index_traffic(c, machine)
    engines = _engines(c, machine)
    read = index_cycles + _half_cycles(reading, requests, engines, machine, sharers)
    write = _half_cycles(writing, requests, engines, machine, sharers)
    moved = math.prod(c.n) * c.run
    startup = machine.dma.startup_cycles
    return DmaCost(
        read_cycles=read,
        write_cycles=write,
        hbm_bytes_read=index_bytes + (moved if c.source.space == Space.HBM else 0),
        hbm_bytes_written=moved if c.destination.space == Space.HBM else 0,
        requests=requests,
        startup_cycles=startup,
        total_cycles=startup + _combined(c, read, write, moved, machine),
    )


def _combined(c: Dma, read: int, write: int, moved: int, machine: Machine) -> int:
    """Reads and writes overlap between two memories; in one memory they take turns."""
    between = math.ceil(moved / machine.dma.cross_cluster_bytes_per_cycle)
    crossing = max(read, write, between) + machine.dma.cross_cluster_cycles
    per_cluster = machine.chip.pes // machine.chip.clusters
    if c.source.space != c.destination.space or c.source.space == Space.HBM:
        together = read + write if c.source.space == c.destination.space else max(read, write)
        peer = c.source.peer | c.destination.peer
        if peer >= per_cluster:
            return crossing
        return together + (machine.dma.remote_cycles if peer else 0)
    pes = [_pes(c, side, machine) for side in (c.source, c.destination)]
    clusters = [{pe // per_cluster for pe in side} for side in pes]
    if not clusters[0] & clusters[1]:
        return crossing
    return read + write + (machine.dma.remote_cycles if pes[0] != pes[1] else 0)


def _pes(c: Dma, side: Side, machine: Machine) -> set[int]:
    """The PEs whose data memory a side touches when rank 0 runs the command."""
    slices = _per_slice(side.base, zip(c.n, side.strides, strict=True), machine)
    per_pe = machine.chip.slices_per_pe
    return {int(s) // per_pe ^ side.peer for s in np.flatnonzero(slices)}


def _per_slice(base: int, loops: Iterable[Loop], machine: Machine) -> np.ndarray:
    """How many runs each slice of the chip gets; f64[slices]."""
    slice_loops = [(n, split_dm_stride(stride)[0]) for n, stride in loops]
    first = base // machine.dm.slice_window_bytes
    return _residues(first, slice_loops, machine.chip.pes * machine.chip.slices_per_pe)


def _engines(c: Dma, machine: Machine) -> int:
    """Engines that serve the command: its descriptors split the loops that move on both sides."""
    most = machine.dma.descriptors_per_command
    sides = {side.space: side for side in (c.source, c.destination)}
    if most == 1 or len(sides) == 1:
        return 1
    hbm, dm = sides[Space.HBM], sides[Space.DM]
    both = [(n, d) for n, h, d in zip(c.n, hbm.strides, dm.strides, strict=True) if h]
    per_slice = _per_slice(dm.base, both, machine).reshape(-1, machine.chip.slices_per_pe)
    return min(most, int(np.count_nonzero(per_slice.sum(axis=1))))


def _halves(c: Dma) -> tuple[_Half, _Half]:
    """Both sides, with inner loops that are contiguous on both merged into the run.

    The sides share their loops, so a loop merges when both strides equal the run. A long run is
    sent in packets of 4,096 B, which is a whole number of requests.
    """
    index = c.index.strides if c.index is not None else (0,) * len(c.n)
    strides = zip(c.n, c.source.strides, c.destination.strides, index, strict=True)
    loops = [loop for loop in strides if loop[0] > 1]
    run = c.run
    while loops and loops[-1][1:] == (run, run, 0):
        run *= loops.pop()[0]
    scale = c.index.scale if c.index is not None else 0
    sides = []
    for k, side in ((1, c.source), (2, c.destination)):
        by_rows = scale * (c.indirect == (Indirect.SOURCE, Indirect.DESTINATION)[k - 1])
        walked = [(loop[0], loop[k], loop[3] if by_rows else 0) for loop in loops]
        own = tuple((n, stride) for n, stride, _ in walked)
        sides.append(_Half(side, k == 2, own, run, by_rows, _address_runs(walked, run)))
    return sides[0], sides[1]


def _address_runs(loops: list[tuple[int, int, int]], run: int) -> int:
    """Contiguous pieces that loops (n, stride, index stride) make of runs."""
    loops = list(loops)
    while loops and loops[-1][1:] == (run, 0):
        run *= loops.pop()[0]
    return math.prod(n for n, _, _ in loops)


def _half_cycles(half: _Half, requests: int, engines: int, machine: Machine, sharers: int) -> int:
    per_request = machine.hbm.unit_bytes / machine.dma.bytes_per_cycle / engines
    if half.side.space == Space.DM:
        return _dm_cycles(half, requests * per_request, machine)
    asked = (requests + _extra_requests(half, machine)) * per_request
    asked += (half.address_runs - 1) * machine.dma.run_overhead_cycles / engines
    if half.row_bytes:
        return math.ceil(max(asked, spread_cycles(requests, machine, sharers)))
    return math.ceil(max(asked, channel_cycles(half.loops, half.run, machine, sharers)))


def _extra_requests(half: _Half, machine: Machine) -> float:
    """Requests' worth of time beyond one each, where they do not cover whole units of 256 B.

    A read that crosses a unit's end counts twice; a write that leaves part of a unit as it was
    reads, changes and writes it. Any row of an indirect side is as likely as any other.
    """
    unit = machine.hbm.unit_bytes
    step = math.gcd(half.row_bytes, unit)
    rows = (unit // step, step)
    starts = _residues(half.side.base, [*half.loops, rows], unit) / rows[0]
    whole, rest = divmod(half.run, unit)
    offset = np.arange(unit)
    slow = whole * (offset != 0)
    if half.write:
        slow += rest > 0
        factor = machine.hbm.rmw_write_factor
    else:
        slow += offset + rest > unit
        factor = machine.hbm.unaligned_read_factor
    return float(slow @ starts) * (factor - 1)


def _dm_cycles(half: _Half, asked: float, machine: Machine) -> int:
    """As fast as requests come, unless one of the memory networks has more to move than that."""
    whole, rest = divmod(half.run, machine.hbm.unit_bytes)
    width = machine.dm.dmn_bytes_per_cycle
    cycles_per_run = whole * _ceil(machine.hbm.unit_bytes, width) + _ceil(rest, width)
    per_slice = _per_slice(half.side.base, half.loops, machine)
    busiest = per_slice.reshape(-1, machine.chip.slices_per_dmn).sum(axis=1).max()
    cycles = max(asked, float(busiest) * cycles_per_run)
    places = [half.side.base, half.run, *(stride for _, stride in half.loops)]
    aligned = all(place % machine.dma.dm_write_alignment_bytes == 0 for place in places)
    if half.write and not aligned:
        cycles *= machine.dm.misaligned_write_factor
    return math.ceil(cycles)


def _residues(base: int, loops: Iterable[tuple[int, int]], modulus: int) -> np.ndarray:
    """How often base + Σ i·stride takes each value modulo `modulus`; f64[modulus]."""
    counts = np.zeros(modulus)
    counts[base % modulus] = 1
    for n, stride in loops:
        cosets = math.gcd(stride, modulus)
        period = modulus // cosets
        rounds, rest = divmod(n, period)
        # Each coset in the order in which a loop walks it: a loop sums over windows of that.
        walk = (np.arange(cosets)[:, None] + np.arange(period) * (stride % modulus)) % modulus
        ordered = counts[walk]
        sums = np.cumsum(np.concatenate([ordered, ordered], axis=1), axis=1)
        window = sums[:, period:] - sums[:, period - rest : 2 * period - rest]
        counts[walk] = rounds * sums[:, period - 1 : period] + window
    return counts


def _index_traffic(c: Dma, machine: Machine) -> tuple[int, int]:
    """(bytes, cycles) for the index list: each entry once, spread over what its loops span.

    Rows can be asked for when their numbers have arrived.
    """
    if c.index is None:
        return 0, 0
    loops = [(n, abs(stride)) for n, stride in zip(c.n, c.index.strides, strict=True) if stride]
    entries = math.prod(n for n, _ in loops)
    span = 4 + sum((n - 1) * stride for n, stride in loops)
    requests = min(entries, _ceil(span, machine.hbm.unit_bytes))
    return 4 * entries, machine.hbm.read_latency_cycles + requests


def _ceil(value: int, unit: int) -> int:
    return -(-value // unit)
