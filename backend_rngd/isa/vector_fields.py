"""The vector engine's part of a command: units, operands, tags, reducers, valid counts."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

MAX_VECTOR_OPS = 10
MAX_COMPARATORS = 4
"""Bits of a tag."""
MAX_SLOTS = 4
"""Three immediates and the register port."""
MAX_GATES = 3


class Alu(IntEnum):
    """The vector engine's units, in pipeline order of their stages."""

    LOGIC_AND = 0
    LOGIC_OR = 1
    LOGIC_XOR = 2
    LOGIC_LSHIFT = 3
    LOGIC_RSHIFT = 4
    FXP_ADD = 5
    FXP_LSHIFT = 6
    FXP_MUL = 7
    FXP_RSHIFT = 8
    FXP_TO_FP = 9
    FMA = 10
    FPU = 11
    EXP = 12
    MUL0 = 13
    MUL1 = 14
    FP_DIV = 15
    FP_TO_FXP = 16
    CLIP_ADD = 17
    CLIP_MAX = 18
    CLIP_MIN = 19


class Op(IntEnum):
    """What a unit computes from its input x and its operands y, z."""

    AND = 0
    OR = 1
    XOR = 2
    SHL = 3
    SHR = 4
    SAR = 5
    IADD = 6
    ISUB = 7
    IMUL = 8
    ITOF = 9
    ADD = 10
    SUB = 11
    MUL = 12
    FMA = 13
    SQRT = 14
    TANH = 15
    SIGMOID = 16
    ERF = 17
    LOG = 18
    SIN = 19
    COS = 20
    EXP = 21
    NEGEXP = 22
    DIV = 23
    FTOI = 24
    MIN = 25
    MAX = 26
    IMIN = 27
    IMAX = 28
    IADD_SAT = 29
    """Saturates, as all that end in `sat`."""
    ISUB_SAT = 30
    SHL_SAT = 31
    MUL_FXP = 32
    """((x · y >> 30) + 1) >> 1: the product of fractions of 31 bits; the smallest number squared
    becomes the largest."""
    SAR_ROUND = 33
    """Arithmetic shift to the right, halves up."""
    ABSMIN = 34
    """The smaller magnitude."""
    ABSMAX = 35
    """The larger magnitude."""
    IABSMIN = 36
    IABSMAX = 37


class Source(IntEnum):
    """Where a unit's operand comes from."""

    NONE = 0
    IMM0 = 1
    IMM1 = 2
    IMM2 = 3
    VRF = 4
    STASH = 5
    SELF = 6
    ZIP = 7
    """The other group's element: from here on the two groups are one."""
    SELECT = 8
    """The first slot whose guard the element's tag satisfies; with none, x passes unchanged."""


class Groups(IntEnum):
    """The groups of a pair that a unit works on before they are one."""

    BOTH = 0
    FIRST = 1
    SECOND = 2


@dataclass(frozen=True)
class VectorOp:
    """One unit's work: op(x, y[, z]), or op(y, x) when `reverse`."""

    alu: Alu
    """The unit."""
    op: Op
    """What it computes."""
    y: Source = Source.NONE
    """Its first operand beside x."""
    z: Source = Source.NONE
    """Its second operand; only `FMA` has one."""
    reverse: bool = False
    """Exchange x and y."""
    stash: bool = False
    """Keep this unit's input for one later `Source.STASH`."""
    int_width: int = 31
    """Bits before the binary point of fixed-point numbers: `ITOF` divides by 2**(31 - width),
    `FTOI` multiplies by it."""
    groups: Groups = Groups.BOTH
    """Groups of a pair that it works on; the other's elements pass."""


class Comparison(IntEnum):
    """How an element is compared with a boundary; signed numbers or floats as the stream has."""

    FALSE = 0
    TRUE = 1
    EQUAL = 2
    LESS = 3
    GREATER = 4
    LESS_UNSIGNED = 5
    """The bit patterns as unsigned numbers."""
    GREATER_UNSIGNED = 6


@dataclass(frozen=True)
class Comparator:
    """One bit of an element's tag."""

    kind: Comparison
    """When the bit is 1."""
    boundary: int = 0
    """Pattern that the element is compared with."""


@dataclass(frozen=True)
class Slot:
    """A choice of `Source.SELECT`, for elements whose tag has `value` where `mask` has ones."""

    source: Source
    """Where its operand comes from: an immediate, the VRF or the stash."""
    mask: int = 0
    """Bits of the tag that count; 0: every element."""
    value: int = 0
    """What they must be."""
    negate: bool = False
    """They must not be that."""

    @property
    def unconditional(self) -> bool:
        return self.mask == 0 and not self.negate


@dataclass(frozen=True)
class Gate:
    """Says by slice and step whether a packet is valid; the counters with its `valid_dim` count.

    With m = slice & mask: m < slice_bound is valid; m = slice_bound is valid while the index is
    below `bound`; m > slice_bound is not, or with `time_major` as for m = slice_bound.
    """

    bound: int
    """First index that is not valid."""
    mask: int = 0
    """Bits of the slice number that hold a part of the axis."""
    slice_bound: int = 0
    """The part where valid data end."""
    time_major: bool = False
    """The counters hold the outer part of the axis, the slices the inner."""


@dataclass(frozen=True)
class Clipper:
    """Valid columns of a packet: min(span, max(0, size - index)), of the first 8."""

    size: int
    """Length of the axis without padding."""
    span: int = 8
    """Columns of a packet that belong to it."""


class Reduce(IntEnum):
    NONE = 0
    ADD = 1
    MAX = 2
    MIN = 3
    IADD = 4
    """Wraps; only across slices."""
    IMAX = 5
    IMIN = 6
    IADD_SAT = 7
    """The exact sum, saturated once."""
    MUL = 8
    """Only across slices."""


class Placement(IntEnum):
    """Where the inter-slice reducer stands relative to the units."""

    FIRST = 0
    LAST = 1


@dataclass(frozen=True)
class Vector:
    """The vector engine: units in order, a reducer, and a reducer across slices.

    Immediates are 32-bit patterns; the unit decides whether they are i32 or f32.
    """

    ops: tuple[VectorOp, ...] = ()
    """Units in pipeline order, each at most once."""
    imm: tuple[int, int, int] = (0, 0, 0)
    """Patterns of the three immediate operands."""
    reduce: Reduce = Reduce.NONE
    """How the reducer folds VSUM counters."""
    reduce_columns: bool = False
    """Fold the packet's columns too, not only the VSUM counters."""
    slice_reduce: Reduce = Reduce.NONE
    """How neighbouring slices are folded."""
    slice_group: int = 1
    """Innermost slices that share one result."""
    slice_placement: Placement = Placement.LAST
    """Before or after the units."""
    vrf_lane: int = 0
    """Bytes between the VRF operands of neighbouring lanes."""
    vrf_column: int = 0
    """Bytes between the VRF operands of neighbouring columns."""
    vrf_pair: int = 0
    """Bytes between the VRF operands of the pair's two groups."""
    comparators: tuple[Comparator, ...] = ()
    """Bits 0 to 3 of every element's tag, from what enters the units; the others are 0."""
    slots: tuple[Slot, ...] = ()
    """Choices of `Source.SELECT`, the first match counts."""
    gates: tuple[Gate, ...] = ()
    """Packets that the reducer leaves out."""
    clipper: Clipper | None = None
    """Columns that the reducer leaves out."""

    @property
    def reads_vrf(self) -> bool:
        return any(Source.VRF in (op.y, op.z) for op in self.ops) or any(
            slot.source == Source.VRF for slot in self.slots
        )

    @property
    def used(self) -> bool:
        return bool(self.ops) or self.reduce != Reduce.NONE or self.slice_reduce != Reduce.NONE
