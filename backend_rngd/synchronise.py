"""The `synchronise` pass: explicit order between the contexts.

Before: commands in their final order, with addresses, without waits and signals.
After:  each command waits for the latest earlier command of each other context that it conflicts
        with, unless other waits, its own or earlier ones, already cover that.
Contract: bitwise; values do not depend on it. It writes the order down, it does not reorder.

Iterations of a repeat are fenced, so a stretch of commands between two fences is ordered on its
own. Semaphore P · 3 + Q carries the signals from context P to context Q.
"""

from __future__ import annotations

from collections.abc import Iterator
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


def order(commands: list[ExecOp | DmaOp], issued: list[Issued]) -> None:
    """Give `commands` the waits and signals that keep conflicting ones apart."""
    waits: dict[int, list[Wait]] = {}
    signals: dict[int, list[int]] = {}
    for i, needed in enumerate(_needed(issued)):
        for j in needed:
            shared = semaphore(issued[j].context, issued[i].context)
            waits.setdefault(i, []).append(Wait(shared, 1))
            signals.setdefault(j, []).append(shared)
    for i, op in enumerate(commands):
        head = Head(issued[i].context, tuple(waits.get(i, ())), tuple(signals.get(i, ())))
        op.command = CommandAttr(replace(op.command.data, head=head))


def _needed(issued: list[Issued]) -> Iterator[list[int]]:
    """For each command, the commands that it has to wait for.

    `known[context]` is, per context, the latest command that has finished whenever the next
    command of `context` starts.
    """
    known = {context: [NEVER] * len(Context) for context in Context}
    at_start: list[list[int]] = []
    for i, latest in enumerate(dependencies(issued)):
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


@dataclass(frozen=True)
class SynchronisePass(ModulePass):
    """Write the order between contexts into the commands."""

    name = "synchronise"

    def apply(self, ctx: XdslContext, op: ModuleOp) -> None:
        for block in op.ops:
            if isinstance(block, BlockOp):
                registers = Registers(block)
                for commands in stretches(block.body.block):
                    order(commands, [resolve(command, registers) for command in commands])
