"""Attention reads and writes KV caches.

Shape letters: B sequences, T tokens, A keys that a sequence may see, G KV heads, H head size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp
from xdsl.dialects.func import CallOp, FuncOp
from xdsl.ir import Attribute, BlockArgument, SSAValue
from xdsl.rewriter import Rewriter

from .. import errors
from ..ir import nn, paged, quant
from ..ir.provenance import carry, describe
from ..ir.types import dims_of, dtype_of, f8e4m3, i32, shape_of, tensor
from ..ir.verification import callee_name, functions
from .contract import Budget, Contract, ContractPass, Relation
from .rewriting import calls, forward_function, return_op, set_returned
from .signature import position_ids_of


@dataclass
class Step:
    """The values of one function that its attention ops and calls need."""

    function: FuncOp
    position_ids: SSAValue
    slot_mapping: SSAValue
    block_table: SSAValue
    lengths: SSAValue
    written: list[SSAValue] = field(default_factory=list)
    """The caches after the step, in the order of the cache arguments."""

    def add_cache(self, type: Attribute) -> BlockArgument:
        return _add_argument(self.function, type, "cache")


def _add_argument(function: FuncOp, type: Attribute, hint: str) -> BlockArgument:
    block = function.body.block
    argument = block.insert_arg(type, len(block.args))
    argument.name_hint = hint
    return argument


@dataclass(frozen=True)
class PagedCallee:
    """How to call a function that has been rewritten."""

    takes_positions: bool
    """Whether the position ids are one of the new arguments: not if it had them already."""
    cache_types: tuple[Attribute, ...]


@dataclass
class _Pager:
    """Rewrites @forward and, once each, the functions with attention that it calls."""

    callees: dict[str, FuncOp]
    done: dict[str, PagedCallee] = field(default_factory=dict)

    def page(self, function: FuncOp, position_ids: SSAValue) -> tuple[Attribute, ...]:
        """Give the function its new arguments and results; returns the types of its caches."""
        batch, seq = dims_of(position_ids)
        step = Step(
            function,
            position_ids,
            _add_argument(function, tensor((batch, seq), i32), "slot_mapping"),
            _add_argument(function, tensor((batch, "attn"), i32), "block_table"),
            _add_argument(function, tensor((batch,), i32), "lengths"),
        )
        for op in list(function.body.block.ops):
            if isinstance(op, nn.AttentionOp):
                self._attention(op, step)
            elif isinstance(op, CallOp) and self._attends(callee_name(op)):
                self._call(op, step)
        set_returned(function, [*return_op(function).operands, *step.written])
        return tuple(cache.type for cache in step.written)

    def _attends(self, name: str) -> bool:
        return name in self.done or attends(self.callees[name], self.callees)

    def _attention(self, op: nn.AttentionOp, step: Step) -> None:
        if op.causal is None:
            raise errors.attention_not_causal(at=describe(op))
        _, groups, _, size = dims_of(op.k)
        assert isinstance(groups, int)
        assert isinstance(size, int)
        kept = _kept(op)
        cache = step.add_cache(paged.cache_type(groups, size, dtype_of(kept.k)))
        write = paged.WriteOp(cache, kept.k, kept.v, step.slot_mapping)
        attend = paged.AttentionOp(
            op.q,
            write.y,
            step.block_table,
            step.lengths,
            step.position_ids,
            kept.k_scale,
            kept.v_scale,
            scale=op.scale.value.data,
            window=None if op.window is None else op.window.value.data,
        )
        carry(op, (write, attend))
        step.written.append(write.y)
        sources = {op.k.owner, op.v.owner}
        Rewriter.replace_op(op, [write, attend])
        for source in sources:
            if isinstance(source, quant.DequantizeOp) and source.y.first_use is None:
                Rewriter.erase_op(source)

    def _call(self, op: CallOp, step: Step) -> None:
        """The callee gets this call's own caches; its results gain them, updated."""
        callee = self._paged_callee(op, step)
        operands = [
            *op.arguments,
            *([step.position_ids] if callee.takes_positions else []),
            step.slot_mapping,
            step.block_table,
            step.lengths,
            *(step.add_cache(type) for type in callee.cache_types),
        ]
        call = CallOp(op.callee, operands, [*op.result_types, *callee.cache_types])
        carry(op, (call,))
        step.written += call.results[len(op.results) :]
        Rewriter.replace_op(op, call, call.results[: len(op.results)])

    def _paged_callee(self, op: CallOp, step: Step) -> PagedCallee:
        name = callee_name(op)
        if name not in self.done:
            function = self.callees[name]
            index = _position_index(name, step)
            if index is None:
                argument = _add_argument(function, step.position_ids.type, "position_ids")
            else:
                argument = function.args[index]
            self.done[name] = PagedCallee(index is None, self.page(function, argument))
        return self.done[name]


@dataclass(frozen=True)
class _Kept:
    """What the cache holds of an attention's keys and values."""

    k: SSAValue
    v: SSAValue
    k_scale: SSAValue | None
    v_scale: SSAValue | None


def _kept(op: nn.AttentionOp) -> _Kept:
    """The codes of keys and values that both are codes times one number; else what they are."""
    k, v = op.k.owner, op.v.owner
    if isinstance(k, quant.DequantizeOp) and isinstance(v, quant.DequantizeOp):
        if _has_one_scale(k) and _has_one_scale(v):
            return _Kept(k.codes, v.codes, k.scale, v.scale)
    return _Kept(op.k, op.v, None, None)


def _has_one_scale(op: quant.DequantizeOp) -> bool:
    return dtype_of(op.codes) == f8e4m3 and math.prod(shape_of(op.scale)) == 1


def _position_index(name: str, step: Step) -> int | None:
    """Which argument of function `name` is the position ids in every call; None if none is."""
    all_calls = [call for call in calls(step.function) if callee_name(call) == name]
    common = set.intersection(
        *({i for i, x in enumerate(call.arguments) if x is step.position_ids} for call in all_calls)
    )
    return min(common, default=None)


def attends(function: FuncOp, callees: dict[str, FuncOp]) -> bool:
    """Whether the function computes attention, itself or in what it calls."""
    return any(
        isinstance(op, nn.AttentionOp)
        or (isinstance(op, CallOp) and attends(callees[callee_name(op)], callees))
        for op in function.walk()
    )


@dataclass(frozen=True)
class PagedAttentionPass(ContractPass):
    """Keep keys and values in one cache per layer, which the program takes and returns.

    Before: `nn.attention` over the tokens of one call;
    `@forward(input_ids, position_ids) -> logits`.
    After:  `paged.write`, then `paged.attention`;
    `@forward(input_ids, position_ids, slot_mapping [B, T], block_table [B, A], lengths [B],
    cache [S, G, 2, H], ...) -> (logits, cache, ...)`, caches in the order of the layers. A
    block function gains slot_mapping, block_table, lengths and its cache, and position_ids
    before them if it had none. Where keys and values are codes times one number each
    (`quant.dequantize`), the cache holds the codes and the attention takes both scales.
    Contract: an error budget, since attention is now in f32 and rounded once. Raises: PAS004
    without @forward, PAS010 if it has other arguments, PAS006 for attention that is not causal.
    """

    name = "paged-attention"
    contract: ClassVar[Contract] = Contract(
        "attention is causal; each function with attention has one caller",
        Relation.PAGED,
        Budget(
            "scores, weights and sums, and keys and values made of codes, were rounded to the "
            "model's type, and now are not; what comes after adds to the difference",
            relative=2**-2,
            relative_float32=1e-4,
        ),
    )

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        if not any(isinstance(inner, nn.AttentionOp) for inner in op.walk()):
            return  # there is none, or it is paged already
        forward = forward_function(op, self.name)
        position_ids = position_ids_of(forward)
        if position_ids is None:
            raise errors.unexpected_signature(
                self.name, "(input_ids, position_ids), both i32 [B, T]", str(forward.function_type)
            )
        _Pager(functions(op)).page(forward, position_ids)
