"""The `schedule` pass: the order in which commands are issued.

Before: commands on virtual buffers, in program order.
After:  the same commands in the order in which they start.
Contract: bitwise; conflicting commands keep their order. Raises: BLD014 for an unknown level.
"""

from __future__ import annotations

from dataclasses import dataclass

from xdsl.context import Context as XdslContext
from xdsl.dialects.builtin import ModuleOp
from xdsl.passes import ModulePass

from .. import errors

LEVELS = (0, 1, 2)


@dataclass(frozen=True)
class SchedulePass(ModulePass):
    """Order the commands of every block."""

    name = "schedule"

    level: int = 2
    """0: program order. 1: overlap inside each kernel. 2: overlap across a block's kernels."""

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise errors.unknown_optimization_level(self.level, LEVELS)

    def apply(self, ctx: XdslContext, op: ModuleOp) -> None:
        """Every level keeps program order so far."""
