"""The `quant` dialect: tensors of 8-bit codes, and the scales that say what the codes mean.

A code stands for itself times a multiplier, its scale. Scales are parameters in whatever type and
shape the checkpoint stores them, or f32 values that the program computes; every op reads them as
f32. Which codes share a scale is said by a block of rows and columns, as MLIR's sub-channel types
do: the whole tensor, one row (channel), or a rectangle, of which the last in each direction may be
partial. Shape letters: N rows and K columns of a weight, R and C those of a block.
Constructors follow the convention of `nn`.
"""

from __future__ import annotations

import math
from typing import Literal

from xdsl.dialects.builtin import IntegerAttr
from xdsl.ir import Attribute, Dialect, SSAValue
from xdsl.irdl import (
    AttrSizedOperandSegments,
    IRDLOperation,
    irdl_op_definition,
    operand_def,
    opt_operand_def,
    prop_def,
    result_def,
    traits_def,
)
from xdsl.traits import Pure
from xdsl.utils.exceptions import VerifyException

from .types import (
    CODES_TENSOR,
    FLOAT_TENSOR,
    I64_ATTR,
    SCALE_TENSOR,
    AnyTensor,
    Dim,
    Dims,
    TensorConstraint,
    bf16,
    dims_of,
    dtype_of,
    expect_dims,
    expect_rank,
    expect_type,
    f8e4m3,
    f32,
    i64,
    shape_of,
    show_dims,
    tensor,
)


@irdl_op_definition
class DynamicScaleOp(IRDLOperation):
    """The scale that brings the largest magnitude of each group to the largest code, 448.

    `y = max(abs(x)) / 448` over each `group` neighbours of the last dimension, in f32. With
    `group` = K each token has one scale.

    Shapes: x [..., K] -> y [..., K / group].
    """

    name = "quant.dynamic_scale"

    x = operand_def(FLOAT_TENSOR)
    group = prop_def(I64_ATTR)
    y = result_def(TensorConstraint((f32,)))

    traits = traits_def(Pure())

    assembly_format = "$x `group` $group attr-dict `:` type($x) `->` type($y)"

    def __init__(self, x: SSAValue, *, group: int) -> None:
        super().__init__(
            operands=[x],
            result_types=[self.infer(x, group)],
            properties={"group": IntegerAttr(group, i64)},
        )

    @staticmethod
    def infer(x: SSAValue, group: int) -> AnyTensor:
        *outer, width = dims_of(x) or (1,)
        if isinstance(width, str) or group < 1 or width % group:
            raise VerifyException(f"groups of {group} do not divide K = {width}")
        return tensor((*outer, width // group), f32)

    def verify_(self) -> None:
        expect_type(self.y, self.infer(self.x, self.group.value.data))


@irdl_op_definition
class QuantizeOp(IRDLOperation):
    """The code nearest to `x / scale`: f32 division, clamped to ±448, halves to even.

    The scale is one number, one for each column, or one for each group of neighbours in the last
    dimension. NaN stays NaN. A scale of zero, which `quant.dynamic_scale` gives for zeros, gives
    zeros.

    Shapes: x [..., K], scale of one element, [K] or [..., K / group] -> y [..., K].
    """

    name = "quant.quantize"

    x = operand_def(FLOAT_TENSOR)
    scale = operand_def(SCALE_TENSOR)
    y = result_def(TensorConstraint((f8e4m3,)))

    traits = traits_def(Pure())

    assembly_format = "$x `by` $scale attr-dict `:` type($x) `,` type($scale) `->` type($y)"

    def __init__(self, x: SSAValue, scale: SSAValue) -> None:
        super().__init__(operands=[x, scale], result_types=[self.infer(x, scale)])

    @staticmethod
    def infer(x: SSAValue, scale: SSAValue) -> AnyTensor:
        check_input_scale(x, scale)
        return tensor(dims_of(x), f8e4m3)

    def verify_(self) -> None:
        expect_type(self.y, self.infer(self.x, self.scale))


@irdl_op_definition
class DequantizeOp(IRDLOperation):
    """Compute `codes * scale` in f32, rounded once to y's type.

    Shapes: codes [..., K], scale of one element, [K] or [..., K / group] -> y [..., K].
    """

    name = "quant.dequantize"

    codes = operand_def(CODES_TENSOR)
    scale = operand_def(SCALE_TENSOR)
    y = result_def(FLOAT_TENSOR)

    traits = traits_def(Pure())

    assembly_format = "$codes `by` $scale attr-dict `:` type($codes) `,` type($scale) `->` type($y)"

    def __init__(self, codes: SSAValue, scale: SSAValue, *, dtype: Attribute = bf16) -> None:
        check_input_scale(codes, scale)
        y = tensor(dims_of(codes), dtype)
        super().__init__(operands=[codes, scale], result_types=[y])

    def verify_(self) -> None:
        check_input_scale(self.codes, self.scale)
        expect_dims("y", self.y, dims_of(self.codes))


@irdl_op_definition
class LinearOp(IRDLOperation):
    """`nn.linear` with codes as weights: sums and scales in f32, rounded once to y's type.

    Rows iR to iR + R - 1 and columns jC to jC + C - 1 of w share scale (i, j). x is in floats, or
    in codes with `x_scale`, which holds one number or one for each group of neighbours of a token.
    `y = sum over k of (x[k] * x_scale) * (w[n, k] * w_scale) + bias`.

    Shapes: x [..., K], w [N, K], w_scale ceil(N / R) by ceil(K / C) elements, x_scale of one
    element or [..., K / group], bias [N] -> y [..., N].
    """

    name = "quant.linear"

    x = operand_def(TensorConstraint((*FLOAT_TENSOR.dtypes, f8e4m3)))
    w = operand_def(CODES_TENSOR)
    w_scale = operand_def(SCALE_TENSOR)
    x_scale = opt_operand_def(SCALE_TENSOR)
    bias = opt_operand_def(FLOAT_TENSOR)
    rows = prop_def(I64_ATTR)
    columns = prop_def(I64_ATTR)
    y = result_def(FLOAT_TENSOR)

    irdl_options = (AttrSizedOperandSegments(as_property=True),)
    traits = traits_def(Pure())

    assembly_format = (
        "$x `,` $w `by` $w_scale `block` $rows `,` $columns (`x_scale` $x_scale^)?"
        " (`bias` $bias^)? attr-dict `:` type($x) `,` type($w) `by` type($w_scale)"
        " (`x_scale` type($x_scale)^)? (`bias` type($bias)^)? `->` type($y)"
    )

    def __init__(
        self,
        x: SSAValue,
        w: SSAValue,
        w_scale: SSAValue,
        x_scale: SSAValue | None = None,
        bias: SSAValue | None = None,
        *,
        rows: int,
        columns: int,
        dtype: Attribute | None = None,
    ) -> None:
        """`dtype` is y's; by default x's, or bf16 if x is codes."""
        dims = self.infer(x, w, w_scale, x_scale, bias, rows, columns)
        if dtype is None:
            dtype = bf16 if is_codes(x) else dtype_of(x)
        super().__init__(
            operands=[x, w, w_scale, x_scale, bias],
            result_types=[tensor(dims, dtype)],
            properties={"rows": IntegerAttr(rows, i64), "columns": IntegerAttr(columns, i64)},
        )

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns of w that share a scale."""
        return self.rows.value.data, self.columns.value.data

    @staticmethod
    def infer(
        x: SSAValue,
        w: SSAValue,
        w_scale: SSAValue,
        x_scale: SSAValue | None,
        bias: SSAValue | None,
        rows: int,
        columns: int,
    ) -> Dims:
        """The dims of y."""
        n, k = expect_rank("w", w, 2)
        x_dims = dims_of(x)
        if not x_dims or x_dims[-1] != k:
            raise VerifyException(f"x is {show_dims(x_dims)} but w has K = {k}")
        if is_codes(x) != (x_scale is not None):
            raise VerifyException("x has a scale exactly if it is codes")
        if x_scale is not None:
            check_input_scale(x, x_scale, columns=False)
        if bias is not None:
            expect_dims("bias", bias, (n,))
        grid = grid_of((_static("N", n), _static("K", k)), rows, columns)
        if grid_in(shape_of(w_scale)) != grid and not _is_vector(shape_of(w_scale), grid):
            raise VerifyException(
                f"w_scale is {show_dims(dims_of(w_scale))}, "
                f"blocks of {rows} by {columns} need {show_dims(grid)}"
            )
        return (*x_dims[:-1], n)

    def verify_(self) -> None:
        dims = self.infer(self.x, self.w, self.w_scale, self.x_scale, self.bias, *self.block)
        expect_dims("y", self.y, dims)


def is_codes(x: SSAValue) -> bool:
    return dtype_of(x) in CODES_TENSOR.dtypes


def grid_of(shape: tuple[int, int], rows: int, columns: int) -> tuple[int, int]:
    """Blocks in each direction of a weight. Raises VerifyException for blocks of no size."""
    if rows < 1 or columns < 1:
        raise VerifyException(f"a block of {rows} by {columns} is empty")
    return -(-shape[0] // rows), -(-shape[1] // columns)


def grid_dim(shape: tuple[int, ...], weight_dim: Literal[0, 1]) -> int | None:
    """The dimension of a stored scale that goes with a weight's; None if it has none for it.

    Formats store a grid as [i, j], [i, 1, j, 1], and one of a single column as [i], too.
    """
    if len(shape) == 4:
        return 2 * weight_dim
    return weight_dim if weight_dim < len(shape) else None


def grid_in(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """The grid that a stored scale of two or four dimensions has; None for other shapes."""
    if len(shape) == 4 and shape[1] == shape[3] == 1:
        return shape[0], shape[2]
    return (shape[0], shape[1]) if len(shape) == 2 else None


def check_input_scale(x: SSAValue, scale: SSAValue, *, columns: bool = True) -> None:
    """Raises VerifyException unless the scale is one number or one for each group of x.

    With `columns` it may also be one for each column, [K].
    """
    if math.prod(shape_of(scale)) == 1:
        return
    *outer, width = dims_of(x)
    if columns and dims_of(scale) == (width,):
        return
    *scale_outer, groups = dims_of(scale)
    if outer != scale_outer or isinstance(groups, str) or _static("K", width) % groups:
        raise VerifyException(
            f"scale is {show_dims(dims_of(scale))}, which is neither one number nor fits "
            f"{show_dims(dims_of(x))}"
        )


def _is_vector(shape: tuple[int, ...], grid: tuple[int, int]) -> bool:
    """Whether the shape has one dimension, or none, for a grid of one column."""
    return len(shape) < 2 and (math.prod(shape), 1) == grid


def _static(name: str, dim: Dim) -> int:
    if isinstance(dim, str):
        raise VerifyException(f"{name} = {dim} must be static")
    return dim


QUANT = Dialect("quant", [DynamicScaleOp, QuantizeOp, DequantizeOp, LinearOp], [])
