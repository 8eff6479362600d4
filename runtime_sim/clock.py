"""When each command of a block starts and ends: queues, signals, shared units, fences.

A command starts when the one before it in its queue has finished, its signals have arrived and the
units that it shares with other queues are free; who comes first in the program takes a unit first.
Iterations of a repeat are fenced, so one is simulated and the others are its copies.

All ranks go in step, so one rank's clock is everybody's. A transfer into another rank's memory is
a message: the engine is free when it has sent it, but a card delivers messages one after the other,
a round of one from each rank. A signal to another rank never overtakes messages before it.

The clock also remembers what each command waited for. From the last finish back to the start that
is the critical path: the commands whose lengths add up to the block's.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from .. import errors
from ..backend_rngd.isa.happens_before import rank_name
from ..backend_rngd.isa.instructions import Context

SIGNAL, PEER_SIGNAL, MESSAGE = -1, -2, -3
"""Stand for the way of a signal, or of a round of messages, where costs have numbers."""
Link = tuple[int, int]
"""A piece of the critical path: (row of the provenance table, number of the cost or of a way)."""
Point = tuple[float, Link | None, "Point | None"]
"""A moment, what ended then, and the moment at which that began."""
START: Point = (0, None, None)


class Exchange(Enum):
    """What a command has to do with other ranks' memories."""

    NONE = 0
    PUSH = 1
    """Sends, and goes on while the bytes are on their way."""
    PULL = 2
    """Fetches, and ends when the bytes have come."""


@dataclass(frozen=True)
class Latencies:
    """Cycles of what no engine does."""

    signal: int
    peer_signal: int
    messages: int
    """Until the last message of a round has arrived, one from each rank."""


@dataclass(frozen=True)
class Command:
    """What the clock needs to know of an entry of the issue list."""

    entry: int
    context: int
    cycles: int
    vector_unit: bool
    blocking_cycles: int
    starves_dma: bool
    waits: tuple[tuple[int, int, int], ...]
    """(semaphore, sender, count): ranks are alike, so a peer's signal is my own to that peer."""
    signals: tuple[tuple[int, int], ...]
    """(semaphore, receiver)"""
    link: Link
    """Its row of the provenance table and the number of its cost."""
    message: Exchange = Exchange.NONE


@dataclass(frozen=True)
class Repeat:
    count: int
    body: Nodes


Nodes = tuple[Command | Repeat, ...]


@dataclass(frozen=True)
class Event:
    """One run of a command, in cycles from the start of the block."""

    command: Command
    start: int
    end: int
    waits_for: tuple[int, ...]
    """How many runs ago the commands were issued whose signals it took."""


@dataclass(frozen=True)
class Loop:
    """Events of a repeat's first iteration; each later one comes `period` cycles on."""

    count: int
    period: int
    events: Events


Events = tuple[Event | Loop, ...]


class Clock:
    """The queues' state while a block's commands go by in program order.

    A cycle belongs to the oldest unfinished command, so a command gets the cycles by which it
    moves the latest finish of all commands up to it.
    """

    def __init__(self, name: str, n_rows: int, latencies: Latencies) -> None:
        self.attributed = [0] * n_rows
        """Cycles of each row of the provenance table."""
        self.path: Counter[Link] = Counter()
        """How often each piece stands on the critical path up to the last fence."""
        self._name = name
        self._latencies = latencies
        self._free = [START] * len(Context)
        """When each queue's last command has finished."""
        self._vector_free = START
        """When the last command with the vector engine has finished."""
        self._delivered = START
        """When the last message has arrived."""
        self._signals: dict[tuple[int, int], deque[tuple[Point, Command, int]]] = {}
        """When each signal that nobody has taken yet was sent, by what and by which run."""
        self._end = START
        self._events: list[Event | Loop] = []
        self._runs = 0

    @property
    def end(self) -> int:
        """The latest finish so far."""
        return int(self._end[0])

    @property
    def events(self) -> Events:
        return tuple(self._events)

    def run(self, nodes: Nodes) -> None:
        """Raises: SIM005, SIM006."""
        for node in nodes:
            if isinstance(node, Repeat):
                self._run_repeat(node)
            else:
                self._run_command(node)

    def fence(self) -> None:
        """Let every queue finish. Raises: SIM005 when a signal has not been taken."""
        for (semaphore, peer), sent in self._signals.items():
            if sent:
                sides = f"{rank_name(peer)} signals last in entry {sent[-1][1].entry}"
                raise errors.semaphore_unbalanced(self._name, semaphore, len(sent), 0, sides)
        point: Point | None = self._end
        while point is not None:
            if point[1] is not None:
                self.path[point[1]] += 1
            point = point[2]
        self._restart(self.end)

    def _restart(self, time: int) -> None:
        self._end = (time, None, None)
        self._free = [self._end] * len(Context)
        self._vector_free = self._end
        self._delivered = self._end

    def _run_command(self, command: Command) -> None:
        cause, waits_for = self._signalled(command)
        if command.vector_unit:
            cause = _later(cause, self._vector_free)
        if command.blocking_cycles or command.starves_dma:
            cause = _later(cause, self._free[Context.DMA])
        if command.blocking_cycles:
            cause = _later(cause, self._free[Context.SUB])
        start = cause[0]
        finish: Point = (start + command.cycles, command.link, cause)
        if command.message != Exchange.NONE:
            sent = _later(finish, self._delivered)
            way = (command.link[0], MESSAGE)
            self._delivered = (sent[0] + self._latencies.messages, way, sent)
        if command.message == Exchange.PULL:
            finish = self._delivered
        if command.blocking_cycles:
            loaded: Point = (start + command.blocking_cycles, None, cause)
            self._free[Context.SUB] = self._free[Context.DMA] = loaded
        if command.starves_dma:
            self._free[Context.DMA] = finish
        if command.vector_unit:
            self._vector_free = finish
        self._free[command.context] = finish
        for semaphore, peer in command.signals:
            point = _later(finish, self._delivered) if peer else finish
            sent_before = self._signals.setdefault((semaphore, peer), deque())
            sent_before.append((point, command, self._runs))
        self._events.append(Event(command, int(start), int(finish[0]), waits_for))
        self._runs += 1
        if finish[0] > self._end[0]:
            self.attributed[command.link[0]] += int(finish[0] - self._end[0])
            self._end = finish

    def _signalled(self, command: Command) -> tuple[Point, tuple[int, ...]]:
        """What it waits for last, and how many runs ago its signals were sent. Raises: SIM006."""
        cause = self._free[command.context]
        waits_for: list[int] = []
        for semaphore, peer, count in command.waits:
            sent = self._signals.get((semaphore, peer), deque())
            if len(sent) < count:
                waiting, sender = f"entry {command.entry}", f"{rank_name(peer)} would signal it"
                raise errors.deadlock(self._name, waiting, semaphore, count, len(sent), sender)
            for _ in range(count):
                point, _, run = sent.popleft()
                waits_for.append(self._runs - run)
                latency = self._latencies.peer_signal if peer else self._latencies.signal
                arrival = point[0] + latency
                if arrival > cause[0]:
                    way = PEER_SIGNAL if peer else SIGNAL
                    cause = (arrival, (command.link[0], way), point)
        return cause, tuple(waits_for)

    def _run_repeat(self, repeat: Repeat) -> None:
        """Simulate one iteration; fences make the others its copies."""
        self.fence()
        start, before = self.end, list(self.attributed)
        path, self.path = self.path, Counter()
        events, self._events = self._events, []
        self.run(repeat.body)
        self.fence()
        period = self.end - start
        events.append(Loop(repeat.count, period, self.events))
        self._events = events
        self.path = _plus(path, self.path, repeat.count)
        self._restart(self.end + (repeat.count - 1) * period)
        for row, earlier in enumerate(before):
            self.attributed[row] += (repeat.count - 1) * (self.attributed[row] - earlier)


def _later(left: Point, right: Point) -> Point:
    return right if right[0] > left[0] else left


def _plus(left: Counter[Link], right: Mapping[Link, int], times: int) -> Counter[Link]:
    for link, count in right.items():
        left[link] += times * count
    return left
