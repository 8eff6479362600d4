"""Writing new keys and values into the paged KV cache.

A slot holds [kv head][K | V][padded head_dim], in bf16 or as codes of a byte each. The heads of a
token are first brought together in one slice, token m in slice m mod 64, because the cache's rows
must be written in long runs: a write of less than 256 B makes HBM read, modify and write. The
switch brings them where tokens and slices are powers of two, so that DMA is left to what crosses
memories.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ..emitter import Activation, Emitter, Ref
from ..isa.instructions import (
    Birth,
    Commit,
    Context,
    Counter,
    Digit,
    Stream,
    Switch,
    Topology,
)
from ..isa.layout import CHUNK, FeatureOrder, features_per_slice
from ..isa.plan import SLICE_ADDRESS_BYTES, Memory
from ..isa.rules import FLIT_BYTES, SLICES_PER_PE

FEW_TOKENS = 8
FEW_FEATURES = 2 * CHUNK
"""The switch moves a ring's packets one after the other: worth it for few tokens, or few features
in a slice."""


def write_cache(
    emit: Emitter, k: Activation, v: Activation, cache: Ref, slots: Ref, slot_index_bytes: int
) -> None:
    """Scatter the tokens' keys and values to the slots that `slots` lists.

    `slot_index_bytes` lie between two entries of the list.
    """
    assert k.order.padded == v.order.padded, (k.order, v.order)
    part_bytes = k.dtype.bytes_for(k.order.padded)
    slot_bytes = k.order.heads * 2 * part_bytes
    turns = -(-k.tokens // k.ring)
    rows = emit.alloc(Memory.DM, turns * slot_bytes, "cache_rows")
    for x, offset in ((k, 0), (v, part_bytes)):
        if x.groups > 1 or _suits_switch(x):
            _switch(emit, x, rows.at(offset), slot_bytes, 2 * part_bytes)
        else:
            _collect(emit, x, rows.at(offset), slot_bytes)
    if k.groups > 1:
        _scatter_groups(emit, k, rows, slot_bytes, cache, slots, slot_index_bytes)
        return
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


def write_joined(
    emit: Emitter,
    joined: Activation,
    keys: Activation,
    cache: Ref,
    slots: Ref,
    slot_index_bytes: int,
) -> None:
    """As `write_cache` for the one head of groups, with values in the second half of their slices.

    What stands in the first half is brought too, and then the keys take its place.
    """
    pair = replace(joined, order=joined.order.model_copy(update={"heads": 2}))
    half_bytes = keys.dtype.bytes_for(keys.order.padded)
    rows = emit.alloc(Memory.DM, keys.tokens // keys.ring * 2 * half_bytes, "cache_rows")
    _switch(emit, pair, rows, 2 * half_bytes, half_bytes)
    _switch(emit, keys, rows, 2 * half_bytes, half_bytes)
    _scatter_groups(emit, keys, rows, 2 * half_bytes, cache, slots, slot_index_bytes)


def _scatter_groups(
    emit: Emitter,
    x: Activation,
    rows: Ref,
    slot_bytes: int,
    cache: Ref,
    slots: Ref,
    slot_index_bytes: int,
) -> None:
    """Rows of each group's tokens, token m in slice m mod R of the group, to the cache."""
    emit.gather(
        [
            (x.groups, x.ring * SLICE_ADDRESS_BYTES, 0, x.tokens * slot_index_bytes),
            (x.tokens // x.ring, slot_bytes, 0, x.ring * slot_index_bytes),
            (x.ring, SLICE_ADDRESS_BYTES, 0, slot_index_bytes),
        ],
        slot_bytes,
        rows,
        cache,
        index=slots,
        row_bytes=slot_bytes,
        scatter=True,
    )


def _suits_switch(x: Activation) -> bool:
    """Whether whole parts of heads lie in slices, and tokens are what a digit of slices counts."""
    small, large = sorted((x.per_slice, x.order.padded))
    whole = large % small == 0 and x.order.positions % x.per_slice == 0
    regular = x.tokens % SLICES_PER_PE == 0 or (
        x.tokens < SLICES_PER_PE and x.tokens & (x.tokens - 1) == 0
    )
    return whole and regular and (x.tokens <= FEW_TOKENS or x.per_slice <= FEW_FEATURES)


def _switch(emit: Emitter, x: Activation, rows: Ref, slot_bytes: int, head_bytes: int) -> None:
    """As `_collect`; each slice takes its token's features from all slices that hold some.

    With fewer tokens than slices, the slices behind the tokens' get copies.
    """
    run = min(x.per_slice, x.order.padded)
    parts, heads = x.order.padded // run, x.per_slice // run
    flit = max(CHUNK, FLIT_BYTES * 8 // x.dtype.bits)
    packet = flit if run % flit == 0 else CHUNK
    packet_bytes = x.dtype.bytes_for(packet)
    ring = x.ring
    digit = Digit(shift=0, bits=(min(x.tokens, ring) - 1).bit_length(), bytes=x.row_bytes)
    switch = Switch(Topology.INTER_TRANSPOSE, ring, (digit,))
    if digit.bits == 0:
        switch = Switch(Topology.BROADCAST01, ring)
    heads_of_unit = x.order.heads // x.units
    emit.exec(
        Context.SUB,
        [
            Counter(
                max(1, x.tokens // ring),
                a=ring * x.row_bytes,
                commit=slot_bytes,
            ),
            Counter(x.units, a=x.unit_bytes, commit=heads_of_unit * head_bytes),
            Counter(
                heads_of_unit // heads,
                birth=Birth.SLICE,
                slices=parts,
                commit=heads * head_bytes,
            ),
            Counter(parts, birth=Birth.SLICE, slices=1, commit=x.dtype.bytes_for(run)),
            Counter(heads, a=x.dtype.bytes_for(run), commit=head_bytes),
            Counter(run // packet, a=packet_bytes, commit=packet_bytes),
        ],
        Stream(packet),
        a=x.ref,
        dtype=x.dtype,
        out=rows,
        commit=Commit(columns=packet, column_stride=x.dtype.bytes_for(1)),
        switch=switch,
    )


def collects_in_groups(order: FeatureOrder, ring: int, tokens: int) -> bool:
    """Whether the switch can bring a token's heads together: units of whole heads, or one unit."""
    per_slice = features_per_slice(order)
    used, parts = order.positions // per_slice, order.padded // per_slice
    whole = per_slice * parts == order.padded and used * per_slice == order.positions
    return whole and tokens % ring == 0 and (used <= ring or ring % parts == 0)


def _collect(emit: Emitter, x: Activation, rows: Ref, slot_bytes: int) -> None:
    """[m][C] over slices -> [kv head][.., padded head_dim] of token m in slice m mod 64."""
    run, size = min(x.per_slice, x.order.padded), x.dtype.bytes_for(1)
    head = np.arange(x.order.heads)[:, None, None]
    part = np.arange(x.order.padded // run)[None, :, None]
    token = np.arange(x.tokens)[None, None, :]
    source_slice, in_slice = np.divmod(head * x.order.padded + part * run, x.per_slice)
    emit.regroup(
        x.ref,
        source_slice,
        token * x.row_bytes + in_slice * size,
        rows,
        token % SLICES_PER_PE,
        token // SLICES_PER_PE * slot_bytes + (head * 2 * x.order.padded + part * run) * size,
        run * size,
    )
