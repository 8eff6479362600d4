"""Blocks for the clock: what each command costs, how repeats nest, which module commands serve."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .. import errors
from ..backend_rngd.isa.cost import DmaCost, ExecCost, dma_cost, exec_cost
from ..backend_rngd.isa.cost_exchange import message_cycles
from ..backend_rngd.isa.expand import MAX_ISSUED, MAX_NESTING, entry_path
from ..backend_rngd.isa.happens_before import sent_signals
from ..backend_rngd.isa.instructions import Control, Dma, Exec, Instruction
from ..backend_rngd.isa.machine import Machine
from ..backend_rngd.isa.plan import Plan, plan_dma, plan_exec
from ..backend_rngd.isa.program import Block, Call, Program, Provenance
from ..backend_rngd.isa.rank_rules import is_exchange
from .clock import MESSAGE, PEER_SIGNAL, SIGNAL, Clock, Command, Exchange, Latencies, Repeat
from .spread import Spread, command_spread, number_spread

UNNAMED_ROW = "<unnamed>"
"""The row of commands whose call and provenance name no module."""


def row_name(program: Program, call: Call, entry: Provenance) -> str:
    """The row of the commands of `call` that have this entry."""
    return entry_path(program, call, entry) or UNNAMED_ROW


class Costs:
    """Costs of a program's commands on a machine; equal commands are one object."""

    def __init__(self, program: Program, machine: Machine, sharers: int) -> None:
        """Ranks load at the same time, so there are at least as many `sharers`."""
        self.machine = machine
        self.ranks = program.header.tensor_parallel_size
        self.latencies = Latencies(
            machine.control.signal_cycles,
            machine.exchange.signal_cycles,
            message_cycles(machine, self.ranks),
        )
        self._sharers = max(sharers, self.ranks)
        self._known: dict[int, tuple[int, ExecCost | DmaCost]] = {}
        self._numbers: dict[tuple[int, bool], int] = {}
        self._plans: list[Plan] = []
        self._cycles: list[int] = []
        self._spreads: dict[int, Spread] = {}

    def of(self, command: Exec | Dma, where: str) -> ExecCost | DmaCost:
        return self.numbered(command, where)[1]

    def numbered(self, command: Exec | Dma, where: str) -> tuple[int, ExecCost | DmaCost]:
        """The cost of `command`, and a number that commands of one kind share. Raises: VED011."""
        known = self._known.get(id(command))
        if known is None:
            cost: ExecCost | DmaCost
            plan: Plan
            if isinstance(command, Exec):
                plan = plan_exec(command, where)
                cost = exec_cost(plan, self.machine)
            else:
                plan = plan_dma(command, where)
                cost = dma_cost(plan, self.machine, self._sharers)
            key = id(cost), is_exchange(command)
            number = self._numbers.setdefault(key, len(self._plans))
            if number == len(self._plans):
                self._plans.append(plan)
                self._cycles.append(cost.total_cycles)
            known = self._known[id(command)] = number, cost
        return known

    def plan(self, number: int) -> Plan:
        """A command's plan with the cost of that number."""
        return self._plans[number]

    def cycles(self, number: int) -> int:
        """How long the piece of the critical path with that number is."""
        ways = {
            SIGNAL: self.latencies.signal,
            PEER_SIGNAL: self.latencies.peer_signal,
            MESSAGE: self.latencies.messages,
        }
        return ways[number] if number in ways else self._cycles[number]

    def spread(self, number: int) -> Spread:
        """The spread of the cost with that number."""
        if number == SIGNAL:
            return number_spread(self.machine, "control.signal_cycles")
        if number == PEER_SIGNAL:
            return number_spread(self.machine, "exchange.signal_cycles")
        if number == MESSAGE:
            return number_spread(self.machine, "exchange.message_cycles", self.ranks)
        if number not in self._spreads:
            plan = self._plans[number]
            self._spreads[number] = command_spread(plan, self.machine, self._sharers)
        return self._spreads[number]


def exchange_of(command: Exec | Dma) -> Exchange:
    """Whether a command sends other ranks' memory something, or fetches it from there."""
    if isinstance(command, Exec):
        return Exchange.NONE
    if command.source.peer:
        return Exchange.PULL
    return Exchange.PUSH if command.destination.peer else Exchange.NONE


def run_clock(program: Program, block: Block, costs: Costs) -> Clock:
    """One run of `block`. Raises: VED011, SIM001 to SIM003, SIM005, SIM006."""
    commands = program.block_commands(block)
    issues(commands, block.name)
    clock = Clock(block.name, len(block.provenance), costs.latencies)
    clock.run(tuple(_nodes(commands, 0, len(commands), block.name, costs)))
    clock.fence()
    return clock


def issues(commands: Sequence[Instruction], name: str) -> list[int]:
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
    commands: Sequence[Instruction], first: int, end: int, name: str, costs: Costs
) -> Iterator[Command | Repeat]:
    """The entries [first, end) as a tree; `_issues` has checked that repeats nest."""
    i = first
    while i < end:
        command = commands[i]
        i += 1
        if isinstance(command, Control):
            body = tuple(_nodes(commands, i, i + command.length, name, costs))
            i += command.length
            yield Repeat(command.count, body)
            continue
        head = command.head
        number, cost = costs.numbered(command, f"{name}[{i - 1}]")
        yield Command(
            entry=i - 1,
            context=int(head.context),
            cycles=cost.total_cycles,
            vector_unit=isinstance(cost, ExecCost) and cost.vector_unit,
            blocking_cycles=cost.blocking_cycles if isinstance(cost, ExecCost) else 0,
            starves_dma=isinstance(cost, ExecCost) and cost.starves_dma,
            waits=tuple(
                (wait.semaphore, peer, wait.count)
                for wait in head.waits
                for peer in wait.peers or (0,)
            ),
            signals=sent_signals(head),
            message=exchange_of(command),
            link=(head.provenance, number),
        )
