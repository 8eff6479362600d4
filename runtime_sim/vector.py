"""The vector engine on whole arrays: units, reducers, and the reducer across slices.

A program is compiled for one order of axes and one set of register-file views; it then maps the
stream's array (two for a pair of streams) to the results. Arrays have one dimension per axis, of
size 1 where nothing differs along it.

Integer units see the bits as i32 and wrap unless they saturate; a shift by 32 or more, or by a
negative number, shifts everything out. Float units work in f32; FMA rounds twice; MIN and MAX keep
a NaN.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from ..backend_rngd.isa.instructions import (
    Comparator,
    Comparison,
    Fate,
    Groups,
    Op,
    Placement,
    Reduce,
    Source,
    Vector,
    VectorOp,
)
from ..backend_rngd.isa.units import CONVERSIONS, REDUCE_STAGE, STAGE
from . import numerics
from .axes import Axis, Pass
from .valid_counts import valid_elements

Array = np.ndarray
Shape = tuple[int, ...]
RegisterView = Callable[[Shape, tuple[int, ...], int], Array]
"""(shape, byte strides, group) -> i32 view of the VRF operand."""

F32, I32, U32 = np.dtype(np.float32), np.dtype(np.int32), np.dtype(np.uint32)

_INTEGER_BINARY: dict[Op, Callable[..., Array]] = {
    Op.AND: np.bitwise_and,
    Op.OR: np.bitwise_or,
    Op.XOR: np.bitwise_xor,
    Op.SHL: np.left_shift,
    Op.SAR: np.right_shift,
    Op.IADD: np.add,
    Op.ISUB: np.subtract,
    Op.IMUL: np.multiply,
    Op.IMIN: np.minimum,
    Op.IMAX: np.maximum,
}


def _add_sat(x: Array, y: Array) -> Array:
    return numerics.saturate(x.astype(np.int64) + y)


def _sub_sat(x: Array, y: Array) -> Array:
    return numerics.saturate(x.astype(np.int64) - y)


def _shl_sat(x: Array, y: Array) -> Array:
    inside = (y >= 0) & (y < 32)
    shifted = x.astype(np.int64) << np.where(inside, y, 32)
    return numerics.saturate(shifted)


def _mul_fxp(x: Array, y: Array) -> Array:
    product = x.astype(np.int64) * y
    return numerics.saturate(((product >> 30) + 1) >> 1)


def _sar_round(x: Array, y: Array) -> Array:
    inside = (y >= 0) & (y < 32)
    by = np.where(inside, y, 33).astype(np.int64)
    half = (np.int64(1) << by) >> 1
    shifted: Array = ((x.astype(np.int64) + half) >> by).astype(np.int32)
    return shifted


def _magnitudes(fold: Callable[..., Array]) -> Callable[..., Array]:
    """Fold of the magnitudes of floats, or of integers: that of the smallest one is 2**31."""

    def apply(x: Array, y: Array) -> Array:
        if x.dtype == np.float32:
            return fold(np.abs(x), np.abs(y))
        return fold(np.abs(x).view(np.uint32), np.abs(y).view(np.uint32)).view(np.int32)

    return apply


_NEW_INTEGER: dict[Op, Callable[..., Array]] = {
    Op.IADD_SAT: _add_sat,
    Op.ISUB_SAT: _sub_sat,
    Op.SHL_SAT: _shl_sat,
    Op.MUL_FXP: _mul_fxp,
    Op.SAR_ROUND: _sar_round,
    Op.IABSMIN: _magnitudes(np.minimum),
    Op.IABSMAX: _magnitudes(np.maximum),
}
"""Operations that always make a new array."""
_NEW_FLOAT: dict[Op, Callable[..., Array]] = {
    Op.ABSMIN: _magnitudes(np.minimum),
    Op.ABSMAX: _magnitudes(np.maximum),
}
_FLOAT_BINARY: dict[Op, Callable[..., Array]] = {
    Op.ADD: np.add,
    Op.SUB: np.subtract,
    Op.MUL: np.multiply,
    Op.DIV: np.divide,
    Op.MIN: np.minimum,
    Op.MAX: np.maximum,
}


def _sigmoid(x: Array) -> Array:
    y: Array = np.negative(x)
    np.exp(y, out=y)
    y += np.float32(1.0)
    np.reciprocal(y, out=y)
    return y


def _negexp(x: Array) -> Array:
    y: Array = np.negative(x)
    np.exp(y, out=y)
    return y


_UNARY: dict[Op, tuple[Callable[[Array], Array], np.dtype[np.generic]]] = {
    Op.SQRT: (np.sqrt, F32),
    Op.TANH: (np.tanh, F32),
    Op.SIGMOID: (_sigmoid, F32),
    Op.ERF: (numerics.erf, F32),
    Op.LOG: (np.log, F32),
    Op.SIN: (np.sin, F32),
    Op.COS: (np.cos, F32),
    Op.EXP: (np.exp, F32),
    Op.NEGEXP: (_negexp, F32),
}
_REDUCE: dict[Reduce, tuple[np.ufunc, np.dtype[np.generic]]] = {
    Reduce.ADD: (np.add, F32),
    Reduce.MAX: (np.maximum, F32),
    Reduce.MIN: (np.minimum, F32),
    Reduce.IADD: (np.add, I32),
    Reduce.IMAX: (np.maximum, I32),
    Reduce.IMIN: (np.minimum, I32),
    Reduce.IADD_SAT: (np.add, I32),
    Reduce.MUL: (np.multiply, F32),
}
_SUMS = (Reduce.ADD, Reduce.IADD, Reduce.IADD_SAT, Reduce.MUL)
_NEUTRAL: dict[Reduce, float | int] = {
    Reduce.ADD: 0.0,
    Reduce.MAX: -np.inf,
    Reduce.MIN: np.inf,
    Reduce.IMAX: -(1 << 31),
    Reduce.IMIN: (1 << 31) - 1,
    Reduce.IADD_SAT: 0,
}
"""What the reducer gives where no element is valid."""

Unit = Callable[[Array], Array]


@dataclass
class _Group:
    """What is known, while compiling, about the array of one group at the current unit."""

    index: int
    shape: Shape
    owned: bool
    """Whether the array is ours to overwrite."""


class VectorProgram:
    """The vector engine's work in one pass, ready to run again and again.

    `shapes` has one shape per group: two for a pair of streams. `owned` says that `run` may
    overwrite its inputs. Raises nothing: the decoder has checked the rules.
    """

    def __init__(
        self,
        work: Pass,
        order: Sequence[Axis],
        shapes: Sequence[Shape],
        owned: bool,
        register: RegisterView,
    ) -> None:
        self._vector: Vector = work.plan.command.vector
        self._is_float = work.plan.stream_dtype.is_float
        self._order = order
        self._register = register
        self._cell: list[Array | None] = [None, None, None, None]
        """The stash, the other group's array at the zip, the tags, what was selected."""
        self._selected_shape: Shape = ()
        self._reduced = False
        self._stash_shape: Shape = ()
        self._pair_units: list[tuple[Unit, Unit]] = []
        self._units: list[Unit] = []
        self._groups = [_Group(i, shape, owned) for i, shape in enumerate(shapes)]
        self._compile()
        self.shape = self._groups[0].shape
        """Shape of the results."""

    def run(self, x: Array, other: Array | None = None) -> Array:
        """The results; `other` is group 1 of a pair."""
        if other is not None:
            for first, second in self._pair_units:
                x, other = first(x), second(other)
            self._cell[1] = other
        for unit in self._units:
            x = unit(x)
        return x

    # --- compiling: each step appends a unit and tracks the array's shape ---

    def _compile(self) -> None:
        v = self._vector
        split = next((i for i, op in enumerate(v.ops) if Source.ZIP in (op.y, op.z)), 0)
        if v.slice_reduce != Reduce.NONE and v.slice_placement == Placement.FIRST:
            self._for_all_groups(self._across_slices)
        if v.comparators:
            self._units.append(self._tag(v, self._groups[0]))
        for op in v.ops[:split]:
            self._for_all_groups(functools.partial(self._unit, op))
        group = self._groups[0]
        for op in v.ops[split:]:
            if STAGE[op.alu] > REDUCE_STAGE:
                self._reduce(group)
            self._units.append(self._unit(op, group))
        self._reduce(group)
        if v.slice_reduce != Reduce.NONE and v.slice_placement == Placement.LAST:
            self._units.append(self._across_slices(group))

    def _for_all_groups(self, make: Callable[[_Group], Unit]) -> None:
        units = [make(group) for group in self._groups]
        if len(units) == 1:
            self._units.append(units[0])
        else:
            self._pair_units.append((units[0], units[1]))

    def _reduce(self, group: _Group) -> None:
        """Fold the summed axes, once, where the reducer stands."""
        if self._reduced or self._vector.reduce == Reduce.NONE:
            return
        self._reduced = True
        axes = tuple(i for i, axis in enumerate(self._order) if axis.fate == Fate.VSUM)
        valid = valid_elements(self._vector, self._order)
        self._units.append(self._fold(self._vector.reduce, axes, group, valid))

    def _across_slices(self, group: _Group) -> Unit:
        axes = tuple(i for i, axis in enumerate(self._order) if axis.grouped)
        return self._fold(self._vector.slice_reduce, axes, group)

    def _fold(
        self, kind: Reduce, axes: tuple[int, ...], group: _Group, valid: Array | None = None
    ) -> Unit:
        ufunc, dtype = _REDUCE[kind]
        # A sum counts steps along which nothing differs; a maximum need not.
        full = tuple(
            self._order[i].n if i in axes and kind in _SUMS else n
            for i, n in enumerate(group.shape)
        )
        if valid is not None:
            full = np.broadcast_shapes(full, valid.shape)
        grows = full != group.shape
        group.shape = tuple(1 if i in axes else n for i, n in enumerate(full))
        group.owned = True

        def fold(x: Array) -> Array:
            x = x.view(dtype)
            if grows:
                x = np.broadcast_to(x, full)
            if valid is not None:
                x = np.where(valid, x, dtype.type(_NEUTRAL[kind]))
            if kind == Reduce.IADD_SAT:
                return numerics.saturate(np.add.reduce(x, axes, np.int64, keepdims=True))
            return cast(Array, ufunc.reduce(x, axis=axes, dtype=dtype, keepdims=True))

        return fold

    def _tag(self, v: Vector, group: _Group) -> Unit:
        """Remember every element's tag."""
        dtype = F32 if self._is_float else I32
        tests = [_comparison(comparator, dtype) for comparator in v.comparators]
        cell = self._cell
        group.owned = False  # its elements may be what is selected from

        def tag(x: Array) -> Array:
            tags = np.zeros(x.shape, np.uint8)
            for bit, test in enumerate(tests):
                tags |= test(x).astype(np.uint8) << np.uint8(bit)
            cell[2] = tags
            return x

        return tag

    def _unit(self, op: VectorOp, group: _Group) -> Unit:
        if op.groups not in (Groups.BOTH, Groups.FIRST + group.index):
            return lambda x: x
        unit = self._selecting(op, group) if op.y == Source.SELECT else self._plain_unit(op, group)
        if not op.stash:
            return unit
        cell = self._cell

        def stash_first(x: Array) -> Array:
            cell[0] = x
            return unit(x)

        return stash_first

    def _selecting(self, op: VectorOp, group: _Group) -> Unit:
        """The unit with each element's first matching slot; others pass."""
        if op.stash:
            self._stash_shape = group.shape
        slots = [(slot, *self._operand(slot.source, group, I32)) for slot in self._vector.slots]
        shape = self._selected_shape = self._grown(group, *(shape for _, _, shape in slots))
        group.owned = False
        unit = self._plain_unit(op, group)
        group.owned = True
        cell = self._cell

        def select(x: Array) -> Array:
            tags = np.zeros((), np.uint8) if cell[2] is None else cell[2]
            open_ = np.ones(shape, np.bool_)
            chosen = np.zeros(shape, np.int32)
            for slot, operand, _ in slots:
                match = (tags & np.uint8(slot.mask)) == slot.value
                hit = open_ & (match != slot.negate)
                np.copyto(chosen, operand(x), where=hit)
                open_ &= ~hit
            cell[3] = chosen
            result = unit(x)
            return np.where(open_, x.view(I32), result.view(I32))

        return select

    def _plain_unit(self, op: VectorOp, group: _Group) -> Unit:
        if op.stash:
            self._stash_shape = group.shape
        if op.op in _UNARY:
            function, dtype = _UNARY[op.op]
            group.owned = True
            return lambda x: function(x.view(dtype))
        if op.op in CONVERSIONS:
            return self._conversion(op, group)
        if op.op in _NEW_INTEGER or op.op in _NEW_FLOAT:
            return self._new(op, group)
        if op.op == Op.FMA:
            return self._fma(op, group)
        if op.op == Op.SHR:
            return self._logical_shift(op, group)
        if op.op in _FLOAT_BINARY:
            return self._binary(_FLOAT_BINARY[op.op], op, group, F32)
        return self._binary(_INTEGER_BINARY[op.op], op, group, I32)

    def _binary(
        self,
        ufunc: Callable[..., Array],
        op: VectorOp,
        group: _Group,
        dtype: np.dtype[np.generic],
    ) -> Unit:
        y, shape = self._operand(op.y, group, dtype)
        mine = group.owned and not op.stash and op.y != Source.SELF
        in_place = mine and self._grown(group, shape) == group.shape
        group.shape, group.owned = self._grown(group, shape), True
        if op.reverse:
            return lambda x: ufunc(y(x), x.view(dtype))
        if in_place:

            def overwrite(x: Array) -> Array:
                x = x.view(dtype)
                return ufunc(x, y(x), out=x)

            return overwrite
        return lambda x: ufunc(x.view(dtype), y(x))

    def _conversion(self, op: VectorOp, group: _Group) -> Unit:
        bits = 31 - op.int_width
        group.owned = True
        if op.op == Op.ITOF:
            return lambda x: numerics.i32_to_f32(x.view(I32), bits)
        return lambda x: numerics.f32_to_i32(x.view(F32), bits)

    def _new(self, op: VectorOp, group: _Group) -> Unit:
        """An operation of two operands that makes a new array."""
        function = _NEW_INTEGER.get(op.op) or _NEW_FLOAT[op.op]
        dtype = F32 if op.op in _NEW_FLOAT else I32
        y, shape = self._operand(op.y, group, dtype)
        group.shape, group.owned = self._grown(group, shape), True
        if op.reverse:
            return lambda x: function(np.asarray(y(x)), x.view(dtype))
        return lambda x: function(x.view(dtype), y(x))

    def _fma(self, op: VectorOp, group: _Group) -> Unit:
        y, shape_y = self._operand(op.y, group, F32)
        z, shape_z = self._operand(op.z, group, F32)
        group.shape, group.owned = self._grown(group, shape_y, shape_z), True

        def fma(x: Array) -> Array:
            return cast(Array, x.view(F32) * y(x) + z(x))

        return fma

    def _logical_shift(self, op: VectorOp, group: _Group) -> Unit:
        y, shape = self._operand(op.y, group, U32)
        group.shape, group.owned = self._grown(group, shape), True
        return lambda x: np.right_shift(x.view(U32), y(x)).view(I32)

    def _grown(self, group: _Group, *operands: Shape) -> Shape:
        return np.broadcast_shapes(group.shape, *operands)

    def _operand(
        self, source: Source, group: _Group, dtype: np.dtype[np.generic]
    ) -> tuple[Callable[[Array], Array], Shape]:
        """A function of the unit's input that gives the operand, and the operand's shape."""
        cell = self._cell
        if source == Source.SELF:
            return (lambda x: x.view(dtype)), group.shape
        if source == Source.STASH:
            return (lambda x: _present(cell[0]).view(dtype)), self._stash_shape
        if source == Source.SELECT:
            return (lambda x: _present(cell[3]).view(dtype)), self._selected_shape
        if source == Source.ZIP:
            return (lambda x: _present(cell[1]).view(dtype)), self._groups[1].shape
        if source == Source.VRF:
            view = self._vrf_view(group.index).view(dtype)
            return (lambda x: view), view.shape
        index = (Source.IMM0, Source.IMM1, Source.IMM2).index(source)
        constant = np.array(self._vector.imm[index], np.uint32).view(dtype)[()]
        return (lambda x: constant), ()

    def _vrf_view(self, group: int) -> Array:
        shape, strides = [], []
        for axis in self._order:
            gone = axis.fate == Fate.VSUM and self._reduced
            moves = axis.vrf != 0 and not gone
            shape.append(axis.n if moves else 1)
            strides.append(axis.vrf if moves else 0)
        return self._register(tuple(shape), tuple(strides), group)


def _comparison(comparator: Comparator, dtype: np.dtype[np.generic]) -> Unit:
    """Elements -> bool; NaN is neither equal, less nor greater."""
    kind = comparator.kind
    if kind in (Comparison.TRUE, Comparison.FALSE):
        return lambda x: np.full(x.shape, kind == Comparison.TRUE)
    unsigned = kind in (Comparison.LESS_UNSIGNED, Comparison.GREATER_UNSIGNED)
    seen = U32 if unsigned else dtype
    boundary = np.array(comparator.boundary, np.uint32).view(seen)[()]
    if kind == Comparison.EQUAL:
        return lambda x: x.view(seen) == boundary
    if kind in (Comparison.LESS, Comparison.LESS_UNSIGNED):
        return lambda x: x.view(seen) < boundary
    return lambda x: x.view(seen) > boundary


def _present(array: Array | None) -> Array:
    assert array is not None
    return array
