"""Cycles of a pass of the tensor unit: a formula per engine, from the plan and the machine.

The engines of a pass stream into each other, so a pass takes as long as its busiest engine, plus
the pipeline's fill, plus a fixed cost per command. `docs/cycles.md` has the formulas as a table.
Addresses play no part: passes that differ only in them share one cost.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from .dtypes import DType
from .instructions import (
    Birth,
    Context,
    Exec,
    Fate,
    Fold,
    Port,
    Reduce,
    Sink,
    Topology,
)
from .machine import Machine
from .plan import ExecPlan
from .units import REDUCE_STAGE, STAGE

FLOAT_STAGES = range(3, 6)
"""Stages between Narrow and Widen: float units, reducer, divider."""
WORD_BITS = 32
"""Of the vector engine's elements."""
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
    starves_dma: bool
    """It stays in one bank for so long that no DMA command may run beside it."""


@dataclass(frozen=True)
class _Shape:
    """A plan whose equality leaves addresses out."""

    command: Exec
    plan: ExecPlan = field(compare=False)


def exec_cost(plan: ExecPlan, machine: Machine) -> ExecCost:
    """Cycles of `plan` on `machine`; computed once per shape."""
    return _exec_cost(_Shape(without_addresses(plan.command), plan), machine)


def without_addresses(c: Exec) -> Exec:
    """What the cost of a command depends on: the same command at address 0 of every port."""
    a, b, trf, vrf, out = (
        Port(dtype=port.dtype) for port in (c.a, c.b, c.trf, c.vrf, c.commit_port)
    )
    return replace(c, a=a, b=b, trf=trf, vrf=vrf, commit_port=out)


@functools.lru_cache(maxsize=65536)
def _exec_cost(shape: _Shape, machine: Machine) -> ExecCost:
    plan = shape.plan
    c = plan.command
    engines: dict[str, int] = {}
    if c.generate is None:  # the commit makes constants itself
        engines["fetch"] = _fetch_cycles(plan, machine)
        engines["switch"] = _switch_cycles(plan, machine)
        engines["collect"] = _collected_flits(plan, machine)
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
    # A slower engine behind it would leave the bank cycles between the fetches.
    steady = engines.get("fetch") == max(engines.values())
    starves = steady and same_bank_accesses(plan, machine) >= starving_accesses(machine)
    if starves and "commit" in engines:
        # Fetches come first and never leave their bank, so commits there wait until they are over.
        engines["commit"] += engines["fetch"]
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
        starves_dma=starves,
    )


def uses_vector_engine(plan: ExecPlan) -> bool:
    """Whether the pass takes the unit of the vector and cast engines.

    There is one such unit: a main and a sub command that both use it exclude each other. The
    commit adapter's rounding of f32 to bf16 leaves it free.
    """
    return plan.command.vector.used or _uses_cast_engine(plan)


def starving_accesses(machine: Machine) -> int:
    """So many accesses to one bank in a row keep a DMA request waiting until the NoC gives up.

    A waiting network repeats its request for each of its slices.
    """
    per_slice = (
        machine.hbm.unit_bytes * machine.chip.slices_per_dmn / machine.dm.dmn_bytes_per_cycle
    )
    return math.ceil(machine.dm.noc_timeout_cycles / per_slice)


def same_bank_accesses(plan: ExecPlan, machine: Machine) -> int:
    """Longest row of fetches that all start in the same bank."""
    line = machine.dm.banks * machine.dm.bank_width_bytes
    if plan.fetched_steps > 1 and _reads_per_packet(plan, plan.command.a, machine) > 1:
        return 1
    accesses = 1
    for counter in reversed([c for c in plan.counters if c.birth == Birth.FETCH and c.n > 1]):
        if counter.a % line:
            break
        accesses *= counter.n
    return accesses


def _switch_cycles(plan: ExecPlan, machine: Machine) -> int:
    c = plan.command
    flits = plan.fetched_steps * _flits(plan, c.stream.valid, machine)
    return c.switch.ring * flits * machine.switch.hop_cycles


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
    return max([size for size in sizes if size <= limit] or sizes[:1])


def _flits(plan: ExecPlan, elements: int, machine: Machine) -> int:
    """Flits per step of a packet with so many elements; a pair has two packets."""
    streams = 2 if plan.command.stream.pair else 1
    return streams * _ceil(plan.stream_dtype.bytes_for(elements), machine.stream.flit_bytes)


def _collected_flits(plan: ExecPlan, machine: Machine) -> int:
    packets = math.prod(c.n for c in plan.counters if c.birth != Birth.REUSE)
    return packets * _flits(plan, plan.command.stream.elements, machine)


def _contraction_cycles(plan: ExecPlan, machine: Machine) -> int:
    """Flits taken, packets multiplied, results drained: the slowest counts."""
    macs = machine.contraction.macs_per_lane[multiplied_kind(plan.stream_dtype)]
    per_packet = _ceil(plan.command.stream.elements, macs)
    products = _multiplied_packets(plan, machine) * per_packet
    return max(_collected_flits(plan, machine), products, _drained_flits(plan, machine))


def _multiplied_packets(plan: ExecPlan, machine: Machine) -> int:
    """Packets that meet register rows, re-use included.

    The stream adapter joins `pack` flits of the stream as they come: where neighbouring packets
    are of one flit, are summed, and meet neighbouring rows, two of them are multiplied at once.
    """
    c = plan.command
    assert c.contraction is not None
    streamed = [k for k in plan.counters if k.birth != Birth.REUSE]
    flits = _flits(plan, c.stream.elements, machine)
    if not streamed or c.contraction.pack == 1 or flits > 1:
        return plan.steps
    inner = streamed[-1]
    dense = c.stream.elements == c.contraction.trf_read * 8 // c.trf.dtype.bits
    if inner.fate != Fate.MSUM or inner.trf != c.contraction.trf_read or not dense:
        return plan.steps
    return plan.steps // inner.n * _ceil(inner.n, c.contraction.pack)


def multiplied_kind(dtype: DType) -> str:
    """How machine files name the type of a product's elements."""
    return "bf16" if dtype.bits == 16 else f"{'f' if dtype.is_float else 'i'}{dtype.bits}"


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
    per_flit = _ceil(machine.stream.flit_bytes * 8 // WORD_BITS, way)
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
    trimmed = min(size for size in machine.commit.valid_bytes if size >= valid)
    return max(1, trimmed // math.gcd(trimmed, _ceil(run, unit) * unit))


def _fill_cycles(plan: ExecPlan, machine: Machine) -> int:
    """The first element's way through the stages that the pass uses.

    Nobody says what a table lookup takes: it counts as the cast, in whose place it stands. Tags are
    a stage of the vector engine; its valid counts are made beside the stream.
    """
    c = plan.command
    if c.generate is not None:
        return machine.commit.fill_cycles
    cycles = machine.fetch.fill_cycles + machine.fetch.adapter_fill_cycles
    converted = (c.stream.lookup, c.stream.cast)
    cycles += machine.fetch.cast_latency_cycles * sum(dtype is not None for dtype in converted)
    cycles += machine.switch.hop_cycles + machine.switch.fill_cycles_per_hop * (c.switch.ring - 1)
    if c.switch.topology == Topology.CUSTOM:
        cycles += machine.switch.bitmap_load_cycles
    cycles += machine.stream.collect_fill_cycles
    if c.contraction is not None:
        fill = machine.contraction
        cycles += c.contraction.depth + fill.accumulator_fill_cycles + fill.folder_fill_cycles
    reducers = sum(kind != Reduce.NONE for kind in (c.vector.reduce, c.vector.slice_reduce))
    units = len(c.vector.ops) + bool(c.vector.comparators)
    cycles += machine.vector.alu_latency_cycles * (units + reducers)
    if _uses_cast_engine(plan):
        cycles += machine.vector.cast_fill_cycles
    if c.commit.sink == Sink.DM:
        cycles += machine.commit.fill_cycles
    return cycles


def _ceil(value: int, unit: int) -> int:
    return -(-value // unit)
