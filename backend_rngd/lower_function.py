"""A function's blocks: with as many tokens at a time as fit.

A function's tokens are worked on in chunks, as many at a time as data memory can hold, and each
chunk is a call of its own; chunks with the same code share a block. When there are several, a
decoder layer is cut at its attention: first all chunks write their keys to the cache, then all
attend, then come the operators after it. What crosses a cut stands in HBM.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from xdsl.dialects import func
from xdsl.dialects.builtin import StringAttr
from xdsl.ir import Operation, SSAValue

from .. import errors
from ..ir import dist, paged
from .block_needs import Crossing, LoweredBlock
from .block_state import BlockState
from .grouping import groupable
from .isa.machine import load_machine
from .lower_block import lower_block
from .place import assign_addresses
from .rngd import DmaOp, ExecOp, RepeatOp
from .tiling import Pins, ProductName, pinned
from .tiling_search import block_cycles
from .token_groups import GROUPS
from .tokens import SEQUENCE_CHUNK_TOKENS, Chunk, TokenShape, chunks
from .value_uses import Linear, feature_orders, module_of, parts_of_modules, segments

CHUNK_TOKENS = (256, 128, 64, 32, 16, 8, 4, 2, 1)
"""Tokens that a block works on at a time: the first number whose buffers fit."""
MOST_COMMANDS = 280
"""Of a block that works on several chunks, at most."""


def lower_function(
    function: func.FuncOp,
    shape: TokenShape,
    logits: frozenset[int],
    pins: Pins,
    compare: bool,
    ranks: int,
) -> list[LoweredBlock]:
    """Blocks in the order of their calls, with as many tokens at a time as fit.

    Tokens that one block cannot take are worked on segment by segment (before attention,
    attention, after it), and in each segment chunk by chunk; chunks with the same code share it.
    Raises: BCK003, BCK006.
    """
    lowering = _FunctionLowering(function, shape, logits, pins, compare, ranks)
    if len(lowering.segments) > 1 and len(_chunks(lowering.ops, shape, CHUNK_TOKENS[0])) > 1:
        return [
            block
            for number, segment in enumerate(lowering.segments)
            for block in lowering.chunked(segment, f"_segment_{number}")
        ]
    return lowering.chunked(None, "")


@dataclass
class _FunctionLowering:
    """The blocks of one function."""

    function: func.FuncOp
    shape: TokenShape
    logits: frozenset[int]
    pins: Pins
    compare: bool
    ranks: int
    """That share the work, and exchange parts of it."""
    crossings: dict[SSAValue, Crossing] = field(default_factory=dict)

    @property
    def ops(self) -> list[Operation]:
        return list(self.function.body.block.ops)

    @property
    def segments(self) -> list[list[Operation]]:
        return segments(self.function.body.block)

    def chunked(self, segment: list[Operation] | None, suffix: str) -> list[LoweredBlock]:
        """A segment's chunks, or the whole function's. Raises: BCK003."""
        name = self.function.sym_name.data + suffix
        wanted = self._pinned_groups(segment or [])
        grouped = self._in_groups(segment, name) if segment and wanted != {1} else None
        if grouped is not None and wanted:
            return grouped
        alone = self._in_chunks(segment, name)
        if grouped is None or _cycles(alone, self.ranks) <= _cycles(grouped, self.ranks):
            return alone
        return grouped

    def _pinned_groups(self, segment: list[Operation]) -> set[int]:
        """The groups that pins ask for."""
        name, parts = self.function.sym_name.data, parts_of_modules(self.function.body.block)
        tokens = {part.count // GROUPS for part in self._parts_of_groups(segment)}
        products = [op for op in segment if isinstance(op, Linear)]
        pins = [
            pinned(self.pins, ProductName(name, module_of(op), parts.get(op, 0), count))
            for op in products
            for count in tokens
        ]
        return {tiling.groups for tiling in pins if tiling is not None}

    def _parts_of_groups(self, segment: list[Operation]) -> list[Chunk]:
        return _chunks(segment, self.shape, GROUPS * CHUNK_TOKENS[0])

    def _in_groups(self, segment: list[Operation], name: str) -> list[LoweredBlock] | None:
        """With the tokens divided over groups of slices; None if that is not possible."""
        parts = self._parts_of_groups(segment)
        orders = feature_orders(self.function.body.block)
        if not parts or not all(
            groupable(segment, orders, self.crossings, part.sequences, part.count) for part in parts
        ):
            return None
        try:
            return self._blocks(segment, name, [[part] for part in parts], GROUPS)
        except errors.MemoryFull:
            return None

    def _in_chunks(self, segment: list[Operation] | None, name: str) -> list[LoweredBlock]:
        full: errors.MemoryFull | None = None
        for limit in CHUNK_TOKENS:
            parts = _chunks(self.ops if segment is None else segment, self.shape, limit)
            try:
                blocks = self._lowered(segment, name, parts)
            except errors.MemoryFull as error:
                full = error
                continue
            if blocks:
                return blocks
        assert full is not None, name
        raise errors.block_does_not_fit(name, self.shape.bucket.name, full.cause)

    def _lowered(
        self, segment: list[Operation] | None, name: str, parts: list[Chunk]
    ) -> list[LoweredBlock]:
        """A block per chunk, or per few chunks of a segment; those with the same code share it.

        Raises: BCK004.
        """
        for together in self._chunks_together(segment, name, parts):
            groups = [parts[i : i + together] for i in range(0, len(parts), together)]
            try:
                return self._blocks(segment, name, groups)
            except errors.MemoryFull:
                if together == 1:
                    raise
        return []

    def _chunks_together(
        self, segment: list[Operation] | None, name: str, parts: list[Chunk]
    ) -> list[int]:
        """How many chunks a block may work on, the most first: all blocks on equally many.

        Commands of a block's chunks overlap, but take time to plan and room for code. Nothing
        overlaps across the fence of a repeat, so blocks with one work on a chunk each.
        """
        if segment is None or len(parts) == 1:
            return [1] if parts else []
        alone = self._block(segment, name, parts[-1:])
        ops = list(alone.op.body.block.ops)
        if any(isinstance(op, RepeatOp) for op in ops):
            return [1]
        commands = sum(isinstance(op, ExecOp | DmaOp) for op in ops)
        most = max(1, MOST_COMMANDS // commands)
        return [n for n in range(most, 0, -1) if len(parts) % n == 0]

    def _blocks(
        self,
        segment: list[Operation] | None,
        name: str,
        together: list[list[Chunk]],
        groups: int = 1,
    ) -> list[LoweredBlock]:
        blocks: list[LoweredBlock] = []
        for i, parts in enumerate(together):
            part_name = name if len(together) == 1 else f"{name}_part_{i}"
            found = self._block(segment, part_name, parts, groups)
            same = next((other for other in blocks if _same_code(found, other)), None)
            if same is not None:
                found.op = same.op
            else:
                assign_addresses(found.op.body.block)
            blocks.append(found)
        return blocks

    def _block(
        self, segment: list[Operation] | None, name: str, parts: list[Chunk], groups: int = 1
    ) -> LoweredBlock:
        return lower_block(
            BlockState(
                name,
                self.function,
                self.shape,
                parts,
                self.logits,
                self.pins,
                self.compare,
                segment,
                self.crossings,
                groups,
            )
        )


def _cycles(blocks: list[LoweredBlock], ranks: int) -> float:
    """What the calls of the blocks are predicted to cost each rank."""
    machine = load_machine()
    return sum(block_cycles(block.op.body.block, machine, ranks).score for block in blocks)


def _same_code(block: LoweredBlock, other: LoweredBlock) -> bool:
    bodies = block.op.body, other.op.body
    return block.needs == other.needs and bodies[0].is_structurally_equivalent(bodies[1])


def _chunks(ops: list[Operation], shape: TokenShape, limit: int) -> list[Chunk]:
    """The parts that blocks work on; none if the tokens cannot be cut to this limit."""
    if any(isinstance(op, paged.LastTokenOp) for op in ops):
        # From here on each sequence is one token, wherever it stands.
        firsts = range(0, shape.sequences, limit)
        return [Chunk(first, min(limit, shape.sequences - first), 0, 1) for first in firsts]
    attends = any(isinstance(op, paged.AttentionOp) for op in ops)
    parts = chunks(shape, limit, SEQUENCE_CHUNK_TOKENS if attends else 1)
    dealt = max((_ranks_dealt_to(op) for op in ops), default=1)
    return parts if all(part.count % dealt == 0 for part in parts) else []


def _ranks_dealt_to(op: Operation) -> int:
    """The ranks among which an operator divides its tokens."""
    if isinstance(op, dist.AllReduceOp) and op.algorithm == StringAttr("scatter_gather"):
        return op.mask.value.data + 1
    return 1
