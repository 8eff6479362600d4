"""Common subexpression elimination."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

from xdsl.context import Context
from xdsl.dialects.builtin import FloatAttr, LocationAttr, ModuleOp
from xdsl.ir import Attribute, Block, Operation
from xdsl.rewriter import Rewriter
from xdsl.traits import is_side_effect_free

from ..ir.provenance import make, read
from .contract import Bitwise, Contract, ContractPass, Relation


def _merge_in(block: Block) -> None:
    """Keep the first of equal ops; one pass suffices, since operands are merged before users."""
    first: dict[Hashable, Operation] = {}
    for op in list(block.ops):
        for region in op.regions:
            for inner in region.blocks:
                _merge_in(inner)
        if op.regions or not op.results or not is_side_effect_free(op):
            continue
        kept = first.setdefault(_key(op), op)
        if kept is not op:
            kept.location = _shared(kept.location, op.location)
            Rewriter.replace_op(op, [], kept.results)


def _key(op: Operation) -> Hashable:
    """Equal for ops that compute the same."""
    named = {**op.properties, **op.attributes}
    attributes = tuple((name, _exact(named[name])) for name in sorted(named))
    return type(op), op.name, tuple(op.operands), attributes, tuple(op.result_types)


def _exact(attribute: Attribute) -> Hashable:
    """0.0 and -0.0 are equal as attributes and different as numbers."""
    if isinstance(attribute, FloatAttr):
        return attribute, math.copysign(1.0, attribute.value.data)
    return attribute


def _shared(kept: LocationAttr, other: LocationAttr) -> LocationAttr:
    """Where an op belongs that stands for two: the innermost module that holds both.

    Otherwise what all layers share would count as part of the first one.
    """
    mine, theirs = read(kept), read(other)
    if mine is None or theirs is None or mine.module == theirs.module:
        return kept
    common = []
    for a, b in zip(mine.module.split("."), theirs.module.split("."), strict=False):
        if a != b:
            break
        common.append(a)
    return make(".".join(common), mine.node)


@dataclass(frozen=True)
class CsePass(ContractPass):
    """Compute equal expressions of a function once.

    Before: `%1 = nn.neg %0` in layer 0 and `%2 = nn.neg %0` in layer 1.
    After:  `%1 = nn.neg %0`, with the module that holds both places as its location.
    """

    name = "cse"
    contract: ClassVar[Contract] = Contract("any module", Relation.SAME, Bitwise())

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        for region in op.regions:
            for block in region.blocks:
                _merge_in(block)
