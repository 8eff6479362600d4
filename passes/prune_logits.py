"""Only the logits that are asked for are computed.

Shape letters: B sequences, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp
from xdsl.dialects.func import CallOp, FuncOp
from xdsl.ir import Block, Operation, OpResult, SSAValue
from xdsl.rewriter import InsertPoint, Rewriter

from .. import errors
from ..ir import nn, paged, quant
from ..ir.provenance import carry, located
from ..ir.types import FLOAT_TENSOR, dims_of, dtype_of, tensor
from ..ir.verification import callee_name, functions
from .contract import Budget, Contract, ContractPass, Relation
from .rewriting import calls, erase_dead_code, forward_function, return_op, set_returned
from .signature import has_logits, paged_inputs

LOGITS = 0
"""Which result of @forward the logits are."""


def row_operands(op: Operation) -> tuple[int, ...] | None:
    """Which operands [B, T, ...] give row t of the result from their row t alone.

    None if the op is not of this kind or if another operand also depends on t.
    """
    match op:
        case nn.UnaryOp() | nn.LinearOp() | nn.RmsNormOp():
            rows: tuple[int, ...] = (0,)
        case nn.CastOp() if dtype_of(op.x) in FLOAT_TENSOR.dtypes:
            rows = (0,)
        case quant.DynamicScaleOp() | quant.QuantizeOp() | quant.DequantizeOp() | quant.LinearOp():
            rows = tuple(i for i, x in enumerate(op.operands) if len(dims_of(x)) == 3)
        case nn.MatmulOp() if len(dims_of(op.b)) == 2:
            rows = (0,)
        case nn.BinaryOp():
            rows = tuple(i for i, x in enumerate(op.operands) if not _is_same_for_all_rows(x))
        case _:
            return None
    expected = dims_of(op.results[0])[:2]
    fits = all(
        len(dims_of(op.operands[i])) == 3 and dims_of(op.operands[i])[:2] == expected for i in rows
    )
    return rows if rows and fits else None


def _is_same_for_all_rows(x: SSAValue) -> bool:
    dims = dims_of(x)
    return len(dims) < 2 or dims[-2] == 1


@dataclass
class _Pruned:
    """The ops of a block of which only the last token's row is needed, in reverse order."""

    block: Block
    result: int
    """Which operand of the return is pruned."""
    rows: dict[Operation, tuple[int, ...]] = field(default_factory=dict)
    """Op -> its operands with a row per token."""

    def collect(self) -> None:
        for op in reversed(list(self.block.ops)):
            rows = row_operands(op)
            if rows is not None and op.results[0].first_use is not None and self._only_pruned(op):
                self.rows[op] = rows

    def _only_pruned(self, op: Operation) -> bool:
        """Whether every use is a row of a pruned op, or the result itself."""
        return all(
            use.index in self.rows.get(use.operation, ())
            or (use.operation is self.block.last_op and use.index == self.result)
            for use in op.results[0].uses
        )

    def rewrite(self, lengths: SSAValue) -> SSAValue:
        """Compute one row; returns what takes the place of the result."""
        last = self.block.last_op
        assert last is not None
        one_row: dict[SSAValue, SSAValue] = {}
        for op in reversed(self.rows):
            for index in self.rows[op]:
                if op.operands[index] not in one_row:
                    one_row[op.operands[index]] = _cut(op.operands[index], lengths, op)
            one_row[op.results[0]] = _recompute(op, one_row)
        result = last.operands[self.result]
        return one_row[result] if result in one_row else _cut(result, lengths, last)


def _cut(value: SSAValue, lengths: SSAValue, user: Operation) -> SSAValue:
    """The last token's row of `value`; it belongs to the module that needs no more."""
    cut = located(paged.LastTokenOp(value, lengths), user.location)
    if isinstance(value, OpResult):
        point = InsertPoint.after(value.op)
    else:
        assert isinstance(value.owner, Block)
        point = InsertPoint.at_start(value.owner)
    Rewriter.insert_op(cut, point)
    return cut.y


def _recompute(op: Operation, one_row: dict[SSAValue, SSAValue]) -> SSAValue:
    batch, _, *rest = dims_of(op.results[0])
    new = type(op).create(
        operands=[one_row.get(operand, operand) for operand in op.operands],
        result_types=[tensor((batch, 1, *rest), dtype_of(op.results[0]))],
        properties=op.properties.copy(),
        attributes=op.attributes.copy(),
    )
    carry(op, [new])
    Rewriter.insert_op(new, InsertPoint.before(op))
    return new.results[0]


def _prune(function: FuncOp, result: int, lengths: SSAValue) -> None:
    pruned = _Pruned(function.body.block, result)
    pruned.collect()
    value = pruned.rewrite(lengths)
    returned = list(return_op(function).operands)
    returned[result] = value
    set_returned(function, returned)


def _prune_callee(call: CallOp, function: FuncOp, result: int, lengths: SSAValue) -> CallOp:
    """Prune inside the called function; returns the call that fits it."""
    operands = list(call.arguments)
    if lengths in operands:
        argument = function.args[operands.index(lengths)]
    else:
        block = function.body.block
        argument = block.insert_arg(lengths.type, len(block.args))
        argument.name_hint = "lengths"
        operands.append(lengths)
    _prune(function, result, argument)
    new = CallOp(call.callee, operands, function.function_type.outputs.data)
    carry(call, [new])
    Rewriter.replace_op(call, new)
    return new


@dataclass(frozen=True)
class PruneLogitsPass(ContractPass):
    """Compute the logits of each sequence's last token, of all tokens, or none.

    Before: @forward returns logits [B, T, V].
    After:  rows=1: `paged.last_token` before the first op that works row by row up to the
    logits (before the final norm), in the function that holds it; logits [B, 1, V].
    rows=0: no logits, and nothing that only they needed. rows=all: the same as before.
    Contract: rows are computed as before, up to the order of sums in products of fewer rows.
    Raises: PAS004 without @forward, PAS007 before `paged-attention`.
    """

    name = "prune-logits"
    contract: ClassVar[Contract] = Contract(
        "after `paged-attention`; a step of several tokens begins at position 0",
        Relation.LAST_TOKEN,
        Budget(
            "a product with fewer rows may sum in another order",
            relative=2**-5,
            relative_float32=1e-5,
        ),
    )

    rows: Literal[0, 1, "all"] = 1
    """Tokens per sequence that get logits."""

    @property
    def relation(self) -> Relation:
        kinds = {0: Relation.NO_LOGITS, 1: Relation.LAST_TOKEN, "all": Relation.SAME}
        return kinds[self.rows]

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        forward = forward_function(op, self.name)
        inputs = paged_inputs(forward)
        if inputs is None:
            raise errors.not_paged_yet(self.name)
        if self.rows == "all" or not has_logits(forward, inputs):
            return
        if self.rows == 0:
            returned = return_op(forward).operands
            set_returned(forward, [*returned[:LOGITS], *returned[LOGITS + 1 :]])
        elif dims_of(return_op(forward).operands[LOGITS])[1] != 1:
            _keep_last_token(op, forward, inputs.lengths)
        erase_dead_code(op)


def _keep_last_token(module: ModuleOp, forward: FuncOp, lengths: SSAValue) -> None:
    logits = return_op(forward).operands[LOGITS]
    call = logits.owner
    if isinstance(call, CallOp) and logits.has_one_use():
        name = callee_name(call)
        if [callee_name(other) for other in calls(module)].count(name) == 1:
            index = call.results.index(logits)
            _prune_callee(call, functions(module)[name], index, lengths)
            set_returned(forward, return_op(forward).operands)
            return
    _prune(forward, LOGITS, lengths)
