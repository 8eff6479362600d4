"""Which parameters are scales of codes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import BlockArgument, Operation, SSAValue

from ..ir import nn, paged, quant
from ..ir.verification import callee_name, functions
from .rewriting import calls


def scale_parameters(module: ModuleOp) -> frozenset[str]:
    """Names of parameters that some op takes for a scale, in whatever function it stands."""
    here = {
        name: [call.arguments for call in calls(module) if callee_name(call) == name]
        for name in functions(module)
    }
    found: set[str] = set()
    for name, function in functions(module).items():
        for op in function.walk():
            for scale in _scales(op):
                if scale is not None:
                    found.update(_named(scale, here[name]))
    return frozenset(found)


def _scales(op: Operation) -> tuple[SSAValue | None, ...]:
    match op:
        case quant.QuantizeOp() | quant.DequantizeOp():
            return (op.scale,)
        case quant.LinearOp():
            return (op.w_scale, op.x_scale)
        case paged.AttentionOp():
            return (op.k_scale, op.v_scale)
        case _:
            return ()


def _named(value: SSAValue, arguments: Sequence[Sequence[SSAValue]]) -> Iterator[str]:
    """The parameters that a value is, if those are the arguments of its function's calls."""
    values = [value]
    if isinstance(value, BlockArgument):
        values = [one[value.index] for one in arguments]
    for one in values:
        if isinstance(one.owner, nn.GetParameterOp):
            yield one.owner.parameter_name
