"""How many cycles a program takes, and which module they belong to; values play no part.

Three queues run side by side: main, sub, DMA. A command starts when the one before it in its
queue has finished and its waits are satisfied; signals meet waits in program order. Commands that
share a unit take turns in program order: main and sub the vector engine; while a custom bitmap for
the switch is loaded, neither sub nor DMA commands run. Iterations of a repeat and calls are fenced:
all before them has finished. Each cycle belongs to the oldest unfinished command, so the rows of
the modules add up to the total.

Costs are computed once per distinct plan, blocks once however many calls share them, and a
repeat's body once, since its fenced iterations are alike.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from .. import errors
from ..backend_rngd.isa.container import Block, Call, Program, Provenance
from ..backend_rngd.isa.cost import DmaCost, ExecCost, dma_cost, exec_cost
from ..backend_rngd.isa.expand import MAX_ISSUED, MAX_NESTING
from ..backend_rngd.isa.instructions import Context, Control, Dma, Exec, Instruction
from ..backend_rngd.isa.machine import Machine
from ..backend_rngd.isa.plan import plan_dma, plan_exec

LAUNCH_ROW = "<launch>"
FINISH_ROW = "<finish>"
UNNAMED_ROW = "<unnamed>"
"""The row of commands whose call and provenance name no module."""


@dataclass(frozen=True)
class ModuleTiming:
    """What one module of one layer takes. Cycles are those during which it is the oldest."""

    path: str
    cycles: int
    time_us: float
    hbm_bytes: int
    macs: int


@dataclass(frozen=True)
class ProgramTiming:
    """One run of a bucket's program."""

    bucket: str
    cycles: int
    time_us: float
    hbm_bytes: int
    """Bytes that DMA commands read from and write to HBM."""
    macs: int
    """Useful multiply-accumulates."""
    hbm_utilization: float
    """Share of the bytes that the program's DMA engines could have moved."""
    mac_utilization: float
    """Share of the multiplications that the program's PEs could have made, in its type."""
    modules: tuple[ModuleTiming, ...]
    engines: Mapping[str, int]
    """Busy cycles per engine of the tensor unit, and of the DMA engine."""
    contexts: Mapping[str, int]
    """Busy cycles of main, sub and dma."""


def time_program(program: Program, machine: Machine) -> ProgramTiming:
    """Time one run of `program`. Raises: VED011, SIM001 to SIM003, SIM005, SIM006."""
    costs = _Costs(machine)
    blocks = [_time_block(program, block, costs) for block in program.blocks]
    rows: dict[str, _Row] = {LAUNCH_ROW: _Row(machine.control.launch_cycles)}
    engines: Counter[str] = Counter()
    contexts: Counter[str] = Counter()
    for call in program.calls:
        timing = blocks[call.block]
        engines.update(timing.engines)
        contexts.update(timing.contexts)
        entries = program.blocks[call.block].provenance
        for entry, row in zip(entries, timing.rows, strict=True):
            rows.setdefault(_row_name(call, entry), _Row()).add(row, entry.macs)
    rows[FINISH_ROW] = _Row(machine.control.finish_cycles)
    total = _Row()
    for row in rows.values():
        total.add(row, row.macs)
    return ProgramTiming(
        bucket=program.bucket,
        cycles=total.cycles,
        time_us=machine.microseconds(total.cycles),
        hbm_bytes=total.hbm_bytes,
        macs=total.macs,
        hbm_utilization=total.hbm_bytes / (total.cycles * _peak_bytes_per_cycle(program, machine)),
        mac_utilization=total.macs / (total.cycles * _peak_macs_per_cycle(program, machine)),
        modules=tuple(
            ModuleTiming(path, r.cycles, machine.microseconds(r.cycles), r.hbm_bytes, r.macs)
            for path, r in rows.items()
        ),
        engines=MappingProxyType(dict(engines)),
        contexts=MappingProxyType(dict(contexts)),
    )


@dataclass(frozen=True, slots=True)
class TimedCommand:
    """One command at one time. Cycles count from the program's launch."""

    call: int
    entry: int
    """Its place in the block's issue list; repeats issue an entry more than once."""
    context: Context
    start: int
    end: int
    module: str
    kind: str
    """`contraction`, `vector` (passes with vector work alone), `move` or `dma`."""
    waits_for: tuple[int, ...]
    """Places in the timeline of the commands whose signals it takes."""


def timeline(program: Program, machine: Machine) -> Iterator[TimedCommand]:
    """Every command of one run in program order, repeats unrolled.

    It begins after the launch; what `time_program` counts as finish follows its last command.
    Raises: as `time_program`.
    """
    costs = _Costs(machine)
    recorded: dict[int, _Recording] = {}
    start, first = machine.control.launch_cycles, 0
    for number, call in enumerate(program.calls):
        block = program.blocks[call.block]
        if call.block not in recorded:
            recorded[call.block] = _record_block(program, block, costs)
        recording = recorded[call.block]
        modules = [_row_name(call, entry) for entry in block.provenance]
        for command in recording.commands:
            yield TimedCommand(
                call=number,
                entry=command.entry,
                context=command.context,
                start=start + command.start,
                end=start + command.end,
                module=modules[command.provenance],
                kind=command.kind,
                waits_for=tuple(first + sender for sender in command.waits_for),
            )
        start += recording.cycles
        first += len(recording.commands)


def _row_name(call: Call, entry: Provenance) -> str:
    return ".".join(part for part in (call.prefix, entry.path) if part) or UNNAMED_ROW


def _peak_bytes_per_cycle(program: Program, machine: Machine) -> float:
    return min(program.header.pes * machine.dma.bytes_per_cycle, machine.hbm_bytes_per_cycle)


def _peak_macs_per_cycle(program: Program, machine: Machine) -> int:
    """For the narrowest element type that the program multiplies."""
    names = {4: "i4", 8: "f8", 16: "bf16"}
    widths = {
        (command.stream.cast or command.a.dtype).bits
        for command in program.commands
        if isinstance(command, Exec) and command.contraction is not None
    }
    per_lane = machine.contraction.macs_per_lane[names[min(widths, default=16)]]
    return program.header.pes * machine.chip.slices_per_pe * machine.chip.lanes_per_slice * per_lane


# --- one block ---


@dataclass
class _Row:
    """A sum over commands or calls."""

    cycles: int = 0
    hbm_bytes: int = 0
    macs: int = 0

    def add(self, other: _Row, macs: int) -> None:
        self.cycles += other.cycles
        self.hbm_bytes += other.hbm_bytes
        self.macs += macs


@dataclass(frozen=True)
class _BlockTiming:
    """One run of a block; `rows` are parallel to its provenance entries."""

    rows: tuple[_Row, ...]
    engines: Mapping[str, int]
    contexts: Mapping[str, int]


@dataclass(frozen=True)
class _Command:
    """What the clock needs to know of an entry of the issue list."""

    entry: int
    context: int
    cycles: int
    vector_unit: bool
    blocking_cycles: int
    waits: tuple[tuple[int, int], ...]
    signals: tuple[int, ...]
    provenance: int
    kind: str


@dataclass(frozen=True)
class _Repeat:
    count: int
    body: _Nodes


_Nodes = tuple[_Command | _Repeat, ...]


class _Costs:
    """Costs of commands on a machine; equal commands of a program are one object."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._known: dict[int, ExecCost | DmaCost] = {}

    def of(self, command: Exec | Dma, where: str) -> ExecCost | DmaCost:
        cost = self._known.get(id(command))
        if cost is None:
            if isinstance(command, Exec):
                cost = exec_cost(plan_exec(command, where), self._machine)
            else:
                cost = dma_cost(plan_dma(command, where), self._machine)
            self._known[id(command)] = cost
        return cost


def _time_block(program: Program, block: Block, costs: _Costs) -> _BlockTiming:
    commands = program.block_commands(block)
    issues = _issues(commands, block.name)
    rows = tuple(_Row() for _ in block.provenance)
    engines: Counter[str] = Counter()
    contexts: Counter[str] = Counter()
    for entry, (command, count) in enumerate(zip(commands, issues, strict=True)):
        if isinstance(command, Control):
            continue
        cost = costs.of(command, f"{block.name}[{entry}]")
        contexts[command.head.context.name.lower()] += count * cost.total_cycles
        if isinstance(cost, DmaCost):
            moved = cost.hbm_bytes_read + cost.hbm_bytes_written
            rows[command.head.provenance].hbm_bytes += count * moved
            engines["dma"] += count * cost.total_cycles
        else:
            for engine, cycles in cost.engines.items():
                engines[engine] += count * cycles
    clock = _Clock(block.name, len(rows))
    clock.run(tuple(_nodes(commands, 0, len(commands), block.name, costs)))
    clock.fence()
    for row, cycles in zip(rows, clock.attributed, strict=True):
        row.cycles = cycles
    return _BlockTiming(rows, engines, contexts)


def _issues(commands: Sequence[Instruction], name: str) -> list[int]:
    """How often each entry is issued. Raises: SIM001, SIM002, SIM003."""
    counts: list[int] = []
    open_repeats: list[tuple[int, int]] = []  # (end of the body, iterations so far)
    for i, command in enumerate(commands):
        while open_repeats and open_repeats[-1][0] == i:
            open_repeats.pop()
        count = open_repeats[-1][1] if open_repeats else 1
        counts.append(count)
        if isinstance(command, Control):
            end = open_repeats[-1][0] if open_repeats else len(commands)
            if i + 1 + command.length > end:
                raise errors.repeat_leaves_block(f"{name}[{i}]", command.length, end - i - 1)
            if len(open_repeats) == MAX_NESTING:
                raise errors.repeats_too_deep(f"{name}[{i}]", MAX_NESTING)
            open_repeats.append((i + 1 + command.length, count * command.count))
    total = sum(
        n for n, command in zip(counts, commands, strict=True) if not isinstance(command, Control)
    )
    if total > MAX_ISSUED:
        raise errors.too_many_commands(name, total, MAX_ISSUED)
    return counts


def _nodes(
    commands: Sequence[Instruction], first: int, end: int, name: str, costs: _Costs
) -> Iterator[_Command | _Repeat]:
    """The entries [first, end) as a tree; `_issues` has checked that repeats nest."""
    i = first
    while i < end:
        command = commands[i]
        i += 1
        if isinstance(command, Control):
            body = tuple(_nodes(commands, i, i + command.length, name, costs))
            i += command.length
            yield _Repeat(command.count, body)
            continue
        head = command.head
        cost = costs.of(command, f"{name}[{i - 1}]")
        yield _Command(
            entry=i - 1,
            context=int(head.context),
            cycles=cost.total_cycles,
            vector_unit=isinstance(cost, ExecCost) and cost.vector_unit,
            blocking_cycles=cost.blocking_cycles if isinstance(cost, ExecCost) else 0,
            waits=tuple((wait.semaphore, wait.count) for wait in head.waits),
            signals=head.signals,
            provenance=head.provenance,
            kind=_kind(command),
        )


def _kind(command: Exec | Dma) -> str:
    if isinstance(command, Dma):
        return "dma"
    if command.contraction is not None:
        return "contraction"
    return "vector" if command.vector.used else "move"


@dataclass(frozen=True, slots=True)
class _Recorded:
    """A command's time from the block's start; `waits_for` are places in the recording."""

    entry: int
    context: Context
    start: int
    end: int
    provenance: int
    kind: str
    waits_for: tuple[int, ...]


@dataclass(frozen=True)
class _Recording:
    """One run of a block, command by command."""

    commands: tuple[_Recorded, ...]
    cycles: int


def _record_block(program: Program, block: Block, costs: _Costs) -> _Recording:
    commands = program.block_commands(block)
    _issues(commands, block.name)  # damaged code ends here, before it is unrolled
    clock = _Clock(block.name, len(block.provenance), record=True)
    clock.run(tuple(_nodes(commands, 0, len(commands), block.name, costs)))
    clock.fence()
    return _Recording(tuple(clock.recorded), sum(clock.attributed))


class _Clock:
    """The queues' state while a block's commands go by in program order.

    A cycle belongs to the oldest unfinished command, so a command gets the cycles by which it
    moves the latest finish of all commands up to it. With `record` each command is kept, and
    repeats run as often as they say.
    """

    def __init__(self, name: str, n_rows: int, record: bool = False) -> None:
        self.attributed = [0] * n_rows
        self.recorded: list[_Recorded] = []
        self._record = record
        self._name = name
        self._free = [0] * len(Context)
        """When each queue's last command has finished."""
        self._vector_free = 0
        """When the last command with the vector engine has finished."""
        self._signals: dict[int, deque[tuple[int, int]]] = {}
        """When each signal that nobody has taken yet was sent, and by which recorded command."""
        self._end = 0

    def run(self, nodes: _Nodes) -> None:
        for node in nodes:
            if isinstance(node, _Repeat):
                self._run_repeat(node)
            else:
                self._run_command(node)

    def fence(self) -> None:
        """Let every queue finish. Raises: SIM005 when a signal has not been taken."""
        for semaphore, sent in self._signals.items():
            if sent:
                raise errors.semaphore_unbalanced(self._name, semaphore, len(sent), 0)
        self._free = [self._end] * len(Context)

    def _run_command(self, command: _Command) -> None:
        start = self._free[command.context]
        waits_for: tuple[int, ...] = ()
        for semaphore, count in command.waits:
            sent = self._signals.get(semaphore, ())
            if len(sent) < count:
                waiting = f"entry {command.entry}"
                raise errors.deadlock(self._name, waiting, semaphore, count, len(sent))
            for _ in range(count):
                sent_at, sender = self._signals[semaphore].popleft()
                start = max(start, sent_at)
                waits_for += (sender,)
        if command.vector_unit:
            start = max(start, self._vector_free)
            self._vector_free = start + command.cycles
        if command.blocking_cycles:
            start = max(start, *self._free)
            self._free = [start + command.blocking_cycles] * len(Context)
        finish = start + command.cycles
        self._free[command.context] = finish
        for semaphore in command.signals:
            self._signals.setdefault(semaphore, deque()).append((finish, len(self.recorded)))
        if self._record:
            self.recorded.append(_record(command, start, finish, waits_for))
        if finish > self._end:
            self.attributed[command.provenance] += finish - self._end
            self._end = finish

    def _run_repeat(self, repeat: _Repeat) -> None:
        """Simulate one iteration; fences make the others its copies."""
        if self._record:
            for _ in range(repeat.count):
                self.fence()
                self.run(repeat.body)
            self.fence()
            return
        self.fence()
        start, before = self._end, list(self.attributed)
        self.run(repeat.body)
        self._end += (repeat.count - 1) * (self._end - start)
        self.fence()
        for row, earlier in enumerate(before):
            self.attributed[row] += (repeat.count - 1) * (self.attributed[row] - earlier)


def _record(command: _Command, start: int, end: int, waits_for: tuple[int, ...]) -> _Recorded:
    return _Recorded(
        entry=command.entry,
        context=Context(command.context),
        start=start,
        end=end,
        provenance=command.provenance,
        kind=command.kind,
        waits_for=waits_for,
    )
