"""Programs in the `rngd` dialect: blocks of code, the calls that run them, what they are for."""

from __future__ import annotations

from collections.abc import Sequence

from xdsl.dialects.builtin import (
    DenseArrayBase,
    IntegerAttr,
    ModuleOp,
    StringAttr,
    SymbolNameConstraint,
    SymbolRefAttr,
    i64,
)
from xdsl.ir import Region, SSAValue
from xdsl.irdl import (
    IRDLOperation,
    irdl_op_definition,
    opt_prop_def,
    prop_def,
    region_def,
    traits_def,
    var_operand_def,
)
from xdsl.traits import IsolatedFromAbove, NoTerminator, SymbolOpInterface
from xdsl.utils.exceptions import VerifyException

from .rngd_buffers import BufferType


@irdl_op_definition
class WorkOp(IRDLOperation):
    """Useful multiply-accumulates of the op at this location, in one run of the block."""

    name = "rngd.work"

    macs = prop_def(IntegerAttr)

    def __init__(self, macs: int) -> None:
        super().__init__(properties={"macs": IntegerAttr(macs, i64)})


@irdl_op_definition
class TilingOp(IRDLOperation):
    """How the product at this location is cut: the text of its tiling record."""

    name = "rngd.tiling"

    product = prop_def(StringAttr)
    """What pins call it: function, module and tokens."""
    record = prop_def(StringAttr)
    runner_up = opt_prop_def(StringAttr)
    """The record of the best other tiling, if there is one."""

    def __init__(self, product: str, record: str, runner_up: str | None = None) -> None:
        texts = {"product": product, "record": record, "runner_up": runner_up}
        super().__init__(
            properties={name: StringAttr(t) for name, t in texts.items() if t is not None}
        )


@irdl_op_definition
class RepeatOp(IRDLOperation):
    """Run the body `count` times; each iteration is fenced."""

    name = "rngd.repeat"

    count = prop_def(IntegerAttr)
    body = region_def("single_block")

    traits = traits_def(NoTerminator())

    def __init__(self, count: int, body: Region) -> None:
        super().__init__(properties={"count": IntegerAttr(count, i64)}, regions=[body])

    def verify_(self) -> None:
        if self.count.value.data < 2:
            raise VerifyException("a repeat runs at least twice")


@irdl_op_definition
class BlockOp(IRDLOperation):
    """Code that calls share. Its arguments are the HBM buffers that a call binds."""

    name = "rngd.block"

    sym_name = prop_def(SymbolNameConstraint())
    body = region_def("single_block")

    traits = traits_def(NoTerminator(), IsolatedFromAbove(), SymbolOpInterface())

    def __init__(self, sym_name: str, body: Region) -> None:
        super().__init__(properties={"sym_name": StringAttr(sym_name)}, regions=[body])

    def verify_(self) -> None:
        for argument in self.body.block.args:
            if not isinstance(argument.type, BufferType) or argument.type.memory.data != "hbm":
                raise VerifyException("a block's arguments are buffers in HBM")


@irdl_op_definition
class CallOp(IRDLOperation):
    """One run of a block with its buffers bound; the location is the modules' prefix.

    `starts` gives, for each buffer, the byte at which the block sees it begin.
    """

    name = "rngd.call"

    callee = prop_def(SymbolRefAttr)
    buffers = var_operand_def(BufferType)
    starts = opt_prop_def(DenseArrayBase)

    def __init__(
        self, callee: str, buffers: Sequence[SSAValue], starts: Sequence[int] = ()
    ) -> None:
        moved = DenseArrayBase.from_list(i64, list(starts)) if any(starts) else None
        super().__init__(
            operands=[buffers], properties={"callee": SymbolRefAttr(callee), "starts": moved}
        )

    def start_of(self, number: int) -> int:
        """Where the block sees buffer `number` begin."""
        return 0 if self.starts is None else int(self.starts.get_values()[number])

    def verify_(self) -> None:
        if self.starts is not None and len(self.starts) != len(self.buffers):
            raise VerifyException("a call has one start for each buffer")


@irdl_op_definition
class ProgramOp(IRDLOperation):
    """What the binary is for: its bucket, and how many ranks run it."""

    name = "rngd.program"

    bucket = prop_def(StringAttr)
    ranks = prop_def(IntegerAttr)

    def __init__(self, bucket: str, ranks: int = 1) -> None:
        properties = {"bucket": StringAttr(bucket), "ranks": IntegerAttr(ranks, i64)}
        super().__init__(properties=properties)


def ranks_of(module: ModuleOp) -> int:
    """The tensor-parallel ranks that run a module's program."""
    programs = [op for op in module.ops if isinstance(op, ProgramOp)]
    return programs[0].ranks.value.data if programs else 1
