"""The `schedule` pass: the order in which commands are issued.

Before: commands on virtual buffers, in program order.
After:  the same commands in the order in which they start, and each buffer's planned lifetime.
Contract: bitwise; commands that depend on each other keep their order.
Raises: BLD014 for an unknown level.

Straight code between repeats is planned as a whole, with the exact costs of the default machine. At
level 0 each command follows the one before it, at level 1 kernels follow each other and commands
overlap inside each, at level 2 they overlap across kernels; `synchronise` enforces the same. A
plan of a lower level is kept where it is not slower, and program order where no plan can be placed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from math import prod

from xdsl.context import Context as XdslContext
from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import Block, Operation
from xdsl.passes import ModulePass

from .. import errors
from .dependences import Command, Touch, arrival, dependences, touches
from .isa.cost import dma_cost, exec_cost
from .isa.cost_exchange import message_cycles
from .isa.machine import Machine, load_machine
from .isa.plan import plan_dma, plan_exec
from .list_schedule import (
    LINK,
    Plan,
    Policy,
    Storage,
    Stretch,
    Task,
    in_order,
    least_makespan,
    list_schedule,
    serial_plan,
)
from .place import assign_addresses, set_lifetime
from .rngd import ON_CHIP_BYTES, AllocOp, ArriveOp, BlockOp, DmaOp, ExecOp, RepeatOp, ranks_of

LEVELS = (0, 1, 2)
MEMORIES = tuple(ON_CHIP_BYTES)
POLICIES = (
    *(Policy(by_path=False, ahead=ahead) for ahead in (1.0, 0.94, 0.88, 0.75, 0.5)),
    *(Policy(by_path=True, ahead=ahead) for ahead in (1.0, 0.88)),
    *(Policy(by_path=by_path, patience_cycles=1000) for by_path in (False, True)),
)
"""What is tried for a block: less room ahead makes longer plans that are easier to place."""
KERNEL_POLICIES = (
    *(Policy(by_path=False, ahead=ahead) for ahead in (1.0, 0.75)),
    Policy(by_path=True),
)
"""What is tried for a kernel at a time."""
ROUNDS = 200
"""Random changes that are tried on a plan, at most,"""
COMMANDS_TRIED = 4000
"""and the commands that they may plan altogether."""


def check_level(level: int) -> None:
    """Raises: BLD014."""
    if level not in LEVELS:
        raise errors.unknown_optimization_level(level, LEVELS)


# --- kernels ---


def kernels(commands: Sequence[Operation]) -> Iterator[tuple[int, int]]:
    """Bounds of the longest runs of commands that come from one operator."""
    first = 0
    for i in range(1, len(commands) + 1):
        if i == len(commands) or commands[i].location != commands[first].location:
            yield first, i
            first = i


def groups(commands: Sequence[Operation], level: int) -> list[tuple[int, int]]:
    """Bounds of what overlaps at a level; each group follows the whole group before it."""
    if level == 0:
        return [(i, i + 1) for i in range(len(commands))]
    return list(kernels(commands)) if level == 1 else [(0, len(commands))]


# --- straight code ---


@dataclass
class _Straight:
    """Commands between two fences, inside the repeats `inside`, outermost first."""

    block: Block
    inside: tuple[RepeatOp, ...]
    commands: list[Command] = field(default_factory=list)
    following: RepeatOp | None = None
    """None at the end of the block."""

    def reorder(self, order: Sequence[int]) -> None:
        """Move the commands into this order, behind all else that stands between the fences."""
        for op in self.commands:
            op.detach()  # type: ignore[no-untyped-call]  # of xDSL
        ordered = [self.commands[i] for i in order]
        if self.following is not None:
            self.block.insert_ops_before(ordered, self.following)
        else:
            self.block.add_ops(ordered)


def _straights(block: Block, inside: tuple[RepeatOp, ...] = ()) -> Iterator[_Straight]:
    current = _Straight(block, inside)
    for op in block.ops:
        if isinstance(op, ExecOp | DmaOp | ArriveOp):
            current.commands.append(op)
        elif isinstance(op, RepeatOp):
            current.following = op
            yield current
            yield from _straights(op.body.block, (*inside, op))
            current = _Straight(block, inside)
    yield current


def _task(op: Command, machine: Machine, ranks: int) -> tuple[Task, list[Touch]]:
    if isinstance(op, ArriveOp):
        return Task(LINK, message_cycles(machine, ranks)), arrival(op)
    if isinstance(op, DmaOp):
        transfer = plan_dma(op.dma, "")
        cycles = dma_cost(transfer, machine, ranks).total_cycles
        return Task(int(op.dma.head.context), cycles), touches(op, transfer, ranks)
    plan = plan_exec(op.exec, "")
    cost = exec_cost(plan, machine)
    task = Task(
        context=int(op.exec.head.context),
        cycles=cost.total_cycles,
        vector_unit=cost.vector_unit,
        blocking_cycles=cost.blocking_cycles,
    )
    return task, touches(op, plan, ranks)


# --- a block ---


@dataclass
class _Span:
    first: int
    last: int

    def cover(self, first: int, last: int) -> None:
        self.first, self.last = min(self.first, first), max(self.last, last)


class BlockProblem:
    """A block's straights as scheduling problems; plans of all of them written into the block."""

    def __init__(self, block: BlockOp, machine: Machine, ranks: int | None = None) -> None:
        """`ranks` run the block together; by default those of the module that it stands in."""
        self._block = block.body.block
        module = block.parent_op()
        self._ranks = ranks or (ranks_of(module) if isinstance(module, ModuleOp) else 1)
        self._straights = list(_straights(self._block))
        self._turns = _turns(self._straights)
        self._allocs = [_allocs_of(straight.commands) for straight in self._straights]
        self._spans: dict[AllocOp, _Span] = {}
        """The straights, by number, in which a buffer is used or has to be kept."""
        for number, allocs in enumerate(self._allocs):
            for alloc in allocs:
                first, last = self._kept(alloc, number) or (number, number)
                self._spans.setdefault(alloc, _Span(first, last)).cover(first, last)
        self.stretches = [self._stretch(n, machine) for n in range(len(self._straights))]

    def _kept(self, alloc: AllocOp, number: int) -> tuple[int, int] | None:
        """The straights of the repeat that uses a buffer from outside, in all its turns.

        All straights for what stays in place from call to call.
        """
        if alloc.resident is not None:
            return 0, len(self._straights) - 1
        inside = self._straights[number].inside
        owner = alloc.parent_op()
        outer = inside[inside.index(owner) + 1 :] if isinstance(owner, RepeatOp) else inside
        return self._turns[outer[0]] if outer else None

    def _stretch(self, number: int, machine: Machine) -> Stretch:
        allocs = self._allocs[number]
        numbers = {alloc: i for i, alloc in enumerate(allocs)}
        tasks, touched = [], []
        for op in self._straights[number].commands:
            task, touch = _task(op, machine, self._ranks)
            used = dict.fromkeys(numbers[alloc] for alloc in _allocs_of([op]))
            tasks.append(replace(task, buffers=tuple(used)))
            touched.append(touch)
        capacities = dict(ON_CHIP_BYTES)
        for alloc, span in self._spans.items():
            if span.first <= number <= span.last and alloc not in numbers:
                capacities[alloc.memory] -= alloc.size_bytes
        return Stretch(
            tuple(replace(t, after=a) for t, a in zip(tasks, dependences(touched), strict=True)),
            tuple(self._storage(alloc, number) for alloc in allocs),
            tuple(capacities[memory] for memory in MEMORIES),
            frozenset({MEMORIES.index("trf")}),
        )

    def _storage(self, alloc: AllocOp, number: int) -> Storage:
        span, kept = self._spans[alloc], self._kept(alloc, number) is not None
        return Storage(
            MEMORIES.index(alloc.memory),
            alloc.size_bytes,
            entering=kept or span.first < number,
            leaving=kept or span.last > number,
        )

    @property
    def commands(self) -> list[list[Command]]:
        """Those of each stretch, in program order."""
        return [straight.commands for straight in self._straights]

    @property
    def runs(self) -> list[int]:
        """How often each stretch is run."""
        return [prod(r.count.value.data for r in one.inside) for one in self._straights]

    def search(self) -> PlanSearch:
        """For the plans of the whole block."""
        pairs = zip(self._straights, self.stretches, strict=True)
        return PlanSearch(
            self.stretches,
            [list(parts(two, list(kernels(one.commands)))) for one, two in pairs],
            self.runs,
            self.can_place,
        )

    def can_place(self, plans: Sequence[Plan]) -> bool:
        """Write the lifetimes, and see whether all buffers find room."""
        self.write_lifetimes(plans)
        try:
            assign_addresses(self._block)
        except errors.MemoryFull:
            return False
        return True

    def write_lifetimes(self, plans: Sequence[Plan]) -> None:
        """Cycles of a repeat's body count once."""
        starts = list(accumulate((plan.makespan for plan in plans), initial=0))
        lives: dict[AllocOp, _Span] = {}
        for number, (plan, stretch) in enumerate(zip(plans, self.stretches, strict=True)):
            for task, start in zip(stretch.tasks, plan.starts, strict=True):
                for b in task.buffers:
                    alloc = self._allocs[number][b]
                    first = starts[number] + start
                    last = first + task.cycles
                    kept = self._kept(alloc, number)
                    if kept is not None:
                        first, last = starts[kept[0]], starts[kept[1] + 1]
                    lives.setdefault(alloc, _Span(first, last)).cover(first, last)
        for alloc, life in lives.items():
            set_lifetime(alloc, life.first, life.last)

    def reorder(self, plans: Sequence[Plan]) -> None:
        """Put the commands into the order of the plans."""
        for straight, plan in zip(self._straights, plans, strict=True):
            straight.reorder(plan.order)


def _turns(straights: Sequence[_Straight]) -> dict[RepeatOp, tuple[int, int]]:
    """The first and the last straight of each repeat's body, by number."""
    spans: dict[RepeatOp, _Span] = {}
    for number, straight in enumerate(straights):
        for repeat in straight.inside:
            spans.setdefault(repeat, _Span(number, number)).cover(number, number)
    return {repeat: (span.first, span.last) for repeat, span in spans.items()}


def _allocs_of(commands: Sequence[Command]) -> list[AllocOp]:
    """The buffers on chip that commands use, each once."""
    owners = (buffer.owner for op in commands for buffer in op.ports().values())
    return list(dict.fromkeys(owner for owner in owners if isinstance(owner, AllocOp)))


# --- plans ---


def planned(stretch: Stretch, policy: Policy) -> Plan:
    """The plan of a policy that comes to no dead end."""
    plan = list_schedule(stretch, policy)
    assert plan is not None, policy
    return plan


def improved(stretch: Stretch, plan: Plan, ahead: float = 1.0) -> Plan:
    """Random changes of urgency, kept when the plan gets no longer; the same ones every time.

    The best plan's order takes the place of program order: what may run ahead depends on it.
    """
    least, n = least_makespan(stretch), len(stretch.tasks)
    rng = random.Random(0)
    current, order = in_order(stretch, plan.order), plan.order
    starts = [plan.starts[i] for i in order]
    best = plan.makespan
    for _ in range(min(ROUNDS, COMMANDS_TRIED // max(n, 1))):
        if best <= least:
            break
        urgency = [float(-start) for start in starts]
        for i in rng.sample(range(n), max(1, n // 8)):
            urgency[i] += rng.gauss(0, 0.3) * best
        policy = Policy(
            patience_cycles=rng.choice((0, 200, 1000)), ahead=ahead, daring=rng.random() < 0.5
        )
        found = list_schedule(current, policy, urgency)
        if found is not None and found.makespan <= best:
            best = found.makespan
            order = tuple(order[i] for i in found.order)
            current = in_order(current, found.order)
            starts = [found.starts[i] for i in found.order]
    by_command = dict(zip(order, starts, strict=True))
    return Plan(order, tuple(by_command[i] for i in range(n)), best)


def parts(stretch: Stretch, runs: Sequence[tuple[int, int]]) -> Iterator[Stretch]:
    """Runs of commands as stretches of their own, one after the other."""
    users: dict[int, _Span] = {}
    for i, task in enumerate(stretch.tasks):
        for b in task.buffers:
            users.setdefault(b, _Span(i, i)).cover(i, i)
    for first, end in runs:
        yield _part(stretch, first, end, users)


def _part(stretch: Stretch, first: int, end: int, users: Mapping[int, _Span]) -> Stretch:
    numbers: dict[int, int] = {}
    for task in stretch.tasks[first:end]:
        for b in task.buffers:
            numbers.setdefault(b, len(numbers))
    tasks = tuple(
        replace(
            task,
            after=tuple(j - first for j in task.after if j >= first),
            buffers=tuple(numbers[b] for b in task.buffers),
        )
        for task in stretch.tasks[first:end]
    )
    capacities = list(stretch.capacities)
    storages: dict[int, Storage] = {}
    for b, storage in enumerate(stretch.buffers):
        entering = storage.entering or users[b].first < first
        leaving = storage.leaving or users[b].last >= end
        if b in numbers:
            storages[b] = replace(storage, entering=entering, leaving=leaving)
        elif entering and leaving:
            capacities[storage.memory] -= storage.size_bytes
    buffers = tuple(storages[b] for b in numbers)
    return Stretch(tasks, buffers, tuple(capacities), stretch.halves)


def _one_after_another(plans: Sequence[Plan]) -> Plan:
    """Each plan starts when the one before it has finished."""
    order: list[int] = []
    starts: list[int] = []
    now = 0
    for plan in plans:
        order += [len(starts) + i for i in plan.order]
        starts += [now + start for start in plan.starts]
        now += plan.makespan
    return Plan(tuple(order), tuple(starts), now)


@dataclass(frozen=True)
class PlanSearch:
    """The search for the best plans of stretches that follow each other."""

    stretches: Sequence[Stretch]
    kernels: Sequence[Sequence[Stretch]]
    """Those of each stretch, in order."""
    runs: Sequence[int]
    """How often each stretch is run."""
    can_place: Callable[[Sequence[Plan]], bool]
    """Whether all buffers find room with these plans."""

    def best(self, level: int) -> list[Plan]:
        """The shortest plans found that can be placed; program order can be, or nothing can."""
        plans = self._of_level(level)
        if level == 2:
            pairs = zip(self.stretches, plans, strict=True)
            better = [improved(stretch, plan) for stretch, plan in pairs]
            if self.cycles(better) < self.cycles(plans) and self.can_place(better):
                return better
        return plans

    def cycles(self, plans: Sequence[Plan]) -> int:
        """Of the whole block, all turns of its repeats counted."""
        return sum(n * plan.makespan for n, plan in zip(self.runs, plans, strict=True))

    def _of_level(self, level: int) -> list[Plan]:
        """The shortest plans of a level's policies; none is longer than a lower level's."""
        serial = [serial_plan(stretch) for stretch in self.stretches]
        if level == 0:
            return serial
        if level == 1:
            by_kernel = [self._by_kernel(policy) for policy in KERNEL_POLICIES]
            return self._first_placeable([*by_kernel, serial])
        whole = [self._by_policy(policy) for policy in POLICIES]
        return self._or_by_kernel(self._first_placeable([*whole, serial]))

    def quick(self) -> list[Plan]:
        """Plans of level 2 by the first policy whose plans can be placed; `best` are no longer."""
        found = (plans for plans in map(self._by_policy, POLICIES) if self.can_place(plans))
        plans = next(found, None) or [serial_plan(stretch) for stretch in self.stretches]
        return self._or_by_kernel(plans)

    def _by_policy(self, policy: Policy) -> list[Plan]:
        return [planned(stretch, policy) for stretch in self.stretches]

    def _or_by_kernel(self, plans: list[Plan]) -> list[Plan]:
        """Those of level 1 where they are shorter."""
        if self.cycles(plans) > self._least_by_kernel():
            return self._first_placeable([plans, self._of_level(1)])
        return plans

    def _first_placeable(self, candidates: list[list[Plan]]) -> list[Plan]:
        """In the order of their length; the last one if there is none."""
        in_order_of_length = sorted(candidates, key=self.cycles)
        return next(
            (plans for plans in in_order_of_length if self.can_place(plans)), candidates[-1]
        )

    def _by_kernel(self, policy: Policy) -> list[Plan]:
        return [
            _one_after_another([planned(kernel, policy) for kernel in found])
            for found in self.kernels
        ]

    def _least_by_kernel(self) -> int:
        """Cycles that no plan of level 1 undercuts."""
        least = [sum(map(least_makespan, found)) for found in self.kernels]
        return sum(n * cycles for n, cycles in zip(self.runs, least, strict=True))


# --- the pass ---


def _schedule_block(block: BlockOp, level: int, machine: Machine) -> None:
    problem = BlockProblem(block, machine)
    plans = problem.search().best(level)
    problem.write_lifetimes(plans)
    problem.reorder(plans)
    for op in [op for op in block.walk() if isinstance(op, ArriveOp)]:
        op.detach()  # type: ignore[no-untyped-call]  # of xDSL
        op.erase()


@dataclass(frozen=True)
class SchedulePass(ModulePass):
    """Order the commands of every block."""

    name = "schedule"

    level: int = 2
    """0: program order. 1: overlap inside each kernel. 2: overlap across a block's kernels."""

    def __post_init__(self) -> None:
        check_level(self.level)

    def apply(self, ctx: XdslContext, op: ModuleOp) -> None:
        machine = load_machine()
        for block in op.ops:
            if isinstance(block, BlockOp):
                _schedule_block(block, self.level, machine)
