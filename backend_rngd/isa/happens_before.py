"""What has certainly finished when a command starts, on its own rank and on the others.

All ranks run the same commands, and partners are named by the bits in which their numbers differ.
So what rank r knows of rank `r ^ p` is what any rank knows of its own `p`, and one vector clock for
all ranks says how many commands of each context the rank `p` away has finished.

A signal to peers carries its sender's clock. Seen from the receiver the sender is `p` away, and who
is `q` away from the sender is `p ^ q` away from the receiver. A command of a group starts when all
its ranks are ready and ends on all of them at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from ... import errors
from .expand import Issued
from .instructions import Context, Dma, Exec, Head, Wait
from .rank_rules import partners

CONTEXTS = len(Context)
BEGUN = CONTEXTS
"""Place in a rank's part of a clock that says whether it has begun the call."""
WIDTH = CONTEXTS + 1
Clock = tuple[int, ...]
"""WIDTH counts for each rank of a `Neighbours`."""
Name = Callable[[int], str]
"""What errors call a command, by its place in the call."""


class Neighbours:
    """The ranks that can know of each other, as masks: partners, their partners, and so on."""

    def __init__(self, partner_masks: Iterable[int]) -> None:
        masks = {0}
        for mask in partner_masks:
            masks |= {other ^ mask for other in masks}
        self.masks = sorted(masks)
        self.place = {mask: i * WIDTH for i, mask in enumerate(self.masks)}
        """Where in a clock the counts of the rank with that mask begin."""
        self._orders = {
            mask: tuple(
                self.place[other ^ mask] + column for other in self.masks for column in range(WIDTH)
            )
            for mask in self.masks
        }

    @staticmethod
    def of(issued: Sequence[Issued]) -> Neighbours:
        return Neighbours({mask for c in _distinct(issued) for mask, _ in partners(c)})

    def beginning(self) -> list[int]:
        """The clock of a call's start: the rank itself has begun."""
        clock = [0] * (len(self.masks) * WIDTH)
        clock[BEGUN] = 1
        return clock

    def seen_from(self, mask: int, clock: Sequence[int]) -> Sequence[int]:
        """The clock of the rank `mask` away in terms of this rank."""
        return [clock[i] for i in self._orders[mask]] if mask else clock


def _distinct(issued: Sequence[Issued]) -> Iterable[Exec | Dma]:
    return {id(i.command): i.command for i in issued}.values()


def group_masks(issued: Issued) -> range:
    """The ranks that run a command together."""
    command = issued.command
    return range(1 << command.group) if isinstance(command, Exec) else range(1)


@dataclass
class Order:
    """The clocks of a call's commands in program order."""

    neighbours: Neighbours
    clocks: list[Clock]
    """When each command starts."""
    positions: list[int]
    """Each command's number within its context."""
    end: Clock
    """When the call ends: what its rank then knows."""
    imbalance: errors.SimulationFault | None = None
    """The first semaphore that a fence finds not at zero."""

    def finished(self, first: int, context: Context, mask: int, second: int) -> bool:
        """Whether the rank `mask` away has finished command `first` when `second` starts."""
        known = self.clocks[second][self.neighbours.place[mask] + context]
        return known > self.positions[first]


def happens_before(issued: Sequence[Issued], at: str, name: Name | None = None) -> Order:
    """The order of a call's commands; `name` says in errors which command is meant.

    Raises: SIM004, SIM006.
    """
    walk = _Walk(issued, at, name or (lambda i: f"entry {issued[i].entry}"))
    for i, command in enumerate(issued):
        walk.visit(i, command)
    walk.fence()
    end = tuple(walk.running[0])
    return Order(walk.neighbours, walk.clocks, walk.positions, end, walk.semaphores.imbalance)


class _Walk:
    """The contexts' clocks while a call's commands go by in program order."""

    def __init__(self, issued: Sequence[Issued], at: str, name: Name) -> None:
        self.neighbours = Neighbours.of(issued)
        self.semaphores = _Semaphores(at, issued, name)
        self.clocks: list[Clock] = []
        self.positions: list[int] = []
        self.running = [self.neighbours.beginning() for _ in range(CONTEXTS)]
        """For each context, what is known when its last command has finished."""
        self._issued = issued
        self._counts = [0] * CONTEXTS
        self._stretch = 0

    def visit(self, i: int, issued: Issued) -> None:
        if issued.stretch != self._stretch:
            self._stretch = issued.stretch
            self.fence()
        context = issued.context
        clock = self.running[context]
        for wait in issued.command.head.waits:
            for peer in wait.peers or (0,):
                sender = self.semaphores.take(wait, peer, i)
                _join(clock, self.neighbours.seen_from(peer, self._after(sender)))
        ready = list(clock)
        for mask in group_masks(issued)[1:]:
            _join(clock, self.neighbours.seen_from(mask, ready))
        self.clocks.append(tuple(clock))
        self.positions.append(self._counts[context])
        self._counts[context] += 1
        self.running[context] = self._after(i)
        self.semaphores.signal(i)

    def _after(self, i: int) -> list[int]:
        """The clock when command i has finished, and not only what came before it."""
        clock = list(self.clocks[i])
        for mask in group_masks(self._issued[i]):
            clock[self.neighbours.place[mask] + self._issued[i].context] = self.positions[i] + 1
        return clock

    def fence(self) -> None:
        """All that came before has finished; other ranks need not have come so far."""
        self.semaphores.clear()
        joined = list(self.running[0])
        for clock in self.running[1:]:
            _join(joined, clock)
        self.running = [list(joined) for _ in range(CONTEXTS)]


def _join(clock: list[int], other: Sequence[int]) -> None:
    clock[:] = map(max, clock, other)


@dataclass
class _Counter:
    """Signals of one semaphore from one sender, in program order."""

    sent: list[int] = field(default_factory=list)
    """Who signalled."""
    waited: list[int] = field(default_factory=list)
    """Who waited."""
    taken: int = 0


class _Semaphores:
    """Signals sent and taken, in program order, each sender's apart."""

    def __init__(self, at: str, issued: Sequence[Issued], name: Name) -> None:
        self._at = at
        self._issued = issued
        self._name = name
        self._counters: dict[tuple[int, int], _Counter] = {}
        self.imbalance: errors.SimulationFault | None = None
        """The first semaphore that was not at zero when `clear` was called."""

    def signal(self, index: int) -> None:
        for semaphore, peer in sent_signals(self._issued[index].command.head):
            counter = self._counter(semaphore, peer)
            self._owned(counter.sent, semaphore, index, "signal")
            counter.sent.append(index)

    def take(self, wait: Wait, peer: int, index: int) -> int:
        """Index of the command whose signal ends the wait."""
        counter = self._counter(wait.semaphore, peer)
        self._owned(counter.waited, wait.semaphore, index, "wait for")
        needed = counter.taken + wait.count
        if needed > len(counter.sent):
            if self.imbalance is not None:  # a fence took what it waits for
                raise self.imbalance
            sent = len(counter.sent)
            other = self._sender(wait.semaphore, peer, index)
            raise errors.deadlock(self._at, self._name(index), wait.semaphore, needed, sent, other)
        counter.taken = needed
        counter.waited.append(index)
        return counter.sent[needed - 1]

    def _sender(self, semaphore: int, peer: int, waiting: int) -> str:
        """Who on the sender's side could end a wait that nothing ends."""
        later = [
            i
            for i in range(waiting, len(self._issued))
            if (semaphore, peer) in sent_signals(self._issued[i].command.head)
        ]
        sent = self._counter(semaphore, peer).sent
        who = rank_name(peer)
        if later:
            return f"{who} signals it in {self._name(later[0])}, which does not come before"
        if sent:
            return f"{who} signals it last in {self._name(sent[-1])}"
        return f"no command of {who} signals it"

    def _counter(self, semaphore: int, peer: int) -> _Counter:
        return self._counters.setdefault((semaphore, peer), _Counter())

    def _owned(self, before: Sequence[int], semaphore: int, index: int, role: str) -> None:
        """Raises: SIM004."""
        if before and self._issued[before[0]].context != self._issued[index].context:
            contexts = (self._issued[i].context.name.lower() for i in (before[0], index))
            raise errors.semaphore_shared(self._at, semaphore, role, *contexts)

    def clear(self) -> None:
        """Forget signals that nobody took, and remember that there were any."""
        for (semaphore, peer), counter in self._counters.items():
            if len(counter.sent) != counter.taken:
                self.imbalance = self.imbalance or errors.semaphore_unbalanced(
                    self._at,
                    semaphore,
                    len(counter.sent),
                    counter.taken,
                    self._sides(peer, counter),
                )
                counter.taken = len(counter.sent)

    def _sides(self, peer: int, counter: _Counter) -> str:
        """The last command on each side of a semaphore."""
        signalling = self._name(counter.sent[-1])
        waiting = self._name(counter.waited[-1]) if counter.waited else "no command"
        return f"{rank_name(peer)} signals last in {signalling}; waiting last: {waiting}"


def rank_name(mask: int) -> str:
    """The rank with these other bits, as errors name it."""
    return f"rank r ^ {mask}" if mask else "the rank itself"


def sent_signals(head: Head) -> tuple[tuple[int, int], ...]:
    """(semaphore, who gets it) of a command's signals; by symmetry also who I get it from."""
    return (
        *((semaphore, 0) for semaphore in head.signals),
        *((signal.semaphore, peer) for signal in head.peer_signals for peer in signal.peers),
    )
