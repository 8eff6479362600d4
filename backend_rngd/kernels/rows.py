"""Moving whole token rows between HBM and the slices.

The hidden state between calls stands in HBM as bf16 [slice][token][C], so that a slice's rows are
one run whatever part of the tokens a block works on at a time. A slice's rows are padded to whole
units of HBM, which cost less to write than parts of them.
"""

from __future__ import annotations

from ..emitter import Activation, Emitter, Ref
from ..isa.instructions import Commit, Context, Counter, Stream
from ..isa.layout import CHUNK, FeatureOrder, features_per_slice
from ..isa.plan import SLICE_ADDRESS_BYTES, Memory
from ..isa.rules import SLICES_PER_PE

HBM_UNIT_BYTES = 256


def hidden_stride(order: FeatureOrder, all_tokens: int) -> int:
    """Bytes between two slices' rows of a hidden state."""
    return -(-all_tokens * features_per_slice(order) * 2 // HBM_UNIT_BYTES) * HBM_UNIT_BYTES


def embedding(
    emit: Emitter, table: Ref, order: FeatureOrder, ids: Ref, id_bytes: int, tokens: int
) -> Activation:
    """Rows of a `RowTableLayout` table, one per token id."""
    x = emit.activation(order, tokens, "embedding")
    emit.gather(
        [
            (tokens, 0, x.row_bytes, id_bytes),
            (SLICES_PER_PE, x.row_bytes, SLICE_ADDRESS_BYTES, 0),
        ],
        x.row_bytes,
        table,
        x.ref,
        index=ids,
        row_bytes=SLICES_PER_PE * x.row_bytes,
    )
    return x


def load_rows(
    emit: Emitter,
    hidden: Ref,
    order: FeatureOrder,
    all_tokens: int,
    first: int,
    tokens: int,
    slices: int = SLICES_PER_PE,
    groups: int = 1,
    deal: int | None = None,
) -> Activation:
    """Tokens first … first + tokens - 1 of a hidden state of `all_tokens` tokens.

    Only the first `slices` slices get theirs; each group its part of the tokens.
    """
    if groups > 1:
        x = emit.activation(order, tokens // groups, "hidden", groups=groups, deal=deal)
        source = hidden.at(first * x.row_bytes)
        for unit in range(x.units):
            load_unit(emit, source, x, all_tokens, unit, x.place(unit * x.unit))
        return x
    x = emit.activation(order, tokens, "hidden")
    emit.dma(
        [(slices, hidden_stride(order, all_tokens), SLICE_ADDRESS_BYTES)],
        x.size_bytes,
        hidden.at(first * x.row_bytes),
        x.ref,
    )
    return x


def store_rows(
    emit: Emitter,
    x: Activation,
    hidden: Ref,
    all_tokens: int,
    first: int,
    slices: int = SLICES_PER_PE,
) -> None:
    """The inverse of `load_rows`."""
    if x.groups > 1:
        for unit in range(x.units):
            outside, loops = _group_runs(x, all_tokens, unit)
            back = [(n, inside, far) for n, far, inside in loops]
            target = hidden.at(first * x.row_bytes + outside)
            emit.dma(back, _group_run_bytes(x), x.place(unit * x.unit), target)
        return
    stride = hidden_stride(x.order, all_tokens)
    whole = x.tokens == all_tokens and x.size_bytes != stride
    emit.dma(
        [(slices, SLICE_ADDRESS_BYTES, stride)],
        stride if whole else x.size_bytes,
        _repeated(emit, x, stride) if whole else x.ref,
        hidden.at(first * x.row_bytes),
    )


def load_unit(
    emit: Emitter, hidden: Ref, x: Activation, all_tokens: int, unit: int, place: Ref
) -> None:
    """One unit of an activation of groups whose tokens begin at `hidden`."""
    outside, loops = _group_runs(x, all_tokens, unit)
    emit.dma(loops, _group_run_bytes(x), hidden.at(outside), place)


def _group_runs(
    x: Activation, all_tokens: int, unit: int
) -> tuple[int, list[tuple[int, int, int]]]:
    """A unit's place in HBM, and its runs: (count, stride in HBM, stride in data memory)."""
    assert x.unit == x.per_slice, "what HBM holds is cut as all slices would hold it"
    stride, run = hidden_stride(x.order, all_tokens), _group_run_bytes(x)
    return unit * x.ring * stride, [
        (min(x.ring, x.slices_used), stride, SLICE_ADDRESS_BYTES),
        (x.groups, run, x.ring * SLICE_ADDRESS_BYTES),
        (x.tokens * x.row_bytes // run, x.groups * run, run),
    ]


def _group_run_bytes(x: Activation) -> int:
    """Rows of a group that follow each other in HBM."""
    return (x.deal or x.tokens) * x.row_bytes


def _repeated(emit: Emitter, x: Activation, size_bytes: int) -> Ref:
    """x again and again, `size_bytes` at least: what fills a unit must have been written."""
    copies = -(-size_bytes // x.size_bytes)
    buffer = emit.alloc(Memory.DM, copies * x.size_bytes, "padded_rows")
    emit.exec(
        Context.SUB,
        [
            Counter(copies, commit=x.size_bytes),
            Counter(x.size_bytes // (2 * CHUNK), a=2 * CHUNK, commit=2 * CHUNK),
        ],
        Stream(CHUNK),
        a=x.ref,
        out=buffer,
        commit=Commit(columns=CHUNK, column_stride=2),
    )
    return buffer


def last_rows(
    emit: Emitter,
    hidden: Ref,
    order: FeatureOrder,
    all_sequences: int,
    tokens_per_sequence: int,
    first_sequence: int,
    sequences: int,
    lengths: Ref,
    length_bytes: int,
) -> Activation:
    """Row lengths[b] - 1 of each of `sequences` sequences of a hidden state; lengths[b] >= 1."""
    x = emit.activation(order, sequences, "last_rows")
    sequence_bytes = tokens_per_sequence * x.row_bytes
    slice_stride = hidden_stride(order, all_sequences * tokens_per_sequence)
    emit.gather(
        [
            (sequences, sequence_bytes, x.row_bytes, length_bytes),
            (SLICES_PER_PE, slice_stride, SLICE_ADDRESS_BYTES, 0),
        ],
        x.row_bytes,
        hidden.at(first_sequence * sequence_bytes),
        x.ref,
        index=lengths.at(first_sequence * length_bytes),
        row_bytes=x.row_bytes,
        origin=1,
    )
    return x


def store_logits(emit: Emitter, x: Activation, logits: Ref, first: int) -> None:
    """f32 rows to an output [token][64·C], features in their own order."""
    row_bytes = SLICES_PER_PE * x.row_bytes
    emit.dma(
        [
            (x.tokens, x.row_bytes, row_bytes),
            (SLICES_PER_PE, SLICE_ADDRESS_BYTES, x.row_bytes),
        ],
        x.row_bytes,
        x.ref,
        logits.at(first * row_bytes),
    )
