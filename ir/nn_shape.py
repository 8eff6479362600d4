"""`nn` ops that move or reduce elements: reshape, transpose, slice, concat, expand, mean."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from xdsl.dialects.builtin import DenseArrayBase, IntegerAttr, UnitAttr
from xdsl.ir import SSAValue
from xdsl.irdl import (
    IRDLOperation,
    irdl_op_definition,
    operand_def,
    opt_prop_def,
    prop_def,
    result_def,
    traits_def,
    var_operand_def,
)
from xdsl.traits import Pure
from xdsl.utils.exceptions import VerifyException

from .types import (
    ANY_TENSOR,
    FLOAT_TENSOR,
    I64_ATTR,
    AnyTensor,
    Dim,
    Dims,
    broadcast,
    dims_of,
    dtype_of,
    expect_same_dtype,
    expect_type,
    i64,
    show_dims,
    tensor,
)


@irdl_op_definition
class ReshapeOp(IRDLOperation):
    """The same elements in row-major order under y's shape.

    The product of the static sizes and the names of the dynamic ones stay the same.
    """

    name = "nn.reshape"

    x = operand_def(ANY_TENSOR)
    y = result_def(ANY_TENSOR)

    traits = traits_def(Pure())

    assembly_format = "$x attr-dict `:` type($x) `->` type($y)"

    def __init__(self, x: SSAValue, dims: Iterable[Dim]) -> None:
        super().__init__(operands=[x], result_types=[tensor(dims, dtype_of(x))])
        self.verify_()

    def verify_(self) -> None:
        expect_type(self.y, tensor(dims_of(self.y), dtype_of(self.x)))
        if _volume(dims_of(self.x)) != _volume(dims_of(self.y)):
            shapes = f"{show_dims(dims_of(self.x))} and {show_dims(dims_of(self.y))}"
            raise VerifyException(f"{shapes} do not hold the same number of elements")


@irdl_op_definition
class TransposeOp(IRDLOperation):
    """Exchange two dimensions."""

    name = "nn.transpose"

    x = operand_def(ANY_TENSOR)
    dim0 = prop_def(I64_ATTR)
    dim1 = prop_def(I64_ATTR)
    y = result_def(ANY_TENSOR)

    traits = traits_def(Pure())

    assembly_format = "$x `dims` $dim0 `,` $dim1 attr-dict `:` type($x) `->` type($y)"

    def __init__(self, x: SSAValue, *, dim0: int, dim1: int) -> None:
        """Negative dims count from the end; dim0 <= dim1 is stored."""
        dim0, dim1 = sorted((normalize_dim(x, dim0), normalize_dim(x, dim1)))
        super().__init__(
            operands=[x],
            result_types=[self.infer(x, dim0, dim1)],
            properties={"dim0": IntegerAttr(dim0, i64), "dim1": IntegerAttr(dim1, i64)},
        )

    @staticmethod
    def infer(x: SSAValue, dim0: int, dim1: int) -> AnyTensor:
        expect_dim("dim0", x, dim0)
        expect_dim("dim1", x, dim1)
        dims = list(dims_of(x))
        dims[dim0], dims[dim1] = dims[dim1], dims[dim0]
        return tensor(dims, dtype_of(x))

    def verify_(self) -> None:
        expect_type(self.y, self.infer(self.x, self.dim0.value.data, self.dim1.value.data))
        if self.dim0.value.data > self.dim1.value.data:
            raise VerifyException("dim0 comes before dim1")


@irdl_op_definition
class SliceOp(IRDLOperation):
    """Elements `start` to `end` (exclusive) of one static dimension."""

    name = "nn.slice"

    x = operand_def(ANY_TENSOR)
    dim = prop_def(I64_ATTR)
    start = prop_def(I64_ATTR)
    end = prop_def(I64_ATTR)
    y = result_def(ANY_TENSOR)

    traits = traits_def(Pure())

    assembly_format = "$x `dim` $dim `from` $start `to` $end attr-dict `:` type($x) `->` type($y)"

    def __init__(self, x: SSAValue, *, dim: int, start: int, end: int) -> None:
        """A negative dim counts from the end; `start` and `end` do not."""
        dim = normalize_dim(x, dim)
        super().__init__(
            operands=[x],
            result_types=[self.infer(x, dim, start, end)],
            properties={
                "dim": IntegerAttr(dim, i64),
                "start": IntegerAttr(start, i64),
                "end": IntegerAttr(end, i64),
            },
        )

    @staticmethod
    def infer(x: SSAValue, dim: int, start: int, end: int) -> AnyTensor:
        expect_dim("dim", x, dim)
        dims = list(dims_of(x))
        size = dims[dim]
        if isinstance(size, str):
            raise VerifyException(f"dimension {dim} of x, {size}, is dynamic: it cannot be cut")
        if not 0 <= start < end <= size:
            raise VerifyException(f"{start} to {end} is not a range inside 0 to {size}")
        dims[dim] = end - start
        return tensor(dims, dtype_of(x))

    def verify_(self) -> None:
        bounds = (self.dim.value.data, self.start.value.data, self.end.value.data)
        expect_type(self.y, self.infer(self.x, *bounds))


@irdl_op_definition
class ConcatOp(IRDLOperation):
    """Join tensors along one static dimension; the others are equal."""

    name = "nn.concat"

    xs = var_operand_def(ANY_TENSOR)
    dim = prop_def(I64_ATTR)
    y = result_def(ANY_TENSOR)

    traits = traits_def(Pure())

    assembly_format = "$xs `dim` $dim attr-dict `:` type($xs) `->` type($y)"

    def __init__(self, xs: Sequence[SSAValue], *, dim: int) -> None:
        """A negative dim counts from the end."""
        dim = normalize_dim(xs[0], dim)
        super().__init__(
            operands=[xs],
            result_types=[self.infer(xs, dim)],
            properties={"dim": IntegerAttr(dim, i64)},
        )

    @staticmethod
    def infer(xs: Sequence[SSAValue], dim: int) -> AnyTensor:
        if not xs:
            raise VerifyException("there is nothing to join")
        expect_same_dtype(**{f"xs[{index}]": x for index, x in enumerate(xs)})
        expect_dim("dim", xs[0], dim)
        first = dims_of(xs[0])
        total = 0
        for x in xs:
            dims = dims_of(x)
            if dims[:dim] + dims[dim + 1 :] != first[:dim] + first[dim + 1 :]:
                shapes = f"{show_dims(first)} and {show_dims(dims)}"
                raise VerifyException(f"{shapes} differ outside dimension {dim}")
            size = dims[dim]
            if isinstance(size, str):
                raise VerifyException(f"dimension {dim}, {size}, is dynamic: it cannot be joined")
            total += size
        return tensor((*first[:dim], total, *first[dim + 1 :]), dtype_of(xs[0]))

    def verify_(self) -> None:
        expect_type(self.y, self.infer(self.xs, self.dim.value.data))


@irdl_op_definition
class ExpandOp(IRDLOperation):
    """Broadcast to y's shape: sizes of 1 stretch, new dimensions appear on the left."""

    name = "nn.expand"

    x = operand_def(ANY_TENSOR)
    y = result_def(ANY_TENSOR)

    traits = traits_def(Pure())

    assembly_format = "$x attr-dict `:` type($x) `->` type($y)"

    def __init__(self, x: SSAValue, dims: Iterable[Dim]) -> None:
        super().__init__(operands=[x], result_types=[tensor(dims, dtype_of(x))])
        self.verify_()

    def verify_(self) -> None:
        expect_type(self.y, tensor(dims_of(self.y), dtype_of(self.x)))
        if broadcast(dims_of(self.x), dims_of(self.y)) != dims_of(self.y):
            shapes = f"{show_dims(dims_of(self.x))} to {show_dims(dims_of(self.y))}"
            raise VerifyException(f"cannot expand {shapes}")


@irdl_op_definition
class MeanOp(IRDLOperation):
    """The mean over some dimensions, which vanish or (`keepdim`) become 1."""

    name = "nn.mean"

    x = operand_def(FLOAT_TENSOR)
    dims = prop_def(DenseArrayBase.constr(i64))
    keepdim = opt_prop_def(UnitAttr)
    y = result_def(FLOAT_TENSOR)

    traits = traits_def(Pure())

    assembly_format = "$x `dims` $dims (`keepdim` $keepdim^)? attr-dict `:` type($x) `->` type($y)"

    def __init__(self, x: SSAValue, *, dims: Iterable[int], keepdim: bool) -> None:
        """Negative dims count from the end; they are stored in ascending order."""
        dims = sorted(normalize_dim(x, dim) for dim in dims)
        super().__init__(
            operands=[x],
            result_types=[self.infer(x, dims, keepdim)],
            properties={
                "dims": DenseArrayBase.from_list(i64, dims),
                "keepdim": UnitAttr() if keepdim else None,
            },
        )

    @staticmethod
    def infer(x: SSAValue, dims: Sequence[int], keepdim: bool) -> AnyTensor:
        for dim in dims:
            expect_dim("dims", x, dim)
        if not dims or list(dims) != sorted(set(dims)):
            raise VerifyException(f"dims must be ascending and without repeats, not {list(dims)}")
        kept = (1 if index in dims else dim for index, dim in enumerate(dims_of(x)))
        rest = (dim for index, dim in enumerate(dims_of(x)) if index not in dims)
        return tensor(kept if keepdim else rest, dtype_of(x))

    def verify_(self) -> None:
        expect_type(self.y, self.infer(self.x, self.dims.get_values(), bool(self.keepdim)))


def normalize_dim(x: SSAValue, dim: int) -> int:
    """The dimension counted from the start, as it is stored."""
    return dim + len(dims_of(x)) if dim < 0 else dim


def expect_dim(name: str, x: SSAValue, dim: int) -> None:
    """Raises VerifyException unless `dim` is a dimension of x, counted from the start."""
    rank = len(dims_of(x))
    if not 0 <= dim < rank:
        raise VerifyException(f"{name} = {dim} is not a dimension of a tensor of rank {rank}")


def _volume(dims: Dims) -> tuple[int, Counter[str]]:
    static = math.prod(dim for dim in dims if isinstance(dim, int))
    return static, Counter(dim for dim in dims if isinstance(dim, str))
