"""Sums over ranks: what row-parallel products and vocabulary-parallel embeddings end with.

Each rank holds its summand [token][C] in data memory. What other ranks push comes into slots beside
it; one vector pass adds the slots up in f32, a residual among them, and rounds once. All
ranks run the same code, so a peer is named by the bits in which its rank differs.

- `rotate`: every rank pushes its whole summand to every other one.
- `scatter_gather`: the tokens are dealt to the ranks; each sums its own, and the sums spread by
  doubling: a message costs the same whatever its size, so each takes along all that its rank has.
- `switch`: one pass of the fused tensor units sums over the ranks of a cluster through the ring.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Self

from ..emitter import HERE, Activation, ActivationShape, ByRank, Emitter, Ref
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
from ..isa.layout import FeatureOrder
from ..isa.plan import SLICE_ADDRESS_BYTES, Memory
from ..isa.rules import SLICES_PER_PE
from ..rngd import ArriveOp
from ..token_groups import unit_stride

RUN = 8
"""Elements per packet: as f32 they fill a flit."""
SLICE_BITS = SLICES_PER_PE.bit_length() - 1
ALL_SLICES = [(SLICES_PER_PE, SLICE_ADDRESS_BYTES, SLICE_ADDRESS_BYTES)]
PIECES = 2
"""Of a sum over tokens that groups of slices divide: their messages take as long to be sent as to
be delivered, and all of it at once would not fit data memory."""


def peers(mask: int) -> tuple[int, ...]:
    """What ranks that differ in some of the bits of `mask`, and in no other, differ in."""
    return tuple(m for m in range(1, mask + 1) if not m & ~mask)


@dataclass(frozen=True)
class PieceShape:
    """Neighbouring units of an activation, in every slice [unit][token][position]."""

    units: int
    tokens: int
    positions: int
    """Of a unit."""
    dtype: DType

    @property
    def row_bytes(self) -> int:
        return self.dtype.bytes_for(self.positions)

    @property
    def unit_bytes(self) -> int:
        """Bytes from one unit to the next."""
        return unit_stride(self.tokens * self.row_bytes, self.row_bytes)

    @property
    def size_bytes(self) -> int:
        return (self.units - 1) * self.unit_bytes + self.tokens * self.row_bytes

    def part(self, ranks: int) -> Self:
        """Its first tokens, as many as each rank has of them."""
        assert self.tokens % ranks == 0, self.tokens
        return replace(self, tokens=self.tokens // ranks)

    def at(self, ref: Ref) -> Piece:
        """A piece like it that stands there."""
        return Piece(self.units, self.tokens, self.positions, self.dtype, ref=ref)


@dataclass(frozen=True)
class Piece(PieceShape):
    """One in data memory."""

    ref: Ref = field(kw_only=True)


def piece_shape(x: ActivationShape, count: int) -> PieceShape:
    """Of an activation's units in as many pieces."""
    return PieceShape(x.units // count, x.tokens, x.unit, x.dtype)


def pieces(x: Activation, count: int = 1) -> tuple[Piece, ...]:
    """An activation's units in as many pieces."""
    shape = piece_shape(x, count)
    return tuple(shape.at(x.place(number * shape.units * x.unit)) for number in range(count))


@dataclass(frozen=True)
class Slots:
    """Summands of one piece in data memory: [slot][unit][token][position]."""

    first: Piece
    count: int

    @staticmethod
    def reserve(emit: Emitter, like: PieceShape, count: int, label: str = "summands") -> Slots:
        """Room for as many pieces like one."""
        return Slots(like.at(emit.alloc(Memory.DM, count * like.size_bytes, label)), count)

    @property
    def slot_bytes(self) -> int:
        return self.first.size_bytes

    def __getitem__(self, number: int) -> Piece:
        return self.first.at(self.first.ref.at(number * self.slot_bytes))


@dataclass(frozen=True)
class Summand(Activation):
    """This rank's summand: the first slots of its pieces."""

    slots: tuple[Slots, ...] = ()

    def place(self, position: int) -> Ref:
        unit, inside = divmod(position, self.unit)
        number, unit = divmod(unit, self.slots[0].first.units)
        first = self.slots[number].first
        return first.ref.at(unit * first.unit_bytes + self.dtype.bytes_for(inside))


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

    @property
    def scatters(self) -> bool:
        """Whether a rank sums a part of the tokens: the residual is then needed of these alone."""
        return self.algorithm == "scatter_gather"

    def reserve(self, emit: Emitter, order: FeatureOrder, tokens: int, groups: int = 1) -> Summand:
        """Room for this rank's summand, which whoever computes it writes there."""
        shape = ActivationShape(order, tokens, self.dtype, groups)
        count = self._pieces_of(shape)
        pushed = len(peers(self.mask)) if self.algorithm == "rotate" else 0
        added = not self.scatters and self.residual
        slots = tuple(
            Slots.reserve(emit, piece_shape(shape, count), 1 + pushed + added) for _ in range(count)
        )
        return Summand(order, tokens, self.dtype, groups, ref=slots[0].first.ref, slots=slots)

    def whole_residual(self, emit: Emitter, x: Activation) -> tuple[Piece, ...]:
        """What is added of a residual that stands in data memory."""
        found = pieces(x, self._pieces_of(x))
        return (
            found
            if not self.scatters
            else tuple(_own_part(emit, piece, self.mask + 1) for piece in found)
        )

    def load_residual(
        self, emit: Emitter, hidden: Ref, order: FeatureOrder, tokens: int, groups: int, stride: int
    ) -> tuple[Piece, ...]:
        """The own part of a residual whose tokens begin at `hidden` in HBM; slices' rows stand
        `stride` bytes apart.
        """
        shape = ActivationShape(order, tokens, groups=groups)
        assert self.scatters, self
        assert shape.unit == shape.per_slice, shape
        row_bytes, part = shape.row_bytes, tokens // (self.mask + 1)
        count = self._pieces_of(shape)
        piece = piece_shape(shape, count)
        found: list[Piece] = []
        for number in range(count):
            own = Slots.reserve(emit, piece.part(self.mask + 1), 1, "residual").first
            emit.dma(
                [
                    (piece.units, shape.ring * stride, own.unit_bytes),
                    (groups, tokens * row_bytes, shape.ring * SLICE_ADDRESS_BYTES),
                    (min(shape.ring, shape.slices_used), stride, SLICE_ADDRESS_BYTES),
                ],
                part * row_bytes,
                hidden.at(number * piece.units * shape.ring * stride),
                own.ref,
                source_rank=ByRank(part * row_bytes),
            )
            found.append(own)
        return tuple(found)

    def run(
        self, emit: Emitter, summand: Summand, residual: tuple[Piece, ...], out: Activation
    ) -> tuple[Piece, ...]:
        """out = the sum of all ranks' summands, and of the residual; rounded once.

        Returns this rank's part of the sum, if it stands apart.
        """
        assert bool(residual) == self.residual
        targets = pieces(out, self._pieces_of(out))
        added = residual or (None,) * len(targets)
        own: list[Piece] = []
        for slots, addend, target in zip(summand.slots, added, targets, strict=True):
            match self.algorithm:
                case "rotate":
                    _rotate(emit, slots, self.mask, addend, target)
                case "scatter_gather":
                    own.append(_scatter_gather(emit, slots.first, self.mask, addend, target))
                case _:
                    assert self.algorithm == "switch", self.algorithm
                    _switch(emit, slots, self.mask, addend, target)
        return tuple(own)

    def _pieces_of(self, x: ActivationShape) -> int:
        """One piece is exchanged while the next is computed, where messages are large."""
        return PIECES if self.scatters and x.units % PIECES == 0 else 1


def _rotate(emit: Emitter, slots: Slots, mask: int, residual: Piece | None, out: Piece) -> None:
    open_slots(emit, slots[1].ref, len(peers(mask)), slots.slot_bytes)
    for number, peer in enumerate(peers(mask), start=1):
        push(emit, slots[0], slots[number], peer)
    if residual is not None:
        put(emit, residual, slots[slots.count - 1])
    _add_up(emit, slots, out)


def _scatter_gather(
    emit: Emitter, summand: Piece, mask: int, residual: Piece | None, out: Piece
) -> Piece:
    """Rank r sums the r-th part of the tokens. Its place differs from rank to rank, so what all
    ranks do alike works on copies that stand at the same place.
    """
    ranks = mask + 1
    part = summand.part(ranks)
    slots = Slots.reserve(emit, part, ranks + (residual is not None))
    step = part.tokens * part.row_bytes
    _copy(emit, summand, slots[0], part.tokens, source_rank=ByRank(step))
    open_slots(emit, slots[1].ref, ranks - 1, slots.slot_bytes)
    for peer in peers(mask):
        push(emit, summand, slots[peer], peer, ByRank(step, peer))
    if residual is not None:
        put(emit, residual, slots[ranks])
    own = Slots.reserve(emit, out.part(ranks), 1, "own_sums").first
    _add_up(emit, slots, own)
    _gather(emit, own, ranks, out)
    return own


def _gather(emit: Emitter, own: Piece, ranks: int, out: Piece) -> None:
    """out = every rank's part. After each round a rank has twice as many: slot s has that of the
    rank that differs in the bits of s.
    """
    slots = Slots.reserve(emit, own, ranks, "received_sums")
    put(emit, own, slots[0])
    bit = 1
    while bit < ranks:
        open_slots(emit, slots[bit].ref, bit, slots.slot_bytes)
        size = bit * slots.slot_bytes
        emit.dma(ALL_SLICES, size, slots[0].ref, slots[bit].ref, peer=bit)
        emit.append(ArriveOp(slots[bit].ref.buffer, slots[bit].ref.offset, size))
        bit *= 2
    step = own.tokens * own.row_bytes
    for peer in range(ranks):
        _copy(emit, slots[peer], out, own.tokens, destination_rank=ByRank(step, peer))


def _switch(emit: Emitter, slots: Slots, mask: int, residual: Piece | None, out: Piece) -> None:
    """The ranks of the sum are an aligned run of 2 or 4 in one cluster."""
    if residual is None:
        _sum_over_cluster(emit, slots[0], mask, out)
        return
    both = Slots.reserve(emit, replace(slots.first, dtype=DType.F32), 2)
    _sum_over_cluster(emit, slots[0], mask, both[0])
    put(emit, residual, both[1])
    _add_up(emit, both, out)


def _sum_over_cluster(emit: Emitter, summand: Piece, mask: int, out: Piece) -> None:
    """out = the sum of the ranks' summands, which come to each slice over a ring of all PEs."""
    ranks = mask + 1
    emit.exec(
        Context.MAIN,
        [
            *_walk(summand, out),
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
        commit=Commit(columns=RUN, column_stride=out.dtype.bytes_for(1)),
        group=mask.bit_length(),
    )


def open_slots(emit: Emitter, first: Ref, count: int, slot_bytes: int) -> None:
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


def push(
    emit: Emitter, source: Piece, destination: Piece, peer: int, source_rank: ByRank = HERE
) -> None:
    """A piece, or as many tokens of it as the destination has, to the same slices of a peer."""
    _copy(emit, source, destination, destination.tokens, peer=peer, source_rank=source_rank)
    place = destination.ref
    emit.append(ArriveOp(place.buffer, place.offset, destination.size_bytes))


def _copy(
    emit: Emitter,
    source: Piece,
    destination: Piece,
    tokens: int,
    *,
    peer: int = 0,
    source_rank: ByRank = HERE,
    destination_rank: ByRank = HERE,
) -> None:
    """`tokens` of every slice to another place of it."""
    emit.dma(
        [*ALL_SLICES, (source.units, source.unit_bytes, destination.unit_bytes)],
        tokens * source.row_bytes,
        source.ref,
        destination.ref,
        peer=peer,
        source_rank=source_rank,
        destination_rank=destination_rank,
    )


def _own_part(emit: Emitter, x: Piece, ranks: int) -> Piece:
    """This rank's tokens of a piece, at a place that is the same on all ranks."""
    own = Slots.reserve(emit, x.part(ranks), 1, "own_residual").first
    _copy(emit, x, own, own.tokens, source_rank=ByRank(own.tokens * own.row_bytes))
    return own


def put(emit: Emitter, source: Piece, slot: Piece) -> None:
    """bf16 into a slot; off main's way."""
    emit.exec(
        Context.SUB,
        _walk(source, slot),
        Stream(RUN, cast=None if slot.dtype == DType.BF16 else DType.F32),
        a=source.ref,
        out=slot.ref,
        out_dtype=slot.dtype,
        commit=Commit(columns=RUN, column_stride=slot.dtype.bytes_for(1)),
    )


def _add_up(emit: Emitter, slots: Slots, out: Piece) -> None:
    """out = the sum over the slots, in f32."""
    first = slots.first
    emit.exec(
        Context.MAIN,
        [*_walk(first, out), Counter(slots.count, fate=Fate.VSUM, a=slots.slot_bytes)],
        Stream(RUN, cast=_cast_to_f32(first.dtype)),
        a=first.ref,
        dtype=first.dtype,
        out=out.ref,
        out_dtype=out.dtype,
        vector=Vector(reduce=Reduce.ADD),
        commit=Commit(columns=RUN, column_stride=out.dtype.bytes_for(1)),
    )


def _walk(source: Piece, out: Piece) -> list[Counter]:
    """Packet by packet over one piece, and with other numbers over another like it."""
    step, out_step = source.dtype.bytes_for(RUN), out.dtype.bytes_for(RUN)
    packets = source.tokens * source.row_bytes // step
    return [
        Counter(source.units, a=source.unit_bytes, commit=out.unit_bytes),
        Counter(packets, a=step, commit=out_step),
    ]


def _cast_to_f32(dtype: DType) -> DType | None:
    return None if dtype == DType.F32 else DType.F32
