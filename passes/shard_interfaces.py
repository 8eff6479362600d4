"""What each function of a model may assume about its arguments and results, and a plan for all.

Activations are whole between functions: only what comes from the host or from the checkpoint, and
what goes to the host, may be cut where it enters or leaves one.
"""

from __future__ import annotations

from collections import Counter

from xdsl.dialects.builtin import ModuleOp
from xdsl.dialects.func import FuncOp, ReturnOp
from xdsl.ir import Block, SSAValue

from ..ir import nn
from ..ir.verification import callee_name, functions
from .rewriting import calls
from .shard_plan import FunctionPlan, Interface


def plan_shards(module: ModuleOp, forward: FuncOp, ranks: int) -> dict[str, FunctionPlan]:
    """A plan for @forward and for each function that it alone calls, by name.

    Functions that others call too work on whole tensors, which is always right.
    """
    plans = {
        name: FunctionPlan(function, ranks, _interface(forward, name)).run()
        for name, function in _callees(module, forward).items()
    }
    outside = Interface(
        inputs=frozenset(range(len(forward.args))),
        returned=frozenset(range(len(forward.function_type.outputs))),
    )
    whole = FunctionPlan(forward, ranks, outside, callees=plans)
    return {**plans, forward.sym_name.data: whole.run()}


def _callees(module: ModuleOp, forward: FuncOp) -> dict[str, FuncOp]:
    known = functions(module)
    everywhere = Counter(callee_name(call) for call in calls(module))
    here = Counter(callee_name(call) for call in calls(forward))
    return {
        name: known[name]
        for name, count in here.items()
        if everywhere[name] == count and not known[name].is_declaration
    }


def _interface(forward: FuncOp, name: str) -> Interface:
    here = [call for call in calls(forward) if callee_name(call) == name]
    columns = list(zip(*(call.arguments for call in here), strict=True))
    results = list(zip(*(call.results for call in here), strict=True))
    return Interface(
        parameters=frozenset(i for i, one in enumerate(columns) if all(map(_is_parameter, one))),
        inputs=frozenset(
            i for i, one in enumerate(columns) if all(isinstance(x.owner, Block) for x in one)
        ),
        returned=frozenset(i for i, one in enumerate(results) if all(map(_is_only_returned, one))),
    )


def _is_parameter(value: SSAValue) -> bool:
    return isinstance(value.owner, nn.GetParameterOp)


def _is_only_returned(value: SSAValue) -> bool:
    users = [use.operation for use in value.uses]
    return bool(users) and all(isinstance(user, ReturnOp) for user in users)
