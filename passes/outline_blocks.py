"""Decoder blocks become functions, one for all blocks that are equal."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, count
from typing import ClassVar

from xdsl.context import Context
from xdsl.dialects.builtin import LocationAttr, ModuleOp, StringAttr
from xdsl.dialects.func import CallOp, FuncOp, ReturnOp
from xdsl.ir import Block, Operation, Region, SSAValue
from xdsl.rewriter import Rewriter

from .. import errors
from ..ir import nn
from ..ir.digest import digest
from ..ir.provenance import describe, located, make, module_path, read, strip_prefix
from ..ir.verification import functions
from .contract import Bitwise, Contract, ContractPass, Relation
from .rewriting import calls, forward_function, return_op

PROLOGUE, EPILOGUE = "prologue", "epilogue"

_NUMBERED = re.compile(r"\.(\d+)(?=\.|$)")


@dataclass
class Part:
    """Ops of @forward that become one function.

    A block has the path of its module as `prefix`; prologue and epilogue, which hold ops of
    several modules, have a `name` instead.
    """

    prefix: str = ""
    name: str = ""
    ops: list[Operation] = field(default_factory=list)


# --- where to cut ---


def _prefixes(path: str) -> Iterator[tuple[str, str]]:
    """(base, numbered module) for each number: ("model.layers", "model.layers.3")."""
    for match in _NUMBERED.finditer(path):
        yield path[: match.start()], path[: match.end()]


def find_base(function: FuncOp) -> str | None:
    """The list of blocks, such as "model.layers"; None if there is none.

    It is the innermost numbered list that every attention op is in, so that neither a list of
    experts inside a block nor one around the whole model is taken for it.
    """
    paths = [module_path(op) or "" for op in function.walk() if isinstance(op, nn.AttentionOp)]
    if not paths:
        return None
    bases = [{base for base, _ in _prefixes(path)} for path in paths]
    return max(set.intersection(*bases), key=len, default=None)


def _block_prefix(op: Operation, base: str) -> str | None:
    """The block that the op belongs to by its location."""
    found = dict(_prefixes(module_path(op) or ""))
    return found.get(base)


def _is_source(op: Operation) -> bool:
    """Ops that belong to no part: parameters stay in @forward, constants go wherever needed."""
    return isinstance(op, nn.GetParameterOp | nn.ConstantOp)


def _split(function: FuncOp, base: str) -> list[Part]:
    """Prologue, blocks in the order of their first ops, epilogue: a part only needs earlier ones.

    What has no block by its location goes to the prologue if blocks need it and it needs none,
    after the last block that it needs if a later one needs it, and else to the epilogue.

    Raises: PAS005 if a block needs a later one.
    """
    ops = [op for op in function.body.block.ops if not isinstance(op, ReturnOp)]
    ops = [op for op in ops if not _is_source(op)]
    prefix_of = {op: _block_prefix(op, base) for op in ops}
    blocks = dict.fromkeys(prefix for prefix in prefix_of.values() if prefix is not None)
    rank = {prefix: index for index, prefix in enumerate(blocks, start=1)}
    needed = _needed_by_blocks(ops, prefix_of)
    parts = [Part(name=PROLOGUE), *(Part(prefix) for prefix in blocks), Part(name=EPILOGUE)]
    part_of: dict[SSAValue, int] = {}
    for op in ops:
        earliest = max((part_of.get(operand, 0) for operand in op.operands), default=0)
        prefix = prefix_of[op]
        if prefix is not None:
            index = rank[prefix]
        else:
            index = earliest if op in needed else len(parts) - 1
        if index < earliest:
            needs = parts[earliest].prefix
            raise errors.blocks_not_in_order(at=describe(op), block=prefix or "", needs=needs)
        parts[index].ops.append(op)
        part_of.update(dict.fromkeys(op.results, index))
    return [part for part in parts if part.ops]


def _needed_by_blocks(
    ops: list[Operation], prefix_of: dict[Operation, str | None]
) -> set[Operation]:
    """Ops whose results reach a block."""
    needed: set[Operation] = set()
    for op in reversed(ops):
        users = {use.operation for result in op.results for use in result.uses}
        if any(prefix_of.get(user) is not None or user in needed for user in users):
            needed.add(op)
    return needed


# --- functions ---


@dataclass(frozen=True)
class Interface:
    """What a part takes from outside, and what it gives back."""

    inputs: list[SSAValue]
    constants: list[nn.ConstantOp]
    outputs: Sequence[SSAValue]


def _interface(part: Part) -> Interface:
    """Values in the order of their first use, parameters after the others."""
    inside = set(part.ops)
    used = dict.fromkeys(operand for op in part.ops for operand in op.operands)
    outside = [value for value in used if value.owner not in inside]
    constants = [value.owner for value in outside if isinstance(value.owner, nn.ConstantOp)]
    values = [value for value in outside if not _is_source_value(value)]
    weights = [value for value in outside if isinstance(value.owner, nn.GetParameterOp)]
    outputs = [
        result
        for op in part.ops
        for result in op.results
        if any(use.operation not in inside for use in result.uses)
    ]
    return Interface(values + weights, constants, outputs)


def _is_source_value(value: SSAValue) -> bool:
    return isinstance(value.owner, Operation) and _is_source(value.owner)


def _outline(part: Part, interface: Interface) -> FuncOp:
    """Move the part's ops into a private function; uses in @forward stay for `_call`."""
    block = Block(arg_types=[value.type for value in interface.inputs])
    for value, argument in zip(interface.inputs, block.args, strict=True):
        argument.name_hint = _hint(value, part.prefix)
    copies = [constant.clone() for constant in interface.constants]
    inner: dict[SSAValue, SSAValue] = dict(zip(interface.inputs, block.args, strict=True))
    inner.update({old.y: new.y for old, new in zip(interface.constants, copies, strict=True)})
    for op in part.ops:
        assert op.parent is not None
        op.parent.detach_op(op)
        op.operands = [inner.get(operand, operand) for operand in op.operands]
        if isinstance(op, nn.AttentionOp):
            op.layer = None  # a shared block does not know for which layer it is called
    for op in (*copies, *part.ops):
        op.location = _relative(op, part.prefix)
        block.add_op(op)
    block.add_op(located(ReturnOp(*interface.outputs), make("")))
    types = (list(block.arg_types), [value.type for value in interface.outputs])
    function = FuncOp(part.name, types, Region(block), visibility="private")
    return located(function, make(""))


def _relative(op: Operation, prefix: str) -> LocationAttr:
    """The op's location inside the block; what comes from elsewhere belongs to the block."""
    provenance = read(op.location)
    if provenance is None or not prefix:
        return op.location
    relative = strip_prefix(op.location, prefix)
    return make("", provenance.node) if relative == op.location else relative


def _hint(value: SSAValue, prefix: str) -> str | None:
    """A parameter's name inside its block; hints are for readers alone."""
    if not isinstance(value.owner, nn.GetParameterOp):
        return value.name_hint
    name = value.owner.parameter_name.removeprefix(f"{prefix}.").replace(".", "_")
    return name if SSAValue.is_valid_name(name) else None


@dataclass
class _Outliner:
    module: ModuleOp
    forward: FuncOp
    shared: dict[object, FuncOp] = field(default_factory=dict)
    """Content of a block -> its function."""

    def run(self, parts: list[Part]) -> None:
        for part in parts:
            interface = _interface(part)
            function = _outline(part, interface)
            self._call(self._keep(function, part), part, interface)
        for op in list(self.forward.body.block.ops):
            if isinstance(op, nn.ConstantOp) and op.y.first_use is None:
                Rewriter.erase_op(op)

    def _keep(self, function: FuncOp, part: Part) -> FuncOp:
        """The function, or the one of an equal block that came before."""
        name = part.name
        if not name:
            equal = self.shared.setdefault(_content(function), function)
            if equal is not function:
                return equal
            name = f"block_{len(self.shared) - 1}"
        function.sym_name = StringAttr(self._unused(name))
        self.module.body.block.add_op(function)
        return function

    def _unused(self, name: str) -> str:
        taken = functions(self.module)
        return next(n for n in chain([name], (f"{name}_{i}" for i in count())) if n not in taken)

    def _call(self, function: FuncOp, part: Part, interface: Interface) -> None:
        outputs = interface.outputs
        call = CallOp(function.sym_name.data, interface.inputs, [value.type for value in outputs])
        body = self.forward.body.block
        body.insert_op_before(located(call, make(part.prefix)), return_op(self.forward))
        for value, result in zip(outputs, call.results, strict=True):
            value.replace_uses_with_if(result, lambda use: use.operation.parent is body)


def _content(function: FuncOp) -> object:
    """Equal for blocks that compute the same in modules of the same names."""
    paths = tuple(module_path(op) for op in function.body.block.ops)
    return digest(function, ignore={"sym_name"}), paths


@dataclass(frozen=True)
class OutlineBlocksPass(ContractPass):
    """One private function per distinct decoder block, so that later work is done once for it.

    Before: @forward with the ops of all layers, at `loc("model.layers.3.mlp.up_proj")`.
    After:  @forward only reads parameters and calls @prologue, @block_0 (at
    `loc("model.layers.3")`, for each equal layer), @block_1 (for layers of another kind), …,
    @epilogue. Inside a block locations are relative (`loc("mlp.up_proj")`), the source node is
    that of the first layer, and `nn.attention` has no `layer`.
    Contract: bitwise. Raises: PAS004 without @forward, PAS005 if a block needs a later one.
    """

    name = "outline-blocks"
    contract: ClassVar[Contract] = Contract(
        "before `paged-attention`; ops carry the module paths of the import",
        Relation.SAME,
        Bitwise(),
    )

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        forward = forward_function(op, self.name)
        base = find_base(forward)
        if base is None or calls(forward):
            return  # no blocks, or outlined already
        _Outliner(op, forward).run(_split(forward, base))
