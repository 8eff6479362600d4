"""How many cycles a program takes, and which module they belong to; values play no part.

Three queues run side by side: main, sub, DMA (`clock.py`). Calls are fenced like the iterations of
a repeat: all before them has finished. Each cycle belongs to the oldest unfinished command, so the
rows of the modules add up to the total. Every time has an interval (`spread.py`).

Costs are computed once per distinct plan, blocks once however many calls share them, and a
repeat's body once, since its fenced iterations are alike.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from .. import errors
from ..backend_rngd.isa.cost import DmaCost, multiplied_kind
from ..backend_rngd.isa.instructions import Control, Exec
from ..backend_rngd.isa.machine import Machine
from ..backend_rngd.isa.program import Block, Program
from .blocks import Costs, exchange_of, issues, row_name, run_clock
from .clock import MESSAGE, PEER_SIGNAL, Exchange, Link
from .spread import Spread, number_spread

LAUNCH_ROW = "<launch>"
FINISH_ROW = "<finish>"
MAX_CYCLES = 1 << 42
"""An hour at 1 GHz: no bucket comes near it, a damaged one may."""
Bound = Literal["HBM", "MAC", "vector", "DMA issue", "exchange", "latency"]
TIME_FACTOR = "model.time_factor"
"""What times may be off by as a whole."""
BUSY_SHARE = 0.5
"""Below this share of the cycles no engine is what a module waits for."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Cycles of something that ran, with their interval, and what they went by with."""

    cycles: int
    time_us: float
    hbm_bytes: int
    """Bytes that DMA commands read from and write to HBM."""
    macs: int
    """Useful multiply-accumulates."""
    engines: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    """Busy cycles per engine of the tensor unit and of the DMA engine, hidden ones included.

    `exchange` is not an engine but the time for which messages to other ranks are on their way.
    """
    roofline_cycles: int = 0
    """The least that its HBM traffic and its multiplications need."""
    bound: Bound = "latency"
    spread: Spread = field(default_factory=Spread)
    exchange_cycles: int = 0
    """Cycles of those that nothing hides: messages and signals of other ranks are waited for."""

    @property
    def low_cycles(self) -> int:
        return max(0, round(self.cycles - self.spread.down))

    @property
    def high_cycles(self) -> int:
        return round(self.cycles + self.spread.up)

    @property
    def dominant(self) -> str | None:
        """The machine's number whose range matters most to the interval."""
        return self.spread.dominant


@dataclass(frozen=True, kw_only=True)
class ModuleTiming(Timing):
    """What one module of one layer takes. Cycles are those during which it is the oldest."""

    path: str


@dataclass(frozen=True, kw_only=True)
class ProgramTiming(Timing):
    """One run of a bucket's program."""

    bucket: str
    hbm_utilization: float
    """Share of the bytes that the program's DMA engines could have moved."""
    mac_utilization: float
    """Share of the multiplications that the program's PEs could have made, in its type."""
    modules: tuple[ModuleTiming, ...]
    contexts: Mapping[str, int]
    """Busy cycles of main, sub and dma."""
    low_us: float = 0.0
    """Time at the low end of the interval, the clock's range included."""
    high_us: float = 0.0
    dominant_us: str | None = None
    """The machine's number whose range matters most to the time's interval."""
    hbm_capacity_utilization: float = 0.0
    """Share of a PE's part of HBM that the program's regions take, KV caches left out."""


def time_program(
    program: Program,
    machine: Machine,
    *,
    sharers: int = 1,
    max_cycles: int = MAX_CYCLES,
    calls: range | None = None,
) -> ProgramTiming:
    """Time one run of `program` while `sharers` PEs, this one included, load from HBM.

    All ranks are alike, so this is the time of one; bytes and shares are a rank's, too. Ranks load
    at the same time, so there are never fewer sharers than ranks. `calls` are those of a pipeline
    stage, else all.

    Raises: VED011, SIM001 to SIM003, SIM005, SIM006, SIM027 (more than `max_cycles`).
    """
    sharers = max(sharers, program.header.tensor_parallel_size)
    costs = Costs(program, machine, sharers)
    own_calls = program.calls if calls is None else program.calls[calls.start : calls.stop]
    blocks = {
        number: _time_block(program, program.blocks[number], costs)
        for number in sorted({call.block for call in own_calls})
    }
    control = machine.control
    launch = number_spread(machine, "control.launch_cycles")
    rows: dict[str, _Row] = {LAUNCH_ROW: _Row(control.launch_cycles, spread=launch)}
    contexts: Counter[str] = Counter()
    for call in own_calls:
        timing = blocks[call.block]
        contexts.update(timing.contexts)
        entries = program.blocks[call.block].provenance
        for entry, row in zip(entries, timing.rows, strict=True):
            rows.setdefault(row_name(program, call, entry), _Row()).add(row, entry.macs)
    finish = number_spread(machine, "control.finish_cycles")
    rows[FINISH_ROW] = _Row(control.finish_cycles, spread=finish)
    total = _Row()
    for row in rows.values():
        total.add(row, row.macs)
    if total.cycles > max_cycles:
        raise errors.too_many_cycles(program.bucket, total.cycles, max_cycles)
    limits = _Limits.of(program, machine, sharers)
    low_us, high_us, dominant_us = interval_us(total.cycles, total.spread, machine)
    return ProgramTiming(
        bucket=program.bucket,
        cycles=total.cycles,
        time_us=machine.microseconds(total.cycles),
        hbm_bytes=total.hbm_bytes,
        macs=total.macs,
        hbm_utilization=total.hbm_bytes / (total.cycles * limits.bytes_per_cycle),
        mac_utilization=total.macs / (total.cycles * limits.macs_per_cycle),
        modules=tuple(limits.module(path, row, machine) for path, row in rows.items()),
        engines=MappingProxyType(dict(total.engines)),
        contexts=MappingProxyType(dict(contexts)),
        exchange_cycles=total.exchange_cycles,
        roofline_cycles=limits.roofline(total),
        bound=limits.bound(total),
        spread=total.spread,
        low_us=low_us,
        high_us=high_us,
        dominant_us=dominant_us,
        hbm_capacity_utilization=_resident_bytes(program, calls)
        * sharers
        / machine.hbm.capacity_bytes,
    )


def _resident_bytes(program: Program, calls: range | None) -> int:
    """Bytes of all regions, or of those that a stage's calls use; KV caches left out."""
    regions = set(range(len(program.regions)))
    if calls is not None:
        stage = program.calls[calls.start : calls.stop]
        regions = {binding.region for call in stage for binding in call.bindings}
    return sum(program.regions[i].bytes_for(slots=0) for i in regions)


@dataclass
class _Row:
    """A sum over commands or calls."""

    cycles: int = 0
    hbm_bytes: int = 0
    macs: int = 0
    engines: Counter[str] = field(default_factory=Counter)
    exchange_cycles: int = 0
    spread: Spread = field(default_factory=Spread)

    def add(self, other: _Row, macs: int) -> None:
        self.cycles += other.cycles
        self.hbm_bytes += other.hbm_bytes
        self.macs += macs
        self.engines.update(other.engines)
        self.exchange_cycles += other.exchange_cycles
        self.spread += other.spread


@dataclass(frozen=True)
class _Limits:
    """What the PE of a rank could do at best."""

    bytes_per_cycle: float
    macs_per_cycle: int

    @staticmethod
    def of(program: Program, machine: Machine, sharers: int) -> _Limits:
        """For the narrowest element type that the program multiplies."""
        kinds = {
            multiplied_kind(command.stream_dtype)
            for command in program.commands
            if isinstance(command, Exec) and command.contraction is not None
        }
        kind = max(kinds, key=machine.macs_per_cycle, default="bf16")
        load = min(machine.dma.bytes_per_cycle, machine.hbm_bytes_per_cycle / sharers)
        return _Limits(load, machine.macs_per_cycle(kind))

    def roofline(self, row: _Row) -> int:
        return round(max(row.hbm_bytes / self.bytes_per_cycle, row.macs / self.macs_per_cycle))

    def bound(self, row: _Row) -> Bound:
        """What is busy most; latency when nothing is for half of the time."""
        hbm = row.hbm_bytes / self.bytes_per_cycle
        busy: dict[Bound, float] = {
            "HBM": hbm,
            "MAC": row.engines["contraction"],
            "vector": max(row.engines["vector"], row.engines["cast"]),
            "DMA issue": row.engines["dma"] - hbm,
            "exchange": row.engines["exchange"],
        }
        busiest = max(busy, key=lambda name: busy[name])
        return busiest if busy[busiest] > BUSY_SHARE * row.cycles else "latency"

    def module(self, path: str, row: _Row, machine: Machine) -> ModuleTiming:
        return ModuleTiming(
            path=path,
            cycles=row.cycles,
            time_us=machine.microseconds(row.cycles),
            hbm_bytes=row.hbm_bytes,
            macs=row.macs,
            engines=MappingProxyType(dict(row.engines)),
            exchange_cycles=row.exchange_cycles,
            roofline_cycles=self.roofline(row),
            bound=self.bound(row),
            spread=row.spread,
        )


def interval_us(cycles: int, own: Spread, machine: Machine) -> tuple[float, float, str | None]:
    """The interval of so many cycles' time, and what dominates it: their own, the clock, the model.

    Another clock changes the time of a cycle, and the cycles in which HBM answers.
    """
    clock = machine.parameters["chip.clock_hertz"]
    assert clock.low is not None
    assert clock.high is not None
    at_clock = own.changes.get("chip.clock_hertz", (0.0, 0.0))
    own_factor = machine.model.time_factor
    time = machine.microseconds(cycles)
    changes = {
        name: (machine.microseconds(low), machine.microseconds(high))
        for name, (low, high) in own.changes.items()
    }
    changes["chip.clock_hertz"] = (
        (cycles + at_clock[0]) / clock.low * 1e6 * own_factor - time,
        (cycles + at_clock[1]) / clock.high * 1e6 * own_factor - time,
    )
    factor = machine.parameters[TIME_FACTOR]
    assert factor.low is not None
    assert factor.high is not None
    changes[TIME_FACTOR] = (
        time * factor.low / own_factor - time,
        time * factor.high / own_factor - time,
    )
    spread = Spread(changes)
    return max(0.0, time - spread.down), time + spread.up, spread.dominant


# --- one block ---


@dataclass(frozen=True)
class _BlockTiming:
    """One run of a block; `rows` are parallel to its provenance entries."""

    rows: tuple[_Row, ...]
    contexts: Mapping[str, int]


def _time_block(program: Program, block: Block, costs: Costs) -> _BlockTiming:
    commands = program.block_commands(block)
    rows = tuple(_Row() for _ in block.provenance)
    contexts: Counter[str] = Counter()
    clock = run_clock(program, block, costs)
    for entry, (command, count) in enumerate(
        zip(commands, issues(commands, block.name), strict=True)
    ):
        if isinstance(command, Control):
            continue
        cost = costs.of(command, f"{block.name}[{entry}]")
        row = rows[command.head.provenance]
        contexts[command.head.context.name.lower()] += count * cost.total_cycles
        if isinstance(cost, DmaCost):
            row.hbm_bytes += count * (cost.hbm_bytes_read + cost.hbm_bytes_written)
            row.engines["dma"] += count * cost.total_cycles
            if exchange_of(command) != Exchange.NONE:
                row.engines["exchange"] += count * costs.latencies.messages
        else:
            for engine, cycles in cost.engines.items():
                row.engines[engine] += count * cycles
    for number, (row, cycles) in enumerate(zip(rows, clock.attributed, strict=True)):
        row.cycles = cycles
        row.exchange_cycles = (
            clock.path[number, MESSAGE] * costs.latencies.messages
            + clock.path[number, PEER_SIGNAL] * costs.latencies.peer_signal
        )
        row.spread = _path_spread(clock.path, number, costs)
    return _BlockTiming(rows, contexts)


def _path_spread(path: Mapping[Link, int], row: int, costs: Costs) -> Spread:
    """The spread of what stands on the critical path for one row."""
    total = Spread()
    for (owner, number), count in path.items():
        if owner == row:
            total += costs.spread(number) * count
    return total
