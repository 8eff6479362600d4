"""Which commands may run at the same time, and whether any of them touch the same bytes.

The machine runs three contexts side by side. A command starts when the one before it in its
context has finished and its waits are over; when it has finished it signals. A semaphore has one
signalling and one waiting context, so signal number n ends the wait that takes number n: the
order that follows is known before anything runs. Calls do not overlap: a block starts when the
block before it has finished. The iterations of a repeat do not overlap either. At each of these
fences every semaphore is at zero.

Two commands conflict if both touch a byte and one writes it. Footprints are hulls, so commands
whose strides interleave count as conflicting. Conflicts without an order are faults.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ... import errors
from .container import Call, Program
from .expand import Issued, expand_call, module_path
from .instructions import REGISTERS, SEMAPHORES, Context, Dma, Sink
from .plan import (
    REGION_SHIFT,
    SLICE_ADDRESS_BYTES,
    DmaPlan,
    ExecPlan,
    Footprint,
    Memory,
    half_spans,
)
from .rules import TRF_HALF_BYTES

CONTEXTS = len(Context)
NEVER = -1
"""Position of a command that does not exist."""


class Access(NamedTuple):
    """Bytes [low, high) of slices [slice_low, slice_high) that a command reads or writes.

    In HBM the bytes are a region's; in the TRF they are the file's, with half and lane in them.
    """

    memory: Memory
    region: int
    low: int
    high: int
    slice_low: int
    slice_high: int
    write: bool


UNBOUND = (0,) * REGISTERS


def accesses(issued: Issued, registers: Sequence[int] = UNBOUND) -> tuple[Access, ...]:
    """The bytes that a command may touch when a call starts with these register values."""
    found: list[Access] = []
    for address, footprint in zip(issued.addresses, issued.plan.footprints, strict=True):
        base = address.resolve(registers)
        if footprint.memory == Memory.HBM:
            found.append(_in_hbm(base, footprint))
        elif footprint.memory == Memory.TRF:
            assert isinstance(issued.plan, ExecPlan)
            found.extend(_in_trf(base, footprint, issued.plan))
        else:
            shift = 0
            if isinstance(issued.plan, DmaPlan):
                shift, base = divmod(base, SLICE_ADDRESS_BYTES)
            found.append(_on_chip(base, footprint, shift))
    return tuple(found)


def _on_chip(base: int, f: Footprint, shift: int) -> Access:
    slices = (f.slice_low + shift, f.slice_high + shift)
    return Access(f.memory, 0, base + f.low, base + f.high, *slices, f.write)


def _in_hbm(base: int, f: Footprint) -> Access:
    region, offset = base >> REGION_SHIFT, base & ((1 << REGION_SHIFT) - 1)
    if f.whole_region:
        return Access(f.memory, region, 0, 1 << REGION_SHIFT, 0, 1, f.write)
    return Access(f.memory, region, offset + f.low, offset + f.high, 0, 1, f.write)


def _in_trf(base: int, f: Footprint, plan: ExecPlan) -> Iterator[Access]:
    c = plan.command
    lanes = c.file_lanes
    if c.contraction is not None:
        used = range(c.commit.lanes)
    else:
        steps = [k.lanes * (k.n - 1) for k in c.counters]
        used = range(sum(min(0, v) for v in steps), sum(max(0, v) for v in steps) + 1)
    size = TRF_HALF_BYTES // lanes
    for half, low, high in half_spans(lanes, base + f.low, base + f.high):
        first = half * TRF_HALF_BYTES
        # Lanes that are used from end to end are one piece.
        whole = high - low == size and bool(used)
        pieces = [range(used.start, used.stop)] if whole else [range(k, k + 1) for k in used]
        for lane in pieces:
            start, end = first + lane.start * size + low, first + (lane.stop - 1) * size + high
            yield Access(f.memory, 0, start, end, f.slice_low, f.slice_high, f.write)


def conflicts(first: Iterable[Access], second: Iterable[Access]) -> bool:
    """Whether two commands must not run at the same time."""
    return _first_conflict(first, second) is not None


def _first_conflict(
    first: Iterable[Access], second: Iterable[Access]
) -> tuple[Access, Access] | None:
    others = tuple(second)
    for a in first:
        for b in others:
            if (
                (a.write or b.write)
                and a.memory == b.memory
                and a.region == b.region
                and a.low < b.high
                and b.low < a.high
                and a.slice_low < b.slice_high
                and b.slice_low < a.slice_high
            ):
                return a, b
    return None


def dependencies(
    issued: Sequence[Issued], registers: Sequence[int] = UNBOUND
) -> list[tuple[int, ...]]:
    """For each command, what it must not overtake or overlap in each context.

    Element i has one entry per context: the index of the latest command before `issued[i]` in
    that context that conflicts with it, or -1; its own context's entry is -1, because order in a
    context comes for free. Waiting for that command is enough: those before it finish first.
    """
    touched = [accesses(command, registers) for command in issued]
    found = np.full((len(issued), CONTEXTS), NEVER, np.int64)
    for cells in _shared_memories(issued, touched):
        cells.scan(found)
    rows: list[tuple[int, ...]] = []
    for command, row in zip(issued, found.tolist(), strict=True):
        row[command.context] = NEVER
        rows.append(tuple(row))
    return rows


class _Cells:
    """One memory cut at every boundary of its accesses; who touched each cell last.

    Cells are few (commands of a block use the same buffers), so an access is a few numpy
    operations, however large the memory is.
    """

    def __init__(self) -> None:
        self._accesses: list[tuple[int, Context, Access]] = []

    def add(self, index: int, context: Context, access: Access) -> None:
        self._accesses.append((index, context, access))

    @property
    def shared(self) -> bool:
        """Whether two contexts use it, and one of them writes."""
        contexts = {context for _, context, _ in self._accesses}
        return len(contexts) > 1 and any(access.write for _, _, access in self._accesses)

    def scan(self, found: np.ndarray) -> None:
        """Raise found[i, context] to the latest conflicting command before i. Shapes: [n, 3]."""
        rows = _ranks(v for _, _, a in self._accesses for v in (a.slice_low, a.slice_high))
        columns = _ranks(v for _, _, a in self._accesses for v in (a.low, a.high))
        # [read or write, context, slices, bytes]: index of the last command.
        last = np.full((2, CONTEXTS, len(rows), len(columns)), NEVER, np.int32)
        pending: list[tuple[np.ndarray, int]] = []
        current = NEVER
        for index, context, a in self._accesses:
            if index != current:
                # A command does not conflict with itself: its marks come after its questions.
                for cells, owner in pending:
                    cells[...] = owner
                pending, current = [], index
            box = (
                slice(rows[a.slice_low], rows[a.slice_high]),
                slice(columns[a.low], columns[a.high]),
            )
            before = last[(slice(None) if a.write else slice(1, 2), slice(None), *box)]
            latest = before.max(axis=(0, 2, 3), initial=NEVER)
            np.maximum(found[index], latest, out=found[index])
            pending.append((last[(int(a.write), int(context), *box)], index))


def _ranks(values: Iterable[int]) -> dict[int, int]:
    return {value: rank for rank, value in enumerate(sorted(set(values)))}


def _shared_memories(
    issued: Sequence[Issued], touched: Sequence[tuple[Access, ...]]
) -> Iterator[_Cells]:
    memories: dict[tuple[Memory, int], _Cells] = {}
    for index, (command, found) in enumerate(zip(issued, touched, strict=True)):
        for access in found:
            cells = memories.setdefault((access.memory, access.region), _Cells())
            cells.add(index, command.context, access)
    return (cells for cells in memories.values() if cells.shared)


# --- the check ---


def check_order(program: Program) -> None:
    """Check every block in every way that the program's calls bind it.

    Raises: SIM001 to SIM003, VED011 (expansion), SIM004 to SIM006 (semaphores), SIM007.
    """
    checked: set[tuple[int, tuple[tuple[int, int, int], ...]]] = set()
    for call in program.calls:
        pattern = (call.block, _binding_pattern(call))
        if pattern not in checked:
            checked.add(pattern)
            check_call_order(program, call)


def _binding_pattern(call: Call) -> tuple[tuple[int, int, int], ...]:
    """(register, region, offset) with regions numbered by appearance: layers look the same."""
    names: dict[int, int] = {}
    return tuple(
        (b.register_number, names.setdefault(b.region, len(names)), b.offset)
        for b in sorted(call.bindings, key=lambda b: b.register_number)
    )


def check_call_order(program: Program, call: Call) -> None:
    """Raises: as `check_order`, naming commands by entry and by module."""
    expanded = expand_call(program, call)
    block = program.blocks[call.block].name

    def name(command: Issued) -> str:
        return f"{block}[{command.entry}] {summary(command)}"

    def module(command: Issued) -> str:
        return module_path(program, call, command.command) or block

    issued = expanded.issued
    clocks, imbalance = _clocks(issued, block)
    position = _positions(issued)
    for i, latest in enumerate(dependencies(issued, expanded.registers)):
        for context, j in enumerate(latest):
            if j == NEVER or position[j] < clocks[i][context]:
                continue
            pair = _first_conflict(
                accesses(issued[j], expanded.registers), accesses(issued[i], expanded.registers)
            )
            assert pair is not None, (i, j)
            raise errors.unordered_conflict(
                block,
                *(name(issued[j]), module(issued[j])),
                *(name(issued[i]), module(issued[i])),
                _what(*pair),
            )
    # Later, because a deleted wait is best explained by the commands that it kept apart.
    if imbalance is not None:
        raise imbalance


def completed_before(issued: Sequence[Issued], at: str) -> list[tuple[int, ...]]:
    """For each command, how many commands of each context have finished when it starts.

    Commands of a context finish in order, so a count says which. Raises: SIM004 to SIM006.
    """
    clocks, imbalance = _clocks(issued, at)
    if imbalance is not None:
        raise imbalance
    return clocks


def _clocks(
    issued: Sequence[Issued], at: str
) -> tuple[list[tuple[int, ...]], errors.SimulationFault | None]:
    """The counts of `completed_before`, and the first semaphore that a fence finds not at zero.

    Raises: SIM004, SIM006.
    """
    semaphores = _Semaphores(at)
    clock_of: list[tuple[int, ...]] = []
    running = [[0] * CONTEXTS for _ in range(CONTEXTS)]
    finished = [0] * CONTEXTS
    stretch = 0
    for i, command in enumerate(issued):
        if command.stretch != stretch:  # a fence: all that came before has finished
            stretch = command.stretch
            semaphores.clear()
            running = [list(finished) for _ in range(CONTEXTS)]
        head = command.command.head
        finished[head.context] += 1
        clock = running[head.context]
        for wait in head.waits:
            j = semaphores.take(wait.semaphore, wait.count, command)
            after = [*clock_of[j]]
            # The signalling command has finished, not only what came before it.
            after[issued[j].context] += 1
            clock[:] = map(max, clock, after)
        clock_of.append(tuple(clock))
        for semaphore in head.signals:
            semaphores.signal(semaphore, i, command)
        clock[head.context] += 1
    semaphores.clear()
    return clock_of, semaphores.imbalance


class _Semaphores:
    """Signals sent and taken, in program order."""

    def __init__(self, at: str) -> None:
        self._at = at
        self._sent: list[list[int]] = [[] for _ in range(SEMAPHORES)]
        self._taken = [0] * SEMAPHORES
        self._signalling: dict[int, Context] = {}
        self._waiting: dict[int, Context] = {}
        self.imbalance: errors.SimulationFault | None = None
        """The first semaphore that was not at zero when `clear` was called."""

    def signal(self, semaphore: int, index: int, command: Issued) -> None:
        self._owned(self._signalling, semaphore, command, "signal")
        self._sent[semaphore].append(index)

    def take(self, semaphore: int, count: int, command: Issued) -> int:
        """Index of the command whose signal ends the wait."""
        self._owned(self._waiting, semaphore, command, "wait for")
        needed = self._taken[semaphore] + count
        sent = self._sent[semaphore]
        if needed > len(sent):
            if self.imbalance is not None:  # a fence took what it waits for
                raise self.imbalance
            waiting = f"entry {command.entry} ({summary(command)})"
            raise errors.deadlock(self._at, waiting, semaphore, needed, len(sent))
        self._taken[semaphore] = needed
        return sent[needed - 1]

    def _owned(
        self, owners: dict[int, Context], semaphore: int, command: Issued, role: str
    ) -> None:
        owner = owners.setdefault(semaphore, command.context)
        if owner != command.context:
            names = (owner.name.lower(), command.context.name.lower())
            raise errors.semaphore_shared(self._at, semaphore, role, *names)

    def clear(self) -> None:
        """Forget signals that nobody took, and remember that there were any."""
        for semaphore, (sent, taken) in enumerate(zip(self._sent, self._taken, strict=True)):
            if len(sent) != taken:
                error = errors.semaphore_unbalanced(self._at, semaphore, len(sent), taken)
                self.imbalance = self.imbalance or error
                self._taken[semaphore] = len(sent)


def _positions(issued: Sequence[Issued]) -> list[int]:
    """Each command's number within its context."""
    counts = [0] * CONTEXTS
    positions = []
    for command in issued:
        positions.append(counts[command.context])
        counts[command.context] += 1
    return positions


def summary(issued: Issued) -> str:
    """A command in a few words, for errors."""
    command = issued.command
    if isinstance(command, Dma):
        source, destination = command.source.space.name, command.destination.space.name
        return f"dma {source.lower()} to {destination.lower()}"
    work = "contraction" if command.contraction else "vector" if command.vector.used else "move"
    sink = {Sink.DM: "dm", Sink.TRF: "trf", Sink.VRF: "vrf"}[command.commit.sink]
    return f"{command.head.context.name.lower()} {work} to {sink}"


def _what(first: Access, second: Access) -> str:
    low, high = max(first.low, second.low), min(first.high, second.high)
    slices = (max(first.slice_low, second.slice_low), min(first.slice_high, second.slice_high))
    verbs = ["writes" if access.write else "reads" for access in (first, second)]
    place = f"{first.memory.name} bytes {low:#x} to {high:#x}"
    if first.memory != Memory.HBM:
        place += f" of slices {slices[0]} to {slices[1] - 1}"
    return f"the first {verbs[0]} and the second {verbs[1]} {place}"
