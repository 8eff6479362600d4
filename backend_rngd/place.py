"""The `place` pass: an address for every buffer on chip.

Before: `rngd.alloc` ops without address.
After:  each has the lowest address at which it overlaps no buffer that is alive with it.
Contract: bitwise; only addresses are added. Raises: BCK004 if a memory is too small.
"""

from __future__ import annotations

from dataclasses import dataclass

from xdsl.context import Context
from xdsl.dialects.builtin import IntegerAttr, ModuleOp, i64
from xdsl.ir import Block, Operation
from xdsl.passes import ModulePass

from .. import errors
from .rngd import ON_CHIP_BYTES, AllocOp, BlockOp, RepeatOp

ALIGNMENT_BYTES = 32


@dataclass(frozen=True)
class Lifetime:
    """A buffer and the positions, in program order, between which it holds something."""

    alloc: AllocOp
    first: int
    last: int


def lifetimes(block: Block) -> list[Lifetime]:
    """Lifetimes of all buffers of a block; what a repeat uses from outside lives to its end."""
    position: dict[Operation, int] = {}
    end_of: dict[RepeatOp, int] = {}
    allocs = list(_number(block, position, end_of))
    return [Lifetime(a, position[a], _last_use(a, position, end_of)) for a in allocs]


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


def _last_use(alloc: AllocOp, position: dict[Operation, int], end_of: dict[RepeatOp, int]) -> int:
    last = position[alloc]
    for use in alloc.buffer.uses:
        at = position[use.operation]
        parent = use.operation.parent_op()
        while isinstance(parent, RepeatOp) and parent is not alloc.parent_op():
            at = end_of[parent]
            parent = parent.parent_op()
        last = max(last, at)
    return last


def assign_addresses(block: Block) -> dict[AllocOp, int]:
    """First fit in program order. Raises: BCK004 with the buffers that are alive together."""
    addresses: dict[AllocOp, int] = {}
    alive: dict[str, list[Lifetime]] = {memory: [] for memory in ON_CHIP_BYTES}
    for life in lifetimes(block):
        memory = life.alloc.memory
        alive[memory] = [other for other in alive[memory] if other.last >= life.first]
        address = _first_gap(life, alive[memory], addresses)
        if address + life.alloc.size_bytes > ON_CHIP_BYTES[memory]:
            together = [(o.alloc.label.data, o.alloc.size_bytes) for o in [*alive[memory], life]]
            raise errors.memory_full(memory, ON_CHIP_BYTES[memory], together)
        addresses[life.alloc] = address
        alive[memory].append(life)
    return addresses


def _first_gap(life: Lifetime, alive: list[Lifetime], addresses: dict[AllocOp, int]) -> int:
    address = 0
    for start, size in sorted((addresses[o.alloc], o.alloc.size_bytes) for o in alive):
        if address + life.alloc.size_bytes <= start:
            break
        address = max(address, -(-(start + size) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES)
    return address


@dataclass(frozen=True)
class PlacePass(ModulePass):
    """Give every `rngd.alloc` an address."""

    name = "place"

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        for block in op.ops:
            if isinstance(block, BlockOp):
                for alloc, address in assign_addresses(block.body.block).items():
                    alloc.address = IntegerAttr(address, i64)
