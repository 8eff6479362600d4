"""Each rank gets its part of the weights, the caches and the work."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from xdsl.context import Context
from xdsl.dialects.builtin import IntegerAttr, ModuleOp, StringAttr
from xdsl.dialects.func import ReturnOp
from xdsl.ir import Attribute, Operation, SSAValue
from xdsl.rewriter import InsertPoint, Rewriter

from .. import errors
from ..ir import dist, nn, quant
from ..ir.dist_cut import MESH, CutAttr, MeshAttr, mesh_of
from ..ir.provenance import located
from ..ir.types import dims_of, dtype_of, f32, i64, shape_of, tensor
from ..ir.verification import parameters
from ..models.mesh import check_tensor_parallel
from .contract import Budget, Contract, ContractPass, Relation
from .cut_products import local_blocks
from .rewriting import forward_function, return_op, set_returned
from .shard_interfaces import plan_shards
from .shard_plan import ANY, Ask, FunctionPlan

WHY = "dist.why"
"""The attribute of a parameter's part that says why it is cut so."""

WEIGHT = 1
"""The operand of a product."""


@dataclass
class _Sharder:
    """Puts one function's plan into effect."""

    plan: FunctionPlan
    declared: dict[str, nn.ParameterOp]
    rounds_partial_sums: bool
    cuts: dict[SSAValue, CutAttr] = field(default_factory=dict)
    """How the values so far are cut; others are whole."""
    converted: dict[tuple[SSAValue, CutAttr | None], SSAValue] = field(default_factory=dict)

    def run(self) -> None:
        function = self.plan.function
        for argument in function.args:
            self._retype(argument)
        ops = list(function.body.block.ops)
        for op in ops:
            for index in range(len(op.operands)):
                op.operands[index] = self._operand(op, index)
            if not isinstance(op, ReturnOp):
                self._change(op)
        set_returned(function, return_op(function).operands)
        for op in ops:
            if isinstance(op, nn.GetParameterOp) and op.y.first_use is None:
                Rewriter.erase_op(op)

    def _change(self, op: Operation) -> None:
        """Give the op its local form."""
        if isinstance(op, nn.SliceOp) and op in self.plan.bounds:
            start, end = self.plan.bounds[op]
            op.start, op.end = IntegerAttr(start, i64), IntegerAttr(end, i64)
        if isinstance(op, quant.LinearOp):
            ask = self.plan.asks.get((op, WEIGHT))
            block = local_blocks(op, None if ask is None else ask.cut)
            op.rows, op.columns = (IntegerAttr(size, i64) for size in block)
        for result in list(op.results):
            self._retype(result)
        if isinstance(op, nn.LinearOp | quant.LinearOp) and op in self.plan.summed:
            dtype = dtype_of(op.y) if self.rounds_partial_sums else f32
            self._sum(op, dtype)
        elif isinstance(op, nn.EmbeddingOp) and op in self.plan.looked_up:
            ask = self.plan.asks[op, 1]
            assert ask.cut is not None
            rows = located(dist.LocalRowsOp(op.ids, ask.cut), op.location)
            Rewriter.insert_op(rows, InsertPoint.before(op))
            op.operands[0] = rows.y
            self._sum(op, dtype_of(op.y))  # one rank has the row, the others zeros
        elif isinstance(op, quant.DynamicScaleOp) and op in self.plan.compared:
            op.group = IntegerAttr(shape_of(op.x)[-1], i64)
            self._sum(op, dtype_of(op.y), dist.MAX)

    def _sum(self, op: Operation, partial: Attribute, kind: str | None = None) -> None:
        """The op's result becomes a partial sum of this type, and its uses get the sum; with a
        `kind`, what stands in place of a sum."""
        dims, dtype = dims_of(op.results[0]), dtype_of(op.results[0])
        y = Rewriter.replace_value_with_new_type(op.results[0], tensor(dims, partial))
        whole = dist.AllReduceOp(y, mask=self.plan.ranks - 1, dtype=dtype, kind=kind)
        y.replace_uses_with_if(whole.y, lambda use: use.operation is not whole)
        Rewriter.insert_op(located(whole, op.location), InsertPoint.after(op))

    def _retype(self, value: SSAValue) -> None:
        ask = self.plan.placed.get(value)
        if ask is not None and ask.cut is not None:
            local = Rewriter.replace_value_with_new_type(value, ask.cut.local_type(value.type))
            self.cuts[local] = ask.cut

    # --- operands ---

    def _operand(self, op: Operation, index: int) -> SSAValue:
        value = op.operands[index]
        ask = self.plan.asks.get((op, index))
        have = self.cuts.get(value)
        if ask is ANY:
            return value
        need = None if ask is None else ask.cut
        if have == need:
            return value
        key = (value, need)
        if key not in self.converted:
            why = "" if ask is None else ask.why
            self.converted[key] = self._convert(value, have, need, op, why)
        return self.converted[key]

    def _convert(
        self,
        value: SSAValue,
        have: CutAttr | None,
        need: CutAttr | None,
        user: Operation,
        why: str,
    ) -> SSAValue:
        owner = value.owner
        if isinstance(owner, nn.GetParameterOp) and need is not None:
            shard = dist.GetShardOp(self.declared[owner.parameter_name], need)
            shard.attributes[WHY] = StringAttr(why)
            Rewriter.insert_op(located(shard, owner.location), InsertPoint.before(owner))
            return shard.y
        location = owner.location if isinstance(owner, Operation) else user.location
        if have is not None:
            whole = self.converted.get((value, None))
            if whole is None:
                gather = located(dist.AllGatherOp(value, have), location)
                Rewriter.insert_op(gather, InsertPoint.before(user))
                whole = self.converted[value, None] = gather.y
            value = whole
        if need is None:
            return value
        part = located(dist.ShardOp(value, need), location)
        Rewriter.insert_op(part, InsertPoint.before(user))
        return part.y


@dataclass(frozen=True)
class ShardTensorParallelPass(ContractPass):
    """Cut weights, caches, logits and the work on them over the ranks of tensor parallelism.

    Before: one program on whole tensors.
    After:  one program for all ranks, `dist.mesh` is <tp, 1>. Attention has some heads on each
    rank; products before it and before another product give their rows, those after it take
    their columns and are followed by `dist.all_reduce`; scales are cut with the codes that they
    belong to, where need be in smaller blocks (`scale_cuts`); embedding and head are cut by the
    vocabulary. Parts are of equal shape, filled up with zeros. @forward takes and returns parts:
    its attributes `dist.argument_cuts` and `dist.result_cuts` say which. tp=1 changes nothing.
    Contract: an error budget, since sums are formed in parts. Raises: PAS004 without @forward,
    PAR007 and PAR008 for other numbers of ranks, SHD006 if the module is cut otherwise already.
    """

    name = "shard-tensor-parallel"
    contract: ClassVar[Contract] = Contract(
        "after `specialize-bucket`",
        Relation.SHARDED,
        Budget(
            "a sum over ranks adds up in another order, and with partial-sum=bf16 rounds each "
            "rank's part; what comes after adds to the difference",
            relative=2**-3,
            relative_float32=1e-4,
        ),
    )

    tp: int
    """Ranks, each of them a PE."""
    partial_sum: Literal["f32", "bf16"] = "f32"
    """What ranks exchange parts of sums in: unrounded, or rounded to the model's type."""

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        check_tensor_parallel(self.tp)
        forward = forward_function(op, self.name)
        mesh = mesh_of(op)
        ranks = 1 if mesh is None else mesh.ranks
        if ranks == self.tp:
            return
        if ranks > 1:
            raise errors.sharded_already(ranks, self.tp)
        declared = parameters(op)
        plans = plan_shards(op, forward, self.tp)
        outside = plans[forward.sym_name.data]
        dist.set_cuts(forward, _cuts(outside.argument_asks), _cuts(outside.result_asks))
        for plan in plans.values():
            _Sharder(plan, declared, self.partial_sum == "bf16").run()
        op.attributes[MESH] = MeshAttr(self.tp, 1 if mesh is None else mesh.stages)


def _cuts(asks: list[Ask | None]) -> list[CutAttr | None]:
    return [None if ask is None else ask.cut for ask in asks]
