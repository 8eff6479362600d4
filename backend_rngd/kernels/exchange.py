"""Sums over ranks: what row-parallel products and vocabulary-parallel embeddings end with.

Each rank holds its summand [token][C] in data memory. What other ranks push comes into slots beside
it; one vector pass adds the slots up in f32, a residual among them, and rounds once. All
ranks run the same code, so a peer is named by the bits in which its rank differs.

- `rotate`: every rank pushes its whole summand to every other one.
- `scatter_gather`: the tokens are dealt to the ranks; each sums its own and pushes the sums.
- `switch`: one pass of the fused tensor units sums over the ranks of a cluster through the ring.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..emitter import HERE, Activation, ByRank, Emitter, Ref
from ..isa.dtypes import DType
from ..isa.instructions import (
    Birth,
    Commit,
    Context,
    Counter,
    Digit,
    Fate,
    Generate,
    Reduce,
    Stream,
    Switch,
    Topology,
    Vector,
)
from ..isa.layout import FeatureOrder, features_per_slice
from ..isa.plan import SLICE_ADDRESS_BYTES, Memory
from ..isa.rules import SLICES_PER_PE
from ..rngd import ArriveOp

RUN = 8
"""Elements per packet: as f32 they fill a flit."""
SLICE_BITS = SLICES_PER_PE.bit_length() - 1


def peers(mask: int) -> tuple[int, ...]:
    """What ranks that differ in some of the bits of `mask`, and in no other, differ in."""
    return tuple(m for m in range(1, mask + 1) if not m & ~mask)


@dataclass(frozen=True)
class Slots:
    """Summands of one activation in data memory: [slot][token][C]; slot 0 is the rank's own."""

    ref: Ref
    order: FeatureOrder
    tokens: int
    count: int
    dtype: DType

    @staticmethod
    def reserve(emit: Emitter, order: FeatureOrder, tokens: int, count: int, dtype: DType) -> Slots:
        size_bytes = count * tokens * dtype.bytes_for(features_per_slice(order))
        return Slots(emit.alloc(Memory.DM, size_bytes, "summands"), order, tokens, count, dtype)

    @property
    def slot_bytes(self) -> int:
        return self[0].size_bytes

    def __getitem__(self, number: int) -> Activation:
        row_bytes = self.dtype.bytes_for(features_per_slice(self.order))
        place = self.ref.at(number * self.tokens * row_bytes)
        return Activation(place, self.order, self.tokens, self.dtype)


@dataclass(frozen=True)
class AllReduce:
    """How a sum over ranks is made."""

    algorithm: str
    """`rotate`, `scatter_gather` or `switch`."""
    mask: int
    """The bits in which the ranks differ whose summands are added."""
    dtype: DType
    """Of what the ranks exchange."""
    residual: bool = False
    """Whether a bf16 activation that all ranks hold is added too."""

    def reserve(self, emit: Emitter, order: FeatureOrder, tokens: int) -> Slots:
        """Room for this rank's summand, which whoever computes it writes into slot 0."""
        pushed = len(peers(self.mask)) if self.algorithm == "rotate" else 0
        added = self.algorithm != "scatter_gather" and self.residual
        return Slots.reserve(emit, order, tokens, 1 + pushed + added, self.dtype)

    def run(
        self, emit: Emitter, summands: Slots, residual: Activation | None, out: Activation
    ) -> None:
        """out = the sum of all ranks' slot 0, and of the residual; rounded once."""
        assert (residual is not None) == self.residual
        match self.algorithm:
            case "rotate":
                _rotate(emit, summands, self.mask, residual, out)
            case "scatter_gather":
                _scatter_gather(emit, summands, self.mask, residual, out)
            case _:
                assert self.algorithm == "switch", self.algorithm
                _switch(emit, summands, self.mask, residual, out)


def _rotate(
    emit: Emitter, slots: Slots, mask: int, residual: Activation | None, out: Activation
) -> None:
    _open(emit, slots[1].ref, len(peers(mask)), slots.slot_bytes)
    for number, peer in enumerate(peers(mask), start=1):
        _push(emit, slots.ref, slots[number].ref, slots.slot_bytes, peer)
    if residual is not None:
        put(emit, residual.ref, slots[slots.count - 1])
    _add_up(emit, slots, out)


def _scatter_gather(
    emit: Emitter, summands: Slots, mask: int, residual: Activation | None, out: Activation
) -> None:
    """Rank r sums the r-th part of the tokens. Its place differs from rank to rank, so what all
    ranks do alike works on copies that stand at the same place.
    """
    ranks = mask + 1
    tokens = summands.tokens // ranks
    assert tokens * ranks == summands.tokens, summands.tokens
    count = ranks + (residual is not None)
    slots = Slots.reserve(emit, summands.order, tokens, count, summands.dtype)
    part = slots.slot_bytes
    _copy(emit, summands.ref, slots.ref, part, source_rank=ByRank(part))
    _open(emit, slots[1].ref, ranks - 1, part)
    for peer in peers(mask):
        _push(emit, summands.ref, slots[peer].ref, part, peer, ByRank(part, peer))
    sums = emit.activation(out.order, tokens, "own_sums", out.dtype)
    if residual is not None:
        own = emit.activation(residual.order, tokens, "own_residual")
        here = ByRank(own.size_bytes)
        _copy(emit, residual.ref, own.ref, own.size_bytes, source_rank=here)
        put(emit, own.ref, slots[ranks])
    _add_up(emit, slots, sums)
    received = emit.alloc(Memory.DM, (ranks - 1) * sums.size_bytes, "received_sums")
    _open(emit, received, ranks - 1, sums.size_bytes)
    for peer in peers(mask):
        place = received.at((peer - 1) * sums.size_bytes)
        _push(emit, sums.ref, place, sums.size_bytes, peer)
    for peer in range(ranks):
        place = received.at((peer - 1) * sums.size_bytes) if peer else sums.ref
        there = ByRank(sums.size_bytes, peer)
        _copy(emit, place, out.ref, sums.size_bytes, destination_rank=there)


def _switch(
    emit: Emitter, summands: Slots, mask: int, residual: Activation | None, out: Activation
) -> None:
    """The ranks of the sum are an aligned run of 2 or 4 in one cluster."""
    if residual is None:
        _sum_over_cluster(emit, summands[0], mask, out)
        return
    slots = Slots.reserve(emit, summands.order, summands.tokens, 2, DType.F32)
    _sum_over_cluster(emit, summands[0], mask, slots[0])
    put(emit, residual.ref, slots[1])
    _add_up(emit, slots, out)


def _sum_over_cluster(emit: Emitter, summand: Activation, mask: int, out: Activation) -> None:
    """out = the sum of the ranks' summands, which come to each slice over a ring of all PEs."""
    ranks = mask + 1
    step, size = summand.dtype.bytes_for(RUN), out.dtype.bytes_for(1)
    emit.exec(
        Context.MAIN,
        [
            Counter(summand.size_bytes // step, a=step, commit=size * RUN),
            Counter(ranks, birth=Birth.SLICE, slices=SLICES_PER_PE, fate=Fate.VSUM),
        ],
        Stream(RUN, cast=_cast_to_f32(summand.dtype)),
        a=summand.ref,
        dtype=summand.dtype,
        out=out.ref,
        out_dtype=out.dtype,
        switch=Switch(
            Topology.BROADCAST1, ranks * SLICES_PER_PE, (Digit(0, SLICE_BITS, slices=1),)
        ),
        vector=Vector(reduce=Reduce.ADD),
        commit=Commit(columns=RUN, column_stride=size),
        group=mask.bit_length(),
    )


def _open(emit: Emitter, first: Ref, count: int, slot_bytes: int) -> None:
    """Write to each slot that peers push into: the signal that it is free is this command's."""
    emit.exec(
        Context.SUB,
        [Counter(count, commit=slot_bytes)],
        Stream(2),
        a=None,
        dtype=DType.F32,
        out=first,
        commit=Commit(columns=2, column_stride=4),
        generate=Generate(),
    )


def _push(
    emit: Emitter,
    source: Ref,
    destination: Ref,
    slice_bytes: int,
    peer: int,
    source_rank: ByRank = HERE,
) -> None:
    """`slice_bytes` of every slice to the same slice of a peer."""
    loops = [(SLICES_PER_PE, SLICE_ADDRESS_BYTES, SLICE_ADDRESS_BYTES)]
    emit.dma(loops, slice_bytes, source, destination, peer=peer, source_rank=source_rank)
    emit.append(ArriveOp(destination.buffer, destination.offset, slice_bytes))


def _copy(
    emit: Emitter,
    source: Ref,
    destination: Ref,
    slice_bytes: int,
    *,
    source_rank: ByRank = HERE,
    destination_rank: ByRank = HERE,
) -> None:
    """`slice_bytes` of every slice to another place of it."""
    emit.dma(
        [(SLICES_PER_PE, SLICE_ADDRESS_BYTES, SLICE_ADDRESS_BYTES)],
        slice_bytes,
        source,
        destination,
        source_rank=source_rank,
        destination_rank=destination_rank,
    )


def put(emit: Emitter, source: Ref, slot: Activation) -> None:
    """bf16 [token][C] into a slot; off main's way."""
    step = slot.dtype.bytes_for(RUN)
    emit.exec(
        Context.SUB,
        [Counter(slot.size_bytes // step, a=2 * RUN, commit=step)],
        Stream(RUN, cast=None if slot.dtype == DType.BF16 else DType.F32),
        a=source,
        out=slot.ref,
        out_dtype=slot.dtype,
        commit=Commit(columns=RUN, column_stride=step // RUN),
    )


def _add_up(emit: Emitter, slots: Slots, out: Activation) -> None:
    """out = the sum over the slots, in f32."""
    step, size = slots.dtype.bytes_for(RUN), out.dtype.bytes_for(1)
    emit.exec(
        Context.MAIN,
        [
            Counter(slots.slot_bytes // step, a=step, commit=size * RUN),
            Counter(slots.count, fate=Fate.VSUM, a=slots.slot_bytes),
        ],
        Stream(RUN, cast=_cast_to_f32(slots.dtype)),
        a=slots.ref,
        dtype=slots.dtype,
        out=out.ref,
        out_dtype=out.dtype,
        vector=Vector(reduce=Reduce.ADD),
        commit=Commit(columns=RUN, column_stride=size),
    )


def _cast_to_f32(dtype: DType) -> DType | None:
    return None if dtype == DType.F32 else DType.F32
