"""What several passes need: patterns to a fixpoint, dead code, the functions of a module."""

from __future__ import annotations

from collections.abc import Iterable

from xdsl.dialects.builtin import FunctionType, ModuleOp
from xdsl.dialects.func import CallOp, FuncOp, ReturnOp
from xdsl.ir import Operation, Region, SSAValue
from xdsl.pattern_rewriter import (
    GreedyRewritePatternApplier,
    PatternRewriteWalker,
    RewritePattern,
)
from xdsl.rewriter import Rewriter
from xdsl.traits import is_side_effect_free

from .. import errors
from ..ir.dist import FORWARD, GetShardOp
from ..ir.nn import GetParameterOp, ParameterOp
from ..ir.provenance import LocationCarrier
from ..ir.verification import callee_name, functions

MAX_ROUNDS = 64
"""Each round rewrites whole chains, so a program that needs more has patterns that disagree."""


def rewrite_to_fixpoint(module: ModuleOp, patterns: Iterable[RewritePattern]) -> None:
    """Apply the patterns, and drop what they leave unused, until nothing changes.

    xDSL's walker has no limit of its own: patterns that undo each other would hang it.
    """
    applier = GreedyRewritePatternApplier(list(patterns))
    for _ in range(MAX_ROUNDS):
        walker = PatternRewriteWalker(
            applier, apply_recursively=False, listener=LocationCarrier().listener()
        )
        if not walker.rewrite_module(module):
            return
        erase_dead_ops(module.body)
    raise AssertionError(f"patterns still change the module after {MAX_ROUNDS} rounds")


def erase_dead_ops(region: Region) -> bool:
    """Erase ops without effect whose results nothing uses; true if there were any."""
    erased = False
    for op in reversed(list(region.walk())):
        unused = bool(op.results) and all(result.first_use is None for result in op.results)
        if unused and is_side_effect_free(op):
            Rewriter.erase_op(op)
            erased = True
    return erased


def erase_dead_code(module: ModuleOp) -> None:
    """Erase ops, calls, private functions and parameter declarations that nothing needs."""
    erase_dead_ops(module.body)
    while _erase_dead_calls(module) or _erase_dead_functions(module):
        erase_dead_ops(module.body)
    reads = (op for op in module.walk() if isinstance(op, GetParameterOp | GetShardOp))
    used = {op.parameter_name for op in reads}
    for op in list(module.ops):
        if isinstance(op, ParameterOp) and op.sym_name.data not in used:
            Rewriter.erase_op(op)


def _erase_dead_calls(module: ModuleOp) -> bool:
    callees = functions(module)
    erased = False
    for call in reversed(calls(module)):  # users first, so that a chain goes at once
        unused = all(result.first_use is None for result in call.results)
        if unused and is_pure(callees[callee_name(call)], callees):
            Rewriter.erase_op(call)
            erased = True
    return erased


def _erase_dead_functions(module: ModuleOp) -> bool:
    called = {callee_name(call) for call in calls(module)}
    dead = [
        function
        for name, function in functions(module).items()
        if is_private(function) and name not in called
    ]
    for function in dead:
        Rewriter.erase_op(function)
    return bool(dead)


def is_private(function: FuncOp) -> bool:
    """Whether only calls inside the module can reach the function."""
    return function.sym_visibility is not None and function.sym_visibility.data == "private"


def is_pure(function: FuncOp, callees: dict[str, FuncOp]) -> bool:
    """Whether a call of the function can be left out if nothing uses what it returns."""
    if function.is_declaration:
        return False
    return all(
        is_pure(callees[callee_name(op)], callees)
        if isinstance(op, CallOp)
        else isinstance(op, ReturnOp) or is_side_effect_free(op)
        for op in function.body.block.ops
    )


def calls(root: Operation) -> list[CallOp]:
    """Every call inside `root`, in order."""
    return [op for op in root.walk() if isinstance(op, CallOp)]


def forward_function(module: ModuleOp, pass_name: str) -> FuncOp:
    """The model's function. Raises: PAS004 if the module has none."""
    found = functions(module)
    if FORWARD not in found or found[FORWARD].is_declaration:
        raise errors.no_forward_function(pass_name, list(found))
    return found[FORWARD]


def return_op(function: FuncOp) -> ReturnOp:
    """The op that ends the function's body."""
    last = function.body.block.last_op
    assert isinstance(last, ReturnOp), f"{function.sym_name.data} has no func.return"
    return last


def set_returned(function: FuncOp, values: Iterable[SSAValue]) -> None:
    """Return `values`, and bring the function's type up to date with them and its arguments."""
    values = tuple(values)
    return_op(function).operands = values
    function.function_type = FunctionType.from_lists(
        [argument.type for argument in function.args], [value.type for value in values]
    )
