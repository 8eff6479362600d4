"""Which commands may run at the same time, and whether any of them touch the same bytes.

The machine runs three contexts side by side. A command starts when the one before it in its
context has finished and its waits are over; when it has finished it signals. A semaphore has one
signalling and one waiting context, so signal number n ends the wait that takes number n: the
order that follows is known before anything runs (`happens_before.py`). Calls do not overlap: a
block starts when the block before it has finished. The iterations of a repeat do not overlap
either. At each of these fences every semaphore is at zero.

A rank's memory is also touched by transfers of other ranks. Fences say nothing of those, so a rank
must have signalled in this call before another one touches its memory, and must have waited for
the transfer before the call ends. All ranks run the same commands, so one rank's view serves all.

Two commands conflict if both touch a byte and one writes it. Footprints are hulls, so commands
whose strides interleave count as conflicting. Conflicts without an order are faults.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, NoReturn

import numpy as np

from ... import errors
from .expand import Issued, expand_call, module_path
from .happens_before import BEGUN, CONTEXTS, happens_before, rank_name
from .instructions import REGISTERS, Context, Dma, Sink
from .plan import (
    REGION_SHIFT,
    SLICE_ADDRESS_BYTES,
    DmaPlan,
    ExecPlan,
    Footprint,
    Memory,
    half_spans,
)
from .program import Call, Program
from .rules import TRF_HALF_BYTES

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


def accesses(
    issued: Issued, registers: Sequence[int] = UNBOUND, rank: int = 0
) -> tuple[Access, ...]:
    """The bytes of its own memory that a command of `rank` may touch, its group's ranks alike.

    `registers` are those with which the call starts.
    """
    return _touched(issued, registers, rank, peer=False)


def peer_accesses(issued: Issued, registers: Sequence[int], rank: int) -> tuple[Access, ...]:
    """The bytes of its peer's memory that a command of `rank` may touch."""
    return _touched(issued, registers, rank, peer=True)


def peer_of(issued: Issued) -> int:
    """In which bits the rank differs whose memory a command reaches; 0 if it is its own."""
    command = issued.command
    return command.source.peer | command.destination.peer if isinstance(command, Dma) else 0


def _touched(
    issued: Issued, registers: Sequence[int], rank: int, *, peer: bool
) -> tuple[Access, ...]:
    found: list[Access] = []
    away = _away(issued)
    for i, (address, footprint) in enumerate(
        zip(issued.addresses, issued.plan.footprints, strict=True)
    ):
        if (i == away) != peer:
            continue
        base = address.resolve(registers, rank)
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


def _away(issued: Issued) -> int | None:
    """Which footprint lies in another rank's memory."""
    command = issued.command
    if isinstance(command, Dma) and (command.source.peer or command.destination.peer):
        return 0 if command.source.peer else 1
    return None


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
    """For each command, what it must not overtake or overlap in each context of its rank.

    Element i has one entry per context: the index of the latest command before `issued[i]` in
    that context that conflicts with it, or -1; its own context's entry is -1, because order in a
    context comes for free. Waiting for that command is enough: those before it finish first.
    What other ranks' commands do to this rank's memory is left out.
    """
    nodes = [
        Node(i, command.context, 0, accesses(command, registers))
        for i, command in enumerate(issued)
    ]
    rows: list[tuple[int, ...]] = []
    for node, row in zip(nodes, latest_conflicts(nodes, CONTEXTS).tolist(), strict=True):
        row[node.column] = NEVER
        rows.append(tuple(row))
    return rows


class Node(NamedTuple):
    """What a command does to a rank's memory, run by that rank or by another one.

    Nodes of one column follow each other: a context of a rank.
    """

    command: int
    """Its number in the call."""
    column: int
    mask: int
    """In which bits the rank differs that runs it."""
    accesses: tuple[Access, ...]


def latest_conflicts(nodes: Sequence[Node], columns: int) -> np.ndarray:
    """[node, column]: the command of the latest node before it there that conflicts, or -1."""
    found = np.full((len(nodes), columns), NEVER, np.int64)
    for cells in _shared_memories(nodes, columns):
        cells.scan(found)
    return found


class _Cells:
    """One memory cut at every boundary of its accesses; who touched each cell last.

    Cells are few (commands of a block use the same buffers), so an access is a few numpy
    operations, however large the memory is.
    """

    def __init__(self, columns: int) -> None:
        self._columns = columns
        self._accesses: list[tuple[int, Node, Access]] = []

    def add(self, number: int, node: Node, access: Access) -> None:
        self._accesses.append((number, node, access))

    @property
    def shared(self) -> bool:
        """Whether two contexts use it, and one of them writes."""
        columns = {node.column for _, node, _ in self._accesses}
        return len(columns) > 1 and any(access.write for _, _, access in self._accesses)

    def scan(self, found: np.ndarray) -> None:
        """Raise found[node, column] to the latest conflicting command. Shapes: [nodes, columns]."""
        rows = _ranks(v for _, _, a in self._accesses for v in (a.slice_low, a.slice_high))
        columns = _ranks(v for _, _, a in self._accesses for v in (a.low, a.high))
        # [read or write, context, slices, bytes]: index of the last command.
        last = np.full((2, self._columns, len(rows), len(columns)), NEVER, np.int32)
        pending: list[tuple[np.ndarray, int]] = []
        current = NEVER
        for number, node, a in self._accesses:
            if number != current:
                # A command does not conflict with itself: its marks come after its questions.
                for cells, owner in pending:
                    cells[...] = owner
                pending, current = [], number
            box = (
                slice(rows[a.slice_low], rows[a.slice_high]),
                slice(columns[a.low], columns[a.high]),
            )
            before = last[(slice(None) if a.write else slice(1, 2), slice(None), *box)]
            latest = before.max(axis=(0, 2, 3), initial=NEVER)
            np.maximum(found[number], latest, out=found[number])
            pending.append((last[(int(a.write), node.column, *box)], node.command))


def _ranks(values: Iterable[int]) -> dict[int, int]:
    return {value: rank for rank, value in enumerate(sorted(set(values)))}


def _shared_memories(nodes: Sequence[Node], columns: int) -> Iterator[_Cells]:
    memories: dict[tuple[Memory, int], _Cells] = {}
    for number, node in enumerate(nodes):
        for access in node.accesses:
            cells = memories.setdefault((access.memory, access.region), _Cells(columns))
            cells.add(number, node, access)
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
    _CallCheck(program, call).run()


class _CallCheck:
    """The accesses to one rank's memory, its own and those of other ranks, against the order."""

    def __init__(self, program: Program, call: Call) -> None:
        expanded = expand_call(program, call)
        self._program, self._call = program, call
        self._block = program.blocks[call.block].name
        self._issued, self._registers = expanded.issued, expanded.registers
        self._order = happens_before(self._issued, self._block, self._full_name)
        peers = sorted({peer_of(command) for command in self._issued} - {0})
        self._column_of = {peer: CONTEXTS + i for i, peer in enumerate(peers)}
        self._columns = [(c, 0) for c in Context] + [(Context.DMA, peer) for peer in peers]
        """The context and the rank's mask of each column of nodes."""

    def run(self) -> None:
        # Addresses that depend on the rank make every rank's memory another case.
        varies = any(a.rank_stride for command in self._issued for a in command.addresses)
        for rank in range(self._program.header.tensor_parallel_size if varies else 1):
            self._check_memory(rank)
        for i, command in enumerate(self._issued):
            if peer_of(command):
                self._check_guarded(i, peer_of(command))
        # Later, because a deleted wait is best explained by the commands that it kept apart.
        if self._order.imbalance is not None:
            raise self._order.imbalance

    def _nodes(self, rank: int) -> Iterator[Node]:
        """Who touches the memory of `rank`, in program order."""
        for i, command in enumerate(self._issued):
            own = accesses(command, self._registers, rank)
            yield Node(i, command.context, 0, own)
            peer = peer_of(command)
            if peer:
                reached = peer_accesses(command, self._registers, rank ^ peer)
                yield Node(i, self._column_of[peer], peer, reached)

    def _check_memory(self, rank: int) -> None:
        nodes = list(self._nodes(rank))
        found = latest_conflicts(nodes, len(self._columns)).tolist()
        for node, latest in zip(nodes, found, strict=True):
            for column, j in enumerate(latest):
                if j == NEVER or column == node.column:
                    continue
                context, mask = self._columns[column]
                if not self._order.finished(j, context, mask ^ node.mask, node.command):
                    other = next(n for n in nodes if (n.command, n.column) == (j, column))
                    self._fail(other, node)

    def _fail(self, first: Node, second: Node) -> NoReturn:
        pair = _first_conflict(first.accesses, second.accesses)
        assert pair is not None, (first, second)
        raise errors.unordered_conflict(
            self._block,
            *(self._node_name(first), self._module(first.command)),
            *(self._node_name(second), self._module(second.command)),
            _what(*pair),
        )

    def _check_guarded(self, i: int, peer: int) -> None:
        """The peer has begun the call before its memory is touched, and knows the end of it."""
        order, what = self._order, "writes to"
        command = self._issued[i].command
        if isinstance(command, Dma) and command.source.peer:
            what = "reads"
        place = order.neighbours.place[peer]
        if not order.clocks[i][place + BEGUN]:
            problem = "and has no signal from it yet in this call"
        elif order.end[place + Context.DMA] <= order.positions[i]:
            problem = "and no wait of the other rank covers it until the call ends"
        else:
            return
        raise errors.exchange_unguarded(
            self._block, self._name(i), self._module(i), what, rank_name(peer), problem
        )

    def _node_name(self, node: Node) -> str:
        by = f" of {rank_name(node.mask)}" if node.mask else ""
        return self._name(node.command) + by

    def _full_name(self, i: int) -> str:
        return f"{self._name(i)} ({self._module(i)})"

    def _name(self, i: int) -> str:
        return f"{self._block}[{self._issued[i].entry}] {summary(self._issued[i])}"

    def _module(self, i: int) -> str:
        return module_path(self._program, self._call, self._issued[i].command) or self._block


def completed_before(issued: Sequence[Issued], at: str) -> list[tuple[int, ...]]:
    """For each command, how many commands of each context of its rank have finished when it starts.

    Commands of a context finish in order, so a count says which. Raises: SIM004 to SIM006.
    """
    order = happens_before(issued, at)
    if order.imbalance is not None:
        raise order.imbalance
    return [clock[:CONTEXTS] for clock in order.clocks]


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
