"""Checks on a whole module: xDSL's own, and those that xDSL leaves out.

xDSL's `verify` looks at one op at a time. It does not see a value that is used before it is
defined, a symbol that nothing declares, or a dynamic dimension whose size nothing gives.
"""

from __future__ import annotations

from collections.abc import Iterator

from xdsl.dialects.builtin import FunctionType, ModuleOp, SymbolRefAttr, TensorType
from xdsl.dialects.func import CallOp, FuncOp
from xdsl.ir import Attribute, Block, Operation, Region, SSAValue
from xdsl.traits import IsolatedFromAbove
from xdsl.utils.exceptions import VerifyException

from .. import errors
from .dist import GetShardOp
from .dist_verification import verify_distribution
from .nn import GetParameterOp, ParameterOp
from .provenance import describe
from .types import check_tensor_type, dims_of


def verify_module(module: ModuleOp) -> None:
    """Check everything that every pass may rely on; linear in the number of ops.

    Raises: IRV001 if an op or type is malformed, IRV002 or IRV003 for values and blocks,
    IRV004 to IRV006 for symbols and calls, IRV007 for dimensions without a size, SHD001 to
    SHD005 for a distributed module.
    """
    _verify_region(module.body, set())
    _verify_ops(module)
    _verify_symbols(module)
    verify_distribution(module)
    for function in functions(module).values():
        _verify_dims(function)


def functions(module: ModuleOp) -> dict[str, FuncOp]:
    """The functions at the module's top level, by name."""
    return {op.sym_name.data: op for op in module.ops if isinstance(op, FuncOp)}


def parameters(module: ModuleOp) -> dict[str, ParameterOp]:
    """The declared parameters, by name."""
    return {op.sym_name.data: op for op in module.ops if isinstance(op, ParameterOp)}


def callee_name(call: CallOp) -> str:
    """The name of the called function."""
    return call.callee.root_reference.data


def _verify_ops(module: ModuleOp) -> None:
    try:
        module.verify()
    except VerifyException as error:
        op, cause = _culprit(module) or (module, error)
        if isinstance(op, CallOp) and isinstance(op.properties.get("callee"), SymbolRefAttr):
            # xDSL checks calls too, but our errors for them say more.
            _verify_call(op, functions(module))
        raise errors.ir_not_valid(at=describe(op), cause=str(cause)) from None


def _culprit(module: ModuleOp) -> tuple[Operation, VerifyException] | None:
    """The op that fails on its own; xDSL's exception does not say which one it was."""
    for op in module.walk():
        try:
            op.verify(verify_nested_ops=False)
        except VerifyException as error:
            return op, error
    return None


def _verify_region(region: Region, defined: set[SSAValue]) -> None:
    """Each operand is in `defined` when its op comes; a region's own values go with it."""
    if len(region.blocks) > 1:
        owner = region.parent_op()
        at = describe(owner) if owner is not None else "the top level"
        raise errors.control_flow_in_ir(at=at, blocks=len(region.blocks))
    for block in region.blocks:
        local = list[SSAValue](block.args)
        defined.update(block.args)
        for op in block.ops:
            _verify_operands(op, defined)
            inner = set() if op.has_trait(IsolatedFromAbove) else defined
            for child in op.regions:
                _verify_region(child, inner)
            defined.update(op.results)
            local.extend(op.results)
        defined.difference_update(local)


def _verify_operands(op: Operation, defined: set[SSAValue]) -> None:
    for index, value in enumerate(op.operands):
        if value not in defined:
            raise errors.value_not_defined(
                at=describe(op), operand=index, defined_by=_definition(value)
            )


def _definition(value: SSAValue) -> str:
    if isinstance(value.owner, Block):
        parent = value.owner.parent_op()
        return "the arguments of " + (describe(parent) if parent is not None else "a block")
    return describe(value.owner)


def _verify_symbols(module: ModuleOp) -> None:
    declared, callees = parameters(module), functions(module)
    for op in module.walk():
        if isinstance(op, GetParameterOp):
            _verify_parameter(op, op.y.type, declared)
        elif isinstance(op, GetShardOp):
            _verify_parameter(op, op.cut.whole_type(op.y.type), declared)
        elif isinstance(op, CallOp):
            _verify_call(op, callees)
    _verify_no_recursion(callees)


def _verify_parameter(
    op: GetParameterOp | GetShardOp, used: Attribute, declared: dict[str, ParameterOp]
) -> None:
    name = op.parameter_name
    if name not in declared:
        raise errors.symbol_not_declared(
            at=describe(op), symbol=name, kind="parameter", declared=list(declared)
        )
    _verify_symbol_type(op, name, used, declared[name].type)


def _verify_call(op: CallOp, callees: dict[str, FuncOp]) -> None:
    name = callee_name(op)
    if name not in callees:
        raise errors.symbol_not_declared(
            at=describe(op), symbol=name, kind="function", declared=list(callees)
        )
    used = FunctionType.from_lists(op.arguments.types, op.res.types)
    _verify_symbol_type(op, name, used, callees[name].function_type)


def _verify_symbol_type(op: Operation, name: str, used: Attribute, declared: Attribute) -> None:
    if used != declared:
        raise errors.symbol_type_differs(
            at=describe(op), symbol=name, used=str(used), declared=str(declared)
        )


def _verify_no_recursion(callees: dict[str, FuncOp]) -> None:
    calls = {
        name: [callee_name(op) for op in function.walk() if isinstance(op, CallOp)]
        for name, function in callees.items()
    }
    finished: set[str] = set()

    def visit(name: str, path: list[str]) -> None:
        if name in path:
            cycle = [*path[path.index(name) :], name]
            raise errors.recursive_calls(at=describe(callees[name]), cycle=cycle)
        if name not in finished:
            for callee in calls[name]:
                visit(callee, [*path, name])
            finished.add(name)

    for name in callees:
        visit(name, [])


def _verify_dims(function: FuncOp) -> None:
    """Every tensor type is well-formed, and every dimension name has a size at run time."""
    if function.is_declaration:
        return
    bound: set[str] = set()
    for argument in function.args:
        bound.update(_symbols(function, argument.type))
    for op in function.walk():
        for result in op.results:
            for dim in _symbols(op, result.type):
                if dim not in bound:
                    raise errors.dimension_not_bound(at=describe(op), dim=dim, bound=sorted(bound))


def _symbols(op: Operation, type: Attribute) -> Iterator[str]:
    if not isinstance(type, TensorType):
        return
    try:
        check_tensor_type(type)
    except VerifyException as error:
        raise errors.ir_not_valid(at=describe(op), cause=str(error)) from None
    yield from (dim for dim in dims_of(type) if isinstance(dim, str))
