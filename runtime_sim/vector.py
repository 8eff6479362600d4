"""The vector engine on whole arrays: units, reducers, and the reducer across slices.

A program is compiled for one order of axes and one set of register-file views; it then maps the
stream's array (two for a pair of streams) to the results. Arrays have one dimension per axis, of
size 1 where nothing differs along it.

Integer units see the bits as i32 and wrap; a shift by 32 or more shifts everything out. Float
units work in f32; FMA rounds twice; MIN and MAX keep a NaN.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from ..backend_rngd.isa.instructions import (
    Fate,
    Op,
    Placement,
    Reduce,
    Source,
    Vector,
    VectorOp,
)
from ..backend_rngd.isa.rules import REDUCE_STAGE, STAGE
from . import numerics
from .axes import Axis

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
    Op.ITOF: (numerics.i32_to_f32, I32),
    Op.FTOI: (numerics.f32_to_i32, F32),
}
_REDUCE: dict[Reduce, tuple[np.ufunc, np.dtype[np.generic]]] = {
    Reduce.ADD: (np.add, F32),
    Reduce.MAX: (np.maximum, F32),
    Reduce.MIN: (np.minimum, F32),
    Reduce.IADD: (np.add, I32),
    Reduce.IMAX: (np.maximum, I32),
    Reduce.IMIN: (np.minimum, I32),
}
_SUMS = (Reduce.ADD, Reduce.IADD)

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
        vector: Vector,
        order: Sequence[Axis],
        shapes: Sequence[Shape],
        owned: bool,
        register: RegisterView,
    ) -> None:
        self._vector = vector
        self._order = order
        self._register = register
        self._cell: list[Array | None] = [None, None]
        """The stash, and the other group's array at the zip."""
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
        self._units.append(self._fold(self._vector.reduce, axes, group))

    def _across_slices(self, group: _Group) -> Unit:
        axes = tuple(i for i, axis in enumerate(self._order) if axis.grouped)
        return self._fold(self._vector.slice_reduce, axes, group)

    def _fold(self, kind: Reduce, axes: tuple[int, ...], group: _Group) -> Unit:
        ufunc, dtype = _REDUCE[kind]
        # A sum counts steps along which nothing differs; a maximum need not.
        full = tuple(
            self._order[i].n if i in axes and kind in _SUMS else n
            for i, n in enumerate(group.shape)
        )
        grows = full != group.shape
        group.shape = tuple(1 if i in axes else n for i, n in enumerate(full))
        group.owned = True

        def fold(x: Array) -> Array:
            x = x.view(dtype)
            if grows:
                x = np.broadcast_to(x, full)
            return cast(Array, ufunc.reduce(x, axis=axes, dtype=dtype, keepdims=True))

        return fold

    def _unit(self, op: VectorOp, group: _Group) -> Unit:
        unit = self._plain_unit(op, group)
        if not op.stash:
            return unit
        cell = self._cell

        def stash_first(x: Array) -> Array:
            cell[0] = x
            return unit(x)

        return stash_first

    def _plain_unit(self, op: VectorOp, group: _Group) -> Unit:
        if op.stash:
            self._stash_shape = group.shape
        if op.op in _UNARY:
            function, dtype = _UNARY[op.op]
            group.owned = True
            return lambda x: function(x.view(dtype))
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


def _present(array: Array | None) -> Array:
    assert array is not None
    return array
