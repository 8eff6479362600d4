"""The `rngd` dialect: commands of the instruction set on buffers.

A module at this level holds the HBM regions of one bucket's program (`rngd.region`), the code
that calls share (`rngd.block`) and the order of the calls (`rngd.call`). Inside a block, buffers
on chip come from `rngd.alloc`: virtual after `tile`, with addresses after `place`. A command is
the instruction set's own text; its ports' bases are offsets into the buffers that are the
operands. After `synchronise` commands carry their waits and signals.

It has no interpreter: it is executed by encoding it and running the bytes.
"""

from __future__ import annotations

from xdsl.ir import Dialect

from .rngd_buffers import ON_CHIP_BYTES, AllocOp, BufferType, RegionOp, buffer_memory
from .rngd_commands import ArriveOp, CommandAttr, DmaOp, ExecOp, steps_of
from .rngd_program import BlockOp, CallOp, ProgramOp, RepeatOp, TilingOp, WorkOp, ranks_of

__all__ = [
    "ON_CHIP_BYTES",
    "RNGD",
    "AllocOp",
    "ArriveOp",
    "BlockOp",
    "BufferType",
    "CallOp",
    "CommandAttr",
    "DmaOp",
    "ExecOp",
    "ProgramOp",
    "RegionOp",
    "RepeatOp",
    "TilingOp",
    "WorkOp",
    "buffer_memory",
    "ranks_of",
    "steps_of",
]

RNGD = Dialect(
    "rngd",
    [
        ProgramOp,
        RegionOp,
        AllocOp,
        ExecOp,
        DmaOp,
        ArriveOp,
        WorkOp,
        TilingOp,
        RepeatOp,
        BlockOp,
        CallOp,
    ],
    [BufferType, CommandAttr],
)
