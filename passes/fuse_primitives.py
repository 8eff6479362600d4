"""Chains of ATen operators become the layer that they compute."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import numpy as np
from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import Operation, OpResult, SSAValue
from xdsl.pattern_rewriter import PatternRewriter, RewritePattern, op_type_rewrite_pattern

from ..ir import nn
from ..ir.types import Dims, dims_of, dtype_of, f32, i32, shape_of
from .contract import Bitwise, Contract, ContractPass, Relation
from .rewriting import rewrite_to_fixpoint

OpT = TypeVar("OpT", bound=Operation)


def _made_by(value: SSAValue, kind: type[OpT]) -> OpT | None:
    return value.owner if isinstance(value.owner, kind) else None


def _either_way(op: nn.AddOp | nn.MulOp) -> Iterator[tuple[SSAValue, SSAValue]]:
    """Sums and products are written in both orders."""
    yield op.a, op.b
    yield op.b, op.a


def _without_cast(value: SSAValue) -> SSAValue:
    cast = _made_by(value, nn.CastOp)
    return value if cast is None else cast.x


# --- RMS norm ---


class FuseRmsNorm(RewritePattern):
    """`weight * (x * rsqrt(mean(x ** 2) + eps))`, in f32 up to the product with the weight."""

    @op_type_rewrite_pattern
    def match_and_rewrite(self, op: nn.MulOp, rewriter: PatternRewriter) -> None:
        for weight, rows in _either_way(op):
            matched = _normalised(rows)
            if matched is None:
                continue
            x, eps = matched
            if x.type == op.y.type and _is_norm_weight(weight, x):
                rewriter.replace(op, nn.RmsNormOp(x, weight, eps=eps))
                return


def _is_norm_weight(weight: SSAValue, x: SSAValue) -> bool:
    return dims_of(weight) == dims_of(x)[-1:] and dtype_of(weight) == dtype_of(x)


def _normalised(rows: SSAValue) -> tuple[SSAValue, float] | None:
    """x and eps, if `rows` is x divided by its root mean square and cast back to x's type."""
    wide = _without_cast(rows)
    product = _made_by(wide, nn.MulOp)
    if product is None or dtype_of(wide) != f32:
        return None
    for wide_x, inverse in _either_way(product):
        eps = _eps_of_inverse(inverse, wide_x)
        x = wide_x if dtype_of(rows) == f32 else _without_cast(wide_x)
        if eps is not None and x.type == rows.type:
            return x, eps
    return None


def _eps_of_inverse(inverse: SSAValue, x: SSAValue) -> float | None:
    """eps, if `inverse` is rsqrt(mean(x ** 2) + eps) over the last dim."""
    match inverse:
        case OpResult(op=nn.RsqrtOp(x=OpResult(op=nn.OffsetOp(x=mean_x2) as offset))):
            mean = _made_by(mean_x2, nn.MeanOp)
        case _:
            return None
    if mean is None or mean.keepdim is None or not _is_square(mean.x, x):
        return None
    if list(mean.dims.get_values()) != [len(dims_of(x)) - 1]:
        return None
    eps = float(offset.value.value.data)
    return eps if eps >= 0 else None


def _is_square(value: SSAValue, x: SSAValue) -> bool:
    match value.owner:
        case nn.PowOp() as power:
            return power.x is x and power.exponent.value.data == 2.0
        case nn.MulOp() as product:
            return product.a is x and product.b is x
        case _:
            return False


# --- rotary position embedding ---


@dataclass(frozen=True)
class Angles:
    """What `position * inv_freq` is made of; `values` are the f32 frequencies."""

    position_ids: SSAValue
    values: tuple[float, ...]


@dataclass(frozen=True)
class Table:
    """cos or sin of the angles, [B, 1, T, 2n], times `scaling`, in the type of x."""

    angles: Angles
    scaling: float


class FuseRope(RewritePattern):
    """`x * cos + rotate_half(x) * sin`, with cos and sin of `position * inv_freq`."""

    @op_type_rewrite_pattern
    def match_and_rewrite(self, op: nn.AddOp, rewriter: PatternRewriter) -> None:
        for straight, turned in _either_way(op):
            fused = _rope(straight, turned)
            if fused is not None and fused.y.type == op.y.type:
                rewriter.replace(op, fused)
                return


def _rope(straight: SSAValue, turned: SSAValue) -> nn.RopeOp | None:
    x_cos, half_sin = _made_by(straight, nn.MulOp), _made_by(turned, nn.MulOp)
    if x_cos is None or half_sin is None:
        return None
    for x, cos in _either_way(x_cos):
        for half, sin in _either_way(half_sin):
            if not _is_rotate_half(half, x):
                continue
            table = _table(cos, nn.CosOp, x)
            if table is not None and table == _table(sin, nn.SinOp, x):
                return nn.RopeOp(
                    x,
                    table.angles.position_ids,
                    inv_freq=table.angles.values,
                    attention_scaling=table.scaling,
                )
    return None


def _is_rotate_half(half: SSAValue, x: SSAValue) -> bool:
    """Whether `half` is x's second half negated, then its first half, along the last dim."""
    concat = _made_by(half, nn.ConcatOp)
    if concat is None or concat.dim.value.data != 3 or len(concat.xs) != 2:
        return False
    size = dims_of(x)[3] if len(dims_of(x)) == 4 else None
    if not isinstance(size, int):
        return False
    match concat.xs[0], concat.xs[1]:
        case OpResult(op=nn.NegOp(x=second)), first:
            return _is_slice(second, x, size // 2, size) and _is_slice(first, x, 0, size // 2)
        case _:
            return False


def _is_slice(value: SSAValue, x: SSAValue, start: int, end: int) -> bool:
    """Whether `value` is [start, end) of x's last dim, as a slice of x or of what x is cut from."""
    whole, begin, _ = _span(x)
    return _made_by(value, nn.SliceOp) is not None and _span(value) == (
        whole,
        begin + start,
        begin + end,
    )


def _span(value: SSAValue) -> tuple[SSAValue, int, int]:
    """The tensor that `value` is cut from along its last dim, and from where to where."""
    last = len(dims_of(value)) - 1
    cut = _made_by(value, nn.SliceOp)
    if cut is None or cut.dim.value.data != last:
        return value, 0, shape_of(value)[last]
    whole, begin, _ = _span(cut.x)
    return whole, begin + cut.start.value.data, begin + cut.end.value.data


def _table(value: SSAValue, kind: type[nn.CosOp | nn.SinOp], x: SSAValue) -> Table | None:
    """The table that `value` is, if it fits x [B, Q, T, 2n]."""
    batch, _, seq, size = dims_of(x)
    if dims_of(value) != (batch, 1, seq, size):
        return None
    value = _without_cast(_without_unit_dims(value, (batch, seq, size)))
    scaling = 1.0
    if dtype_of(value) == f32 and (scale := _made_by(value, nn.ScaleOp)) is not None:
        value, scaling = scale.x, float(scale.factor.value.data)
    function = _made_by(value, kind)
    both = None if function is None else _made_by(function.x, nn.ConcatOp)
    if both is None or len(both.xs) != 2 or both.xs[0] is not both.xs[1]:
        return None
    if both.dim.value.data != 2 or dims_of(both.y) != (batch, seq, size):
        return None
    angles = _angles(both.xs[0], (batch, seq))
    return None if angles is None else Table(angles, scaling)


def _angles(value: SSAValue, tokens: Dims) -> Angles | None:
    """`position * inv_freq`, as a product of [B, T, 1] and [n] or as a matmul of the two."""
    if dtype_of(value) != f32:
        return None
    if (product := _made_by(value, nn.MulOp)) is not None:
        pairs = [
            (position, frequency)
            for position, frequency in _either_way(product)
            if dims_of(position) == (*tokens, 1)
        ]
    elif (turned := _made_by(value, nn.TransposeOp)) is not None:
        matmul = _made_by(turned.x, nn.MatmulOp)
        fits = (
            matmul is not None
            and (turned.dim0.value.data, turned.dim1.value.data) == (1, 2)
            and dims_of(matmul.b) == (tokens[0], 1, tokens[1])
        )
        pairs = [(matmul.b, matmul.a)] if matmul is not None and fits else []
    else:
        return None
    for position, frequency in pairs:
        position_ids, values = _positions(position, tokens), _frequencies(frequency)
        if position_ids is not None and values is not None:
            fitting = dims_of(value) == (*tokens, len(values))
            return Angles(position_ids, values) if fitting else None
    return None


def _positions(value: SSAValue, tokens: Dims) -> SSAValue | None:
    """The i32 [B, T] tensor of which `value` is an f32 view."""
    value = _without_cast(_without_unit_dims(value, tokens))
    value = _without_unit_dims(value, tokens)
    return value if dtype_of(value) == i32 and dims_of(value) == tokens else None


def _frequencies(value: SSAValue) -> tuple[float, ...] | None:
    """The n numbers of an f32 constant, of which `value` is a view without or with batches."""
    while (view := _made_by(value, nn.ExpandOp) or _made_by(value, nn.ReshapeOp)) is not None:
        if view.x.type != view.y.type and not _keeps_row(view):
            return None
        value = view.x
    constant = _made_by(value, nn.ConstantOp)
    if constant is None or dtype_of(value) != f32:
        return None
    array = constant.to_numpy()
    one_row = array.size == max(array.shape, default=0)
    in_range = bool(((array >= 0) & np.isfinite(array)).all())
    return tuple(array.reshape(-1).tolist()) if one_row and in_range else None


def _keeps_row(view: nn.ExpandOp | nn.ReshapeOp) -> bool:
    """Whether a view only adds dims of size 1, or (expand) copies along the first dims."""
    if isinstance(view, nn.ReshapeOp):
        return _significant(dims_of(view.x)) == _significant(dims_of(view.y))
    return dims_of(view.x)[-2:] == dims_of(view.y)[-2:]


def _without_unit_dims(value: SSAValue, dims: Dims) -> SSAValue:
    """The tensor of these dims of which `value` is the same with dims of size 1 put in."""
    reshape = _made_by(value, nn.ReshapeOp)
    if reshape is None or dims_of(value) == dims:
        return value
    same = _significant(dims_of(reshape.x)) == _significant(dims_of(reshape.y))
    return reshape.x if same else value


def _significant(dims: Dims) -> Dims:
    return tuple(dim for dim in dims if dim != 1)


class FusePartialRope(RewritePattern):
    """RoPE on the first elements of each head, joined with the rest, is RoPE on the head."""

    @op_type_rewrite_pattern
    def match_and_rewrite(self, op: nn.ConcatOp, rewriter: PatternRewriter) -> None:
        if len(op.xs) != 2 or op.dim.value.data != 3:
            return
        match op.xs[0], op.xs[1]:
            case OpResult(op=nn.RopeOp(x=OpResult(op=nn.SliceOp(x=x))) as rope), tail:
                rotary, size = dims_of(rope.x)[3], dims_of(x)[3]
            case _:
                return
        if not isinstance(rotary, int) or not isinstance(size, int) or x.type != op.y.type:
            return
        joins = _is_slice(rope.x, x, 0, rotary) and _is_slice(tail, x, rotary, size)
        if joins and 2 * len(rope.inv_freq) == rotary:
            fused = nn.RopeOp(
                x,
                rope.position_ids,
                inv_freq=rope.inv_freq.get_values(),
                attention_scaling=rope.attention_scaling.value.data,
            )
            rewriter.replace(op, fused)


@dataclass(frozen=True)
class FusePrimitivesPass(ContractPass):
    """Recognise layers in what PyTorch exported, element by element.

    Before: cast, pow, mean, offset, rsqrt, mul, cast, mul; slice, neg, concat, mul, mul, add
    with cos and sin of `position_ids * inv_freq`.
    After:  `nn.rms_norm`; `nn.rope` with the same f32 frequencies and scaling.
    Contract: bitwise. What differs in any rounding is left as it is.
    """

    name = "fuse-primitives"
    contract: ClassVar[Contract] = Contract(
        "any module; after `canonicalize`, which removes views inside the chains",
        Relation.SAME,
        Bitwise(),
    )

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        rewrite_to_fixpoint(op, (FuseRmsNorm(), FuseRope(), FusePartialRope()))
