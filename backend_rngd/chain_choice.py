"""Which loads of a block the calls before it take over: a search with a quick forecast.

A forecast plans a block with the simplest policy, its first stretch without the loads that others
have done and its last stretch with those that it does for others. Loads are offered in program
order and from the shortest one on; blocks are decided one after the other, the one with the most
calls first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from .isa.instructions import Context
from .list_schedule import Policy, Stretch, Task, bytes_in_order, list_schedule
from .rngd import ON_CHIP_BYTES, DmaOp
from .schedule import BlockProblem

Pair = tuple[str, str | None]
"""A block and the one that is called next."""
TRIED = ((False, 2), (False, 0), (True, 4), (False, 4), (False, 1), (True, 8), (True, 2))
"""(whether the shortest or the first ones, how many) beside those that stay where they are."""
MOST_STAYING = 8
"""More of these are taken for what they are not: loads of chunks that share their weights."""
COMMANDS_TRIED = 6000
"""Commands that the forecasts for a block may plan altogether."""
FORECAST = Policy(by_path=False)
DM = tuple(ON_CHIP_BYTES).index("dm")


@dataclass(frozen=True)
class Load:
    """A load at a block's beginning that calls before it could do."""

    op: DmaOp
    cycles: int
    size_bytes: int
    stays: bool
    """The next call of the same block finds it where it is."""


@dataclass(frozen=True)
class Choice:
    """The loads that calls before each block do for it."""

    entries: Mapping[str, tuple[Load, ...]]

    def entry(self, name: str) -> tuple[Load, ...]:
        """What a block finds in data memory."""
        return self.entries[name]

    def exits(self, pair: Pair) -> tuple[Load, ...]:
        """What the pair's first block loads for the second."""
        name, following = pair
        if following is None:
            return ()
        return tuple(
            load for load in self.entries[following] if name != following or not load.stays
        )

    def with_entry(self, name: str, loads: tuple[Load, ...]) -> Choice:
        return Choice({**self.entries, name: loads})


def choose(
    pairs: Mapping[Pair, int],
    forecasts: Mapping[str, Forecast],
    loads: Mapping[str, Sequence[Load]],
    most_bytes: int,
) -> Choice:
    """The loads to hand over; `pairs` says how often blocks follow each other.

    Those for one block take up to `most_bytes` of a slice.
    """
    calls = {name: sum(n for pair, n in pairs.items() if pair[0] == name) for name in forecasts}
    choice = Choice(dict.fromkeys(forecasts, ()))
    for name in sorted(forecasts, key=lambda name: -calls[name]):
        concerned = {pair: n for pair, n in pairs.items() if name in pair}

        def cycles(tried: Choice, concerned: Mapping[Pair, int] = concerned) -> float:
            return sum(n * forecasts[pair[0]].cycles(tried, pair) for pair, n in concerned.items())

        tried = [choice.with_entry(name, one) for one in _candidates(loads[name], most_bytes)]
        if tried:
            commands = sum(forecasts[pair[0]].size for pair in concerned)
            choice = min([choice, *tried[: max(1, COMMANDS_TRIED // commands)]], key=cycles)
    return choice


def _candidates(loads: Sequence[Load], most_bytes: int) -> list[tuple[Load, ...]]:
    """Sets of loads within the limits, in program order; what stays comes first."""
    staying = sum(load.stays for load in loads)
    least = staying if staying <= MOST_STAYING else 0
    by_place = sorted(loads, key=lambda load: not load.stays)
    by_length = sorted(loads, key=lambda load: (not load.stays, load.cycles))
    found: dict[tuple[Load, ...], None] = {}
    for shortest, count in TRIED:
        taken = set((by_length if shortest else by_place)[: least + count])
        if sum(load.size_bytes for load in taken) <= most_bytes:
            found[tuple(load for load in loads if load in taken)] = None
    return [one for one in found if one]


class Forecast:
    """The cycles of one block as it hands loads over."""

    def __init__(self, problem: BlockProblem) -> None:
        self._commands = problem.commands
        self._stretches = problem.stretches
        self._runs = problem.runs
        self._usual = [self._planned(stretch) for stretch in self._stretches]
        self._known: dict[tuple[tuple[Load, ...], tuple[Load, ...], bool], float] = {}

    @property
    def size(self) -> int:
        """Commands that it plans each time."""
        return len({*self._commands[0], *self._commands[-1]})

    def cycles(self, choice: Choice, pair: Pair) -> float:
        """Of a call of the block before one of `pair[1]`; infinite if memory is too small."""
        key = (choice.entry(pair[0]), choice.exits(pair), pair[0] == pair[1])
        if key not in self._known:
            self._known[key] = self._cycles(*key)
        return self._known[key]

    def _cycles(self, entry: tuple[Load, ...], exits: tuple[Load, ...], own: bool) -> float:
        last = len(self._stretches) - 1
        held = sum(load.size_bytes for load in {*entry, *exits})
        total = 0
        for number, stretch in enumerate(self._stretches):
            changed = _with_room_for(stretch, held)
            if any(map(int.__gt__, bytes_in_order(changed), changed.capacities)):
                return float("inf")
            if number == last:
                changed = self._with_exits(changed, exits, own)
            if number == 0:
                numbers = {op: i for i, op in enumerate(self._commands[0])}
                changed = _without(changed, {numbers[load.op] for load in entry})
            same = changed.tasks == stretch.tasks
            makespan = self._usual[number] if same else self._planned(changed)
            total += self._runs[number] * makespan
        return total

    def _with_exits(self, stretch: Stretch, exits: Iterable[Load], own: bool) -> Stretch:
        """Own loads follow the commands that use their buffers."""
        added = []
        for load in exits:
            users = {use.operation for use in load.op.destination.uses} if own else set()
            after = tuple(i for i, op in enumerate(self._commands[-1]) if op in users)
            added.append(Task(int(Context.DMA), load.cycles, after))
        return replace(stretch, tasks=(*stretch.tasks, *added))

    def _planned(self, stretch: Stretch) -> int:
        plan = list_schedule(stretch, FORECAST)
        assert plan is not None, "a policy that is not daring comes to no dead end"
        return plan.makespan


def _with_room_for(stretch: Stretch, held: int) -> Stretch:
    capacities = list(stretch.capacities)
    capacities[DM] -= held
    return replace(stretch, capacities=tuple(capacities))


def _without(stretch: Stretch, removed: set[int]) -> Stretch:
    """The stretch without some of its commands, whose buffers are held all the time."""
    held = {b for i in removed for b in stretch.tasks[i].buffers}
    kept = [i for i in range(len(stretch.tasks)) if i not in removed]
    place = {i: number for number, i in enumerate(kept)}
    tasks = []
    for i in kept:
        task = stretch.tasks[i]
        after = tuple(place[j] for j in task.after if j in place)
        buffers = tuple(b for b in task.buffers if b not in held)
        tasks.append(replace(task, after=after, buffers=buffers))
    return replace(stretch, tasks=tuple(tasks))
