"""Tensor types with named dynamic dimensions, and typed views of them.

A dimension (`Dim`) is an `int` when its size is known and a `str`, its name, when it is dynamic.
In the type a dynamic dimension is `?` and its name stands in the encoding:
`tensor<?x?x576xbf16, #nn.dims<"batch", "seq", _>>` has the dims `("batch", "seq", 576)`. Every
dynamic dimension has a name, and two dimensions are equal exactly if their sizes or names are.
A type without dynamic dimensions has no encoding, so equal types compare equal.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

from typing_extensions import TypeVar
from xdsl.dialects.builtin import (
    DYNAMIC_INDEX,
    ArrayAttr,
    IntegerAttr,
    NoneAttr,
    StringAttr,
    TensorType,
    bf16,
    f8E4M3FN,
    f8E5M2,
    f8E8M0FNU,
    f16,
    f32,
    f64,
    i32,
    i64,
)
from xdsl.ir import Attribute, ParametrizedAttribute, SSAValue
from xdsl.irdl import (
    AttrConstraint,
    IntConstraint,
    VerificationContext,
    irdl_attr_definition,
    param_def,
)
from xdsl.parser import AttrParser
from xdsl.printer import Printer
from xdsl.utils.exceptions import VerifyException

__all__ = [
    "ANY_TENSOR",
    "CACHE_TENSOR",
    "CODES_TENSOR",
    "FLOAT_TENSOR",
    "I64_ATTR",
    "INT_TENSOR",
    "SCALE_TENSOR",
    "AnyTensor",
    "Dim",
    "Dims",
    "DimsAttr",
    "TensorConstraint",
    "bf16",
    "broadcast",
    "check_tensor_type",
    "dims_of",
    "dtype_of",
    "expect_dims",
    "expect_rank",
    "expect_same_dtype",
    "expect_type",
    "f8e4m3",
    "f8e5m2",
    "f8e8m0",
    "f16",
    "f32",
    "f64",
    "i32",
    "i64",
    "shape_of",
    "show_dims",
    "specialize",
    "tensor",
]

Dim: TypeAlias = int | str
Dims: TypeAlias = tuple[Dim, ...]
AnyTensor: TypeAlias = TensorType[Attribute]

f8e4m3, f8e5m2, f8e8m0 = f8E4M3FN, f8E5M2, f8E8M0FNU
"""Types of codes, and of scales that are powers of two."""

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@irdl_attr_definition
class DimsAttr(ParametrizedAttribute):
    """The names of a tensor's dynamic dimensions, `_` where the size is known.

    It is the encoding of a tensor type: `tensor<?x?x576xbf16, #nn.dims<"batch", "seq", _>>`.
    A type without dynamic dimensions has none. In Python, `_` is the empty string.
    """

    name = "nn.dims"

    names: ArrayAttr[StringAttr] = param_def()

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__(ArrayAttr([StringAttr(name) for name in names]))

    def entries(self) -> tuple[str, ...]:
        return tuple(name.data for name in self.names)

    def verify(self) -> None:
        for name in self.entries():
            if name and not _NAME.fullmatch(name):
                raise VerifyException(f"dimension name {name!r} is not an identifier")

    @classmethod
    def parse_parameters(cls, parser: AttrParser) -> Sequence[Attribute]:
        def entry() -> StringAttr:
            if parser.parse_optional_keyword("_") is not None:
                return StringAttr("")
            return StringAttr(parser.parse_str_literal(" or `_`"))

        return [ArrayAttr(parser.parse_comma_separated_list(parser.Delimiter.ANGLE, entry))]

    def print_parameters(self, printer: Printer) -> None:
        def entry(name: str) -> None:
            printer.print_string_literal(name) if name else printer.print_string("_")

        with printer.in_angle_brackets():
            printer.print_list(self.entries(), entry)


def tensor(dims: Iterable[Dim], dtype: Attribute) -> AnyTensor:
    """The type of a tensor with these dims, in which a string is a dynamic dimension's name."""
    return _tensor(tuple(dims), dtype)


def dims_of(x: SSAValue | Attribute) -> Dims:
    """Sizes and names of the dimensions. Raises VerifyException if `x` is no such tensor."""
    return _dims(x.type if isinstance(x, SSAValue) else x)


def shape_of(x: SSAValue | Attribute) -> tuple[int, ...]:
    """Sizes of the dimensions, -1 where dynamic."""
    return tuple(-1 if isinstance(dim, str) else dim for dim in dims_of(x))


def dtype_of(x: SSAValue | Attribute) -> Attribute:
    """The element type, such as `bf16`."""
    return _tensor_type(x).element_type


def show_dims(dims: Iterable[Dim]) -> str:
    """Dims as they stand in messages: `[batch, seq, 576]`."""
    return f"[{', '.join(str(dim) for dim in dims)}]"


def specialize(type: Attribute, sizes: Mapping[str, int]) -> Attribute:
    """The type with the named dimensions in `sizes` made static; other attributes unchanged."""
    if not isinstance(type, TensorType):
        return type
    dims = dims_of(type)
    if not any(dim in sizes for dim in dims if isinstance(dim, str)):
        return type
    return tensor(
        (sizes.get(dim, dim) if isinstance(dim, str) else dim for dim in dims), dtype_of(type)
    )


def expect_type(y: SSAValue, expected: Attribute) -> None:
    """Raises VerifyException if a result's type is not the one that its operands give."""
    if y.type is not expected and y.type != expected:
        raise VerifyException(f"result is {y.type} but the operands give {expected}")


def expect_rank(name: str, x: SSAValue, rank: int) -> Dims:
    """The dims of operand `name`. Raises VerifyException if it has another rank."""
    dims = dims_of(x)
    if len(dims) != rank:
        raise VerifyException(f"{name} must have rank {rank}, but it is {show_dims(dims)}")
    return dims


def expect_dims(name: str, x: SSAValue, expected: Dims) -> None:
    """Raises VerifyException if operand `name` has other dims."""
    if dims_of(x) != expected:
        raise VerifyException(
            f"{name} must be {show_dims(expected)}, but it is {show_dims(dims_of(x))}"
        )


def expect_same_dtype(**operands: SSAValue | None) -> None:
    """Raises VerifyException unless all operands have one element type."""
    dtypes = {name: dtype_of(x) for name, x in operands.items() if x is not None}
    if len(set(dtypes.values())) > 1:
        listed = ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items())
        raise VerifyException(f"operands must have one element type, but they have {listed}")


def broadcast(a: Dims, b: Dims) -> Dims:
    """PyTorch's broadcasting: aligned at the right, size 1 stretches, names equal themselves.

    Raises VerifyException if the dims do not broadcast.
    """
    rank = max(len(a), len(b))
    pairs = zip(_pad(a, rank), _pad(b, rank), strict=True)
    if any(x != y and x != 1 and y != 1 for x, y in pairs):
        raise VerifyException(f"{show_dims(a)} and {show_dims(b)} do not broadcast")
    pairs = zip(_pad(a, rank), _pad(b, rank), strict=True)
    return tuple(y if x == 1 else x for x, y in pairs)


@lru_cache(maxsize=4096)
def check_tensor_type(type: Attribute) -> None:
    """Raises VerifyException unless `type` is a ranked tensor whose dynamic dims have names."""
    if not isinstance(type, TensorType):
        raise VerifyException(f"{type} is not a ranked tensor")
    shape = type.get_shape()
    if isinstance(type.encoding, NoneAttr):
        names: tuple[str, ...] = ("",) * len(shape)
    elif isinstance(type.encoding, DimsAttr):
        names = type.encoding.entries()
    else:
        raise VerifyException(f"{type} has an encoding other than #nn.dims")
    if len(names) != len(shape):
        raise VerifyException(f"{type} has {len(shape)} dimensions but {len(names)} names")
    for index, (size, name) in enumerate(zip(shape, names, strict=True)):
        if size == DYNAMIC_INDEX and not name:
            raise VerifyException(f"dynamic dimension {index} of {type} has no name")
        if size != DYNAMIC_INDEX and name:
            raise VerifyException(f"dimension {index} of {type} has both a size and a name")
        if size < 1 and size != DYNAMIC_INDEX:
            raise VerifyException(f"dimension {index} of {type} is empty")
    if DYNAMIC_INDEX not in shape and isinstance(type.encoding, DimsAttr):
        raise VerifyException(f"{type} is static and must have no #nn.dims")


@dataclass(frozen=True)
class TensorConstraint(AttrConstraint[AnyTensor]):
    """A well-formed ranked tensor with one of the given element types."""

    dtypes: tuple[Attribute, ...]

    def verify(self, attr: Attribute, constraint_context: VerificationContext) -> None:
        check_tensor_type(attr)
        if dtype_of(attr) not in self.dtypes:
            allowed = ", ".join(str(dtype) for dtype in self.dtypes)
            raise VerifyException(f"element type of {attr} is not one of {allowed}")

    def get_bases(self) -> set[type[Attribute]]:
        return {TensorType}

    def mapping_type_vars(
        self, type_var_mapping: Mapping[TypeVar, AttrConstraint | IntConstraint]
    ) -> TensorConstraint:
        return self


I64_ATTR = IntegerAttr.constr(i64)
FLOAT_TENSOR = TensorConstraint((bf16, f16, f32, f64))
INT_TENSOR = TensorConstraint((i32,))
CODES_TENSOR = TensorConstraint((f8e4m3, f8e5m2))
CACHE_TENSOR = TensorConstraint((*FLOAT_TENSOR.dtypes, f8e4m3))
SCALE_TENSOR = TensorConstraint((bf16, f16, f32, f8e8m0))
ANY_TENSOR = TensorConstraint(
    (*FLOAT_TENSOR.dtypes, *INT_TENSOR.dtypes, *CODES_TENSOR.dtypes, f8e8m0)
)


@lru_cache(maxsize=4096)
def _tensor(dims: Dims, dtype: Attribute) -> AnyTensor:
    # One object per type: building, hashing and comparing types is most of what verifying costs.
    shape = [DYNAMIC_INDEX if isinstance(dim, str) else dim for dim in dims]
    if DYNAMIC_INDEX not in shape:
        return TensorType(dtype, shape)
    return TensorType(dtype, shape, DimsAttr("" if isinstance(dim, int) else dim for dim in dims))


@lru_cache(maxsize=4096)
def _dims(type: Attribute) -> Dims:
    check_tensor_type(type)
    assert isinstance(type, TensorType)
    if isinstance(type.encoding, DimsAttr):
        pairs = zip(type.encoding.entries(), type.get_shape(), strict=True)
        return tuple(name or size for name, size in pairs)
    return type.get_shape()


def _tensor_type(x: SSAValue | Attribute) -> AnyTensor:
    type = x.type if isinstance(x, SSAValue) else x
    if not isinstance(type, TensorType):
        raise VerifyException(f"{type} is not a ranked tensor")
    return type


def _pad(dims: Dims, rank: int) -> Dims:
    return (1,) * (rank - len(dims)) + dims
