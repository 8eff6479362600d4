"""ATen operators as `nn` operators: one small function per operator, found by name in `TABLE`.

A function gets the node and the values of its arguments (tensors as SSA values, the rest as
Python has it) and returns the value of the node. What an operator's attributes forbid is raised
as `Unsupported`, which the importer collects. Shapes come from the traced node, so the sizes that
`view` and `expand` compute at run time need no operators of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from xdsl.ir import Attribute, Operation, SSAValue

from ..ir import nn
from ..ir.types import Dims, bf16, dims_of, dtype_of, f16, f32, f64, i32, shape_of
from .layer_reuse import ENTER, LEAVE

DTYPES: dict[torch.dtype, Attribute] = {
    torch.bfloat16: bf16,
    torch.float16: f16,
    torch.float32: f32,
    torch.float64: f64,
    torch.int32: i32,
    torch.int64: i32,
}
"""Ids and positions are 64 bits wide in torch and 32 in the IR: none reaches 2^31."""

Value: TypeAlias = SSAValue | tuple[SSAValue, ...]

EMPTY: tuple[SSAValue, ...] = ()
"""A slice without elements, which the IR has no type for; only `cat` accepts it.

Partial rotary embeddings cut one off and join it again when they turn out to be total.
"""


class Unsupported(Exception):
    """Why a node cannot be translated; the message is for the user."""


@dataclass(frozen=True)
class Result:
    """The type of the traced node, with its dims by name."""

    dims: Dims
    dtype: Attribute


class Builder:
    """Where a translation puts its operators."""

    def __init__(self, insert: Callable[[Operation], None], result: Result | None) -> None:
        self._insert = insert
        self._result = result

    @property
    def result(self) -> Result:
        """Of a node that is one tensor."""
        assert self._result is not None
        return self._result

    def add(self, op: Operation) -> SSAValue:
        self._insert(op)
        return op.results[0]

    def cast(self, x: SSAValue, dtype: Attribute) -> SSAValue:
        return x if dtype_of(x) == dtype else self.add(nn.CastOp(x, dtype=dtype))

    def reshape(self, x: SSAValue, dims: Dims) -> SSAValue:
        return x if dims_of(x) == dims else self.add(nn.ReshapeOp(x, dims))


Translation: TypeAlias = Callable[..., Value]
"""`(builder, *args, **kwargs) -> value`, with the arguments of the ATen operator."""

TABLE: dict[str, Translation] = {}

ATTENTION = "furiosa_llm.attention.default"
CAT = "aten.cat.default"


def _translates(*targets: str) -> Callable[[Translation], Translation]:
    def register(function: Translation) -> Translation:
        TABLE.update(dict.fromkeys(targets, function))
        return function

    return register


# --- element by element ---

UNARY: dict[str, type[nn.UnaryOp]] = {
    "aten.neg.default": nn.NegOp,
    "aten.rsqrt.default": nn.RsqrtOp,
    "aten.sqrt.default": nn.SqrtOp,
    "aten.exp.default": nn.ExpOp,
    "aten.sigmoid.default": nn.SigmoidOp,
    "aten.silu.default": nn.SiluOp,
    "aten.tanh.default": nn.TanhOp,
    "aten.cos.default": nn.CosOp,
    "aten.sin.default": nn.SinOp,
}


def _unary(op: type[nn.UnaryOp]) -> Translation:
    return lambda b, x: b.add(op(b.cast(x, b.result.dtype)))


TABLE.update({target: _unary(op) for target, op in UNARY.items()})


@_translates("aten.gelu.default")
def _gelu(b: Builder, x: SSAValue, *, approximate: str = "none") -> Value:
    if approximate not in ("none", "tanh"):
        raise Unsupported(f"approximate={approximate}")
    return b.add(nn.GeluOp(x, approximate="tanh" if approximate == "tanh" else "none"))


@_translates("aten.pow.Tensor_Scalar")
def _pow(b: Builder, x: SSAValue, exponent: float) -> Value:
    return b.add(nn.PowOp(x, exponent=float(exponent)))


@_translates("aten.add.Tensor", "aten.add.Scalar")
def _add(b: Builder, x: SSAValue, other: SSAValue | float, *, alpha: float = 1) -> Value:
    if alpha != 1:
        raise Unsupported(f"alpha={alpha}")
    if isinstance(other, SSAValue):
        return _binary(b, nn.AddOp, x, other)
    return b.add(nn.OffsetOp(b.cast(x, b.result.dtype), value=float(other)))


@_translates("aten.sub.Tensor", "aten.sub.Scalar")
def _sub(b: Builder, x: SSAValue, other: SSAValue | float, *, alpha: float = 1) -> Value:
    if alpha != 1:
        raise Unsupported(f"alpha={alpha}")
    if isinstance(other, SSAValue):
        return _binary(b, nn.SubOp, x, other)
    return b.add(nn.OffsetOp(b.cast(x, b.result.dtype), value=-float(other)))


@_translates("aten.mul.Tensor", "aten.mul.Scalar")
def _mul(b: Builder, x: SSAValue, other: SSAValue | float) -> Value:
    if isinstance(other, SSAValue):
        return _binary(b, nn.MulOp, x, other)
    return b.add(nn.ScaleOp(b.cast(x, b.result.dtype), factor=float(other)))


@_translates("aten.div.Tensor", "aten.div.Scalar")
def _div(b: Builder, x: SSAValue, other: SSAValue | float) -> Value:
    """A scalar divides in f32, as torch does for 16-bit types; its reciprocal would round twice."""
    if isinstance(other, SSAValue):
        return _binary(b, nn.DivOp, x, other)
    divisor = b.add(nn.ConstantOp(np.array([other], np.float32)))
    quotient = b.add(nn.DivOp(b.cast(x, f32), divisor))
    return b.cast(quotient, b.result.dtype)


def _binary(b: Builder, op: type[nn.BinaryOp], x: SSAValue, y: SSAValue) -> SSAValue:
    """Both in the type that torch promotes them to."""
    if not (dims_of(x) and dims_of(y)) and dtype_of(x) != dtype_of(y):
        raise Unsupported("a 0-d tensor of another type")  # torch does not round it first
    return b.add(op(b.cast(x, b.result.dtype), b.cast(y, b.result.dtype)))


# --- types and shapes ---


@_translates(
    "aten.to.dtype",
    "aten.to.device",
    "aten.to.dtype_layout",
    "aten._to_copy.default",
    "aten.type_as.default",
)
def _to(b: Builder, x: SSAValue, *_: Any, **__: Any) -> Value:
    return b.cast(x, b.result.dtype)


@_translates(
    "aten.contiguous.default",
    "aten.clone.default",
    "aten.alias.default",
    "aten.detach.default",
    "aten.detach_.default",
    "aten.lift_fresh_copy.default",
    ENTER,
    LEAVE,
)
def _same(b: Builder, x: SSAValue, *_: Any, **__: Any) -> Value:
    return x


@_translates("aten.dropout.default")
def _dropout(b: Builder, x: SSAValue, p: float, train: bool) -> Value:
    if p and train:
        raise Unsupported(f"p={p} in training")
    return x


@_translates(
    "aten.view.default",
    "aten.reshape.default",
    "aten._unsafe_view.default",
    "aten.unsqueeze.default",
    "aten.flatten.using_ints",
    "aten.unflatten.int",
)
def _reshape(b: Builder, x: SSAValue, *_: Any, **__: Any) -> Value:
    return b.reshape(x, b.result.dims)


@_translates("aten.squeeze.dim", "aten.squeeze.dims", "aten.squeeze.default")
def _squeeze(b: Builder, x: SSAValue, dims: int | Sequence[int] | None = None) -> Value:
    """Only of known sizes: whether a dynamic dimension is 1, and vanishes, is not known."""
    if dims is None:
        dims = range(len(dims_of(x)))
    for dim in [dims] if isinstance(dims, int) else dims:
        _static(x, dim)
    return b.reshape(x, b.result.dims)


@_translates("aten.expand.default", "aten.broadcast_to.default")
def _expand(b: Builder, x: SSAValue, *_: Any, **__: Any) -> Value:
    return x if dims_of(x) == b.result.dims else b.add(nn.ExpandOp(x, b.result.dims))


@_translates("aten.transpose.int")
def _transpose(b: Builder, x: SSAValue, dim0: int, dim1: int) -> Value:
    return b.add(nn.TransposeOp(x, dim0=dim0, dim1=dim1))


@_translates("aten.t.default")
def _t(b: Builder, x: SSAValue) -> Value:
    return b.add(nn.TransposeOp(x, dim0=0, dim1=1)) if len(dims_of(x)) == 2 else x


@_translates("aten.permute.default")
def _permute(b: Builder, x: SSAValue, order: Sequence[int]) -> Value:
    """As exchanges of two dims, each of which puts one dim where it belongs."""
    at = list(range(len(order)))
    for place, dim in enumerate(order):
        found = at.index(dim % len(order))
        if found != place:
            x = b.add(nn.TransposeOp(x, dim0=place, dim1=found))
            at[place], at[found] = at[found], at[place]
    return x


@_translates("aten.slice.Tensor")
def _slice(
    b: Builder,
    x: SSAValue,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Value:
    if dims_of(x) == b.result.dims:
        return x
    if 0 in b.result.dims:
        return EMPTY
    size = shape_of(x)[dim]
    if step != 1 or size < 0:
        raise Unsupported(f"a slice with step {step} of a dimension of size {dims_of(x)[dim]}")
    begin, stop, _ = slice(start, end).indices(size)
    return b.add(nn.SliceOp(x, dim=dim, start=begin, end=stop))


@_translates("aten.split.Tensor")
def _split(b: Builder, x: SSAValue, size: int, dim: int = 0) -> Value:
    total = _static(x, dim)
    return _cut(b, x, [min(size, total - begin) for begin in range(0, total, size)], dim)


@_translates("aten.chunk.default")
def _chunk(b: Builder, x: SSAValue, chunks: int, dim: int = 0) -> Value:
    return _split(b, x, -(-_static(x, dim) // chunks), dim)


@_translates("aten.split_with_sizes.default", "aten.split.sizes")
def _cut(b: Builder, x: SSAValue, sizes: Sequence[int], dim: int = 0) -> Value:
    ends = np.cumsum(sizes).tolist()
    return tuple(
        b.add(nn.SliceOp(x, dim=dim, start=end - size, end=end))
        for size, end in zip(sizes, ends, strict=True)
    )


def _static(x: SSAValue, dim: int) -> int:
    size = dims_of(x)[dim]
    if isinstance(size, str):
        raise Unsupported(f"the dynamic dimension {size}")
    return size


@_translates("getitem")
def _getitem(b: Builder, values: tuple[SSAValue, ...], index: int) -> Value:
    return values[index]


@_translates(CAT)
def _cat(b: Builder, xs: Sequence[Value], dim: int = 0) -> Value:
    parts = [b.cast(x, b.result.dtype) for x in xs if isinstance(x, SSAValue)]
    return parts[0] if len(parts) == 1 else b.add(nn.ConcatOp(parts, dim=dim))


@_translates("aten.mean.dim")
def _mean(b: Builder, x: SSAValue, dims: Sequence[int], keepdim: bool = False, **_: Any) -> Value:
    return b.add(nn.MeanOp(b.cast(x, b.result.dtype), dims=dims, keepdim=keepdim))


# --- layers ---


@_translates("aten.linear.default")
def _linear(b: Builder, x: SSAValue, w: SSAValue, bias: SSAValue | None = None) -> Value:
    return b.add(nn.LinearOp(x, w, bias))


@_translates("aten.matmul.default", "aten.mm.default", "aten.bmm.default")
def _matmul(b: Builder, x: SSAValue, y: SSAValue) -> Value:
    return b.add(nn.MatmulOp(x, y))


@_translates("aten.embedding.default")
def _embedding(b: Builder, table: SSAValue, ids: SSAValue, *_: Any, **__: Any) -> Value:
    return b.add(nn.EmbeddingOp(ids, table))


@_translates(ATTENTION)
def _attention(
    b: Builder,
    q: SSAValue,
    k: SSAValue,
    v: SSAValue,
    *,
    scale: float,
    layer: int,
    window: int | None,
    unsupported: str,
) -> Value:
    if unsupported:
        raise Unsupported(unsupported)
    return b.add(nn.AttentionOp(q, k, v, scale=scale, window=window, layer=layer))
