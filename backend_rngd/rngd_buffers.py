"""Memory in the `rngd` dialect: regions of HBM and buffers on chip."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from xdsl.dialects.builtin import (
    DenseArrayBase,
    DictionaryAttr,
    IntAttr,
    IntegerAttr,
    StringAttr,
    UnitAttr,
)
from xdsl.ir import Attribute, Operation, ParametrizedAttribute, SSAValue, TypeAttribute
from xdsl.irdl import (
    BaseAttr,
    IRDLOperation,
    irdl_attr_definition,
    irdl_op_definition,
    opt_prop_def,
    param_def,
    prop_def,
    result_def,
)
from xdsl.parser import AttrParser
from xdsl.printer import Printer
from xdsl.utils.exceptions import VerifyException

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
        return buffer_type(self.buffer).size.data

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


def buffer_type(value: SSAValue) -> BufferType:
    assert isinstance(value.type, BufferType)
    return value.type


def buffer_memory(value: SSAValue) -> str:
    """dm, trf, vrf or hbm: where a buffer lies."""
    return buffer_type(value).memory.data
