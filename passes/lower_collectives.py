"""Which exchanges there are, and how each one runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp, StringAttr
from xdsl.ir import Operation
from xdsl.pattern_rewriter import PatternRewriter, RewritePattern, op_type_rewrite_pattern

from ..backend_rngd.isa.machine import DEFAULT_MACHINE, Machine, load_machine
from ..ir import dist, nn
from ..ir.dist_cut import mesh_of
from ..ir.types import dtype_of, f32
from .contract import Budget, Contract, ContractPass, Relation
from .cse import CsePass
from .exchange_cost import sum_stages
from .rewriting import erase_dead_ops, rewrite_to_fixpoint


class ShardOfGathered(RewritePattern):
    """What was gathered only to be cut the same way again stays with its rank."""

    @op_type_rewrite_pattern
    def match_and_rewrite(self, op: dist.ShardOp, rewriter: PatternRewriter) -> None:
        gather = op.x.owner
        if isinstance(gather, dist.AllGatherOp) and gather.cut == op.cut:
            rewriter.replace(op, [], [gather.x])


class GatherOfShard(RewritePattern):
    """What every rank had is not collected from the others."""

    @op_type_rewrite_pattern
    def match_and_rewrite(self, op: dist.AllGatherOp, rewriter: PatternRewriter) -> None:
        shard = op.x.owner
        if isinstance(shard, dist.ShardOp) and shard.cut == op.cut:
            rewriter.replace(op, [], [shard.x])


class ShardOfSum(RewritePattern):
    """A sum of which each rank needs a part is not sent whole."""

    @op_type_rewrite_pattern
    def match_and_rewrite(self, op: dist.ShardOp, rewriter: PatternRewriter) -> None:
        total = op.x.owner
        if isinstance(total, dist.AllReduceOp) and _is_own_sum(total) and _is_of_all(total, op):
            rewriter.replace(op, dist.ReduceScatterOp(total.x, op.cut, dtype=dtype_of(total.y)))


class SumOfSums(RewritePattern):
    """Two sums over the same ranks that are added, such as attention's and the feed-forward
    part's where both start from one norm, are one sum."""

    @op_type_rewrite_pattern
    def match_and_rewrite(self, op: nn.AddOp, rewriter: PatternRewriter) -> None:
        a, b = op.a.owner, op.b.owner
        if not (isinstance(a, dist.AllReduceOp) and isinstance(b, dist.AllReduceOp)) or a is b:
            return
        same = a.mask == b.mask and a.x.type == b.x.type and a.y.type == b.y.type
        if same and dtype_of(a.x) == f32 and _is_own_sum(a) and _is_own_sum(b):
            added = nn.AddOp(a.x, b.x)
            total = dist.AllReduceOp(added.y, mask=a.mask.value.data, dtype=dtype_of(op.y))
            rewriter.replace(op, [added, total])


@dataclass(frozen=True)
class ChooseAlgorithm(RewritePattern):
    """The cheapest exchanges take the place of a collective that has no algorithm yet."""

    ranks: int
    machine: Machine

    @op_type_rewrite_pattern
    def match_and_rewrite(self, op: dist.AllReduceOp, rewriter: PatternRewriter) -> None:
        if op.algorithm is not None:
            return
        kind = None if op.kind is None else op.kind.data
        mask = op.mask.value.data
        stages = sum_stages(op.x, mask, self.ranks, self.machine, is_dealt=op.is_sum)
        new: list[Operation] = []
        x = op.x
        for stage in stages:
            dtype = dtype_of(op.y) if stage is stages[-1] else f32
            part = dist.AllReduceOp(
                x, mask=stage.mask, dtype=dtype, kind=kind, algorithm=stage.algorithm
            )
            new.append(part)
            x = part.y
        rewriter.replace(op, new)


@dataclass(frozen=True)
class NameAlgorithm(RewritePattern):
    """Gathering is a rotation of parts; scattering sums is half of scatter_gather."""

    @op_type_rewrite_pattern
    def match_and_rewrite(
        self, op: dist.AllGatherOp | dist.ReduceScatterOp, rewriter: PatternRewriter
    ) -> None:
        if op.algorithm is None:
            gathers = isinstance(op, dist.AllGatherOp)
            op.algorithm = StringAttr("rotate" if gathers else "scatter_gather")
            rewriter.notify_op_modified(op)


def _is_own_sum(op: dist.AllReduceOp) -> bool:
    """A sum that nothing else uses."""
    return op.is_sum and op.algorithm is None and len(list(op.y.uses)) == 1


def _is_of_all(op: dist.AllReduceOp, shard: dist.ShardOp) -> bool:
    return bool(op.mask.value.data == shard.cut.ranks - 1)


@dataclass(frozen=True)
class LowerCollectivesPass(ContractPass):
    """Drop exchanges that are not needed, and choose how the others run.

    Before: `dist.all_reduce %x mask 7`.
    After:  each collective has an `algorithm`, the cheapest by the machine's cost formulas for
    its size: all at once, or from the nearest ranks to the farthest, such as `mask 3 algorithm
    "switch"` in each cluster, then `mask 4 algorithm "rotate"` between the two, with f32 sums in
    between. Gone are collectives that undo each other or do the same, and sums of sums are one.
    Contract: an error budget, since sums are formed in another order.
    Raises: VED030 for an unknown machine.
    """

    name = "lower-collectives"
    contract: ClassVar[Contract] = Contract(
        "after `shard-tensor-parallel` and `specialize-bucket`",
        Relation.SHARDED,
        Budget(
            "ranks add up in another order, and sums of sums are rounded once; what comes after "
            "adds to the difference",
            relative=2**-3,
            relative_float32=1e-4,
        ),
    )

    machine: str = DEFAULT_MACHINE
    """The machine whose costs count."""

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        machine = load_machine(self.machine)
        mesh = mesh_of(op)
        if mesh is None or mesh.ranks == 1:
            return
        CsePass().apply(ctx, op)
        erase_dead_ops(op.body)
        rewrite_to_fixpoint(op, [ShardOfGathered(), GatherOfShard(), ShardOfSum(), SumOfSums()])
        rewrite_to_fixpoint(op, [ChooseAlgorithm(mesh.ranks, machine), NameAlgorithm()])
