"""Where the inputs of @forward stand, by phase; positions are the interface, names are hints.

After import: `(input_ids, position_ids) -> logits`. After `paged-attention`:
`(input_ids, position_ids, slot_mapping, block_table, lengths, cache...) -> (logits, cache...)`;
`prune-logits{rows=0}` drops the logits.

Shape letters: B sequences, T tokens, A keys that a sequence may see.
"""

from __future__ import annotations

from dataclasses import dataclass

from xdsl.dialects.func import FuncOp
from xdsl.ir import BlockArgument

from ..ir.types import dims_of, dtype_of, i32

INPUT_IDS, POSITION_IDS = 0, 1
SLOT_MAPPING, BLOCK_TABLE, LENGTHS, FIRST_CACHE = 2, 3, 4, 5


def position_ids_of(function: FuncOp) -> BlockArgument | None:
    """The position ids [B, T] of an imported @forward; None if its arguments are others."""
    args = function.args
    kinds = [(dtype_of(arg), len(dims_of(arg))) for arg in args]
    fits = kinds == [(i32, 2), (i32, 2)] and args[0].type == args[POSITION_IDS].type
    return args[POSITION_IDS] if fits else None


@dataclass(frozen=True)
class PagedInputs:
    """The arguments that tell paged attention what to read and write."""

    position_ids: BlockArgument
    """[B, T]"""
    slot_mapping: BlockArgument
    """[B, T]"""
    block_table: BlockArgument
    """[B, A]"""
    lengths: BlockArgument
    """[B]"""
    caches: tuple[BlockArgument, ...]


def paged_inputs(function: FuncOp) -> PagedInputs | None:
    """The paged inputs of @forward; None before `paged-attention`."""
    args = function.args
    if len(args) < FIRST_CACHE:
        return None
    inputs = PagedInputs(
        args[POSITION_IDS],
        args[SLOT_MAPPING],
        args[BLOCK_TABLE],
        args[LENGTHS],
        tuple(args[FIRST_CACHE:]),
    )
    ranks = [(dtype_of(arg), len(dims_of(arg))) for arg in args[POSITION_IDS:FIRST_CACHE]]
    return inputs if ranks == [(i32, 2), (i32, 2), (i32, 2), (i32, 1)] else None


def has_logits(function: FuncOp, inputs: PagedInputs) -> bool:
    """Whether the first result is the logits; the other results are one per cache."""
    return len(function.function_type.outputs) > len(inputs.caches)
