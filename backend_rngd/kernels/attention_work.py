"""What the passes of one round of attention share: which slices work, and on which sequences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..emitter import Emitter, Index, Ref
from ..isa.dtypes import DType
from ..isa.instructions import (
    Commit,
    Context,
    Counter,
    Placement,
    Reduce,
    Sink,
    Stream,
    Switch,
    Topology,
    Vector,
)
from ..isa.plan import SLICE_ADDRESS_BYTES, Memory
from .attention_tiling import Round


@dataclass(frozen=True)
class Work:
    """A round, `turn`, that a loop may repeat for later sequences."""

    emit: Emitter
    turn: Round
    head_dim: int
    """Of a head in memory, its padding included."""
    dtype: DType
    """Of what the cache holds."""
    loop: Index
    loop_sequences: int
    """Sequences by which each iteration of the loop moves on."""

    @property
    def pitch(self) -> int:
        """Bytes from a key and its value to the next."""
        return 2 * self.dtype.bytes_for(self.head_dim)

    def cached(self, elements: int) -> Stream:
        """A packet of keys or values, which are multiplied as bf16."""
        return Stream(elements, lookup=None if self.dtype == DType.BF16 else DType.BF16)

    def at(self, ref: Ref, sequence_bytes: int) -> Ref:
        """What belongs to the round's first sequence, where sequences are so far apart."""
        here = ref.at(self.turn.first_sequence * sequence_bytes)
        return here.moved(self.loop, self.loop_sequences * sequence_bytes)

    def alloc(self, size_bytes: int, label: str) -> Ref:
        return self.emit.alloc(Memory.DM, size_bytes, label)

    def exec(
        self, context: Context, counters: Sequence[Counter], stream: Stream, **ports: Any
    ) -> None:
        """A pass in the slices that work."""
        self.emit.exec(context, counters, stream, valid_slices=self.turn.slices, **ports)

    def vrf(self, source: Ref, elements: int, label: str, dtype: DType = DType.F32) -> Ref:
        """Elements of data memory in the VRF of the slices that work."""
        return self.emit.load_vrf(source, elements, label, dtype, self.turn.slices)

    def across_splits(self, vector: Vector, reduce: Reduce) -> Vector:
        """The same with results folded over the splits of each group, before any unit works."""
        if self.turn.splits == 1:
            return vector
        placement = Placement.FIRST if vector.ops else Placement.LAST
        return replace(
            vector,
            slice_reduce=reduce,
            slice_group=self.turn.splits,
            slice_placement=placement,
        )

    def per_sequence(self, source: Ref, stride: int, run_bytes: int, label: str) -> Ref:
        """The sequence's own bytes in the first slice of each of its groups (see `shared_vrf`)."""
        buffer = self.alloc(run_bytes, label)
        group_bytes = self.turn.splits * SLICE_ADDRESS_BYTES
        self.emit.dma(
            [
                (self.turn.sequences, stride, self.turn.kv_heads * group_bytes),
                (self.turn.kv_heads, 0, group_bytes),
            ],
            run_bytes,
            self.at(source, stride),
            buffer,
        )
        return buffer

    def shared_vrf(self, source: Ref, elements: int, label: str) -> Ref:
        """i32 elements of each group's first slice in the VRF of all its slices."""
        vrf = self.emit.alloc(Memory.VRF, 4 * elements, label)
        run = math.gcd(elements, 8)
        self.exec(
            Context.SUB,
            [Counter(elements // run, a=4 * run, vrf=4 * run)],
            Stream(run),
            a=source,
            dtype=DType.I32,
            out=vrf,
            commit=Commit(Sink.VRF, columns=run),
            switch=from_first(self.turn.splits),
        )
        return vrf


def from_first(slices: int) -> Switch:
    """Every slice of a ring gets the packets of the ring's first one."""
    return Switch(Topology.BROADCAST1, slices) if slices > 1 else Switch()
