"""Operators that a matrix product or a sum over ranks takes over, as the only ones to read it.

- `mul(act(x · gateᵀ), x · upᵀ)`: a gated product, tile by tile.
- `add(x · wᵀ, residual)`: the residual joins the f32 sums; also where they are sums over ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

from xdsl.ir import Block, Operation, SSAValue

from ..ir import dist, nn
from ..ir.types import shape_of
from .kernels.elementwise import UNARY


@dataclass(frozen=True)
class Gated:
    """`parts` in program order, the last one is the product of both."""

    gate: nn.LinearOp
    activation: Operation
    up: nn.LinearOp
    parts: tuple[Operation, ...]


@dataclass(frozen=True)
class Residual:
    """A product, what is added to it, and the sum."""

    linear: nn.LinearOp
    other: SSAValue
    parts: tuple[Operation, ...]


@dataclass(frozen=True)
class ReducedResidual:
    """A sum over ranks, what is added to it, and the sum of both."""

    reduce: dist.AllReduceOp
    other: SSAValue
    parts: tuple[Operation, ...]


Fusion = Gated | Residual | ReducedResidual


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
        if not (isinstance(gate, nn.LinearOp) and isinstance(other, nn.LinearOp)):
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
        if not isinstance(first, nn.LinearOp | dist.AllReduceOp) or not _read_once(value):
            continue
        if shape_of(value) == shape_of(other) and value is not other:
            earlier = other.owner
            if isinstance(earlier, Operation) and order.get(earlier, 0) > order[first]:
                continue  # the residual would not be there yet
            if isinstance(first, nn.LinearOp):
                return Residual(first, other, (first, op))
            return ReducedResidual(first, other, (first, op))
    return None


def _read_once(value: SSAValue) -> bool:
    return len(list(value.uses)) == 1
