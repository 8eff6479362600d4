"""What a block needs from its caller: its HBM arguments, and what each of them stands for."""

from __future__ import annotations

from dataclasses import dataclass
from operator import add

from xdsl.ir import SSAValue

from ..ir import nn
from ..ir.types import shape_of
from .isa.layout import Derived, FeatureOrder, Layout
from .rngd import BlockOp


@dataclass(frozen=True)
class Part:
    """Indices [begin, end) of a tensor, per dim."""

    begin: tuple[int, ...]
    end: tuple[int, ...]

    @staticmethod
    def all_of(value: SSAValue) -> Part:
        return Part((0,) * len(shape_of(value)), shape_of(value))

    def moved(self, dim: int, by: int) -> Part:
        """The part seen from a tensor that begins `by` earlier along `dim`."""
        move = tuple(by if i == dim else 0 for i in range(len(self.begin)))
        begin, end = (tuple(map(add, bounds, move)) for bounds in (self.begin, self.end))
        return Part(begin, end)


def whole_of(value: SSAValue, part: Part) -> tuple[SSAValue, Part]:
    """The tensor that `value` is a slice of, and where `part` of the slice lies in it."""
    while isinstance(value.owner, nn.SliceOp):
        part = part.moved(value.owner.dim.value.data, value.owner.start.value.data)
        value = value.owner.x
    return value, part


@dataclass(frozen=True)
class Argument:
    """An argument of the function, as an HBM buffer; a parameter in one layout and one part."""

    number: int
    layout: Layout | None = None
    part: Part | None = None


@dataclass(frozen=True)
class Result:
    """A result of the function: the hidden state, or logits."""

    number: int
    order: FeatureOrder
    tokens: int
    logits: bool


@dataclass(frozen=True)
class Scratch:
    """Room in HBM for a block's own use."""

    name: str
    size_bytes: int


@dataclass(frozen=True)
class Crossing:
    """A value that one segment of a function leaves in HBM for a later one."""

    number: int
    order: FeatureOrder
    tokens: int


Need = Argument | Result | Crossing | Scratch | Derived


@dataclass
class LoweredBlock:
    """A block, what each of its HBM arguments stands for, and where in it this call begins."""

    op: BlockOp
    needs: list[Need]
    starts: list[int]
    """Bytes from the start of each argument's region."""
