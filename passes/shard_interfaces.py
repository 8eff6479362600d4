"""What each function of a model may assume about its arguments and results, and a plan for all.

Activations are whole between functions: only what comes from the host or from the checkpoint, and
what goes to the host, may be cut where it enters or leaves one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

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
    tables = frozenset(_tables(module, forward))
    plans = {
        name: FunctionPlan(function, ranks, _interface(forward, name, tables)).run()
        for name, function in _callees(module, forward).items()
    }
    outside = Interface(
        inputs=frozenset(range(len(forward.args))),
        returned=frozenset(range(len(forward.function_type.outputs))),
    )
    whole = FunctionPlan(forward, ranks, outside, callees=plans, tables=tables)
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


def _interface(forward: FuncOp, name: str, tables: frozenset[str]) -> Interface:
    here = [call for call in calls(forward) if callee_name(call) == name]
    columns = list(zip(*(call.arguments for call in here), strict=True))
    results = list(zip(*(call.results for call in here), strict=True))
    names = [_parameter_names(column) for column in columns]
    return Interface(
        parameters=frozenset(i for i, one in enumerate(names) if None not in one),
        inputs=frozenset(
            i for i, one in enumerate(columns) if all(isinstance(x.owner, Block) for x in one)
        ),
        returned=frozenset(i for i, one in enumerate(results) if all(map(_is_only_returned, one))),
        tables=frozenset(i for i, one in enumerate(names) if not tables.isdisjoint(one)),
    )


def _parameter_names(values: tuple[SSAValue, ...]) -> set[str | None]:
    """None among them stands for what is no parameter."""
    return {
        value.owner.parameter_name if isinstance(value.owner, nn.GetParameterOp) else None
        for value in values
    }


def _is_only_returned(value: SSAValue) -> bool:
    users = [use.operation for use in value.uses]
    return bool(users) and all(isinstance(user, ReturnOp) for user in users)


def _tables(module: ModuleOp, forward: FuncOp) -> Iterator[str]:
    """Parameters whose rows are looked up, in @forward or in what it calls."""
    known = functions(module)
    read = [(forward, op) for op in forward.walk() if isinstance(op, nn.EmbeddingOp)]
    yield from (
        op.table.owner.parameter_name
        for _, op in read
        if isinstance(op.table.owner, nn.GetParameterOp)
    )
    for call in calls(forward):
        callee = known[callee_name(call)]
        used = {op.table for op in callee.walk() if isinstance(op, nn.EmbeddingOp)}
        for operand, argument in zip(call.arguments, callee.args, strict=True):
            if argument in used and isinstance(operand.owner, nn.GetParameterOp):
                yield operand.owner.parameter_name
