"""The memories of a group of processing elements, and what is known about their content.

Two things are known besides the bytes, because they make execution fast:

- *Weights that were not moved.* A DMA command that brings a tile of a parameter to data memory
  only leaves a `Tile`: where the bytes would come from. A contraction that streams the tile uses
  a decoded copy; only another kind of reader makes the bytes real.
- *Register rows that all slices share.* After a broadcast fill only slice 0 of the TRF is
  written, and a flag for each 8 B says that the other slices hold the same.

Memory starts as 0xFF bytes, NaN in every float type.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ..backend_rngd.isa.rules import DM_BYTES, SLICES_PER_PE, TRF_BYTES, VRF_BYTES
from .register_file import GRANULE_BYTES, Granules, LaneWindow, lane_window

Array = np.ndarray


class Box(NamedTuple):
    """Bytes [low, high) of slices [first, end) of data memory."""

    low: int
    high: int
    first: int
    end: int

    def and_in(self, other: Box) -> Box | None:
        """What both have."""
        low, high = max(self.low, other.low), min(self.high, other.high)
        first, end = max(self.first, other.first), min(self.end, other.end)
        return Box(low, high, first, end) if low < high and first < end else None

    def without(self, other: Box) -> Iterator[Box]:
        """What is left of it: before and behind `other`, and in slices that it does not have."""
        shared = self.and_in(other)
        if shared is None:
            yield self
            return
        for box in (
            self._replace(high=shared.low),
            self._replace(low=shared.high),
            shared._replace(first=self.first, end=shared.first),
            shared._replace(first=shared.end, end=self.end),
        ):
            if box.low < box.high and box.first < box.end:
                yield box


@dataclass(eq=False)
class Tile:
    """Bytes [low, high) of the first slices as a DMA command would have written them."""

    low: int
    high: int
    key: tuple[object, ...]
    """Equal keys mean equal bytes."""
    read: Callable[[], Array]
    """The bytes, u8[slices, high - low]."""
    slices: int = SLICES_PER_PE
    live: list[Box] = field(default_factory=list)
    """Parts that nothing has overwritten."""
    _content: Array | None = None

    def __post_init__(self) -> None:
        self.live = [Box(self.low, self.high, 0, self.slices)]

    def content(self) -> Array:
        """The bytes; kept, since who needs a part of them is followed by others."""
        if self._content is None:
            self._content = self.read()
        return self._content

    def cut(self, box: Box) -> None:
        """Forget what `box` has."""
        self.live = [part for own in self.live for part in own.without(box)]


class Files(NamedTuple):
    """The bytes of the slices of some ranks, one after the other: u8[slices, bytes] each."""

    dm: Array
    trf: Array
    vrf: Array

    @staticmethod
    def filled(slices: int, fill: int) -> Files:
        """Memories whose bytes all have one value."""
        sizes = (DM_BYTES, TRF_BYTES, VRF_BYTES)
        return Files(*(_filled((slices, size), fill) for size in sizes))

    def part(self, first: int, slices: int) -> Files:
        """The same bytes, of some slices."""
        return Files(*(memory[first : first + slices] for memory in self))


class ChipMemory:
    """DM, TRF and VRF of `slices` slices, as u8[slices, bytes]."""

    can_share = True
    """Whether flags may say that all slices hold the same."""

    def __init__(
        self, slices: int = SLICES_PER_PE, fill: int = 0xFF, files: Files | None = None
    ) -> None:
        """Memories of their own, filled with a byte, or those in `files`."""
        self.slices = slices
        self.dm, self.trf, self.vrf = files or Files.filled(slices, fill)
        self.shared = np.zeros(TRF_BYTES // GRANULE_BYTES, np.bool_)
        """Granules of the TRF whose value in slice 0 is that of every slice."""
        self._trf_granules = self.trf.view(np.uint64)
        self._trf_copy = np.empty((slices, TRF_BYTES), np.uint8)
        self.tiles: list[Tile] = []

    # --- data memory ---

    def tile_at(self, box: Box) -> Tile | None:
        """The tile that has all of `box`; without one, makes bytes real there."""
        for tile in self.tiles:
            for part in tile.live:
                if part.and_in(box) == box:
                    return tile
        self.make_real(box)
        return None

    def make_real(self, box: Box) -> None:
        """Write what tiles hold in `box`: someone needs the bytes."""
        for tile in self.tiles:
            parts = [shared for part in tile.live if (shared := part.and_in(box)) is not None]
            if parts:
                content = tile.content()
                for part in parts:
                    slices = slice(part.first, part.end)
                    own = content[slices, part.low - tile.low : part.high - tile.low]
                    self.dm[slices, part.low : part.high] = own
                    tile.cut(part)
        self._drop_dead_tiles()

    def overwrite(self, box: Box, filled: bool) -> None:
        """Someone is about to write in `box`: every byte of it if `filled`, else some."""
        if not filled:
            self.make_real(box)
            return
        for tile in self.tiles:
            if tile.low < box.high and box.low < tile.high:
                tile.cut(box)
        self._drop_dead_tiles()

    def put_tile(self, tile: Tile) -> None:
        """Let `tile` stand for its bytes."""
        self.overwrite(Box(tile.low, tile.high, 0, tile.slices), filled=True)
        self.tiles.append(tile)

    def _drop_dead_tiles(self) -> None:
        if not all(tile.live for tile in self.tiles):
            self.tiles = [tile for tile in self.tiles if tile.live]

    # --- tensor register file ---

    def lane_window(self, lanes: int, low: int, high: int) -> LaneWindow:
        """Bytes [low, high) of each lane, to be read or written one command at a time."""
        return lane_window(self.trf, self._trf_copy, lanes, low, high)

    def unshare(self, granules: Granules) -> None:
        """Give every slice its own copy of those that are shared."""
        flags = granules.of(self.shared)
        if flags.any():
            which = granules.numbers[flags]
            self._trf_granules[1:, which] = self._trf_granules[0, which]
            flags[...] = False


def _filled(shape: tuple[int, int], fill: int) -> Array:
    """Bytes that are all `fill`; zeros cost nothing until they are touched."""
    return np.full(shape, fill, np.uint8) if fill else np.zeros(shape, np.uint8)
