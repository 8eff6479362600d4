"""One form for equal programs: no-ops go, chains of views become one, fused projections split."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import Operation, SSAValue
from xdsl.pattern_rewriter import PatternRewriter, RewritePattern, op_type_rewrite_pattern
from xdsl.utils.exceptions import VerifyException

from ..ir import nn
from ..ir.nn_parameters import MAX_CONSTANT_BYTES
from ..ir.provenance import located
from ..ir.types import bf16, broadcast, dims_of, dtype_of, f16, f32, f64, i32, shape_of
from .contract import Budget, Contract, ContractPass, Relation
from .rewriting import rewrite_to_fixpoint


class DropIdentity(RewritePattern):
    """Ops that change nothing: their result is their operand."""

    def match_and_rewrite(self, op: Operation, rewriter: PatternRewriter) -> None:
        if _is_identity(op):
            rewriter.replace(op, [], [op.operands[0]])


def _is_identity(op: Operation) -> bool:
    match op:
        case nn.ReshapeOp() | nn.ExpandOp() | nn.SliceOp() | nn.CastOp():
            return bool(op.x.type == op.y.type)
        case nn.TransposeOp():
            return op.dim0 == op.dim1
        case nn.ConcatOp():
            return len(op.xs) == 1
        case nn.ScaleOp():
            return op.factor.value.data == 1.0
        case nn.PowOp():
            return op.exponent.value.data == 1.0
        case _:
            return False


class ComposeReshapes(RewritePattern):
    """A reshape of a reshape is one reshape."""

    @op_type_rewrite_pattern
    def match_and_rewrite(self, op: nn.ReshapeOp, rewriter: PatternRewriter) -> None:
        if isinstance(inner := op.x.owner, nn.ReshapeOp):
            rewriter.replace(op, nn.ReshapeOp(inner.x, dims_of(op.y)))


class ComposeExpands(RewritePattern):
    """An expand of an expand is one expand."""

    @op_type_rewrite_pattern
    def match_and_rewrite(self, op: nn.ExpandOp, rewriter: PatternRewriter) -> None:
        if isinstance(inner := op.x.owner, nn.ExpandOp):
            rewriter.replace(op, nn.ExpandOp(inner.x, dims_of(op.y)))


class CancelTransposes(RewritePattern):
    """Exchanging the same two dims twice changes nothing."""

    @op_type_rewrite_pattern
    def match_and_rewrite(self, op: nn.TransposeOp, rewriter: PatternRewriter) -> None:
        inner = op.x.owner
        if isinstance(inner, nn.TransposeOp) and (op.dim0, op.dim1) == (inner.dim0, inner.dim1):
            rewriter.replace(op, [], [inner.x])


class CancelCasts(RewritePattern):
    """Widening and narrowing back gives the same number."""

    @op_type_rewrite_pattern
    def match_and_rewrite(self, op: nn.CastOp, rewriter: PatternRewriter) -> None:
        inner = op.x.owner
        if not isinstance(inner, nn.CastOp) or op.y.type != inner.x.type:
            return
        if (dtype_of(inner.x), dtype_of(inner.y)) in _EXACT_CASTS:
            rewriter.replace(op, [], [inner.x])


_EXACT_CASTS = {(bf16, f32), (f16, f32), (bf16, f64), (f16, f64), (f32, f64), (i32, f64)}
"""Types that hold every value of the narrower one."""


class CancelNegations(RewritePattern):
    """Minus minus x is x."""

    @op_type_rewrite_pattern
    def match_and_rewrite(self, op: nn.NegOp, rewriter: PatternRewriter) -> None:
        if isinstance(inner := op.x.owner, nn.NegOp):
            rewriter.replace(op, [], [inner.x])


class ComposeSlices(RewritePattern):
    """A slice of a slice of the same dim is one slice."""

    @op_type_rewrite_pattern
    def match_and_rewrite(self, op: nn.SliceOp, rewriter: PatternRewriter) -> None:
        inner = op.x.owner
        if not isinstance(inner, nn.SliceOp) or op.dim != inner.dim:
            return
        dim, start, end = _bounds(op)
        begin = inner.start.value.data
        rewriter.replace(op, nn.SliceOp(inner.x, dim=dim, start=begin + start, end=begin + end))


class SliceOfConcat(RewritePattern):
    """A slice that lies inside one part of a concat is a slice of that part."""

    @op_type_rewrite_pattern
    def match_and_rewrite(self, op: nn.SliceOp, rewriter: PatternRewriter) -> None:
        concat = op.x.owner
        if not isinstance(concat, nn.ConcatOp) or op.dim != concat.dim:
            return
        dim, start, end = _bounds(op)
        begin = 0
        for part in concat.xs:
            size = shape_of(part)[dim]
            if begin <= start and end <= begin + size:
                rewriter.replace(
                    op, nn.SliceOp(part, dim=dim, start=start - begin, end=end - begin)
                )
                return
            begin += size


class JoinConcats(RewritePattern):
    """A concat among the parts of a concat along the same dim gives its parts."""

    @op_type_rewrite_pattern
    def match_and_rewrite(self, op: nn.ConcatOp, rewriter: PatternRewriter) -> None:
        inner = [_concat_along(x, op) for x in op.xs]
        if any(inner):
            parts = [
                part for x, c in zip(op.xs, inner, strict=True) for part in (c.xs if c else (x,))
            ]
            rewriter.replace(op, nn.ConcatOp(parts, dim=op.dim.value.data))


def _concat_along(x: SSAValue, op: nn.ConcatOp) -> nn.ConcatOp | None:
    owner = x.owner
    return owner if isinstance(owner, nn.ConcatOp) and owner.dim == op.dim else None


class BroadcastByItself(RewritePattern):
    """An elementwise op broadcasts: an expand before it is only needed for what neither has."""

    def match_and_rewrite(self, op: Operation, rewriter: PatternRewriter) -> None:
        if not isinstance(op, nn.BinaryOp):
            return
        for index, other in ((0, op.b), (1, op.a)):
            expand = op.operands[index].owner
            if not isinstance(expand, nn.ExpandOp):
                continue
            if _broadcast(expand.x, other) == dims_of(op.y):
                op.operands[index] = expand.x
                rewriter.notify_op_modified(op)
                return


def _broadcast(a: SSAValue, b: SSAValue) -> object:
    try:
        return broadcast(dims_of(a), dims_of(b))
    except VerifyException:
        return None


class SplitFusedProjection(RewritePattern):
    """A slice of a projection's columns is a projection by those rows of the weight.

    Only if the projection has no other uses: otherwise its work would be done twice.
    """

    @op_type_rewrite_pattern
    def match_and_rewrite(self, op: nn.SliceOp, rewriter: PatternRewriter) -> None:
        linear = op.x.owner
        if not isinstance(linear, nn.LinearOp) or not _cuts_columns(op):
            return
        if not all(_cuts_columns(use.operation) for use in linear.y.uses):
            return
        _, start, end = _bounds(op)
        rows = nn.SliceOp(linear.w, dim=0, start=start, end=end)
        parts: list[Operation] = [rows]
        bias = None
        if linear.bias is not None:
            parts.append(nn.SliceOp(linear.bias, dim=0, start=start, end=end))
            bias = parts[-1].results[0]
        parts.append(nn.LinearOp(linear.x, rows.y, bias))
        # The work belongs to the projection's module, not to the one that takes it apart.
        rewriter.replace(op, [located(part, linear.location) for part in parts])


def _cuts_columns(op: Operation) -> bool:
    return isinstance(op, nn.SliceOp) and op.dim.value.data == len(dims_of(op.x)) - 1


def _bounds(op: nn.SliceOp) -> tuple[int, int, int]:
    return op.dim.value.data, op.start.value.data, op.end.value.data


class FoldConstant(RewritePattern):
    """A view of a constant is a constant, as is a widening cast (such as of RoPE frequencies)."""

    def match_and_rewrite(self, op: Operation, rewriter: PatternRewriter) -> None:
        if not isinstance(op, nn.ReshapeOp | nn.SliceOp | nn.CastOp):
            return
        if not isinstance(constant := op.x.owner, nn.ConstantOp):
            return
        folded = _fold(op, constant.to_numpy())
        if folded is not None and folded.nbytes <= MAX_CONSTANT_BYTES:
            rewriter.replace(op, nn.ConstantOp(folded))


def _fold(
    op: nn.ReshapeOp | nn.SliceOp | nn.CastOp, value: np.ndarray[Any, Any]
) -> np.ndarray[Any, Any] | None:
    match op:
        case nn.ReshapeOp():
            return value.reshape(shape_of(op.y))
        case nn.SliceOp():
            dim, start, end = _bounds(op)
            return value.take(range(start, end), axis=dim)
        case nn.CastOp() if (dtype_of(op.x), dtype_of(op.y)) in _EXACT_CASTS:
            return value.astype(np.float32 if dtype_of(op.y) == f32 else np.float64)
        case _:
            return None


PATTERNS = (
    DropIdentity,
    ComposeReshapes,
    ComposeExpands,
    CancelTransposes,
    CancelCasts,
    CancelNegations,
    ComposeSlices,
    SliceOfConcat,
    JoinConcats,
    BroadcastByItself,
    SplitFusedProjection,
    FoldConstant,
)


@dataclass(frozen=True)
class CanonicalizePass(ContractPass):
    """Simplify until nothing changes, for at most `rewriting.MAX_ROUNDS` rounds.

    Before: `nn.reshape` of `nn.reshape`, `nn.scale %x by 1.0`, a slice of a fused projection's
    columns.
    After:  one `nn.reshape`, `%x`, an `nn.linear` by an `nn.slice` of the weight.
    Contract: bitwise but for split projections, whose sums a matrix product may order anew.
    """

    name = "canonicalize"
    contract: ClassVar[Contract] = Contract(
        "any module",
        Relation.SAME,
        Budget(
            "a product with fewer columns may sum each of them in another order",
            relative=2**-5,
            relative_float32=1e-5,
        ),
    )

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        rewrite_to_fixpoint(op, [pattern() for pattern in PATTERNS])
