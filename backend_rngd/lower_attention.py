"""Attention in a block: rotary embedding, the write to the KV cache, the heads' work."""

from __future__ import annotations

from xdsl.ir import SSAValue

from ..ir import nn, paged
from ..ir.types import shape_of
from .block_state import BlockState
from .emitter import Activation, Ref
from .isa.dtypes import DType
from .isa.layout import KeyIndex, RopeTable, Zeros, features_per_slice, heads
from .isa.rules import SLICES_PER_PE
from .kernels import rows
from .kernels.attention import CacheScales, Inputs, PagedAttention
from .kernels.attention_tiling import attention_rounds, dealt_run
from .kernels.cache import write_cache
from .kernels.rope import load_angles, rope
from .tokens import INDEX_BYTES, WORD_BYTES

PADDING_POSITION = 1
"""Position id of padding tokens (docs of the vendor's interface): a row of every RoPE table."""


def lower_rope(state: BlockState, op: nn.RopeOp) -> Activation:
    """Queries or keys turned by their positions' angles."""
    x = state.of(op.x)
    return rope(state.emit, x, angles_of(state, op, x), "rotated")


def angles_of(state: BlockState, op: nn.RopeOp, x: Activation) -> Ref:
    """Angles of the tokens; queries and keys share them if their heads lie alike in slices."""
    table = RopeTable(
        rows=max(state.shape.bucket.attention_size, PADDING_POSITION + 1),
        order=x.order,
        per_slice=x.per_slice,
        inv_freq=tuple(float(v) for v in op.inv_freq.get_values()),
        scaling=op.attention_scaling.value.data,
    )
    for positions, known, angles in state.now.angles:
        same = positions == op.position_ids and x.order.heads <= known.order.heads
        order = x.order.model_copy(update={"heads": known.order.heads})
        if same and table.model_copy(update={"order": order}) == known:
            return angles
    rows_of_table = state.positions(op.position_ids)
    angles = load_angles(state.emit, x, state.need(table), rows_of_table, WORD_BYTES)
    state.now.angles.append((op.position_ids, table, angles))
    return angles


def lower_write(state: BlockState, op: paged.WriteOp) -> None:
    """Put the chunk's keys and values into their slots of the cache."""
    cache = state.cache(op.cache)
    slots = state.input(op.slot_mapping, INDEX_BYTES, state.shape.row_bytes("slot_mapping"))
    write_cache(state.emit, state.of(op.k), state.of(op.v), cache, slots, INDEX_BYTES)


def lower_attention(state: BlockState, op: paged.AttentionOp) -> Activation:
    """The heads' work on all that is in the cache."""
    chunk, grouped = state.chunk, state.groups > 1
    q = _dealt(state, op.q) if grouped else state.of(op.q)
    kv_heads = shape_of(op.cache)[1]
    attended = state.shape.attended(chunk)
    table_row = state.shape.table_row_bytes
    # Groups of slices that share a sequence work as on so many sequences with the same keys.
    sequences = state.groups if grouped else chunk.sequences
    rounds = attention_rounds(sequences, kv_heads, attended, table_row // INDEX_BYTES)
    key_index = {
        (turn.splits, turn.keys): state.need(KeyIndex(splits=turn.splits, keys=turn.keys))
        for turn in rounds
    }
    scales = None
    if op.k_scale is not None and op.v_scale is not None:
        keys, values = (state.now.scales.of(scale) for scale in (op.k_scale, op.v_scale))
        scales = CacheScales(keys.ref, values.ref)
    inputs = Inputs(
        cache=state.cache(op.cache),
        cache_dtype=DType.BF16 if scales is None else DType.F8E4M3,
        scales=scales,
        block_table=state.argument(op.block_table, chunk.first_sequence * table_row),
        table_row_bytes=0 if grouped else table_row,
        lengths=state.input(op.lengths, 0, WORD_BYTES),
        length_bytes=0 if grouped else WORD_BYTES,
        positions=state.positions(op.position_ids),
        position_bytes=WORD_BYTES,
        key_index=key_index,
        zeros=state.need(Zeros(size=_zero_bytes(q))),
    )
    return PagedAttention(
        state.emit,
        q,
        kv_heads,
        sequences,
        chunk.first_token,
        rounds,
        op.scale.value.data,
        inputs,
    ).run()


def _dealt(state: BlockState, value: SSAValue) -> Activation:
    """Query rows of an earlier segment, dealt to the groups of slices."""
    crossing, tokens = state.crossings[value], state.chunk.count // state.groups
    order = crossing.order
    return rows.load_rows(
        state.emit,
        state.need(crossing, state.chunk.first(state.shape) * features_per_slice(order) * 2),
        order,
        state.shape.all_tokens,
        0,
        state.chunk.count,
        groups=state.groups,
        deal=dealt_run(order, SLICES_PER_PE // state.groups, tokens),
    )


def _zero_bytes(q: Activation) -> int:
    """Enough zeros for a slice of attention's output."""
    order = heads(q.order.heads, q.order.head_dim, rotary=False)
    return 2 * q.tokens * features_per_slice(order)
