"""Runs of blocks become stages of a pipeline, which send what the next one needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp
from xdsl.dialects.func import CallOp, FuncOp, ReturnOp
from xdsl.ir import Operation, SSAValue
from xdsl.rewriter import InsertPoint, Rewriter

from .. import errors
from ..ir import dist, nn, paged
from ..ir.dist_cut import MESH, MeshAttr, mesh_of
from ..ir.provenance import located
from ..ir.types import dims_of, dtype_of, tensor
from ..ir.verification import callee_name, functions
from ..models.stages import list_of, stage_sizes
from .contract import Bitwise, Contract, ContractPass, Relation
from .rewriting import forward_function


def block_calls(forward: FuncOp, callees: dict[str, FuncOp]) -> list[CallOp]:
    """The calls of @forward that run a block: a function with attention."""
    blocks = {
        name
        for name, function in callees.items()
        if any(isinstance(op, nn.AttentionOp | paged.AttentionOp) for op in function.walk())
    }
    ops = forward.body.block.ops
    return [op for op in ops if isinstance(op, CallOp) and callee_name(op) in blocks]


def _begin_stage(forward: FuncOp, first: Operation, stage: int) -> None:
    """Before `first`, stage - 1 sends and `stage` receives what later ops use."""
    ops = list(forward.body.block.ops)
    later = set(ops[ops.index(first) :])
    for value in [value for op in ops if op not in later for value in _sent(op, later)]:
        assert isinstance(value.owner, Operation)
        send = located(dist.SendOp(value, to=stage), value.owner.location)
        same = tensor(dims_of(value), dtype_of(value))
        received = located(dist.RecvOp(same, source=stage - 1), first.location)
        value.replace_uses_with_if(received.y, lambda use: _needs(use.operation, later))
        Rewriter.insert_op(send, InsertPoint.before(_first_recv(first)))
        Rewriter.insert_op(received, InsertPoint.before(first))


def _sent(op: Operation, later: set[Operation]) -> list[SSAValue]:
    """Results that ops of `later` use; parameters and constants are at hand on every stage."""
    if isinstance(op, nn.GetParameterOp | nn.ConstantOp | dist.GetShardOp):
        return []
    return [x for x in op.results if any(_needs(use.operation, later) for use in x.uses)]


def _needs(user: Operation, later: set[Operation]) -> bool:
    """What is returned goes to the host from the stage that has it."""
    return user in later and not isinstance(user, ReturnOp)


def _first_recv(op: Operation) -> Operation:
    """Sends of a stage come before the `recv`s that begin the next one."""
    while isinstance(op.prev_op, dist.RecvOp):
        op = op.prev_op
    return op


def _stage_blocks(forward: FuncOp, blocks: list[CallOp]) -> tuple[int, ...]:
    """How many blocks each stage has now."""
    counted = set(blocks)
    return tuple(sum(op in counted for op in stage) for stage in dist.stages_of(forward))


@dataclass(frozen=True)
class SplitPipelineStagesPass(ContractPass):
    """Divide the blocks into stages that run one after the other, each on ranks of its own.

    Before: @forward calls prologue, blocks and epilogue.
    After:  between two stages, `dist.send` for each value that later ones use and `dist.recv` of
    it; `dist.mesh` is <tp, stages>. What comes before the blocks is in the first stage, what comes
    after them in the last. Arguments are given to all stages, results taken from the stage that
    has them. One stage changes nothing.
    Contract: bitwise. Raises: PAS004 without @forward, SHD007 without blocks, SHD008 if there are
    other stages already, PAR010 to PAR014 for stages that the blocks do not give.
    """

    name = "split-pipeline-stages"
    contract: ClassVar[Contract] = Contract("after `outline-blocks`", Relation.SHARDED, Bitwise())

    stages: int | None = None
    """How many; they are as even as can be, unless `blocks` says otherwise."""
    blocks: tuple[int, ...] | None = None
    """Blocks of each stage."""

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        forward = forward_function(op, self.name)
        calls = block_calls(forward, functions(op))
        if not calls:
            raise errors.no_blocks_to_split(self.name)
        sizes = stage_sizes(len(calls), self.stages, self.blocks)
        present = _stage_blocks(forward, calls)
        if present == sizes:
            return
        if len(present) > 1:
            raise errors.staged_already(list_of(present), list_of(sizes))
        end = 0
        for stage, size in enumerate(sizes[:-1], start=1):
            end += size
            _begin_stage(forward, calls[end], stage)
        mesh = mesh_of(op)
        op.attributes[MESH] = MeshAttr(1 if mesh is None else mesh.ranks, len(sizes))
