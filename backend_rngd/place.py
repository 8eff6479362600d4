"""The `place` pass: an address for every buffer on chip.

Before: `rngd.alloc` ops without address.
After:  each has an address at which it overlaps no buffer that is alive with it.
Contract: bitwise; only addresses are added. Raises: BCK004 if a memory is too small.

Resident buffers have their addresses already, and keep them for the whole block. The others are
placed one by one at the lowest address that is free during their lifetime. The order
matters: by their start wastes nothing when buffers die in the order in which they came, by their
size leaves small gaps to small buffers. The first order in which all fit is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from xdsl.context import Context
from xdsl.dialects.builtin import DenseArrayBase, IntegerAttr, ModuleOp, i64
from xdsl.ir import Block, Operation
from xdsl.passes import ModulePass

from .. import errors
from .rngd import ON_CHIP_BYTES, AllocOp, BlockOp, RepeatOp

ALIGNMENT_BYTES = 32
FOR_EVER = 1 << 62
"""Later than every cycle."""


@dataclass(frozen=True)
class Lifetime:
    """A buffer and when it holds something: [first, end), in cycles or in places of the code."""

    alloc: AllocOp
    first: int
    end: int


def lifetimes(block: Block) -> list[Lifetime]:
    """Lifetimes of all buffers of a block: as planned, or from the order of the code.

    A buffer that a repeat uses from outside lives as long as the repeat does, a resident one for
    ever.
    """
    position: dict[Operation, int] = {}
    end_of: dict[RepeatOp, int] = {}
    allocs = _number(block, position, end_of)
    return [_resident(a) or _planned(a) or _in_code(a, position, end_of) for a in allocs]


def _number(
    block: Block, position: dict[Operation, int], end_of: dict[RepeatOp, int]
) -> list[AllocOp]:
    allocs: list[AllocOp] = []
    for op in block.ops:
        position[op] = len(position)
        if isinstance(op, AllocOp):
            allocs.append(op)
        elif isinstance(op, RepeatOp):
            allocs += _number(op.body.block, position, end_of)
            end_of[op] = len(position)
    return allocs


def _resident(alloc: AllocOp) -> Lifetime | None:
    return None if alloc.resident is None else Lifetime(alloc, -1, FOR_EVER)


def _planned(alloc: AllocOp) -> Lifetime | None:
    if alloc.lifetime is None:
        return None
    first, end = alloc.lifetime.get_values()
    return Lifetime(alloc, int(first), int(end))


def _in_code(
    alloc: AllocOp, position: dict[Operation, int], end_of: dict[RepeatOp, int]
) -> Lifetime:
    spans: list[tuple[int, int]] = []
    for use in alloc.buffer.uses:
        first = position[use.operation]
        end = first + 1
        parent = use.operation.parent_op()
        while isinstance(parent, RepeatOp) and parent is not alloc.parent_op():
            first, end = position[parent], end_of[parent]
            parent = parent.parent_op()
        spans.append((first, end))
    start = position[alloc]
    first = min((first for first, _ in spans), default=start)
    return Lifetime(alloc, first, max((end for _, end in spans), default=start + 1))


def set_lifetime(alloc: AllocOp, first: int, end: int) -> None:
    """Write down that the buffer holds something in the cycles [first, end)."""
    alloc.lifetime = DenseArrayBase.from_list(i64, (first, end))


def forget_lifetimes(block: Block) -> None:
    """Undo `set_lifetime` for a plan that is not followed."""
    for op in block.walk():
        if isinstance(op, AllocOp):
            op.lifetime = None


def assign_addresses(block: Block) -> dict[AllocOp, int]:
    """An address for each buffer. Raises: BCK004 with the buffers that are alive together."""
    addresses: dict[AllocOp, int] = {}
    for memory, capacity in ON_CHIP_BYTES.items():
        lives = [life for life in lifetimes(block) if life.alloc.memory == memory]
        placed = _placed(lives, capacity)
        if placed is None:
            raise errors.memory_full(memory, capacity, _fullest(lives))
        addresses |= {life.alloc: at for life, at in zip(lives, placed, strict=True)}
    return addresses


_Order = Callable[[Lifetime], tuple[int, ...]]
ORDERS: tuple[_Order, ...] = (
    lambda life: (life.first, -life.end),
    lambda life: (-life.alloc.size_bytes, life.first),
    lambda life: (life.first - life.end, -life.alloc.size_bytes, life.first),
    lambda life: (-life.alloc.size_bytes * (life.end - life.first), life.first),
)


def _placed(lives: Sequence[Lifetime], capacity: int) -> list[int] | None:
    """Addresses in the first order in which all fit, or None."""
    if not lives or _most_bytes(lives)[1] > capacity:
        return None if lives else []
    for order in ORDERS:
        sequence = sorted(range(len(lives)), key=lambda i: (*order(lives[i]), i))
        found = _first_fit(lives, sequence, capacity)
        if found is not None:
            return found
    return None


def _first_fit(lives: Sequence[Lifetime], order: Sequence[int], capacity: int) -> list[int] | None:
    addresses = [0] * len(lives)
    # Of those placed so far: first, end, address, end of the address range.
    placed = np.zeros((4, len(lives)), np.int64)
    for count, i in enumerate(sorted(order, key=lambda i: lives[i].alloc.resident is None)):
        life, size = lives[i], lives[i].alloc.size_bytes
        if life.alloc.resident is not None:
            assert life.alloc.address is not None, "the op's verifier checks it"
            address = life.alloc.address.value.data
        else:
            together = (placed[0, :count] < life.end) & (placed[1, :count] > life.first)
            ranges = placed[2:, :count][:, together]
            address = _lowest_gap(ranges[:, np.argsort(ranges[0], kind="stable")].T.tolist(), size)
        if address + size > capacity:
            return None
        addresses[i] = address
        end = -(-(address + size) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        placed[:, count] = (life.first, life.end, address, end)
    return addresses


def _lowest_gap(ranges: Sequence[Sequence[int]], size: int) -> int:
    """The lowest address with `size` free bytes between address ranges sorted by their start."""
    address = 0
    for start, end in ranges:
        if address + size <= start:
            break
        address = max(address, end)
    return address


def _most_bytes(lives: Sequence[Lifetime]) -> tuple[int, int]:
    """(moment, bytes): when most bytes are in use, and how many."""
    changes = [(life.first, life.alloc.size_bytes) for life in lives]
    changes += [(life.end, -life.alloc.size_bytes) for life in lives]
    used = most = moment = 0
    for when, change in sorted(changes):
        used += change
        if used > most:
            most, moment = used, when
    return moment, most


def _fullest(lives: Sequence[Lifetime]) -> list[tuple[str, int]]:
    """Label and bytes of the buffers that are alive when most bytes are in use."""
    moment, _ = _most_bytes(lives)
    together = [life for life in lives if life.first <= moment < life.end]
    return [(life.alloc.label.data, life.alloc.size_bytes) for life in together]


@dataclass(frozen=True)
class PlacePass(ModulePass):
    """Give every `rngd.alloc` an address."""

    name = "place"

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        for block in op.ops:
            if isinstance(block, BlockOp):
                for alloc, address in assign_addresses(block.body.block).items():
                    alloc.address = IntegerAttr(address, i64)
