"""Several scalar machines: a program of ranks run with every queue at its own pace.

Commands run one at a time and whole, but in any order that queues, semaphores and groups allow.
What the order check accepts must give the same bytes in all of them, those of program order.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import numpy as np
from scalar_machine import ScalarMachine

from furiosa_llm.backend_rngd.isa.instructions import Context, Dma, Exec


class ScalarRanks:
    """`ranks` machines whose data memory lies in one array, u8[64 · ranks, USED_BYTES]."""

    def __init__(
        self, ranks: int, dm: np.ndarray, hbm: Sequence[Sequence[np.ndarray]] = ()
    ) -> None:
        self.dm = dm.copy()
        empty = np.zeros((0, 0), np.uint8)
        self.machines = [ScalarMachine(empty, empty, empty) for _ in range(ranks)]
        for rank, machine in enumerate(self.machines):
            machine.dm = self.dm[64 * rank : 64 * (rank + 1)]
            machine.rank, machine.ranks = rank, self.machines

    def in_program_order(self, commands: Sequence[Exec | Dma]) -> None:
        for command in commands:
            step = 1 << command.group if isinstance(command, Exec) else 1
            for rank in range(0, len(self.machines), step):
                self.execute(command, rank)

    def execute(self, command: Exec | Dma, rank: int) -> None:
        """A command of `rank`, or of the group that begins with it."""
        if isinstance(command, Dma):
            self.machines[rank].transfer(command)
            return
        empty = np.zeros((0, 0), np.uint8)
        group = ScalarMachine(empty, empty, empty)
        group.dm = self.dm[64 * rank : 64 * (rank + (1 << command.group))]
        group.execute(command)

    def in_random_order(self, commands: Sequence[Exec | Dma], rng: random.Random) -> bool:
        """Whether all commands could run; the machines stop where none can."""
        queues = {
            (rank, context): [c for c in commands if c.head.context == context]
            for rank in range(len(self.machines))
            for context in Context
        }
        signals: Counter[tuple[int, int, int]] = Counter()
        """(receiver, semaphore, sender)"""

        def ready(rank: int, context: Context) -> bool:
            queue = queues[rank, context]
            return bool(queue) and all(
                signals[rank, wait.semaphore, rank ^ peer] >= wait.count
                for wait in queue[0].head.waits
                for peer in wait.peers or (0,)
            )

        def group_of(rank: int, context: Context) -> list[int]:
            command = queues[rank, context][0]
            size = 1 << command.group if isinstance(command, Exec) else 1
            return list(range(rank & -size, (rank & -size) + size))

        def together(rank: int, context: Context) -> bool:
            command = queues[rank, context][0]
            members = group_of(rank, context)
            same = all(queues[m, context] and queues[m, context][0] is command for m in members)
            return same and all(ready(m, context) for m in members)

        while any(queues.values()):
            choices = [place for place in queues if ready(*place) and together(*place)]
            if not choices:
                return False
            rank, context = rng.choice(choices)
            members, command = group_of(rank, context), queues[rank, context][0]
            self.execute(command, members[0])
            for member in members:
                queues[member, context].pop(0)
                for wait in command.head.waits:
                    for peer in wait.peers or (0,):
                        signals[member, wait.semaphore, member ^ peer] -= wait.count
                for semaphore in command.head.signals:
                    signals[member, semaphore, member] += 1
                for signal in command.head.peer_signals:
                    for peer in signal.peers:
                        signals[member ^ peer, signal.semaphore, member] += 1
        return True
