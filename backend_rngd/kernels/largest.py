"""The largest of what all ranks have: scales of tokens of which each rank holds a part.

Each token has one f32 of 8 bytes, the same in all slices that hold a part of it, and so has the
result. As in sums (`exchange.py`), others push their numbers into slots beside the own ones, or one
pass of fused tensor units takes them from the slices of a cluster.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..emitter import FORWARD, Emitter, Ref
from ..isa.dtypes import DType
from ..isa.instructions import (
    Birth,
    Commit,
    Context,
    Counter,
    Digit,
    Fate,
    Reduce,
    Stream,
    Switch,
    Topology,
    Vector,
)
from ..isa.plan import Memory
from ..isa.rules import SLICES_PER_PE
from .exchange import SLICE_BITS, PieceShape, Slots, open_slots, peers, push
from .linear import NUMBER_BYTES

COLUMNS = NUMBER_BYTES // DType.F32.bytes_for(1)


@dataclass(frozen=True)
class Comparison:
    """How the ranks that differ in the bits of `mask` only find their largest numbers."""

    algorithm: str
    """`rotate` or `switch`."""
    mask: int

    def run(self, emit: Emitter, numbers: Ref, tokens: int) -> Ref:
        """The largest number of each token, of this rank's `numbers` and those of the others."""
        out = emit.alloc(Memory.DM, tokens * NUMBER_BYTES, "largest")
        if self.algorithm == "rotate":
            slots = self._collected(emit, numbers, tokens)
            others = Counter(slots.count, fate=Fate.VSUM, a=slots.slot_bytes)
            _largest(emit, slots.first.ref, tokens, others, out)
        else:
            assert self.algorithm == "switch", self.algorithm
            ranks = self.mask + 1
            others = Counter(ranks, birth=Birth.SLICE, slices=SLICES_PER_PE, fate=Fate.VSUM)
            digit = Digit(0, SLICE_BITS, slices=1)
            ring = Switch(Topology.BROADCAST1, ranks * SLICES_PER_PE, (digit,))
            _largest(emit, numbers, tokens, others, out, ring, self.mask.bit_length())
        return out

    def _collected(self, emit: Emitter, numbers: Ref, tokens: int) -> Slots:
        """All ranks' numbers, one after the other."""
        others = peers(self.mask)
        shape = PieceShape(1, tokens, COLUMNS, DType.F32)
        slots = Slots.reserve(emit, shape, 1 + len(others), "compared")
        open_slots(emit, slots[1].ref, len(others), slots.slot_bytes)
        for number, peer in enumerate(others, start=1):
            push(emit, shape.at(numbers), slots[number], peer)
        emit.exec(
            Context.SUB,
            [Counter(tokens, a=NUMBER_BYTES, commit=NUMBER_BYTES)],
            Stream(COLUMNS),
            a=numbers,
            dtype=DType.F32,
            out=slots.first.ref,
            commit=Commit(columns=COLUMNS, column_stride=4),
        )
        return slots


def _largest(
    emit: Emitter,
    numbers: Ref,
    tokens: int,
    others: Counter,
    out: Ref,
    switch: Switch = FORWARD,
    group: int = 0,
) -> None:
    """out = the largest number of each token over the steps of `others`."""
    emit.exec(
        Context.MAIN,
        [Counter(tokens, a=NUMBER_BYTES, commit=NUMBER_BYTES), others],
        Stream(COLUMNS),
        a=numbers,
        dtype=DType.F32,
        out=out,
        switch=switch,
        vector=Vector(reduce=Reduce.MAX),
        commit=Commit(columns=COLUMNS, column_stride=4),
        group=group,
    )
