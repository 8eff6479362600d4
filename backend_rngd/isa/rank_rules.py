"""What a command says about other ranks must satisfy: which memory it reaches, who takes part.

A program has 1, 2, 4 or 8 ranks, and a partner is named by the bits in which its number differs, so
everyone has a partner exactly if the bits exist.
"""

from __future__ import annotations

from collections.abc import Iterator

from ... import errors
from .instructions import Dma, Exec, Indirect


def check_dma_ranks(command: Dma, where: str) -> None:
    """Raises: VED011, naming the first rule that does not hold."""
    for rule, cause in _dma_ranks(command):
        raise errors.rule_broken(where, rule, cause)


def _dma_ranks(c: Dma) -> Iterator[tuple[str, str]]:
    if c.source.peer and c.destination.peer:
        yield "peer", "a transfer has one side at least in the memory of its own rank"
    indirect = {Indirect.SOURCE: c.source, Indirect.DESTINATION: c.destination}.get(c.indirect)
    if indirect is not None and indirect.peer:
        yield "peer", "row numbers address the memory of their own rank"


def is_exchange(command: Exec | Dma) -> bool:
    """Whether other ranks' memories or tensor units take part."""
    if isinstance(command, Exec):
        return command.group > 0
    return bool(command.source.peer or command.destination.peer)


def partners(command: Exec | Dma) -> Iterator[tuple[int, str]]:
    """(bits in which the partner's rank differs, what the two do) for each partner."""
    for wait in command.head.waits:
        for peer in wait.peers:
            yield peer, f"waits for semaphore {wait.semaphore} from"
    for signal in command.head.peer_signals:
        for peer in signal.peers:
            yield peer, f"signals semaphore {signal.semaphore} of"
    if isinstance(command, Exec):
        for bit in range(command.group):
            yield 1 << bit, "works in one group with"
        return
    if command.source.peer:
        yield command.source.peer, "reads the memory of"
    if command.destination.peer:
        yield command.destination.peer, "writes to the memory of"
