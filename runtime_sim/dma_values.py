"""Executes DMA commands: a transfer is one assignment between two strided views.

Large tiles of parameters are not moved at all: data memory remembers where they come from
(`memory.Tile`). Rows of an index list are one fancy-indexed access.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .. import errors
from ..backend_rngd.isa.instructions import Dma, Indirect, Side, Space
from ..backend_rngd.isa.plan import (
    REGION_SHIFT,
    SLICE_ADDRESS_BYTES,
    DmaPlan,
    Memory,
    split_dm_stride,
)
from ..backend_rngd.isa.rules import DM_BYTES
from .hbm import Parameter, Region
from .memory import Box, Tile
from .ranks import Rank
from .weights import WeightCache

Array = np.ndarray
Step = Callable[[], None]
Where = Callable[[], str]
"""Says, for a fault, which command it is."""

TILE_BYTES = 32 << 10
"""Transfers of a parameter from this size on are remembered instead of made."""
MAX_COMPARED_STEPS = 1 << 22
"""Steps of a transfer whose addresses are compared one by one when its loops do not nest."""
OFFSET_MASK = (1 << REGION_SHIFT) - 1


@dataclass(frozen=True)
class End:
    """One side of a transfer in one buffer: u8 bytes, where it starts, bytes per loop."""

    buffer: Callable[[], Array]
    stable: bool
    """Whether `buffer` always gives the same array."""
    start: int
    strides: tuple[int, ...]

    def view(self, n: Sequence[int], run: int, width: int) -> Array:
        """[*n, run / width] elements of `width` bytes."""
        return np.ndarray(
            (*n, run // width),
            np.dtype(f"u{width}"),
            self.buffer(),
            self.start,
            (*self.strides, width),
        )


class Sides(NamedTuple):
    """Whose memories a transfer reads and writes."""

    source: Rank
    destination: Rank
    own: Rank
    """Where an index list lies."""

    @staticmethod
    def of(c: Dma, rank: int, ranks: Sequence[Rank]) -> Sides:
        """Those of a command that `rank` executes."""
        source, destination = c.source.peer, c.destination.peer
        return Sides(ranks[rank ^ source], ranks[rank ^ destination], ranks[rank])


def bind_dma(
    plan: DmaPlan, resolved: Sequence[int], sides: Sides, weights: WeightCache, where: Where
) -> Step:
    """A step that executes `plan` at these addresses: source, destination, index list.

    Addresses must have been checked. Raises: SIM016 (now), SIM013 (when the step runs).
    """
    c = plan.command
    source = bind_end(c.source, resolved[0], sides.source)
    destination = bind_end(c.destination, resolved[1], sides.destination)
    _must_not_overlap(c, destination, where)
    if c.index is not None:
        return _indirect_step(plan, source, destination, resolved, sides, where)
    tile = _tile(plan, source, resolved, sides, weights)
    if tile is not None:
        return tile
    return _copy_step(c, source, destination, _guard(plan, resolved, sides))


def region_of(address: int, regions: Sequence[Region]) -> Region:
    return regions[address >> REGION_SHIFT]


def bind_end(side: Side, address: int, rank: Rank) -> End:
    """The side of a transfer that starts at `address` of a rank's memory."""
    if side.space == Space.HBM:
        region = region_of(address, rank.regions)
        return End(region.content, region.stable, address & OFFSET_MASK, side.strides)
    return _dm_end(side, address, lambda: rank.memory.dm, DM_BYTES)


def _dm_end(side: Side, address: int, buffer: Callable[[], Array], slice_bytes: int) -> End:
    slice_number, local = divmod(address, SLICE_ADDRESS_BYTES)
    strides = []
    for stride in side.strides:
        slices, inside = split_dm_stride(stride)
        strides.append(slices * slice_bytes + inside)
    return End(buffer, True, slice_number * slice_bytes + local, tuple(strides))


def _must_not_overlap(c: Dma, destination: End, where: Where) -> None:
    """Raises: SIM016. Rows of a scatter may be equal: the last one in order stays."""
    extent = c.run
    walked = _row_loops(c) if c.indirect == Indirect.DESTINATION else ()
    loops = [
        (abs(stride), n)
        for i, (stride, n) in enumerate(zip(destination.strides, c.n, strict=True))
        if n > 1 and i not in walked
    ]
    for stride, n in sorted(loops):
        if stride < extent:
            break
        extent += stride * (n - 1)
    else:
        return
    # Loops that do not nest can still keep apart: heads of one slice between those of others.
    if _closest(loops) < c.run:
        raise errors.overlapping_transfer(where())


def _closest(loops: Sequence[tuple[int, int]]) -> int:
    """The smallest distance in bytes between two steps of the loops; 0 if there are too many."""
    if math.prod(n for _, n in loops) > MAX_COMPARED_STEPS:
        return 0
    starts = np.zeros(1, np.int64)
    for stride, n in loops:
        starts = (starts[:, None] + np.arange(n) * stride).reshape(-1)
    return int(np.diff(np.sort(starts)).min())


def _width(*bytes_: int) -> int:
    """The widest element, up to 8 B, that divides everything."""
    return math.gcd(8, *bytes_)


def _copy_step(c: Dma, source: End, destination: End, guard: Step) -> Step:
    width = _width(*(c.run, source.start, destination.start, *source.strides, *destination.strides))
    target = destination.view(c.n, c.run, width)
    if source.stable:
        content = source.view(c.n, c.run, width)

        def copy() -> None:
            guard()
            target[...] = content

        return copy

    def copy_again() -> None:
        guard()
        target[...] = source.view(c.n, c.run, width)

    return copy_again


def _guard(plan: DmaPlan, resolved: Sequence[int], sides: Sides) -> Step:
    """What data memory must know before the transfer."""
    reads: list[Box] = []
    writes: list[tuple[Box, bool]] = []
    for address, f in zip(resolved, plan.footprints, strict=True):
        if f.memory != Memory.DM:
            continue
        first, local = divmod(address, SLICE_ADDRESS_BYTES)
        box = Box(local + f.low, local + f.high, first + f.slice_low, first + f.slice_high)
        if f.write:
            writes.append((box, _fills(plan)))
        else:
            reads.append(box)

    def guard() -> None:
        if sides.source.memory.tiles:
            for box in reads:
                sides.source.memory.make_real(box)
        if sides.destination.memory.tiles:
            for box, filled in writes:
                sides.destination.memory.overwrite(box, filled)

    return guard


def _fills(plan: DmaPlan) -> bool:
    """Whether a transfer writes every byte of its rows of its slices."""
    f = plan.footprints[1]
    return plan.bytes == (f.slice_high - f.slice_low) * (f.high - f.low)


# --- tiles of parameters ---


def _tile(
    plan: DmaPlan,
    source: End,
    resolved: Sequence[int],
    sides: Sides,
    weights: WeightCache,
) -> Step | None:
    """A step that remembers the transfer, if it brings a tile of a parameter to slices from 0."""
    c, memory = plan.command, sides.destination.memory
    if c.source.space != Space.HBM or c.destination.space != Space.DM:
        return None
    region = region_of(resolved[0], sides.source.regions)
    if not isinstance(region, Parameter) or plan.bytes < TILE_BYTES:
        return None
    f = plan.footprints[1]
    slices = f.slice_high - f.slice_low
    if not _fills(plan) or resolved[1] // SLICE_ADDRESS_BYTES + f.slice_low:
        return None
    slice_bytes = f.high - f.low
    local = resolved[1] % SLICE_ADDRESS_BYTES
    # The first byte of the tile is `low` bytes from where the destination starts.
    start = (resolved[1] // SLICE_ADDRESS_BYTES) * SLICE_ADDRESS_BYTES - f.low

    def read() -> Array:
        content = np.empty((slices, slice_bytes), np.uint8)
        target = _dm_end(c.destination, start, lambda: content, slice_bytes)
        _copy_step(c, source, target, lambda: None)()
        return content

    geometry = weights.intern((c.n, c.run, c.source.strides, c.destination.strides))
    key = (region.number, source.start, geometry)
    low, high = local + f.low, local + f.high

    def remember() -> None:
        memory.put_tile(Tile(low, high, key, read, slices))

    return remember


# --- index lists ---


def _row_loops(c: Dma) -> tuple[int, ...]:
    """The loops that walk the index list."""
    assert c.index is not None
    return tuple(
        i for i, (n, s) in enumerate(zip(c.n, c.index.strides, strict=True)) if s and n > 1
    )


def _indirect_step(
    plan: DmaPlan,
    source: End,
    destination: End,
    resolved: Sequence[int],
    sides: Sides,
    where: Where,
) -> Step:
    c = plan.command
    assert c.index is not None
    gather = c.indirect == Indirect.SOURCE
    rows_end, plain = (source, destination) if gather else (destination, source)
    region = region_of(resolved[0 if gather else 1], sides.own.regions)
    walked = _row_loops(c)
    inside = tuple(i for i in range(len(c.n)) if i not in walked)
    table = _RowTable(c, rows_end, walked, inside, region.size, where)
    numbers = _index_view(c, resolved[2], sides.own.regions, walked)
    guard = _guard(plan, resolved, sides)
    order = (*walked, *inside)
    n = tuple(c.n[i] for i in order)
    width = _width(
        *(c.run, c.index.scale, rows_end.start, *rows_end.strides, plain.start, *plain.strides)
    )
    ordered = End(plain.buffer, True, plain.start, tuple(plain.strides[i] for i in order))

    def run() -> None:
        guard()
        other = ordered.view(n, c.run, width)
        rows = table.checked(numbers)
        if gather and isinstance(region, Parameter) and not region.stable:
            other[...] = table.placed(region, rows, width)
        elif gather:
            other[...] = table.get(rows, width)
        else:
            table.put(rows, width, other)

    return run


def _index_view(c: Dma, address: int, regions: Sequence[Region], walked: Sequence[int]) -> Array:
    """The row numbers, i32[*row loops]."""
    assert c.index is not None
    return np.ndarray(
        tuple(c.n[i] for i in walked),
        np.int32,
        region_of(address, regions).content(),
        address & OFFSET_MASK,
        tuple(c.index.strides[i] for i in walked),
    )


class _RowTable:
    """The indirect side as [row, loops inside a row, run], plus the row loops' own strides."""

    def __init__(
        self,
        c: Dma,
        end: End,
        walked: Sequence[int],
        inside: Sequence[int],
        size: int,
        where: Where,
    ) -> None:
        assert c.index is not None
        self._c, self._end, self._where = c, end, where
        self._scale = c.index.scale
        self._walked, self._inside = walked, inside
        self._low = sum(min(0, (c.n[i] - 1) * end.strides[i]) for i in walked)
        self._offsets = self._row_loop_offsets(walked)
        loops = [(c.n[i] - 1) * end.strides[i] for i in range(len(c.n))]
        last = end.start + sum(max(0, v) for v in loops) + c.run
        fitting = (size - last) // self._scale + 1 if self._scale else 1 << 31
        if c.index.bound > fitting:
            raise errors.index_out_of_bounds(where(), c.index.bound - 1, fitting)
        self._rows = c.index.bound or fitting

    def _row_loop_offsets(self, walked: Sequence[int]) -> Array | None:
        """Bytes that the row loops add by themselves, shape [*row loops]; usually none.

        They count from the lowest one, `_low` bytes from the base.
        """
        if not any(self._end.strides[i] for i in walked):
            return None
        total = np.array(-self._low, np.int64)
        for i in walked:
            step = np.arange(self._c.n[i], dtype=np.int64) * self._end.strides[i]
            total = total[..., None] + step
        return total

    def checked(self, numbers: Array) -> Array:
        """The row numbers. Raises: SIM013."""
        assert self._c.index is not None
        rows: Array = numbers.astype(np.int64) - self._c.index.origin
        if rows.size and (rows.min() < 0 or rows.max() >= self._rows):
            bad = rows[(rows < 0) | (rows >= self._rows)].flat[0]
            raise errors.index_out_of_bounds(self._where(), int(bad), self._rows)
        return rows

    def _table(self, width: int) -> tuple[Array, int]:
        """[units, *inside, run / width], unit bytes: unit u starts u units after the lowest row."""
        unit = math.gcd(self._scale, *(self._end.strides[i] for i in self._walked)) or width
        loops = [(self._c.n[i], self._end.strides[i]) for i in self._inside]
        extent = sum(max(0, (n - 1) * stride) for n, stride in loops) + self._c.run
        buffer = self._end.buffer()
        start = self._end.start + self._low
        view = np.ndarray(
            (
                (buffer.size - start - extent) // unit + 1,
                *(n for n, _ in loops),
                self._c.run // width,
            ),
            np.dtype(f"u{width}"),
            buffer,
            start,
            (unit, *(stride for _, stride in loops), width),
        )
        return view, unit

    def _units(self, rows: Array, unit: int) -> Array:
        offsets = rows * self._scale
        if self._offsets is not None:
            offsets = offsets + self._offsets
        return offsets // unit

    def get(self, rows: Array, width: int) -> Array:
        view, unit = self._table(width)
        found: Array = view[self._units(rows, unit)]
        return found

    def put(self, rows: Array, width: int, values: Array) -> None:
        view, unit = self._table(width)
        view[self._units(rows, unit)] = values

    def placed(self, region: Parameter, rows: Array, width: int) -> Array:
        """As `get`, placing only the rows that are asked for where that is possible."""
        row_bytes = region.row_bytes
        simple = row_bytes == self._scale and self._offsets is None
        if row_bytes is None or not simple or self._end.start >= row_bytes:
            return self.get(rows, width)
        content = region.rows(rows.reshape(-1))
        view = np.ndarray(
            (len(content), *(self._c.n[i] for i in self._inside), self._c.run // width),
            np.dtype(f"u{width}"),
            content,
            self._end.start,
            (row_bytes, *(self._end.strides[i] for i in self._inside), width),
        )
        return view.reshape((*rows.shape, *view.shape[1:]))
