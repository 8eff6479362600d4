"""The `rngd` dialect: commands of the instruction set on buffers.

A module at this level holds the HBM regions of one bucket's program (`rngd.region`), the code
that calls share (`rngd.block`) and the order of the calls (`rngd.call`). Inside a block, buffers
on chip come from `rngd.alloc`: virtual after `tile`, with addresses after `place`. A command is
the instruction set's own text; its ports' bases are offsets into the buffers that are the
operands. After `synchronise` commands carry their waits and signals.

It has no interpreter: it is executed by encoding it and running the bytes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from xdsl.dialects.builtin import (
    DenseArrayBase,
    DictionaryAttr,
    IntAttr,
    IntegerAttr,
    IntegerType,
    ModuleOp,
    StringAttr,
    SymbolNameConstraint,
    SymbolRefAttr,
    UnitAttr,
    i32,
    i64,
)
from xdsl.ir import (
    Attribute,
    Data,
    Dialect,
    Operation,
    ParametrizedAttribute,
    Region,
    SSAValue,
    TypeAttribute,
)
from xdsl.irdl import (
    AttrSizedOperandSegments,
    BaseAttr,
    IRDLOperation,
    irdl_attr_definition,
    irdl_op_definition,
    operand_def,
    opt_operand_def,
    opt_prop_def,
    param_def,
    prop_def,
    region_def,
    result_def,
    traits_def,
    var_operand_def,
)
from xdsl.parser import AttrParser
from xdsl.printer import Printer
from xdsl.traits import IsolatedFromAbove, NoTerminator, SymbolOpInterface
from xdsl.utils.exceptions import VerifyException

from .isa.assembly import format_command, parse_command
from .isa.instructions import Dma, Exec, Space
from .isa.plan import Memory
from .isa.rules import DM_BYTES, TRF_BYTES, VRF_BYTES

ON_CHIP_BYTES = {"dm": DM_BYTES, "trf": TRF_BYTES, "vrf": VRF_BYTES}
"""Bytes per slice of each memory that `place` allocates."""


@irdl_attr_definition
class BufferType(ParametrizedAttribute, TypeAttribute):
    """A run of bytes in a memory: per slice on chip, per rank in HBM (`hbm` has no size here)."""

    name = "rngd.buffer"

    memory: StringAttr = param_def(BaseAttr(StringAttr))
    size: IntAttr = param_def()

    def __init__(self, memory: Memory, size_bytes: int) -> None:
        super().__init__(StringAttr(memory.name.lower()), IntAttr(size_bytes))

    def verify(self) -> None:
        if self.memory.data not in (*ON_CHIP_BYTES, "hbm"):
            raise VerifyException(f"there is no memory {self.memory.data!r}")
        if self.size.data < 0:
            raise VerifyException("a buffer has no negative size")

    @classmethod
    def parse_parameters(cls, parser: AttrParser) -> Sequence[Attribute]:
        with parser.in_angle_brackets():
            memory: Attribute = StringAttr(parser.parse_identifier())
            parser.parse_punctuation(",")
            return [memory, IntAttr(parser.parse_integer())]

    def print_parameters(self, printer: Printer) -> None:
        with printer.in_angle_brackets():
            printer.print_string(f"{self.memory.data}, {self.size.data}")


@irdl_attr_definition
class CommandAttr(Data[Exec | Dma]):
    """A command of the instruction set, in assembler text."""

    name = "rngd.command"

    @classmethod
    def parse_parameter(cls, parser: AttrParser) -> Exec | Dma:
        with parser.in_angle_brackets():
            text = parser.parse_str_literal()
        command = parse_command(text)
        if not isinstance(command, Exec | Dma):
            parser.raise_error("expected an exec or a dma command")
        return command

    def print_parameter(self, printer: Printer) -> None:
        with printer.in_angle_brackets():
            printer.print_string_literal(format_command(self.data))


@irdl_op_definition
class RegionOp(IRDLOperation):
    """A piece of HBM that the loader fills or reserves: parameter, table, input, cache, scratch.

    `content` is the region's entry in the binary's header.
    """

    name = "rngd.region"

    region_name = prop_def(StringAttr)
    content = prop_def(DictionaryAttr)
    buffer = result_def(BufferType)

    def __init__(self, region_name: str, content: DictionaryAttr) -> None:
        super().__init__(
            properties={"region_name": StringAttr(region_name), "content": content},
            result_types=[BufferType(Memory.HBM, 0)],
        )


@functools.lru_cache(maxsize=4096)
def _on_chip(memory: Memory, size_bytes: int) -> BufferType:
    return BufferType(memory, size_bytes)


@irdl_op_definition
class AllocOp(IRDLOperation):
    """A buffer on chip, in every slice at the same address.

    `schedule` sets `lifetime`, the cycles between which it holds something, `place` the address.
    A `resident` buffer stays in place from call to call: `chain` gives it its address, and it
    takes up room during the whole block.
    """

    name = "rngd.alloc"

    label = prop_def(StringAttr)
    lifetime = opt_prop_def(DenseArrayBase)
    address = opt_prop_def(IntegerAttr)
    resident = opt_prop_def(UnitAttr)
    buffer = result_def(BufferType)

    def __init__(self, memory: Memory, size_bytes: int, label: str) -> None:
        Operation.__init__(
            self,
            properties={"label": StringAttr(label)},
            result_types=[_on_chip(memory, size_bytes)],
        )

    @property
    def memory(self) -> str:
        return buffer_memory(self.buffer)

    @property
    def size_bytes(self) -> int:
        return _buffer_type(self.buffer).size.data

    def verify_(self) -> None:
        capacity = ON_CHIP_BYTES.get(self.memory)
        if capacity is None:
            raise VerifyException("HBM regions are declared, not allocated")
        if self.lifetime is not None and len(self.lifetime.get_values()) != 2:
            raise VerifyException("a lifetime is its first cycle and the one past its last")
        if self.resident is not None and self.address is None:
            raise VerifyException("a resident buffer has an address")
        if self.address is not None:
            end = self.address.value.data + self.size_bytes
            if self.address.value.data < 0 or end > capacity:
                raise VerifyException(f"the buffer ends at {end} of {capacity} bytes")


def _buffer_type(value: SSAValue) -> BufferType:
    assert isinstance(value.type, BufferType)
    return value.type


def buffer_memory(value: SSAValue) -> str:
    """dm, trf, vrf or hbm: where a buffer lies."""
    return _buffer_type(value).memory.data


PORT_MEMORY = {"a": "dm", "b": "dm", "trf": "trf", "vrf": "vrf"}
EXEC_PORTS = (*PORT_MEMORY, "out")
SEGMENTS = AttrSizedOperandSegments.attribute_name
"""Which ports a command uses, as xDSL keeps it: the number of operands of each."""


@functools.cache
def _segments(used: tuple[bool, ...]) -> DenseArrayBase[IntegerType]:
    return DenseArrayBase.from_list(i32, [int(one) for one in used])


@functools.cache
def _used_ports(segments: DenseArrayBase[IntegerType]) -> tuple[str, ...]:
    counts = segments.get_values()
    return tuple(name for name, count in zip(EXEC_PORTS, counts, strict=True) if count)


@irdl_op_definition
class ExecOp(IRDLOperation):
    """One pass of the tensor units; each port's base is an offset into its buffer.

    `steps` gives, for each port that moves in enclosing `rngd.repeat` ops, the bytes per
    iteration of each of them, outermost first.
    """

    name = "rngd.exec"

    a = opt_operand_def(BufferType)
    b = opt_operand_def(BufferType)
    trf = opt_operand_def(BufferType)
    vrf = opt_operand_def(BufferType)
    out = operand_def(BufferType)
    command = prop_def(CommandAttr)
    steps = opt_prop_def(DictionaryAttr)

    irdl_options = (AttrSizedOperandSegments(as_property=True),)

    def __init__(
        self,
        command: Exec,
        *,
        a: SSAValue | None = None,
        b: SSAValue | None = None,
        trf: SSAValue | None = None,
        vrf: SSAValue | None = None,
        out: SSAValue,
        steps: dict[str, tuple[int, ...]] | None = None,
    ) -> None:
        values = (a, b, trf, vrf, out)
        properties: dict[str, Attribute] = {
            "command": CommandAttr(command),
            SEGMENTS: _segments(tuple(value is not None for value in values)),
        }
        moving = steps_attribute(steps or {})
        if moving is not None:
            properties["steps"] = moving
        # Not xDSL's builder, which costs more than all else of a command's lowering.
        operands = [value for value in values if value is not None]
        Operation.__init__(self, operands=operands, properties=properties)

    @property
    def exec(self) -> Exec:
        data = self.command.data
        assert isinstance(data, Exec)
        return data

    def ports(self) -> dict[str, SSAValue]:
        """The buffers by port name, those that are used."""
        segments = self.properties[SEGMENTS]
        assert isinstance(segments, DenseArrayBase)
        return dict(zip(_used_ports(segments), self.operands, strict=True))

    def verify_(self) -> None:
        if not isinstance(self.command.data, Exec):
            raise VerifyException("rngd.exec holds an exec command")
        if (self.a is None) != (self.exec.generate is not None):
            raise VerifyException("a pass fetches from a buffer, unless it makes constants")
        for name, value in self.ports().items():
            expected = PORT_MEMORY.get(name, self.exec.commit.sink.name.lower())
            if _buffer_type(value).memory.data != expected:
                raise VerifyException(f"port {name} needs a buffer in {expected}")
        _verify_steps(self.steps, EXEC_PORTS)


@irdl_op_definition
class DmaOp(IRDLOperation):
    """A transfer between buffers; `index` is the list of an indirect side.

    With `for_successor` it works for the next call: its module is inside that call's prefix.
    """

    name = "rngd.dma"

    source = operand_def(BufferType)
    destination = operand_def(BufferType)
    index = opt_operand_def(BufferType)
    command = prop_def(CommandAttr)
    steps = opt_prop_def(DictionaryAttr)
    for_successor = opt_prop_def(UnitAttr)

    def __init__(
        self,
        command: Dma,
        *,
        source: SSAValue,
        destination: SSAValue,
        index: SSAValue | None = None,
        steps: dict[str, tuple[int, ...]] | None = None,
    ) -> None:
        super().__init__(
            operands=[source, destination, index],
            properties={
                "command": CommandAttr(command),
                "steps": steps_attribute(steps or {}),
            },
        )

    @property
    def dma(self) -> Dma:
        data = self.command.data
        assert isinstance(data, Dma)
        return data

    def ports(self) -> dict[str, SSAValue]:
        """The buffers by side name, those that are used."""
        named = {"source": self.source, "destination": self.destination, "index": self.index}
        return {name: value for name, value in named.items() if value is not None}

    def verify_(self) -> None:
        if not isinstance(self.command.data, Dma):
            raise VerifyException("rngd.dma holds a dma command")
        if (self.dma.index is None) != (self.index is None):
            raise VerifyException("an indirect transfer has an index list, and only it")
        sides = ((self.dma.source, self.source), (self.dma.destination, self.destination))
        for side, value in sides:
            expected = "hbm" if side.space == Space.HBM else "dm"
            if _buffer_type(value).memory.data != expected:
                raise VerifyException(f"a side in {side.space.name} needs a buffer in {expected}")
        _verify_steps(self.steps, ("source", "destination", "index"))


@irdl_op_definition
class ArriveOp(IRDLOperation):
    """What a peer has pushed, as this rank has pushed it to the peer, is there.

    It stands for the message's way while `schedule` plans, and is gone afterwards. All ranks run
    the same code, so a rank's own push says when its peer's arrives: into the `size` bytes of
    every slice from `offset` on.
    """

    name = "rngd.arrive"

    buffer = operand_def(BufferType)
    offset = prop_def(IntegerAttr)
    size = prop_def(IntegerAttr)

    def __init__(self, buffer: SSAValue, offset: int, size: int) -> None:
        properties = {"offset": IntegerAttr(offset, i64), "size": IntegerAttr(size, i64)}
        super().__init__(operands=[buffer], properties=properties)

    def ports(self) -> dict[str, SSAValue]:
        """The buffer that is written."""
        return {"buffer": self.buffer}


def steps_attribute(steps: dict[str, tuple[int, ...]]) -> DictionaryAttr | None:
    """Steps per port, without the ports that stand still; None if all do."""
    moving = {name: values for name, values in steps.items() if any(values)}
    if not moving:
        return None
    return DictionaryAttr({k: DenseArrayBase.from_list(i64, v) for k, v in moving.items()})


def steps_of(op: ExecOp | DmaOp, port: str) -> tuple[int, ...]:
    """Bytes per iteration of each enclosing repeat, outermost first; empty if the port stands."""
    if op.steps is None or port not in op.steps.data:
        return ()
    values = op.steps.data[port]
    assert isinstance(values, DenseArrayBase)
    return tuple(int(v) for v in values.get_values())


def _verify_steps(steps: DictionaryAttr | None, ports: tuple[str, ...]) -> None:
    for name, values in (steps.data if steps else {}).items():
        if name not in ports or not isinstance(values, DenseArrayBase):
            raise VerifyException(f"steps of {name!r} are not a port's array of bytes")


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
