"""What a collective of the IR costs on a machine, and the cheapest way to run it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

from xdsl.ir import Attribute, SSAValue

from ..backend_rngd.isa.cost_exchange import (
    all_gather_cycles,
    all_reduce_cycles,
    reduce_scatter_cycles,
)
from ..backend_rngd.isa.dtypes import DType
from ..backend_rngd.isa.layout import features_per_slice, plain
from ..backend_rngd.isa.machine import Machine
from ..backend_rngd.isa.rules import SLICES_PER_PE
from ..ir import dist
from ..ir.types import bf16, dims_of, dtype_of, f16, f32

Collective: TypeAlias = dist.AllReduceOp | dist.AllGatherOp | dist.ReduceScatterOp

BYTES: dict[Attribute, int] = {bf16: 2, f16: 2, f32: 4}
DTYPES: dict[Attribute, DType] = {bf16: DType.BF16, f32: DType.F32}
PART_TOKENS = 256
"""The backend works on so many tokens at a time at most (docs/architecture.md)."""
SWITCH_MASKS = (1, 3)
"""Ranks of one cluster, whose tensor units fuse."""


@dataclass(frozen=True)
class Stage:
    """One exchange among the ranks that differ in the bits of `mask`."""

    mask: int
    algorithm: str


def sum_stages(
    x: SSAValue, mask: int, ranks: int, machine: Machine, *, is_dealt: bool = True
) -> tuple[Stage, ...]:
    """The cheapest exchanges, one after the other, that add `x` up over the ranks of `mask`.

    Tokens are dealt to the ranks, each of which adds some of them up, only with `is_dealt`.
    """
    fitting = [
        stages
        for stages in _choices(x, mask, ranks)
        if all(_fits(x, stage, machine) for stage in stages)
        and (is_dealt or all(stage.algorithm != "scatter_gather" for stage in stages))
    ]
    return min(fitting, key=lambda stages: (sum_cycles(x, stages, ranks, machine), len(stages)))


def sum_cycles(x: SSAValue, stages: tuple[Stage, ...], ranks: int, machine: Machine) -> int:
    """Cycles of the exchanges of one part of the tokens; after the first one, sums are f32."""
    total, dtype = 0, dtype_of(x)
    for stage in stages:
        total += all_reduce_cycles(
            machine,
            ranks,
            part_bytes(x, dtype),
            stage.algorithm,
            mask=stage.mask,
            dtype=DTYPES.get(dtype, DType.F32),
        )
        dtype = f32
    return total


def collective_cycles(op: Collective, ranks: int, machine: Machine) -> int:
    """Cycles of a collective whose algorithm has been chosen, for all tokens, part after part."""
    parts = math.ceil(math.prod(_sizes(op.x)[:-1]) / PART_TOKENS)
    return parts * _part_cycles(op, ranks, machine)


def _part_cycles(op: Collective, ranks: int, machine: Machine) -> int:
    x_bytes = part_bytes(op.x, dtype_of(op.x))
    match op:
        case dist.AllGatherOp():
            return all_gather_cycles(machine, ranks, x_bytes)
        case dist.ReduceScatterOp():
            dtype = DTYPES.get(dtype_of(op.x), DType.F32)
            return reduce_scatter_cycles(machine, ranks, x_bytes, dtype=dtype)
        case dist.AllReduceOp():
            assert op.algorithm is not None
            stage = Stage(op.mask.value.data, op.algorithm.data)
            return sum_cycles(op.x, (stage,), ranks, machine)


def part_bytes(x: SSAValue, dtype: Attribute) -> int:
    """Bytes of the tokens that are worked on at a time, on each rank: as many in all slices as in
    the fullest, since all of them take as long.
    """
    *tokens, width = _sizes(x)
    spread = SLICES_PER_PE * features_per_slice(plain(width))
    return min(math.prod(tokens), PART_TOKENS) * spread * BYTES.get(dtype, 4)


def _sizes(x: SSAValue) -> list[int]:
    sizes = [dim for dim in dims_of(x) if isinstance(dim, int)]
    assert len(sizes) == len(dims_of(x)), "specialize-bucket has not run"
    return sizes


def _choices(x: SSAValue, mask: int, ranks: int) -> Iterator[tuple[Stage, ...]]:
    """Every way to go from the nearest ranks to the farthest, in one exchange or several."""
    for masks in _splits([bit for bit in (1, 2, 4) if bit & mask]):
        rotations = tuple(Stage(part, "rotate") for part in masks)
        yield rotations
        if masks[0] in SWITCH_MASKS:
            yield (Stage(masks[0], "switch"), *rotations[1:])
    if mask == ranks - 1 and _is_dealt(x, ranks):
        yield (Stage(mask, "scatter_gather"),)


def _is_dealt(x: SSAValue, ranks: int) -> bool:
    """Whether the tokens worked on at a time divide by the ranks: several of one sequence are
    padded to whole lanes, which are as many as there can be ranks."""
    *batch, _ = _sizes(x)
    if len(batch) > 1 and batch[-1] > 1:
        return True
    sequences = math.prod(batch)
    return sequences <= PART_TOKENS and sequences % ranks == 0


def _fits(x: SSAValue, stage: Stage, machine: Machine) -> bool:
    """Half of the data memory holds what is added; a pair fits, in smaller parts if need be."""
    peers = (1 << stage.mask.bit_count()) - 1
    summands = {"switch": 1, "rotate": 1 + peers, "scatter_gather": 3}[stage.algorithm]
    slice_bytes = part_bytes(x, f32) // machine.chip.slices_per_pe
    return summands <= 2 or summands * slice_bytes <= machine.dm.bytes_per_slice // 2


def _splits(bits: list[int]) -> Iterator[tuple[int, ...]]:
    """The bits in runs: 1, 2, 4 is 7; 3, 4; 1, 6; 1, 2, 4."""
    if not bits:
        yield ()
    for end in range(len(bits), 0, -1):
        for rest in _splits(bits[end:]):
            yield (sum(bits[:end]), *rest)
