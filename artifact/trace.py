"""A program's timeline as a Perfetto trace: a track for each context and engine of each PE.

A command is a slice on its context's track, named by module and kind, with its place in the
block, its plan and its bound beside it; below it stand the busy times of the engines that it
uses. Arrows go from a signal's sender to the command that waits for it. All processing elements
of a program run the same code, so they have the same slices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import errors
from ..backend_rngd.isa.cost import ExecCost, dma_cost, exec_cost
from ..backend_rngd.isa.instructions import Context, Dma, Exec, Fate, Instruction
from ..backend_rngd.isa.machine import Machine
from ..backend_rngd.isa.plan import DmaPlan, ExecPlan, Plan, plan_dma, plan_exec
from ..backend_rngd.isa.program import Program
from ..runtime_sim.timeline import TimedCommand, timeline
from . import perfetto
from .perfetto import Edge, Pattern, Strings

ENGINES = (
    "fetch",
    "switch",
    "collect",
    "contraction",
    "vector",
    "inter_slice",
    "cast",
    "transpose",
    "commit",
)
"""Of a tensor unit, in the order of the pipeline; the two contexts have their own tracks."""
CALLS_RANK = 0
TRACKS_PER_PE = 64
"""Distance between the track numbers of neighbouring PEs."""


def write_trace(program: Program, machine: Machine, file: Path) -> None:
    """Write the trace of one run of `program`. Raises: ART012, VED011, SIMxxx."""
    try:
        with file.open("wb") as opened:
            opened.writelines(encode_trace(program, machine))
    except OSError as error:
        raise errors.trace_not_written(str(file), errors.in_words(error)) from error


def encode_trace(program: Program, machine: Machine) -> list[bytes]:
    """The bytes of the trace, in parts. Times are nanoseconds of the machine's clock."""
    commands = list(timeline(program, machine))
    arrows = _Arrows(commands)
    strings = Strings()
    parts: list[bytes] = []
    for pe in range(program.header.tensor_parallel_size):
        parts += _PeTracks(pe, program, machine, strings).encode(commands, arrows)
    return [strings.packet(), *parts]


class _Arrows:
    """Numbers of the arrows that leave and enter each command."""

    def __init__(self, commands: Sequence[TimedCommand]) -> None:
        self.leaving: list[tuple[int, ...]] = [()] * len(commands)
        self.arriving: list[tuple[int, ...]] = [()] * len(commands)
        count = 0
        for i, command in enumerate(commands):
            for sender in command.waits_for:
                count += 1
                self.leaving[sender] += (count,)
                self.arriving[i] += (count,)
        self.count = count


class _PeTracks:
    """Encodes the slices of one processing element."""

    def __init__(self, pe: int, program: Program, machine: Machine, strings: Strings) -> None:
        self._pe = pe
        self._program = program
        self._machine = machine
        self._strings = strings
        self._nanoseconds = 1e9 / machine.chip.clock_hertz
        self._patterns: dict[tuple[int, int, int, int], _CommandPattern] = {}
        self._names: dict[tuple[str, str], int] = {}
        self._tracks: dict[tuple[Context, str], int] = {}

    def encode(self, commands: Sequence[TimedCommand], arrows: _Arrows) -> list[bytes]:
        first_arrow = self._pe * arrows.count
        slices = []
        for i, command in enumerate(commands):
            leaving = [first_arrow + arrow for arrow in arrows.leaving[i]]
            arriving = [first_arrow + arrow for arrow in arrows.arriving[i]]
            pattern = self._pattern(command, len(leaving), len(arriving))
            name = self._name(command)
            slices.append(pattern.fill(command, name, leaving, arriving, self._nanoseconds))
        return [self._descriptors(), self._calls(commands), *slices]

    def _calls(self, commands: Sequence[TimedCommand]) -> bytes:
        """Launch, calls and finish on the first track. A call begins when the one before ends."""
        end = self._machine.control.launch_cycles
        spans = [(0, end, "launch")]
        ends: dict[int, int] = {}
        for command in commands:
            ends[command.call] = max(command.end, ends.get(command.call, 0))
        for call, last in sorted(ends.items()):
            begin, end = end, max(end, last)
            spans.append((begin, end, self._call_name(call)))
        spans.append((end, end + self._machine.control.finish_cycles, "finish"))
        return perfetto.slices(
            self._uuid(CALLS_RANK),
            ((self._time(b), self._time(e), self._strings.name(name)) for b, e, name in spans),
        )

    def _call_name(self, number: int) -> str:
        call = self._program.calls[number]
        return call.prefix or self._program.blocks[call.block].name

    def _time(self, cycles: int) -> int:
        return round(cycles * self._nanoseconds)

    def _name(self, command: TimedCommand) -> int:
        key = (command.module, command.kind)
        number = self._names.get(key)
        if number is None:
            number = self._strings.name(f"{command.module}: {command.kind}")
            self._names[key] = number
        return number

    def _pattern(self, command: TimedCommand, n_out: int, n_in: int) -> _CommandPattern:
        block = self._program.calls[command.call].block
        key = (block, command.entry, n_out, n_in)
        pattern = self._patterns.get(key)
        if pattern is None:
            pattern = self._patterns[key] = self._make_pattern(block, command, n_out, n_in)
        return pattern

    def _make_pattern(
        self, block_number: int, command: TimedCommand, n_out: int, n_in: int
    ) -> _CommandPattern:
        block = self._program.blocks[block_number]
        work = _work(self._program.commands[block.first + command.entry], self._machine)
        arguments = self._strings.arguments(
            {"block": block.name, "entry": command.entry, **work.arguments}
        )
        packets = Pattern()
        track = self._track(command.context, "")
        packets.named_event(track, 0, arguments, n_out, n_in)
        busy = sorted(work.engines.items(), key=lambda engine: ENGINES.index(engine[0]))
        for engine, _ in busy:
            name = self._strings.name(engine)
            packets.event(Edge.BEGIN, self._track(command.context, engine), 2, name)
        for i, (engine, _) in enumerate(busy):
            packets.event(Edge.END, self._track(command.context, engine), 3 + i)
        packets.event(Edge.END, track, 1)
        ends = tuple(work.base_cycles + cycles for _, cycles in busy)
        return _CommandPattern(packets, work.base_cycles, ends)

    def _track(self, context: Context, engine: str) -> int:
        key = (context, engine)
        if key not in self._tracks:
            place = 1 + ENGINES.index(engine) if engine else 0
            self._tracks[key] = self._uuid(1 + int(context) * (1 + len(ENGINES)) + place)
        return self._tracks[key]

    def _uuid(self, rank: int) -> int:
        return 1 + self._pe * TRACKS_PER_PE + 1 + rank

    def _descriptors(self) -> bytes:
        """The tracks that have slices, calls first, then each context above its engines."""
        process = self._uuid(-1)
        parts = [
            perfetto.process_track(process, f"PE {self._pe}", self._pe + 1),
            perfetto.slice_track(self._uuid(CALLS_RANK), process, "calls", CALLS_RANK),
        ]
        for (context, engine), uuid in sorted(self._tracks.items(), key=lambda item: item[1]):
            name = " ".join(part for part in (context.name.lower(), engine) if part)
            parts.append(perfetto.slice_track(uuid, process, name, uuid - self._uuid(CALLS_RANK)))
        return b"".join(parts)


@dataclass(frozen=True)
class _CommandPattern:
    """Packets of a command, and when its engines begin and end, in cycles from its start."""

    packets: Pattern
    engines_begin: int
    engines_end: Sequence[int]

    def fill(
        self,
        command: TimedCommand,
        name: int,
        leaving: Sequence[int],
        arriving: Sequence[int],
        nanoseconds: float,
    ) -> bytes:
        start, end = command.start, command.end
        cycles = (
            start,
            end,
            min(start + self.engines_begin, end),
            *(min(start + engine_end, end) for engine_end in self.engines_end),
        )
        times = [round(cycle * nanoseconds) for cycle in cycles]
        return self.packets.fill(times, name, leaving, arriving)


# --- what a command does ---


@dataclass(frozen=True)
class _Work:
    """What a trace says of a command whatever the call."""

    engines: Mapping[str, int]
    """Busy cycles by engine of the tensor unit."""
    base_cycles: int
    """Cycles before the engines begin."""
    arguments: Mapping[str, int | str]


def _work(command: Instruction, machine: Machine) -> _Work:
    if isinstance(command, Exec):
        plan = plan_exec(command, "trace")
        return _exec_work(plan, exec_cost(plan, machine))
    assert isinstance(command, Dma)
    dma_plan = plan_dma(command, "trace")
    cost = dma_cost(dma_plan, machine)
    bound = {cost.startup_cycles: "startup", cost.read_cycles: "read", cost.write_cycles: "write"}
    arguments: dict[str, int | str] = {
        "plan": summary(dma_plan),
        "bytes": dma_plan.bytes,
        "bound": bound[max(bound)],
        "cycles": cost.total_cycles,
    }
    return _Work({}, cost.startup_cycles, arguments)


def _exec_work(plan: ExecPlan, cost: ExecCost) -> _Work:
    busiest = max(cost.engines, key=lambda engine: cost.engines[engine])
    latency = cost.base_cycles + cost.latency_cycles
    arguments: dict[str, int | str] = {
        "plan": summary(plan),
        "bytes": _fetched_bytes(plan),
        "bound": busiest if cost.engines[busiest] > latency else "latency",
        "cycles": cost.total_cycles,
    }
    return _Work(cost.engines, cost.base_cycles, arguments)


def _fetched_bytes(plan: ExecPlan) -> int:
    ports = (plan.command.a, plan.command.b) if plan.command.stream.pair else (plan.command.a,)
    packets = plan.slices * plan.fetched_steps
    return sum(packets * port.dtype.bytes_for(plan.command.stream.valid) for port in ports)


def summary(plan: Plan) -> str:
    """A plan in a line: what moves or is computed, in which loops."""
    return _dma_summary(plan) if isinstance(plan, DmaPlan) else _exec_summary(plan)


def _dma_summary(plan: DmaPlan) -> str:
    c = plan.command
    ways = f"{c.source.space.name} to {c.destination.space.name}"
    rows = "" if c.index is None else f", {c.indirect.name.lower()} rows by index"
    return f"{ways}, {plan.runs} runs of {c.run} B{rows}"


def _exec_summary(plan: ExecPlan) -> str:
    c = plan.command
    loops = " x ".join(f"{k.n} {_LOOPS[k.fate]}" for k in plan.counters) or "1"
    parts = [f"{plan.slices} slices", f"loops {loops}", f"packets of {c.stream.elements}"]
    if c.switch.ring > 1:
        parts.append(f"{c.switch.topology.name.lower()} over {c.switch.ring} slices")
    if c.contraction is not None:
        parts.append(f"contraction on {c.contraction.lanes} lanes")
    parts += [op.op.name.lower() for op in c.vector.ops]
    return ", ".join([*parts, f"to {c.commit.sink.name}"])


_LOOPS = {Fate.OUT: "out", Fate.MSUM: "sum", Fate.VSUM: "vector sum"}
