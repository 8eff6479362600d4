"""Writing new keys and values into the paged KV cache.

A slot holds [kv head][K | V][padded head_dim]. The heads of a token are first brought together in
one slice, token m in slice m mod 64, because the cache's rows must be written in long runs: a
write of less than 256 B makes HBM read, modify and write.
"""

from __future__ import annotations

import numpy as np

from ..emitter import Activation, Emitter, Ref
from ..isa.plan import SLICE_ADDRESS_BYTES, Memory
from ..isa.rules import SLICES_PER_PE


def write_cache(
    emit: Emitter, k: Activation, v: Activation, cache: Ref, slots: Ref, slot_index_bytes: int
) -> None:
    """Scatter the tokens' keys and values to the slots that `slots` lists.

    `slot_index_bytes` lie between two entries of the list.
    """
    assert k.order.padded == v.order.padded, (k.order, v.order)
    slot_bytes = k.order.heads * 4 * k.order.padded
    turns = -(-k.tokens // SLICES_PER_PE)
    rows = emit.alloc(Memory.DM, turns * slot_bytes, "cache_rows")
    for x, offset in ((k, 0), (v, 2 * k.order.padded)):
        _collect(emit, x, rows.at(offset), slot_bytes)
    for first in range(0, k.tokens, SLICES_PER_PE):
        tokens = min(SLICES_PER_PE, k.tokens - first)
        emit.gather(
            [(tokens, SLICE_ADDRESS_BYTES, 0, slot_index_bytes)],
            slot_bytes,
            rows.at(first // SLICES_PER_PE * slot_bytes),
            cache,
            index=slots.at(first * slot_index_bytes),
            row_bytes=slot_bytes,
            scatter=True,
        )


def _collect(emit: Emitter, x: Activation, rows: Ref, slot_bytes: int) -> None:
    """[m][C] over slices -> [kv head][.., padded head_dim] of token m in slice m mod 64."""
    run = min(x.per_slice, x.order.padded)
    head = np.arange(x.order.heads)[:, None, None]
    part = np.arange(x.order.padded // run)[None, :, None]
    token = np.arange(x.tokens)[None, None, :]
    source_slice, in_slice = np.divmod(head * x.order.padded + part * run, x.per_slice)
    emit.regroup(
        x.ref,
        source_slice,
        token * x.row_bytes + in_slice * 2,
        rows,
        token % SLICES_PER_PE,
        token // SLICES_PER_PE * slot_bytes + head * 4 * x.order.padded + part * run * 2,
        run * 2,
    )
