"""Query rows and results of attention: between the features of tokens and rows in slices."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..emitter import Activation, Ref, power_of_two_at_least
from ..isa.instructions import (
    Birth,
    Commit,
    Context,
    Counter,
    Digit,
    Sink,
    Stream,
    Switch,
    Topology,
)
from ..isa.plan import SLICE_ADDRESS_BYTES
from .attention_tiling import Rows
from .attention_work import Work, from_first

FLIT = 16
"""bf16 elements of a packet."""


@dataclass
class RowMoves:
    """Rows of a tile are [row][head_dim]; q and out are [token][C] over the slices.

    Where a group's slices are those that hold its query heads, the switch carries them; else DMA
    brings them to and from the group's first slice. Tokens that are dealt to groups of slices are
    in the right slices already.
    """

    work: Work
    q: Activation
    out: Activation
    group: int
    """Query heads of a kv head."""
    tokens: int
    """Of each sequence in the chunk."""

    @property
    def row_bytes(self) -> int:
        return 2 * self.work.head_dim

    @cached_property
    def _ring(self) -> int | None:
        """Slices that hold the queries of a group and are the first of those that work on it."""
        turn, parts = self.work.turn, self.work.head_dim // self.q.per_slice
        if turn.sequences > 1 or turn.first_head or self.work.head_dim % self.q.per_slice:
            return None
        held = self.group * parts
        alone = turn.kv_heads == 1 and held <= turn.splits and held == power_of_two_at_least(held)
        return held if held == turn.splits or alone else None

    def _direct(self, rows: Rows) -> int | None:
        """`_ring`, if the tile has all heads of the group and no padding."""
        whole = rows.heads == self.group and rows.count == rows.heads * rows.tokens
        return self._ring if whole else None

    # --- inwards ---

    def fill(self, rows: Rows) -> Ref:
        """Query rows in the register file of every split of their group, [row block][head_dim]."""
        trf = self.work.emit.trf(rows.count * self.row_bytes)
        if self.q.deal is not None:
            self._fill_from_units(rows, trf)
        elif self._direct(rows) is None:
            buffer = self.work.alloc(rows.count * self.row_bytes, "queries")
            self._regroup(rows, self.q, buffer, outwards=False)
            self._fill_from_first(rows, buffer, trf)
        else:
            self._fill_from_holders(rows, trf)
        return trf

    def _fill_from_first(self, rows: Rows, buffer: Ref, trf: Ref) -> None:
        self.work.exec(
            Context.SUB,
            [
                Counter(rows.blocks, a=rows.lanes * self.row_bytes, trf=self.row_bytes),
                Counter(rows.lanes, a=self.row_bytes, lanes=1),
                Counter(self.work.head_dim // FLIT, a=32, trf=32),
            ],
            Stream(FLIT),
            a=buffer,
            out=trf,
            commit=Commit(Sink.TRF, columns=FLIT),
            switch=from_first(self.work.turn.splits),
            trf_lanes=rows.lanes,
        )

    def _fill_from_holders(self, rows: Rows, trf: Ref) -> None:
        """From the slices that hold the heads' features, in parts of C."""
        x, parts = self.q, self.work.head_dim // self.q.per_slice
        ring = self.work.turn.splits
        if rows.tokens == 1:
            heads = [
                Counter(
                    rows.blocks,
                    birth=Birth.SLICE,
                    slices=rows.lanes * parts,
                    trf=self.row_bytes,
                ),
                Counter(rows.lanes, birth=Birth.SLICE, slices=parts, lanes=1),
            ]
        else:
            heads = [
                Counter(
                    rows.heads,
                    birth=Birth.SLICE,
                    slices=parts,
                    trf=rows.token_blocks * self.row_bytes,
                ),
                Counter(rows.token_blocks, a=rows.lanes * x.row_bytes, trf=self.row_bytes),
                Counter(rows.lanes, a=x.row_bytes, lanes=1),
            ]
        self.work.exec(
            Context.SUB,
            [
                *heads,
                Counter(parts, birth=Birth.SLICE, slices=1, trf=x.row_bytes),
                Counter(x.per_slice // FLIT, a=32, trf=32),
            ],
            Stream(FLIT),
            a=self.work.at(x.ref, self.tokens * x.row_bytes).at(rows.first_token * x.row_bytes),
            out=trf,
            commit=Commit(Sink.TRF, columns=FLIT),
            switch=Switch(Topology.BROADCAST01, ring) if ring > 1 else Switch(),
            trf_lanes=rows.lanes,
        )

    @property
    def _heads_of_unit(self) -> int:
        """Query heads whose parts are one unit of a group's slices."""
        return self.group // self.q.units

    def _fill_from_units(self, rows: Rows, trf: Ref) -> None:
        """From the slices of the group, where heads lie unit by unit, in parts of C."""
        x, parts = self.q, self.work.head_dim // self.q.per_slice
        head_bytes = rows.token_blocks * self.row_bytes
        self.work.exec(
            Context.SUB,
            [
                Counter(x.units, a=x.unit_bytes, trf=self._heads_of_unit * head_bytes),
                Counter(self._heads_of_unit, birth=Birth.SLICE, slices=parts, trf=head_bytes),
                Counter(rows.token_blocks, a=rows.lanes * x.row_bytes, trf=self.row_bytes),
                Counter(rows.lanes, a=x.row_bytes, lanes=1),
                Counter(parts, birth=Birth.SLICE, slices=1, trf=x.row_bytes),
                Counter(x.per_slice // FLIT, a=32, trf=32),
            ],
            Stream(FLIT),
            a=x.ref.at(rows.first_token * x.row_bytes),
            out=trf,
            commit=Commit(Sink.TRF, columns=FLIT),
            switch=Switch(Topology.BROADCAST01, x.ring),
            trf_lanes=rows.lanes,
        )

    # --- outwards ---

    def store(self, rows: Rows, results: Ref) -> None:
        """Results [row][head_dim] bf16, equal in all splits of a group, to the output."""
        if self.out.deal is not None:
            self._store_units(rows, results)
            return
        ring = self._direct(rows)
        covered = self.out.slices_read * self.out.per_slice == self.out.order.positions
        if ring is None or rows.tokens > 1 or not covered:
            self._regroup(rows, self.out, results, outwards=True)
            return
        bits = ring.bit_length() - 1
        digit = Digit(shift=0, bits=bits, bytes=self.out.row_bytes)
        self.work.exec(
            Context.SUB,
            [Counter(self.out.per_slice // FLIT, a=32, commit=32)],
            Stream(FLIT),
            a=results,
            out=self.work.at(self.out.ref, self.out.row_bytes),
            commit=Commit(columns=FLIT, column_stride=2),
            switch=Switch(Topology.INTER_TRANSPOSE, ring, (digit,)) if ring > 1 else Switch(),
        )

    def _store_units(self, rows: Rows, results: Ref) -> None:
        """Each slice of a group gets its own part of each unit's heads, from the first slice."""
        x, parts = self.out, self.work.head_dim // self.out.per_slice
        head_bytes, heads = rows.tokens * self.row_bytes, self._heads_of_unit
        group_bytes = x.ring * SLICE_ADDRESS_BYTES
        self.work.emit.dma(
            [
                (x.groups, group_bytes, group_bytes),
                (x.units, heads * head_bytes, x.unit_bytes),
                (heads, head_bytes, parts * SLICE_ADDRESS_BYTES),
                (parts, x.row_bytes, SLICE_ADDRESS_BYTES),
                (rows.tokens, self.row_bytes, x.row_bytes),
            ],
            x.row_bytes,
            results,
            x.ref.at(rows.first_token * x.row_bytes),
        )

    def _regroup(self, rows: Rows, x: Activation, buffer: Ref, *, outwards: bool) -> None:
        """Between tokens [m][C] and rows [row][head_dim] in each group's first slice."""
        turn, order = self.work.turn, x.order
        run = min(x.per_slice, order.padded)
        # Padded rows repeat the last head: they must be finite, and nobody reads what they give.
        count = rows.heads if outwards or rows.tokens > 1 else rows.count
        axes = np.ix_(
            np.arange(turn.sequences),
            np.arange(turn.kv_heads),
            np.arange(count),
            np.arange(rows.tokens),
            np.arange(order.padded // run),
        )
        sequence, kv_head, head, token, part = axes
        own_head = rows.first_head + np.minimum(head, rows.heads - 1)
        query_head = (turn.first_head + kv_head) * self.group + own_head
        x_slice, in_slice = np.divmod(query_head * order.padded + part * run, x.per_slice)
        m = sequence * self.tokens + rows.first_token + token
        x_byte = m * x.row_bytes + in_slice * 2
        row_slice = (sequence * turn.kv_heads + kv_head) * turn.splits
        row_byte = (head * rows.tokens + token) * 2 * order.padded + part * run * 2
        place = self.work.at(x.ref, self.tokens * x.row_bytes)
        emit = self.work.emit
        if outwards:
            emit.regroup(buffer, row_slice, row_byte, place, x_slice, x_byte, 2 * run)
        else:
            emit.regroup(place, x_slice, x_byte, buffer, row_slice, row_byte, 2 * run)
