"""Commands in the `rngd` dialect: the instruction set's text on buffers."""

from __future__ import annotations

import functools

from xdsl.dialects.builtin import (
    DenseArrayBase,
    DictionaryAttr,
    IntegerAttr,
    IntegerType,
    UnitAttr,
    i32,
    i64,
)
from xdsl.ir import Attribute, Data, Operation, SSAValue
from xdsl.irdl import (
    AttrSizedOperandSegments,
    IRDLOperation,
    irdl_attr_definition,
    irdl_op_definition,
    operand_def,
    opt_operand_def,
    opt_prop_def,
    prop_def,
)
from xdsl.parser import AttrParser
from xdsl.printer import Printer
from xdsl.utils.exceptions import VerifyException

from .isa.assembly import format_command, parse_command
from .isa.instructions import Dma, Exec, Space
from .rngd_buffers import BufferType, buffer_type


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
            if buffer_type(value).memory.data != expected:
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
            if buffer_type(value).memory.data != expected:
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
