"""Operators that a matrix product or a sum over ranks takes over, as the only ones to read it.

- `mul(act(x · gateᵀ), x · upᵀ)`: a gated product, tile by tile.
- `add(x · wᵀ, residual)`: the residual joins the f32 sums; also where they are sums over ranks.
- keys and values on their way to the cache, where tokens are divided over groups of slices: one
  product of both.
"""

from __future__ import annotations

from dataclasses import dataclass

from xdsl.ir import Block, Operation, SSAValue

from ..ir import dist, nn, paged, quant
from ..ir.types import shape_of
from .kernels.elementwise import UNARY
from .value_uses import Linear, before_codes


@dataclass(frozen=True)
class Gated:
    """`parts` in program order, the last one is the product of both."""

    gate: Linear
    activation: Operation
    up: Linear
    parts: tuple[Operation, ...]


@dataclass(frozen=True)
class Residual:
    """A product, what is added to it, and the sum."""

    linear: Linear
    other: SSAValue
    parts: tuple[Operation, ...]


@dataclass(frozen=True)
class ReducedResidual:
    """A sum over ranks, what is added to it, and the sum of both."""

    reduce: dist.AllReduceOp
    other: SSAValue
    parts: tuple[Operation, ...]


@dataclass(frozen=True)
class KeysValues:
    """The products of keys and of values, the keys' rotation, and what writes both.

    Both may be made codes on the way.
    """

    keys: nn.LinearOp
    values: nn.LinearOp
    rope: nn.RopeOp
    parts: tuple[Operation, ...]


Fusion = Gated | Residual | ReducedResidual | KeysValues


def fusions(body: Block) -> dict[Operation, Fusion]:
    """What can be fused, by the operator that gives the result."""
    found: dict[Operation, Fusion] = {}
    order = {op: i for i, op in enumerate(body.ops)}
    for op in body.ops:
        fused: Fusion | None = None
        if isinstance(op, nn.MulOp):
            fused = _gated(op, order)
        elif isinstance(op, nn.AddOp):
            fused = _residual(op, order)
        if fused is not None:
            found[op] = fused
    return found


def _gated(op: nn.MulOp, order: dict[Operation, int]) -> Gated | None:
    for active, up in ((op.a, op.b), (op.b, op.a)):
        activation = active.owner
        if not isinstance(activation, nn.UnaryOp) or activation.name not in UNARY:
            continue
        gate, other = activation.x.owner, up.owner
        if not (isinstance(gate, Linear) and isinstance(other, Linear)):
            continue
        alone = all(_read_once(value) for value in (active, up, activation.x))
        same = gate.x == other.x and shape_of(gate.y) == shape_of(other.y)
        biases = (gate.bias is None) == (other.bias is None)
        if alone and same and biases and gate is not other:
            parts = sorted((gate, activation, other), key=order.__getitem__)
            return Gated(gate, activation, other, (*parts, op))
    return None


def _residual(op: nn.AddOp, order: dict[Operation, int]) -> Residual | ReducedResidual | None:
    sides = [(op.a, op.b), (op.b, op.a)]
    for value, other in sides:
        first = value.owner
        if not isinstance(first, Linear | dist.AllReduceOp) or not _read_once(value):
            continue
        if shape_of(value) == shape_of(other) and value is not other:
            earlier = other.owner
            if isinstance(earlier, Operation) and order.get(earlier, 0) > order[first]:
                continue  # the residual would not be there yet
            if isinstance(first, Linear):
                return Residual(first, other, (first, op))
            return ReducedResidual(first, other, (first, op))
    return None


def keys_values(body: Block) -> dict[Operation, KeysValues]:
    """Writes to the cache of what two products of one input give."""
    found: dict[Operation, KeysValues] = {}
    for op in body.ops:
        if not isinstance(op, paged.WriteOp):
            continue
        rope, before_rope = _through_views(before_codes(op.k))
        if not isinstance(rope, nn.RopeOp):
            continue
        keys, after_keys = _through_views(rope.x)
        values, after_values = _through_views(before_codes(op.v))
        if not (isinstance(keys, nn.LinearOp) and isinstance(values, nn.LinearOp)):
            continue
        codes = {x.owner for x in (op.k, op.v) if isinstance(x.owner, quant.QuantizeOp)}
        own = {keys, values, rope, *before_rope, *after_keys, *after_values, *codes}
        alone = all(_read_once(part.results[0]) for part in own)
        plain = keys.bias is None and values.bias is None
        if alone and plain and keys.x == values.x and keys is not values:
            parts = tuple(part for part in body.ops if part in own)
            found[op] = KeysValues(keys, values, rope, (*parts, op))
    return found


def _through_views(value: SSAValue) -> tuple[Operation | None, list[Operation]]:
    """What computes a value, and the views on the way from there."""
    views: list[Operation] = []
    while isinstance(value.owner, nn.ReshapeOp | nn.TransposeOp | nn.CastOp):
        views.append(value.owner)
        value = value.owner.x
    return (value.owner if isinstance(value.owner, Operation) else None), views


def _read_once(value: SSAValue) -> bool:
    return len(list(value.uses)) == 1
