"""`nn` ops that bring values in: parameters (by name, never by value) and small constants."""

from __future__ import annotations

import math
from typing import Any, cast

import ml_dtypes
import numpy as np
from xdsl.dialects.builtin import (
    BytesAttr,
    DenseIntOrFPElementsAttr,
    FlatSymbolRefAttrConstr,
    StringAttr,
    SymbolNameConstraint,
    SymbolRefAttr,
    TensorType,
)
from xdsl.ir import Attribute
from xdsl.irdl import IRDLOperation, irdl_op_definition, prop_def, result_def, traits_def
from xdsl.parser import Parser
from xdsl.printer import Printer
from xdsl.traits import Pure, SymbolOpInterface
from xdsl.utils.exceptions import VerifyException

from .types import (
    ANY_TENSOR,
    AnyTensor,
    bf16,
    check_tensor_type,
    dtype_of,
    f8e4m3,
    f8e5m2,
    f8e8m0,
    f16,
    f32,
    f64,
    i32,
    shape_of,
    tensor,
)

MAX_CONSTANT_BYTES = 64 * 1024

NUMPY_DTYPES: dict[Attribute, np.dtype[Any]] = {
    bf16: np.dtype(ml_dtypes.bfloat16),
    f8e4m3: np.dtype(ml_dtypes.float8_e4m3fn),
    f8e5m2: np.dtype(ml_dtypes.float8_e5m2),
    f8e8m0: np.dtype(ml_dtypes.float8_e8m0fnu),
    f16: np.dtype(np.float16),
    f32: np.dtype(np.float32),
    f64: np.dtype(np.float64),
    i32: np.dtype(np.int32),
}


@irdl_op_definition
class ParameterOp(IRDLOperation):
    """Declare a parameter of the model; the symbol is the tensor's name in the checkpoint."""

    name = "nn.parameter"

    sym_name = prop_def(SymbolNameConstraint())
    type = prop_def(ANY_TENSOR)

    traits = traits_def(SymbolOpInterface())

    assembly_format = "$sym_name attr-dict `:` $type"

    def __init__(self, name: str, type: AnyTensor) -> None:
        super().__init__(properties={"sym_name": StringAttr(name), "type": type})

    def verify_(self) -> None:
        if -1 in shape_of(self.type):
            raise VerifyException(f"a parameter has a static shape, but this one is {self.type}")


@irdl_op_definition
class GetParameterOp(IRDLOperation):
    """The value of a declared parameter."""

    name = "nn.get_parameter"

    parameter = prop_def(FlatSymbolRefAttrConstr)
    y = result_def(ANY_TENSOR)

    traits = traits_def(Pure())

    assembly_format = "$parameter attr-dict `:` type($y)"

    def __init__(self, parameter: str | ParameterOp, type: AnyTensor | None = None) -> None:
        """`type` may be left out when the declaration itself is given."""
        name = parameter
        if isinstance(parameter, ParameterOp):
            name, type = parameter.sym_name.data, parameter.type
        assert isinstance(name, str)
        assert type is not None
        super().__init__(properties={"parameter": SymbolRefAttr(name)}, result_types=[type])

    @property
    def parameter_name(self) -> str:
        """The name of the tensor in the checkpoint."""
        return self.parameter.root_reference.data


@irdl_op_definition
class ConstantOp(IRDLOperation):
    """A small constant, at most 64 KiB; anything that grows with the model is a parameter.

    Written `nn.constant dense<[1.0, 0.5]> : tensor<2xf32>`. Where decimals would not read back as
    the same bits, the value is a hexadecimal string: `dense<"0x0000807F"> : tensor<1xf32>`.
    """

    name = "nn.constant"

    value = prop_def(DenseIntOrFPElementsAttr)
    y = result_def(ANY_TENSOR)

    traits = traits_def(Pure())

    def __init__(self, value: DenseIntOrFPElementsAttr | np.ndarray[Any, Any]) -> None:
        """`value` may be a numpy array of a supported dtype (bf16 is ml_dtypes.bfloat16)."""
        if isinstance(value, np.ndarray):
            value = _dense(value)
        super().__init__(properties={"value": value}, result_types=[value.type])

    def to_numpy(self) -> np.ndarray[Any, Any]:
        """The elements, bit for bit."""
        dtype = NUMPY_DTYPES[dtype_of(self.value.type)]
        return np.frombuffer(self.value.data.data, dtype).reshape(self.value.get_shape())

    def verify_(self) -> None:
        check_tensor_type(self.value.type)
        if self.y.type != self.value.type:
            raise VerifyException(f"value is {self.value.type} but y is {self.y.type}")
        if -1 in shape_of(self.y):
            raise VerifyException(f"a constant has a static shape, but y is {self.y.type}")
        expected_bytes = math.prod(shape_of(self.y)) * NUMPY_DTYPES[dtype_of(self.y)].itemsize
        size_bytes = len(self.value.data.data)
        if size_bytes != expected_bytes:
            raise VerifyException(f"value has {size_bytes} bytes, its type {expected_bytes}")
        if size_bytes > MAX_CONSTANT_BYTES:
            raise VerifyException(
                f"value has {size_bytes} bytes, more than {MAX_CONSTANT_BYTES}: use nn.parameter"
            )

    @classmethod
    def parse(cls, parser: Parser) -> ConstantOp:
        attributes = parser.parse_optional_attr_dict()
        position = parser.pos
        value = parser.parse_attribute()
        if not isinstance(value, DenseIntOrFPElementsAttr):
            parser.raise_error("expected dense<...>", position, parser.pos)
        op = cls(value)
        op.attributes |= attributes
        return op

    def print(self, printer: Printer) -> None:
        printer.print_op_attributes(self.attributes)
        printer.print_string(" ")
        if _prints_exactly(self.to_numpy()):
            printer.print_attribute(self.value)
            return
        printer.print_string(f'dense<"0x{self.value.data.data.hex().upper()}"> : ')
        printer.print_attribute(self.value.type)


def _dense(array: np.ndarray[Any, Any]) -> DenseIntOrFPElementsAttr:
    dtype = next((d for d, n in NUMPY_DTYPES.items() if n == array.dtype), None)
    assert dtype is not None, f"nn has no element type for numpy's {array.dtype}"
    type = cast(TensorType[Any], tensor(array.shape, dtype))
    return DenseIntOrFPElementsAttr(type, BytesAttr(array.tobytes()))


def _prints_exactly(array: np.ndarray[Any, Any]) -> bool:
    """Whether xDSL's decimal list reads back as the same bits.

    It does not for NaN and infinity (read back as integers), for -0.0 beside 0.0 (printed as one
    splat) and for some large whole numbers (printed as hexadecimal integers).
    """
    if array.dtype == np.int32:
        return True
    with np.errstate(invalid="ignore"):  # a signalling NaN
        values = array.astype(np.float64)
    negative_zero = (values == 0) & np.signbit(values)
    return bool(np.all(np.isfinite(values) & (np.abs(values) <= 1e6) & ~negative_zero))
