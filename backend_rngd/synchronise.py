"""The `synchronise` pass: explicit order between the contexts.

Before: commands in their final order, with addresses, without waits and signals.
After:  each command waits for the latest earlier command of each other context that it conflicts
        with, unless other waits, its own or earlier ones, already cover that.
        At level 0 each command also waits for the one before it, at level 1 each kernel for the
        one before it, so that nothing overlaps that the plan keeps apart.
Contract: bitwise; values do not depend on it. It writes the order down, it does not reorder.

A push into a peer's memory is, by symmetry, also the peer's push into this rank's: as that it waits
for the commands here that it conflicts with, and later ones wait for it. Its signals and those to
it go to the peer.

Iterations of a repeat are fenced, so a stretch of commands between two fences is ordered on its
own. Semaphore P · 3 + Q carries the signals from context P to context Q, and semaphore
9 + P · 3 + Q those to context Q of another rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from xdsl.context import Context as XdslContext
from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import Block
from xdsl.passes import ModulePass

from .. import errors
from ..ir.provenance import describe
from .encode import Registers, resolve
from .isa.expand import Issued
from .isa.instructions import Context, Head, PeerSignal, Wait
from .isa.ordering import (
    NEVER,
    UNBOUND,
    Node,
    accesses,
    latest_conflicts,
    peer_accesses,
    peer_of,
)
from .isa.record_types import MAX_SIGNALS, MAX_WAITS
from .rngd import BlockOp, CommandAttr, DmaOp, ExecOp, RepeatOp, ranks_of
from .schedule import check_level, groups


def semaphore(signalling: Context, waiting: Context, *, of_peer: bool = False) -> int:
    """The semaphore that carries signals from one context to another."""
    contexts = len(Context)
    return (contexts * of_peer + int(signalling)) * contexts + int(waiting)


def stretches(block: Block) -> Iterator[list[ExecOp | DmaOp]]:
    """Commands between fences, in program order."""
    current: list[ExecOp | DmaOp] = []
    for op in block.ops:
        if isinstance(op, ExecOp | DmaOp):
            current.append(op)
        elif isinstance(op, RepeatOp):
            yield current
            current = []
            yield from stretches(op.body.block)
    yield current


def order(commands: list[ExecOp | DmaOp], issued: list[Issued], level: int, ranks: int) -> None:
    """Give `commands` the waits and signals that keep conflicting ones and groups apart."""
    heads = [_Head(command.context) for command in issued]
    nodes = list(_nodes(issued, ranks))
    pairs = [
        (node, other)
        for node, needed in zip(nodes, _needed(issued, nodes, groups(commands, level)), strict=True)
        for other in needed
    ]

    def name(number: int) -> str:
        return describe(commands[number])

    # Signals to peers first: what this rank's contexts wait for, a later command can tell them.
    pairs.sort(key=lambda pair: pair[0].mask == pair[1].mask)
    taken: set[tuple[Context, int, int]] = set()
    wanted: dict[int, list[_Signal]] = {}
    for node, other in pairs:
        head, peer = heads[node.command], node.mask ^ other.mask
        signalling = _signaller(issued, heads, other, node, name)
        number = semaphore(heads[signalling].context, head.context, of_peer=peer != 0)
        # A peer's push signals once: that it has arrived, and that its source is free.
        signal = head.context, signalling, peer
        if signal not in taken:
            taken.add(signal)
            sent = _Signal(signalling, number, peer)
            heads[signalling].signal(sent)
            wanted.setdefault(node.command, []).append(sent)
    # Commands in their order, each with the latest signals first: others can be waited for earlier.
    for command, signals in sorted(wanted.items()):
        for sent in sorted(signals, reverse=True):
            heads[_waiter(issued, heads, command, sent, name)].wait(sent)
    for op, head in zip(commands, heads, strict=True):
        op.command = CommandAttr(replace(op.command.data, head=head.built()))


def _signaller(
    issued: Sequence[Issued],
    heads: Sequence[_Head],
    finished: Node,
    waiting: Node,
    name: Callable[[int], str],
) -> int:
    """Which command says that `finished` has finished: it, or a later one of its context.

    A command has few signals. A later one of its context starts when the ones before it have
    finished; but that a push has arrived, only the push itself can say.
    Raises: BCK007 if none of them has a signal left.
    """
    context, to = issued[finished.command].context, heads[waiting.command].context
    number = semaphore(context, to, of_peer=finished.mask != waiting.mask)
    for i in range(finished.command, finished.command + 1 if finished.mask else waiting.command):
        if issued[i].context == context and heads[i].can_signal(number):
            return i
    raise errors.no_signal_left(
        name(finished.command), name(waiting.command), str(to.name).lower(), MAX_SIGNALS
    )


def _waiter(
    issued: Sequence[Issued],
    heads: Sequence[_Head],
    command: int,
    sent: _Signal,
    name: Callable[[int], str],
) -> int:
    """Which command waits for a signal: this one, or an earlier one of its context.

    A command has few waits. Those of a context start in order, so an earlier one can wait for it;
    but not before the one that signals, in the program's order, or both might wait for ever.
    Raises: BCK008 if none of them has a wait left.
    """
    for i in range(command, sent.command, -1):
        if issued[i].context == issued[command].context and heads[i].can_wait(sent, i == command):
            return i
    raise errors.no_wait_left(name(command), name(sent.command), MAX_WAITS)


class _Signal(NamedTuple):
    """What a command sends when it has finished."""

    command: int
    semaphore: int
    peer: int
    """In which bits the rank differs that gets it and, by symmetry, sends its own; 0 for none."""


@dataclass
class _Head:
    """What a command waits for and signals; partners are named by the bits in which they differ."""

    context: Context
    waits: dict[int, set[int]] = field(default_factory=dict)
    """Who sends the signals, by semaphore."""
    signals: dict[int, set[int]] = field(default_factory=dict)
    """Who gets them, by semaphore."""

    def can_signal(self, semaphore: int) -> bool:
        """Whether it does, or has a signal left."""
        return semaphore in self.signals or len(self.signals) < MAX_SIGNALS

    def signal(self, sent: _Signal) -> None:
        """Let this command send it."""
        self.signals.setdefault(sent.semaphore, set()).add(sent.peer)

    def can_wait(self, sent: _Signal, for_itself: bool) -> bool:
        """Whether it has a wait left; for another command, one that it does not use itself."""
        senders = self.waits.get(sent.semaphore)
        if senders is None:
            return len(self.waits) < MAX_WAITS
        return for_itself or sent.peer not in senders

    def wait(self, sent: _Signal) -> None:
        """Let this command wait for it."""
        self.waits.setdefault(sent.semaphore, set()).add(sent.peer)

    def built(self) -> Head:
        peers = {number: tuple(sorted(who - {0})) for number, who in self.signals.items()}
        return Head(
            self.context,
            tuple(
                Wait(number, 1, tuple(sorted(who - {0})))
                for number, who in sorted(self.waits.items())
            ),
            tuple(number for number, who in sorted(peers.items()) if not who),
            peer_signals=tuple(
                PeerSignal(number, who) for number, who in sorted(peers.items()) if who
            ),
        )


def _nodes(issued: Sequence[Issued], ranks: int) -> Iterator[Node]:
    """Who touches a rank's memory, in program order: its commands, and its peers' pushes."""
    columns: dict[int, int] = {}
    for i, command in enumerate(issued):
        varies = any(address.rank_stride for address in command.addresses)
        cases = range(ranks if varies else 1)
        own = dict.fromkeys(a for rank in cases for a in accesses(command, UNBOUND, rank))
        yield Node(i, command.context, 0, tuple(own))
        peer = peer_of(command)
        if peer:
            column = columns.setdefault(peer, len(Context) + len(columns))
            yield Node(i, column, peer, peer_accesses(command, UNBOUND, 0))


def _needed(
    issued: Sequence[Issued], nodes: Sequence[Node], bounds: Sequence[tuple[int, int]]
) -> Iterator[list[Node]]:
    """For each node, the nodes that it has to wait for; `bounds` are those of the groups.

    `known[column]` is, per column, the latest command that has finished whenever the next
    node of `column` starts.
    """
    columns = 1 + max(len(Context) - 1, *(node.column for node in nodes)) if nodes else 0
    known = [[NEVER] * columns for _ in range(columns)]
    at_start: dict[tuple[int, int], list[int]] = {}
    node_at = {(node.command, node.column): node for node in nodes}
    conflicts = latest_conflicts(nodes, columns).tolist()
    barriers = list(_last_of_earlier_groups(issued, bounds))
    for node, conflicting in zip(nodes, conflicts, strict=True):
        latest = [*conflicting]
        if not node.mask:
            latest[: len(Context)] = map(max, conflicting, barriers[node.command])
        latest[node.column] = NEVER
        own = known[node.column]
        wanted = [(j, column) for column, j in enumerate(latest) if j > own[column]]
        needed = [
            (j, column)
            for j, column in wanted
            if not any(at_start[other][column] >= j for other in wanted if other != (j, column))
        ]
        for j, column in needed:
            own[:] = map(max, own, at_start[j, column])
            own[column] = max(own[column], j)
        at_start[node.command, node.column] = list(own)
        own[node.column] = node.command
        yield [node_at[key] for key in needed]


def _last_of_earlier_groups(
    issued: Sequence[Issued], bounds: Sequence[tuple[int, int]]
) -> Iterator[list[int]]:
    """For each command, the last command of each other context before its group."""
    last = [NEVER] * len(Context)
    for first, end in bounds:
        barrier = list(last)
        for i in range(first, end):
            own = int(issued[i].context)
            yield [NEVER if context == own else j for context, j in enumerate(barrier)]
            last[own] = i


@dataclass(frozen=True)
class SynchronisePass(ModulePass):
    """Write the order between contexts into the commands."""

    name = "synchronise"

    level: int = 2
    """As for `schedule`."""

    def __post_init__(self) -> None:
        check_level(self.level)

    def apply(self, ctx: XdslContext, op: ModuleOp) -> None:
        ranks = ranks_of(op)
        for block in op.ops:
            if isinstance(block, BlockOp):
                registers = Registers(block)
                for commands in stretches(block.body.block):
                    issued = [resolve(command, registers) for command in commands]
                    order(commands, issued, self.level, ranks)
