"""What the `dist` dialect means: all ranks of all stages run in step.

A value is a tuple with each rank's tensor. Ops of other dialects are what they are on one rank,
done on each; collectives see the tensors of all.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor
from xdsl.dialects.builtin import ModuleOp
from xdsl.dialects.func import FuncOp
from xdsl.ir import Operation

from . import dist
from .dist_cut import CutAttr, mesh_of
from .interpreter import (
    Frame,
    Machine,
    Parameters,
    Precision,
    accept_inputs,
    apply_op,
    check_result,
    runnable_function,
)
from .types import dtype_of
from .verification import functions

Ranks: TypeAlias = tuple[Tensor, ...]
"""One value: the tensor of each rank."""


def take(cut: CutAttr, whole: Tensor, rank: int) -> Tensor:
    """The part of `rank`, zeros where it holds nothing."""
    dim = cut.dim.data
    shape = list(whole.shape)
    shape[dim] = cut.local_size
    part = whole.new_zeros(shape)
    for begin, (start, stop) in cut.pieces(rank):
        part.narrow(dim, begin, stop - start).copy_(whole.narrow(dim, start, stop - start))
    return part


def assemble(cut: CutAttr, parts: Sequence[Tensor]) -> Tensor:
    """The whole tensor, bit for bit what `take` was given; padding is dropped.

    Of what several ranks hold, the first rank's counts.
    """
    dim = cut.dim.data
    shape = list(parts[0].shape)
    shape[dim] = cut.whole_size
    whole = parts[0].new_zeros(shape)
    for rank in reversed(range(cut.ranks)):
        for begin, (start, stop) in cut.pieces(rank):
            length = stop - start
            whole.narrow(dim, start, length).copy_(parts[rank].narrow(dim, begin, length))
    return whole


def run_ranks(
    module: ModuleOp,
    function_name: str,
    inputs: Sequence[Ranks],
    parameters: Parameters,
    *,
    precision: Precision = "model",
) -> list[Ranks]:
    """Run a function of a verified module on all ranks of its mesh.

    Each input and each result is a tuple of tensors, one per rank; a module without a mesh has
    one rank. `parameters` gives whole parameters. Otherwise as `interpreter.run`.
    """
    function = runnable_function(module, function_name)
    mesh = mesh_of(module)
    machine = _AllRanks(
        functions(module),
        ranks=1 if mesh is None else mesh.ranks,
        parameter_source=parameters,
        precision=precision,
    )
    with torch.no_grad():
        return machine.call(function, list(inputs))


@dataclass
class _AllRanks(Machine[Ranks, list[Frame]]):
    ranks: int = field(kw_only=True)
    parameter_source: Parameters = field(kw_only=True)
    precision: Precision = field(kw_only=True)
    sent: deque[Ranks] = field(default_factory=deque)

    def enter(self, function: FuncOp, inputs: Sequence[Ranks]) -> tuple[list[Frame], list[Ranks]]:
        frames = [Frame(self.precision, {}, self.parameter_source) for _ in range(self.ranks)]
        by_rank = [
            accept_inputs(function, [value[rank] for value in inputs], frame)
            for rank, frame in enumerate(frames)
        ]
        return frames, list(zip(*by_rank, strict=True))

    def results(
        self, op: Operation, operands: Sequence[Ranks], frames: list[Frame]
    ) -> Sequence[Ranks]:
        if isinstance(op, dist.SendOp):
            self.sent.append(operands[0])
            return ()
        if isinstance(op, dist.RecvOp):
            return (self.sent.popleft(),)
        collective = COLLECTIVES.get(type(op))
        if collective is not None:
            parts = collective(op, operands, frames)
            return (tuple(check_result(op, x, f) for x, f in zip(parts, frames, strict=True)),)
        return (
            tuple(
                apply_op(op, [value[rank] for value in operands], frame)
                for rank, frame in enumerate(frames)
            ),
        )


Collective: TypeAlias = Callable[[Any, Sequence[Ranks], list[Frame]], Sequence[Tensor]]


def _get_shard(op: dist.GetShardOp, _: Sequence[Ranks], frames: list[Frame]) -> list[Tensor]:
    whole = frames[0].parameter(op.parameter_name, op.cut.whole_type(op.y.type))
    return [take(op.cut, whole, rank) for rank in range(len(frames))]


def _local_rows(
    op: dist.LocalRowsOp, operands: Sequence[Ranks], frames: list[Frame]
) -> list[Tensor]:
    (ids,) = operands
    return [_rows_of(op.cut, rank, ids[rank]) for rank in range(len(frames))]


def _rows_of(cut: CutAttr, rank: int, ids: Tensor) -> Tensor:
    zeros = cut.first_zero(rank)
    assert zeros is not None
    rows = torch.full_like(ids, zeros)
    for begin, (start, stop) in cut.pieces(rank):
        here = (ids >= start) & (ids < stop)
        rows = torch.where(here, ids - start + begin, rows)
    return rows


def _all_reduce(
    op: dist.AllReduceOp, operands: Sequence[Ranks], frames: list[Frame]
) -> list[Tensor]:
    (x,) = operands
    mask = op.mask.value.data
    dtype = frames[0].dtype(dtype_of(op.y))
    members: dict[int, list[Tensor]] = {}
    for rank, part in enumerate(x):
        members.setdefault(rank & ~mask, []).append(part)
    reduced = _sum if op.is_sum else _largest
    results = {group: reduced(parts).to(dtype) for group, parts in members.items()}
    return [results[rank & ~mask] for rank in range(len(frames))]


def _sum(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total


def _largest(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack([part.float() for part in parts]).amax(dim=0)


def _all_gather(
    op: dist.AllGatherOp, operands: Sequence[Ranks], frames: list[Frame]
) -> list[Tensor]:
    return [assemble(op.cut, operands[0])] * len(frames)


def _reduce_scatter(
    op: dist.ReduceScatterOp, operands: Sequence[Ranks], frames: list[Frame]
) -> list[Tensor]:
    total = _sum(operands[0]).to(frames[0].dtype(dtype_of(op.y)))
    return [take(op.cut, total, rank) for rank in range(len(frames))]


def _shard(op: dist.ShardOp, operands: Sequence[Ranks], frames: list[Frame]) -> list[Tensor]:
    return [take(op.cut, operands[0][rank], rank) for rank in range(len(frames))]


COLLECTIVES: dict[type[Operation], Collective] = {
    dist.GetShardOp: _get_shard,
    dist.LocalRowsOp: _local_rows,
    dist.AllReduceOp: _all_reduce,
    dist.AllGatherOp: _all_gather,
    dist.ReduceScatterOp: _reduce_scatter,
    dist.ShardOp: _shard,
}
"""Ops whose result on a rank depends on its number or on other ranks."""
