"""The tensor register file as its lanes see it.

A lane's first half lies in the first half of the file and its second half in the second, so that
buffers in different halves never meet (docs/isa.md, "Machine"). A command whose
rows stay in one half works in place. One that crosses works on a copy in which each lane is
contiguous.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..backend_rngd.isa.plan import half_spans
from ..backend_rngd.isa.rules import TRF_BYTES, TRF_HALF_BYTES

Array = np.ndarray
GRANULE_BYTES = 8
"""Unit of the flags that say what all slices share."""


@dataclass(frozen=True)
class LaneWindow:
    """Bytes [low, high) of each lane, where byte b of lane l is `start + l · lane_bytes + b`."""

    buffer: Array
    """u8[slices, TRF_BYTES]: the file, or the copy."""
    start: int
    lane_bytes: int
    copies: tuple[tuple[Array, Array], ...] = ()
    """(part of the copy, part of the file) for each half; nothing when the file is used itself."""

    def load(self, slices: int) -> None:
        """Bring the first slices' bytes to the copy."""
        for mine, file in self.copies:
            mine[:slices] = file[:slices]

    def store(self, slices: int) -> None:
        """Bring the first slices' bytes back."""
        for mine, file in self.copies:
            file[:slices] = mine[:slices]


def lane_window(trf: Array, scratch: Array, lanes: int, low: int, high: int) -> LaneWindow:
    """The window [low, high) of a file u8[slices, TRF_BYTES] with `lanes` lanes.

    `scratch` has the file's shape and holds the copy of a window that crosses the halves.
    """
    size = TRF_HALF_BYTES // lanes
    spans = half_spans(lanes, low, high)
    if lanes == 1:  # its halves are neighbours
        return LaneWindow(trf, 0, TRF_BYTES)
    if len(spans) == 1:
        return LaneWindow(trf, spans[0][0] * (TRF_HALF_BYTES - size), size)
    by_half = trf.reshape(-1, 2, lanes, size)
    by_lane = scratch.reshape(-1, lanes, 2, size)
    copies = tuple((by_lane[:, :, h, a:b], by_half[:, h, :, a:b]) for h, a, b in spans)
    return LaneWindow(scratch, 0, 2 * size, copies)


@dataclass(frozen=True)
class Granules:
    """Granules `start + i · step + j` for i < lanes, j < n."""

    start: int
    lanes: int
    step: int
    n: int

    def of(self, flags: Array) -> Array:
        """Their flags as a view [lanes, n] of all flags."""
        return np.ndarray((self.lanes, self.n), flags.dtype, flags, self.start, (self.step, 1))

    @property
    def numbers(self) -> Array:
        """[lanes, n]"""
        rows = self.start + np.arange(self.lanes) * self.step
        numbers: Array = rows[:, None] + np.arange(self.n)
        return numbers


def lane_granules(lanes: int, used: range, low: int, high: int) -> Iterator[Granules]:
    """The granules that bytes [low, high) of lanes `used` touch, for each half."""
    size = TRF_HALF_BYTES // lanes
    for half, first, end in half_spans(lanes, low, high):
        start = (half * TRF_HALF_BYTES + used.start * size + first) // GRANULE_BYTES
        n = -(-end // GRANULE_BYTES) - first // GRANULE_BYTES
        yield Granules(start, len(used), size // GRANULE_BYTES, n)


def stored_granules(
    lanes: int, base: int, row_bytes: int, steps: Sequence[tuple[int, int, int]]
) -> slice | Array:
    """Granules that a store fills: rows at `base` + every step of loops (n, bytes, lanes).

    All of it in whole granules. A slice when they are neighbours, otherwise their numbers.
    """
    byte = base + np.arange(0, row_bytes, GRANULE_BYTES)
    lane = np.zeros_like(byte)
    for n, by_bytes, by_lanes in steps:
        byte = np.add.outer(np.arange(n) * by_bytes, byte)
        lane = np.add.outer(np.arange(n) * by_lanes, lane)
    size = TRF_HALF_BYTES // lanes
    places = byte // size * TRF_HALF_BYTES + lane * size + byte % size
    numbers: Array = np.sort(places.ravel()) // GRANULE_BYTES
    first, end = int(numbers[0]), int(numbers[-1]) + 1
    return slice(first, end) if end - first == len(numbers) else numbers
