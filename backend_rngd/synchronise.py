"""The `synchronise` pass: explicit order between the contexts.

Before: commands in their final order, with addresses, without waits and signals.
After:  each command waits for the latest earlier command of each other context that it conflicts
        with, unless other waits, its own or earlier ones, already cover that.
        At level 0 each command also waits for the one before it, at level 1 each kernel for the
        one before it, so that nothing overlaps that the plan keeps apart.
Contract: bitwise; values do not depend on it. It writes the order down, it does not reorder.

Iterations of a repeat are fenced, so a stretch of commands between two fences is ordered on its
own. Semaphore P · 3 + Q carries the signals from context P to context Q.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from xdsl.context import Context as XdslContext
from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import Block
from xdsl.passes import ModulePass

from .encode import Registers, resolve
from .isa.expand import Issued
from .isa.instructions import Context, Head, Wait
from .isa.ordering import NEVER, dependencies
from .rngd import BlockOp, CommandAttr, DmaOp, ExecOp, RepeatOp
from .schedule import check_level, groups


def semaphore(signalling: Context, waiting: Context) -> int:
    """The semaphore that carries signals from one context to another."""
    return int(signalling) * len(Context) + int(waiting)


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


def order(commands: list[ExecOp | DmaOp], issued: list[Issued], level: int) -> None:
    """Give `commands` the waits and signals that keep conflicting ones and groups apart."""
    waits: dict[int, list[Wait]] = {}
    signals: dict[int, list[int]] = {}
    for i, needed in enumerate(_needed(issued, groups(commands, level))):
        for j in needed:
            shared = semaphore(issued[j].context, issued[i].context)
            waits.setdefault(i, []).append(Wait(shared, 1))
            signals.setdefault(j, []).append(shared)
    for i, op in enumerate(commands):
        head = Head(issued[i].context, tuple(waits.get(i, ())), tuple(signals.get(i, ())))
        op.command = CommandAttr(replace(op.command.data, head=head))


def _needed(issued: list[Issued], bounds: Sequence[tuple[int, int]]) -> Iterator[list[int]]:
    """For each command, the commands that it has to wait for; `bounds` are those of the groups.

    `known[context]` is, per context, the latest command that has finished whenever the next
    command of `context` starts.
    """
    known = {context: [NEVER] * len(Context) for context in Context}
    at_start: list[list[int]] = []
    earlier = _last_of_earlier_groups(issued, bounds)
    for i, (conflicting, barrier) in enumerate(zip(dependencies(issued), earlier, strict=True)):
        latest = [max(pair) for pair in zip(conflicting, barrier, strict=True)]
        own = known[issued[i].context]
        wanted = [j for context, j in enumerate(latest) if j > own[context]]
        needed = [
            j
            for j in wanted
            if not any(at_start[k][issued[j].context] >= j for k in wanted if k != j)
        ]
        for j in needed:
            own[:] = map(max, own, at_start[j])
            own[issued[j].context] = max(own[issued[j].context], j)
        at_start.append(list(own))
        own[issued[i].context] = i
        yield needed


def _last_of_earlier_groups(
    issued: list[Issued], bounds: Sequence[tuple[int, int]]
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
        for block in op.ops:
            if isinstance(block, BlockOp):
                registers = Registers(block)
                for commands in stretches(block.body.block):
                    order(
                        commands, [resolve(command, registers) for command in commands], self.level
                    )
