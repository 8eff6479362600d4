"""Cycles of one command: a formula per engine, from the plan and the machine's numbers.

The engines of a pass stream into each other, so a pass takes as long as its busiest engine, plus
the pipeline's fill, plus a fixed cost per command. A DMA command is a startup cost and the reads
and writes of its requests: they overlap between two memories and add up inside one. `docs/isa.md`
has the formulas as a table; nothing here depends on what registers hold.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from .dtypes import DType
from .instructions import (
    Birth,
    Context,
    Dma,
    Fate,
    Fold,
    Indirect,
    Port,
    Reduce,
    Side,
    Sink,
    Space,
    Topology,
)
from .machine import Machine
from .plan import DmaPlan, ExecPlan, split_dm_stride
from .rules import REDUCE_STAGE, STAGE

FLOAT_STAGES = range(3, 6)
"""Stages between Narrow and Widen: float units, reducer, divider."""
CAST_ENGINE_EXEMPT = (DType.F32, DType.BF16)
"""The commit adapter itself rounds f32 to bf16; other casts go through the cast engine."""


@dataclass(frozen=True)
class ExecCost:
    """Cycles of one pass; `engines` holds the engines that it uses."""

    engines: Mapping[str, int]
    latency_cycles: int
    """What the pipeline needs to fill: the first result's way through all stages."""
    base_cycles: int
    total_cycles: int
    vector_unit: bool
    """It takes the unit of the vector and cast engines: no other pass uses that meanwhile."""
    blocking_cycles: int
    """For so long after its start no sub or DMA command starts: its bitmap is being loaded."""


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


# --- tensor unit ---


@functools.lru_cache(maxsize=65536)
def exec_cost(plan: ExecPlan, machine: Machine) -> ExecCost:
    """Cycles of `plan` on `machine`."""
    c = plan.command
    engines = {
        "fetch": _fetch_cycles(plan, machine),
        "switch": c.switch.ring * plan.fetched_steps * _flits(plan, c.stream.valid, machine),
        "collect": _collected_flits(plan, machine),
    }
    if c.contraction is not None:
        engines["contraction"] = _contraction_cycles(plan, machine)
    if c.vector.used:
        engines["vector"] = _vector_cycles(plan, machine)
    if c.vector.slice_reduce != Reduce.NONE:
        # The ring of reducers passes the last element on through the whole group.
        engines["inter_slice"] = max(engines.values()) + c.vector.slice_group
    if _uses_cast_engine(plan):
        engines["cast"] = _vector_flits(plan, machine)
    if c.commit.transpose_rows:
        engines["transpose"] = _transpose_cycles(plan, machine)
    if c.commit.sink == Sink.DM:
        engines["commit"] = _commit_cycles(plan, machine)
    control = machine.control
    main = c.head.context == Context.MAIN
    base = control.exec_main_cycles if main else control.exec_sub_cycles
    latency = _fill_cycles(plan, machine)
    custom = c.switch.topology == Topology.CUSTOM
    return ExecCost(
        engines=MappingProxyType(engines),
        latency_cycles=latency,
        base_cycles=base,
        total_cycles=base + max(engines.values()) + latency,
        vector_unit=uses_vector_engine(plan),
        blocking_cycles=machine.switch.bitmap_load_cycles if custom else 0,
    )


def uses_vector_engine(plan: ExecPlan) -> bool:
    """Whether the pass takes the unit of the vector and cast engines.

    There is one such unit: a main and a sub command that both use it exclude each other. The
    commit adapter's rounding of f32 to bf16 leaves it free.
    """
    return plan.command.vector.used or _uses_cast_engine(plan)


def _fetch_cycles(plan: ExecPlan, machine: Machine) -> int:
    ports = (plan.command.a, plan.command.b) if plan.command.stream.pair else (plan.command.a,)
    return plan.fetched_steps * sum(_reads_per_packet(plan, port, machine) for port in ports)


def _reads_per_packet(plan: ExecPlan, port: Port, machine: Machine) -> int:
    """Reads of one size that make up a packet.

    The size divides the packet and its contiguous run. The run grows outward over the packet's
    second entry; counters cannot change the result, for then the run holds whole packets. A read
    may overrun into what `pad` overwrites with zeros.
    """
    s = plan.command.stream
    dtype = port.dtype
    packet = dtype.bytes_for(s.valid)
    run = dtype.bytes_for(s.run if s.run_step else 1)
    if plan.command.head.context == Context.SUB:
        return s.runs * _ceil(dtype.bytes_for(s.run), machine.fetch.sub_read_bytes)
    if s.run_step == 0 or (s.runs > 1 and s.run_stride != run):
        return packet // _read_size(math.gcd(packet, run), dtype, plan.stream_dtype, machine)
    padded = max(packet, dtype.bytes_for(s.elements))
    sizes = {packet, *(_ceil(packet, size) * size for size in machine.fetch.main_read_bytes)}
    return min(
        size // _read_size(size, dtype, plan.stream_dtype, machine)
        for size in sizes
        if size <= padded
    )


def _read_size(access: int, stored: DType, streamed: DType, machine: Machine) -> int:
    """Largest read that divides `access` bytes and whose cast output fits."""
    limit = machine.fetch.max_cast_output_bytes * stored.bits // streamed.bits
    sizes = [size for size in machine.fetch.main_read_bytes if access % size == 0]
    return max([size for size in sizes if size <= limit] or sizes[:1] or [1])


def _flits(plan: ExecPlan, elements: int, machine: Machine) -> int:
    """Flits per step of a packet with so many elements; a pair has two packets."""
    streams = 2 if plan.command.stream.pair else 1
    return streams * _ceil(plan.stream_dtype.bytes_for(elements), machine.stream.flit_bytes)


def _collected_flits(plan: ExecPlan, machine: Machine) -> int:
    packets = math.prod(c.n for c in plan.counters if c.birth != Birth.REUSE)
    return packets * _flits(plan, plan.command.stream.elements, machine)


def _contraction_cycles(plan: ExecPlan, machine: Machine) -> int:
    """Flits taken, packets multiplied, results drained: the slowest counts."""
    return max(_collected_flits(plan, machine), plan.steps, _drained_flits(plan, machine))


def _drained_flits(plan: ExecPlan, machine: Machine) -> int:
    """Words of the lane folder's bus: lanes side by side, or one lane's columns after another's."""
    contraction = plan.command.contraction
    assert contraction is not None
    sums = math.prod(c.n for c in plan.counters if c.fate != Fate.MSUM)
    columns = plan.command.stream.elements >> contraction.depth
    if contraction.fold == Fold.INTERLEAVED:
        return sums * columns
    return sums * contraction.lanes * _ceil(columns, machine.contraction.out_bus_elements)


def _vector_flits(plan: ExecPlan, machine: Machine) -> int:
    """Flits that enter the vector engine, of up to eight 32-bit elements."""
    if plan.command.contraction is not None:
        return _drained_flits(plan, machine)
    return plan.steps * _flits(plan, plan.command.stream.elements, machine)


def _vector_cycles(plan: ExecPlan, machine: Machine) -> int:
    v = plan.command.vector
    stages = {STAGE[op.alu] for op in v.ops}
    if v.reduce != Reduce.NONE:
        stages.add(REDUCE_STAGE)
    narrow = any(stage in FLOAT_STAGES for stage in stages)
    way = machine.vector.float_elements_per_cycle if narrow else machine.vector.elements_per_cycle
    per_flit = _ceil(machine.vector.elements_per_cycle, way)
    return _vector_flits(plan, machine) * per_flit


def _uses_cast_engine(plan: ExecPlan) -> bool:
    pair = (plan.result_dtype, plan.command.commit_port.dtype)
    return pair[0] != pair[1] and pair != CAST_ENGINE_EXEMPT


def _out_steps(plan: ExecPlan) -> int:
    return math.prod(c.n for c in plan.out_counters)


def _transposer(plan: ExecPlan, machine: Machine) -> tuple[int, int, int]:
    """(flits in, rows out, blocks): rows enter in flits, columns leave as rows of at most 8 B."""
    o = plan.command.commit
    per_flit = machine.transpose.valid_per_flit[f"b{plan.command.commit_port.dtype.bits}"]
    flits_in = o.transpose_rows * _ceil(o.transpose_columns, per_flit)
    elements = _out_steps(plan) * o.lanes * o.columns
    return flits_in, o.transpose_columns, _ceil(elements, o.transpose_rows * o.transpose_columns)


def _transpose_cycles(plan: ExecPlan, machine: Machine) -> int:
    cycles_in, cycles_out, blocks = _transposer(plan, machine)
    if plan.command.commit.transpose_columns > machine.transpose.buffer_columns:
        return blocks * (cycles_in + cycles_out)  # one block fills both buffers
    return cycles_in + (blocks - 1) * max(cycles_in, cycles_out) + cycles_out


def _commit_cycles(plan: ExecPlan, machine: Machine) -> int:
    """Writes: each flit's valid bytes in pieces that divide the contiguous run in memory."""
    o = plan.command.commit
    if o.transpose_rows:
        _, cycles_out, blocks = _transposer(plan, machine)
        return blocks * cycles_out  # one row of at most 8 B per write
    size = plan.command.commit_port.dtype.bytes_for(1)
    inner, stride, outer = _commit_axis(plan)
    per_flit = machine.stream.flit_bytes * 8 // plan.result_dtype.bits
    full, rest = divmod(inner, per_flit)
    if stride != size and inner > 1:
        return outer * inner
    run = inner * size
    whole = _writes(plan, per_flit * size, run, machine)
    tail = _writes(plan, rest * size, run, machine) if rest else 0
    return outer * (full * whole + tail)


def _commit_axis(plan: ExecPlan) -> tuple[int, int, int]:
    """(elements, stride in bytes, repetitions) of the axis along which a flit lies."""
    c = plan.command
    lanes_inside = c.contraction is not None and c.contraction.fold == Fold.INTERLEAVED
    if lanes_inside:
        return c.commit.lanes, c.commit.lane_stride, _out_steps(plan) * c.commit.columns
    return c.commit.columns, c.commit.column_stride, _out_steps(plan) * c.commit.lanes


def _writes(plan: ExecPlan, valid: int, run: int, machine: Machine) -> int:
    """Writes for a flit with `valid` bytes (trimmed to units of 8) inside a run of `run`."""
    unit = machine.commit.sub_write_bytes
    if plan.command.head.context == Context.SUB:
        return _ceil(valid, unit)
    trimmed = _ceil(valid, unit) * unit
    return max(1, trimmed // math.gcd(trimmed, _ceil(run, unit) * unit))


def _fill_cycles(plan: ExecPlan, machine: Machine) -> int:
    """The first element's way through the stages that the pass uses."""
    c = plan.command
    cycles = machine.fetch.fill_cycles + machine.fetch.adapter_fill_cycles
    if c.stream.cast is not None:
        cycles += machine.fetch.cast_latency_cycles
    cycles += machine.switch.hop_cycles + machine.switch.fill_cycles_per_hop * (c.switch.ring - 1)
    if c.switch.topology == Topology.CUSTOM:
        cycles += machine.switch.bitmap_load_cycles
    cycles += machine.stream.collect_fill_cycles
    if c.contraction is not None:
        fill = machine.contraction
        cycles += c.contraction.depth + fill.accumulator_fill_cycles + fill.folder_fill_cycles
    reducers = sum(kind != Reduce.NONE for kind in (c.vector.reduce, c.vector.slice_reduce))
    cycles += machine.vector.alu_latency_cycles * (len(c.vector.ops) + reducers)
    if _uses_cast_engine(plan):
        cycles += machine.vector.cast_fill_cycles
    if c.commit.sink == Sink.DM:
        cycles += machine.commit.fill_cycles
    return cycles


# --- DMA ---


@dataclass(frozen=True)
class _Half:
    """One side of a DMA command with its merged loops (n, stride in bytes)."""

    side: Side
    write: bool
    loops: tuple[tuple[int, int], ...]
    run: int
    row_bytes: int
    """Bytes per row number of an indirect side; 0 without one."""

    @property
    def runs(self) -> int:
        return math.prod(n for n, _ in self.loops)


@functools.lru_cache(maxsize=65536)
def dma_cost(plan: DmaPlan, machine: Machine) -> DmaCost:
    """Cycles of `plan` on `machine`, with registers that hold multiples of 256."""
    c = plan.command
    reading, writing = _halves(c)
    requests = reading.runs * _ceil(reading.run, machine.hbm.unit_bytes)
    index_bytes, index_requests = _index_traffic(c, machine)
    read = _half_cycles(reading, requests, machine) + index_requests
    write = _half_cycles(writing, requests, machine)
    same_memory = c.source.space == c.destination.space
    startup = machine.dma.startup_cycles
    return DmaCost(
        read_cycles=read,
        write_cycles=write,
        hbm_bytes_read=index_bytes + (plan.bytes if c.source.space == Space.HBM else 0),
        hbm_bytes_written=plan.bytes if c.destination.space == Space.HBM else 0,
        requests=requests,
        startup_cycles=startup,
        total_cycles=startup + (read + write if same_memory else max(read, write)),
    )


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
    from_rows, to_rows = (c.indirect == kind for kind in (Indirect.SOURCE, Indirect.DESTINATION))
    return (
        _Half(c.source, False, tuple((n, s) for n, s, _, _ in loops), run, scale * from_rows),
        _Half(c.destination, True, tuple((n, d) for n, _, d, _ in loops), run, scale * to_rows),
    )


def _half_cycles(half: _Half, requests: int, machine: Machine) -> int:
    if half.side.space == Space.DM:
        return _dm_cycles(half, requests, machine)
    channels = machine.hbm.unit_cycles * requests / machine.hbm.channels
    return max(requests, math.ceil(channels)) + _hbm_extra_cycles(half, machine)


def _hbm_extra_cycles(half: _Half, machine: Machine) -> int:
    """Cycles beyond one per request, for requests that do not cover whole units of 256 B.

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
    return math.ceil(float(slow @ starts) * (factor - 1))


def _dm_cycles(half: _Half, requests: int, machine: Machine) -> int:
    """One request per cycle, unless one of the memory networks has more to move than that."""
    whole, rest = divmod(half.run, machine.hbm.unit_bytes)
    width = machine.dm.dmn_bytes_per_cycle
    cycles_per_run = whole * _ceil(machine.hbm.unit_bytes, width) + _ceil(rest, width)
    slice_loops = [(n, split_dm_stride(stride)[0]) for n, stride in half.loops]
    first = half.side.base // machine.dm.slice_window_bytes
    per_slice = _residues(first, slice_loops, machine.chip.pes * machine.chip.slices_per_pe)
    busiest = int(per_slice.reshape(-1, machine.chip.slices_per_dmn).sum(axis=1).max())
    cycles = max(requests, busiest * cycles_per_run)
    places = [half.side.base, half.run, *(stride for _, stride in half.loops)]
    aligned = all(place % machine.dma.dm_write_alignment_bytes == 0 for place in places)
    if half.write and not aligned:
        return math.ceil(cycles * machine.dm.misaligned_write_factor)
    return cycles


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
    """(bytes, requests) for the index list: each entry once, spread over what its loops span."""
    if c.index is None:
        return 0, 0
    loops = [(n, abs(stride)) for n, stride in zip(c.n, c.index.strides, strict=True) if stride]
    entries = math.prod(n for n, _ in loops)
    span = 4 + sum((n - 1) * stride for n, stride in loops)
    return 4 * entries, min(entries, _ceil(span, machine.hbm.unit_bytes))


def _ceil(value: int, unit: int) -> int:
    return -(-value // unit)
