"""`nn` ops that work element by element: arithmetic, activations, casts."""

from __future__ import annotations

import math
from abc import ABC
from typing import ClassVar, Literal

from xdsl.dialects.builtin import Float64Type, FloatAttr, StringAttr
from xdsl.ir import Attribute, SSAValue
from xdsl.irdl import (
    IRDLOperation,
    VarConstraint,
    irdl_op_definition,
    operand_def,
    prop_def,
    result_def,
    traits_def,
)
from xdsl.traits import Pure
from xdsl.utils.exceptions import VerifyException

from .exact_floats import Exact
from .types import (
    ANY_TENSOR,
    FLOAT_TENSOR,
    AnyTensor,
    broadcast,
    dims_of,
    dtype_of,
    expect_type,
    f64,
    tensor,
)


class BinaryOp(IRDLOperation, ABC):
    """Combine `a` and `b` with PyTorch's broadcasting; both have one element type."""

    a = operand_def(ANY_TENSOR)
    b = operand_def(ANY_TENSOR)
    y = result_def(ANY_TENSOR)

    traits = traits_def(Pure())

    assembly_format = "$a `,` $b attr-dict `:` type($a) `,` type($b) `->` type($y)"

    def __init__(self, a: SSAValue, b: SSAValue) -> None:
        super().__init__(operands=[a, b], result_types=[self.infer(a, b)])

    @staticmethod
    def infer(a: SSAValue, b: SSAValue) -> AnyTensor:
        if dtype_of(a) != dtype_of(b):
            raise VerifyException(f"a is {dtype_of(a)} but b is {dtype_of(b)}: cast one of them")
        return tensor(broadcast(dims_of(a), dims_of(b)), dtype_of(a))

    def verify_(self) -> None:
        expect_type(self.y, self.infer(self.a, self.b))


@irdl_op_definition
class AddOp(BinaryOp):
    """`y = a + b`, broadcast."""

    name = "nn.add"


@irdl_op_definition
class SubOp(BinaryOp):
    """`y = a - b`, broadcast."""

    name = "nn.sub"


@irdl_op_definition
class MulOp(BinaryOp):
    """`y = a * b`, broadcast."""

    name = "nn.mul"


@irdl_op_definition
class DivOp(BinaryOp):
    """`y = a / b`, broadcast, of floats."""

    name = "nn.div"

    a = operand_def(FLOAT_TENSOR)
    b = operand_def(FLOAT_TENSOR)


class UnaryOp(IRDLOperation, ABC):
    """Apply a function of one number to each element; `y` has x's type."""

    T: ClassVar = VarConstraint("T", FLOAT_TENSOR)

    x = operand_def(T)
    y = result_def(T)

    traits = traits_def(Pure())

    assembly_format = "$x attr-dict `:` type($x)"

    def __init__(self, x: SSAValue) -> None:
        super().__init__(operands=[x], result_types=[x.type])


@irdl_op_definition
class NegOp(UnaryOp):
    """`y = -x`."""

    name = "nn.neg"


@irdl_op_definition
class RsqrtOp(UnaryOp):
    """`y = 1 / sqrt(x)`."""

    name = "nn.rsqrt"


@irdl_op_definition
class SqrtOp(UnaryOp):
    """`y = sqrt(x)`."""

    name = "nn.sqrt"


@irdl_op_definition
class ExpOp(UnaryOp):
    """`y = e ** x`."""

    name = "nn.exp"


@irdl_op_definition
class SigmoidOp(UnaryOp):
    """`y = 1 / (1 + exp(-x))`."""

    name = "nn.sigmoid"


@irdl_op_definition
class SiluOp(UnaryOp):
    """`y = x * sigmoid(x)`, rounded once."""

    name = "nn.silu"


@irdl_op_definition
class TanhOp(UnaryOp):
    """`y = tanh(x)`."""

    name = "nn.tanh"


@irdl_op_definition
class CosOp(UnaryOp):
    """`y = cos(x)`, x in radians."""

    name = "nn.cos"


@irdl_op_definition
class SinOp(UnaryOp):
    """`y = sin(x)`, x in radians."""

    name = "nn.sin"


@irdl_op_definition
class GeluOp(UnaryOp):
    """`y = x * Phi(x)`, exact (`none`) or by the tanh approximation (`tanh`)."""

    name = "nn.gelu"

    approximate = prop_def(StringAttr)

    assembly_format = "$x `approximate` $approximate attr-dict `:` type($x)"

    def __init__(self, x: SSAValue, *, approximate: Literal["none", "tanh"]) -> None:
        IRDLOperation.__init__(
            self,
            operands=[x],
            result_types=[x.type],
            properties={"approximate": StringAttr(approximate)},
        )

    def verify_(self) -> None:
        if self.approximate.data not in ("none", "tanh"):
            raise VerifyException(f'approximate is "none" or "tanh", not {self.approximate}')


@irdl_op_definition
class ScaleOp(UnaryOp):
    """`y = x * factor`, the product formed in at least f32 and rounded once."""

    name = "nn.scale"

    factor = prop_def(FloatAttr[Float64Type])

    custom_directives = (Exact,)
    assembly_format = "$x `by` custom<Exact>($factor) attr-dict `:` type($x)"

    def __init__(self, x: SSAValue, *, factor: float) -> None:
        IRDLOperation.__init__(
            self,
            operands=[x],
            result_types=[x.type],
            properties={"factor": FloatAttr(factor, f64)},
        )

    def verify_(self) -> None:
        expect_finite("factor", self.factor)


@irdl_op_definition
class OffsetOp(UnaryOp):
    """`y = x + value`, the sum formed in at least f32 and rounded once."""

    name = "nn.offset"

    value = prop_def(FloatAttr[Float64Type])

    custom_directives = (Exact,)
    assembly_format = "$x `by` custom<Exact>($value) attr-dict `:` type($x)"

    def __init__(self, x: SSAValue, *, value: float) -> None:
        IRDLOperation.__init__(
            self,
            operands=[x],
            result_types=[x.type],
            properties={"value": FloatAttr(value, f64)},
        )

    def verify_(self) -> None:
        expect_finite("value", self.value)


@irdl_op_definition
class PowOp(UnaryOp):
    """`y = x ** exponent`."""

    name = "nn.pow"

    exponent = prop_def(FloatAttr[Float64Type])

    custom_directives = (Exact,)
    assembly_format = "$x `to` custom<Exact>($exponent) attr-dict `:` type($x)"

    def __init__(self, x: SSAValue, *, exponent: float) -> None:
        IRDLOperation.__init__(
            self,
            operands=[x],
            result_types=[x.type],
            properties={"exponent": FloatAttr(exponent, f64)},
        )

    def verify_(self) -> None:
        expect_finite("exponent", self.exponent)


@irdl_op_definition
class CastOp(IRDLOperation):
    """Convert to y's element type: floats round to nearest even, floats to i32 truncate."""

    name = "nn.cast"

    x = operand_def(ANY_TENSOR)
    y = result_def(ANY_TENSOR)

    traits = traits_def(Pure())

    assembly_format = "$x attr-dict `:` type($x) `->` type($y)"

    def __init__(self, x: SSAValue, *, dtype: Attribute) -> None:
        super().__init__(operands=[x], result_types=[tensor(dims_of(x), dtype)])

    def verify_(self) -> None:
        expect_type(self.y, tensor(dims_of(self.x), dtype_of(self.y)))


def expect_finite(name: str, value: FloatAttr[Float64Type]) -> None:
    if not math.isfinite(value.value.data):
        raise VerifyException(f"{name} is finite, not {value.value.data}")
