"""The list scheduler: when each of a stretch's commands starts, as a problem of its own.

A stretch is straight code between two fences. Its commands run in three contexts, one at a time in
each; a command starts when those that it depends on have finished, and when memory has room for
the buffers that it is the first to touch. A buffer's bytes are free again when the last command
that touches it has finished. Main and sub share one vector unit; while a command loads a bitmap
for the switch, no other starts.

Commands are taken in the order in which they start: at each step the one that can start first,
among equals the most urgent. Memory cannot run full for good, because what could be done in
program order can always be done: a command ahead of its place may take memory only if all that
remains would still fit when done in program order from there.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np

from .isa.instructions import Context

LINK = len(Context)
"""Where messages to other ranks queue: they take turns on a card, and no rank's engine."""
CONTEXTS = len(Context) + 1
NEVER = 1 << 62
"""Later than every cycle."""


@dataclass(frozen=True, slots=True)
class Task:
    """A command as the scheduler sees it."""

    context: int
    cycles: int
    after: tuple[int, ...] = ()
    """Earlier commands that must have finished."""
    buffers: tuple[int, ...] = ()
    """The buffers on chip that it touches."""
    vector_unit: bool = False
    blocking_cycles: int = 0
    """It starts when all contexts stand still, and keeps them so for that long."""


@dataclass(frozen=True, slots=True)
class Storage:
    """A buffer on chip: which of the memories, and its bytes there."""

    memory: int
    size_bytes: int
    entering: bool = False
    """It holds something when the stretch begins."""
    leaving: bool = False
    """It is still needed when the stretch has ended."""


@dataclass(frozen=True)
class Stretch:
    """Commands in program order, the buffers that they touch, and each memory's bytes for them."""

    tasks: tuple[Task, ...]
    buffers: tuple[Storage, ...]
    capacities: tuple[int, ...]
    halves: frozenset[int] = frozenset()
    """Memories that are given out in halves: there is no room between buffers to lose."""


@dataclass(frozen=True)
class Policy:
    """What a run of the list scheduler prefers."""

    by_path: bool = True
    """Urgency is the length of the longest path to the end; else the place in the program."""
    patience_cycles: int = 0
    """How long a context stands still for a more urgent command before a longer one."""
    ahead: float = 1.0
    """Share of the memories that commands ahead of their place may fill, but for halves."""
    daring: bool = False
    """Take memory without caring for the rest: it may come to a dead end."""


@dataclass(frozen=True)
class Plan:
    """Commands in the order in which they start, when each starts, and when the last finishes."""

    order: tuple[int, ...]
    starts: tuple[int, ...]
    """By command, in cycles from the start of the stretch."""
    makespan: int


def serial_plan(stretch: Stretch) -> Plan:
    """One command after the other, in program order."""
    starts, now = [], 0
    for task in stretch.tasks:
        starts.append(now)
        now += task.cycles
    return Plan(tuple(range(len(starts))), tuple(starts), now)


def list_schedule(stretch: Stretch, policy: Policy, urgency: Sequence[float] = ()) -> Plan | None:
    """A plan for `stretch`, which must fit its memories in program order; None at a dead end.

    `urgency`, by command, replaces the policy's own: the most urgent has the highest.
    """
    if not urgency:
        paths = path_cycles(stretch.tasks)
        urgency = paths if policy.by_path else range(len(paths), 0, -1)
    return _Run(stretch, policy, urgency).run()


def in_order(stretch: Stretch, order: Sequence[int]) -> Stretch:
    """The same commands with another program order, in which they must fit the memories too.

    The order of a plan is one: done one by one, its commands need no more than in the plan.
    """
    place = [0] * len(order)
    for number, i in enumerate(order):
        place[i] = number
    return replace(stretch, tasks=tuple(_moved(stretch.tasks[i], place) for i in order))


def _moved(task: Task, place: Sequence[int]) -> Task:
    """With the new numbers of the commands that it follows; `replace` takes thrice as long."""
    return Task(
        task.context,
        task.cycles,
        tuple([place[j] for j in task.after]),
        task.buffers,
        task.vector_unit,
        task.blocking_cycles,
    )


def least_makespan(stretch: Stretch) -> int:
    """Cycles that no plan undercuts: of the longest path, and of the busiest context."""
    busy = [0] * CONTEXTS
    for task in stretch.tasks:
        busy[task.context] += task.cycles
    return max(*busy, *path_cycles(stretch.tasks), 0)


def path_cycles(tasks: Sequence[Task]) -> list[int]:
    """For each command, the cycles of the longest chain of commands that begins with it."""
    longest = [task.cycles for task in tasks]
    for i in range(len(tasks) - 1, -1, -1):
        task = tasks[i]
        for j in task.after:
            if longest[i] + tasks[j].cycles > longest[j]:
                longest[j] = longest[i] + tasks[j].cycles
    return longest


def bytes_in_order(stretch: Stretch) -> list[int]:
    """Of each memory, the bytes in use at most when the commands are done in program order."""
    n = len(stretch.tasks)
    changes = [[0] * (n + 1) for _ in stretch.capacities]
    spans = [(0 if b.entering else n, n if b.leaving else -1) for b in stretch.buffers]
    for i, task in enumerate(stretch.tasks):
        for number in task.buffers:
            first, last = spans[number]
            spans[number] = min(first, i), max(last, i)
    for buffer, (first, last) in zip(stretch.buffers, spans, strict=True):
        if first <= last:
            changes[buffer.memory][first] += buffer.size_bytes
            if last < n:
                changes[buffer.memory][last + 1] -= buffer.size_bytes
    return [max(accumulate(memory)) for memory in changes]


class _Memories:
    """Bytes in use now, and bytes in use if the rest were done in program order from here."""

    def __init__(self, stretch: Stretch, policy: Policy) -> None:
        n = len(stretch.tasks)
        self._buffers = stretch.buffers
        self._capacities = stretch.capacities
        self._limits = [
            capacity if memory in stretch.halves else int(capacity * policy.ahead)
            for memory, capacity in enumerate(stretch.capacities)
        ]
        self._daring = policy.daring
        self._used = [0] * len(stretch.capacities)
        self._held = [buffer.entering for buffer in stretch.buffers]
        self._first = [0 if buffer.entering else n for buffer in stretch.buffers]
        self._last = [n if buffer.leaving else -1 for buffer in stretch.buffers]
        self._uses = [int(buffer.leaving) for buffer in stretch.buffers]
        self._touched = [task.buffers for task in stretch.tasks]
        self._frees: list[tuple[int, int]] = []
        for i, touched in enumerate(self._touched):
            for b in touched:
                self._first[b] = min(self._first[b], i)
                self._last[b] = max(self._last[b], i)
                self._uses[b] += 1
        # Bytes at each place of the program order, per memory.
        self._rest = [np.zeros(n + 1, np.int64) for _ in stretch.capacities]
        for b, buffer in enumerate(stretch.buffers):
            if buffer.entering:
                self._used[buffer.memory] += buffer.size_bytes
            self._rest[buffer.memory][self._first[b] : self._last[b] + 1] += buffer.size_bytes
        self._finish = [0] * len(stretch.buffers)

    @property
    def next_free(self) -> int:
        return self._frees[0][0] if self._frees else NEVER

    def free(self) -> None:
        """Give back the buffer that is finished with next."""
        _, b = heapq.heappop(self._frees)
        self._used[self._buffers[b].memory] -= self._buffers[b].size_bytes

    def takes(self, task: int) -> bool:
        """Whether the command is the first to touch a buffer."""
        return any(not self._held[b] for b in self._touched[task])

    def fits(self, task: int, place: int) -> bool:
        """Whether the command may start now; `place` is the first one still to be scheduled."""
        needed = [0] * len(self._capacities)
        first = place
        for b in self._touched[task]:
            if not self._held[b]:
                needed[self._buffers[b].memory] += self._buffers[b].size_bytes
                first = max(first, self._first[b])
        for memory, size in enumerate(needed):
            if not size:
                continue
            limit = self._limits[memory] if first > place else self._capacities[memory]
            if self._used[memory] + size > limit:
                return False
            if first > place and not self._daring:
                most = int(self._rest[memory][place:first].max())
                if most + size > limit:
                    return False
        return True

    def start(self, task: int, place: int, finish: int) -> None:
        """Take what the command needs; note what nobody needs after it."""
        for b in self._touched[task]:
            buffer = self._buffers[b]
            if not self._held[b]:
                self._held[b] = True
                self._used[buffer.memory] += buffer.size_bytes
                self._rest[buffer.memory][place : self._first[b]] += buffer.size_bytes
            self._finish[b] = max(self._finish[b], finish)
            self._uses[b] -= 1
            if self._uses[b] == 0:
                heapq.heappush(self._frees, (self._finish[b], b))
                self._rest[buffer.memory][place : self._last[b] + 1] -= buffer.size_bytes


_Queue = list[tuple[int, int]]
"""A heap of (rank or cycle, command)."""


class _Run:
    """One run; ranks order the commands by urgency, 0 first."""

    def __init__(self, stretch: Stretch, policy: Policy, urgency: Sequence[float]) -> None:
        tasks = stretch.tasks
        n = len(tasks)
        self.tasks, self.policy = tasks, policy
        self.memories = _Memories(stretch, policy)
        self.rank = [0] * n
        for rank, i in enumerate(sorted(range(n), key=lambda i: (-urgency[i], i))):
            self.rank[i] = rank
        self.followers: list[list[int]] = [[] for _ in tasks]
        self.missing = [len(task.after) for task in tasks]
        for i, task in enumerate(tasks):
            for j in task.after:
                self.followers[j].append(i)
        self.ready = [0] * n
        self.starts = [-1] * n
        self.order: list[int] = []
        self.place = 0
        self.now = 0
        self.free = [0] * CONTEXTS
        self.vector_free = 0
        self.waiting: list[_Queue] = [[] for _ in range(CONTEXTS)]
        """Commands whose predecessors are scheduled but not finished: (when they are, command)."""
        self.open: list[tuple[_Queue, ...]] = [([], [], [], []) for _ in range(CONTEXTS)]
        """Ready commands: without and with new buffers, then those with the vector unit."""
        self.is_open = [False] * n
        for i in range(n):
            if not self.missing[i]:
                heapq.heappush(self.waiting[tasks[i].context], (0, i))

    def run(self) -> Plan | None:
        end = 0
        while len(self.order) < len(self.tasks):
            start, i, blocked = self._best()
            free = self.memories.next_free
            if start == free == NEVER:
                assert self.policy.daring, "memory has run full for good"
                return None
            if free <= start and free != NEVER:
                self._release(start, blocked)
            elif self.is_open[i]:
                end = max(end, self._start(i, start))
            else:
                self.now = start
        return Plan(tuple(self.order), tuple(self.starts), end)

    def _release(self, start: int, blocked: bool) -> None:
        """Free memory that is due: one buffer if a command waits for it, else all up to `start`."""
        while self.memories.next_free <= start:
            if blocked:
                self.now = max(self.now, self.memories.next_free)
            self.memories.free()
            if blocked:
                return

    def _best(self) -> tuple[int, int, bool]:
        """(start, command, whether memory keeps one from starting) of what can start first."""
        best, blocked = (NEVER, NEVER, -1), False
        for context in sorted(range(CONTEXTS), key=self.free.__getitem__):
            start = max(self.free[context], self.now)
            if start > best[0]:
                break  # nor can the contexts that are free even later start before the best
            self._open_ready(context, start)
            found = (NEVER, NEVER, -1)
            for kind, queue in enumerate(self.open[context]):
                i = self._head(queue)
                if i >= 0 and kind & 1 and not self.memories.fits(i, self.place):
                    blocked = True
                    i = self.place
                    if (
                        not self.is_open[i]
                        or self.tasks[i].context != context
                        or self.tasks[i].vector_unit != (kind >= 2)
                        or not self.memories.fits(i, i)
                    ):
                        continue
                if i >= 0:
                    found = min(found, (self._earliest(i, start), self.rank[i], i))
            found = self._patient(context, found)
            if found[2] < 0 and self.waiting[context]:
                ready, i = self.waiting[context][0]
                found = (ready, self.rank[i], i)
            best = min(best, found)
        return best[0], best[2], blocked

    def _open_ready(self, context: int, start: int) -> None:
        waiting = self.waiting[context]
        while waiting and waiting[0][0] <= start:
            _, i = heapq.heappop(waiting)
            self.is_open[i] = True
            kind = 2 * self.tasks[i].vector_unit + self.memories.takes(i)
            heapq.heappush(self.open[context][kind], (self.rank[i], i))

    def _head(self, queue: _Queue) -> int:
        while queue and self.starts[queue[0][1]] >= 0:
            heapq.heappop(queue)
        return queue[0][1] if queue else -1

    def _earliest(self, i: int, start: int) -> int:
        if self.tasks[i].vector_unit:
            start = max(start, self.vector_free)
        if self.tasks[i].blocking_cycles:
            start = max(start, *self.free)
        return start

    def _patient(self, context: int, found: tuple[int, int, int]) -> tuple[int, int, int]:
        """Rather a more urgent command that is ready soon than a long one now."""
        patience = self.policy.patience_cycles
        if not patience or found[2] < 0 or not self.waiting[context]:
            return found
        ready, i = self.waiting[context][0]
        soon = ready <= found[0] + patience
        if soon and self.rank[i] < found[1] and self.tasks[found[2]].cycles > patience:
            return (ready, self.rank[i], i)
        return found

    def _start(self, i: int, start: int) -> int:
        """Schedule the command; returns when it finishes."""
        task = self.tasks[i]
        finish = start + task.cycles
        self.now = max(self.now, start)
        self.starts[i] = start
        self.order.append(i)
        if task.vector_unit:
            self.vector_free = finish
        if task.blocking_cycles:
            self.free = [max(free, start + task.blocking_cycles) for free in self.free]
        self.free[task.context] = finish
        while self.place < len(self.tasks) and self.starts[self.place] >= 0:
            self.place += 1
        self.memories.start(i, self.place, finish)
        for j in self.followers[i]:
            self.ready[j] = max(self.ready[j], finish)
            self.missing[j] -= 1
            if not self.missing[j]:
                heapq.heappush(self.waiting[self.tasks[j].context], (self.ready[j], j))
        return finish
