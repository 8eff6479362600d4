"""The memories of a program's ranks, and those of groups of ranks that run a pass together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ..backend_rngd.isa.rules import SLICES_PER_PE
from .hbm import Region
from .memory import Box, ChipMemory, Files, Tile
from .register_file import Granules

Array = np.ndarray


class Rank(NamedTuple):
    """What a transfer can reach of a rank: its slices and its regions of HBM."""

    memory: ChipMemory
    regions: Sequence[Region]


class Chips:
    """The slices of all ranks, one rank's after the other's."""

    def __init__(self, ranks: int, fill: int = 0xFF) -> None:
        self._files = Files.filled(ranks * SLICES_PER_PE, fill)
        self.of_rank = [
            ChipMemory(files=self._files.part(rank * SLICES_PER_PE, SLICES_PER_PE))
            for rank in range(ranks)
        ]
        self._groups: dict[tuple[int, int], GroupMemory] = {}

    def of_group(self, first: int, ranks: int) -> ChipMemory:
        """The slices of `ranks` ranks from `first` side by side."""
        if ranks == 1:
            return self.of_rank[first]
        key = (first, ranks)
        if key not in self._groups:
            files = self._files.part(first * SLICES_PER_PE, ranks * SLICES_PER_PE)
            self._groups[key] = GroupMemory(files, self.of_rank[first : first + ranks])
        return self._groups[key]


class GroupMemory(ChipMemory):
    """The slices of several ranks as one; what is known of their content, each rank knows."""

    can_share = False

    def __init__(self, files: Files, members: Sequence[ChipMemory]) -> None:
        super().__init__(len(files.dm), files=files)
        self._members = members

    @property
    def tiles(self) -> list[Tile]:
        return [tile for member in self._members for tile in member.tiles]

    @tiles.setter
    def tiles(self, tiles: list[Tile]) -> None:
        assert not tiles, "a transfer fills one rank's memory"

    def tile_at(self, box: Box) -> Tile | None:
        """No tile is one of all ranks: makes bytes real."""
        self.make_real(box)
        return None

    def make_real(self, box: Box) -> None:
        for member, own in self._shares(box):
            member.make_real(own)

    def overwrite(self, box: Box, filled: bool) -> None:
        for member, own in self._shares(box):
            member.overwrite(own, filled)

    def _shares(self, box: Box) -> Iterator[tuple[ChipMemory, Box]]:
        """Each rank's slices of the box, in its own numbers."""
        for number, member in enumerate(self._members):
            start = number * member.slices
            shared = box.and_in(box._replace(first=start, end=start + member.slices))
            if shared is not None:
                first, end = shared.first - start, shared.end - start
                yield member, shared._replace(first=first, end=end)

    def unshare(self, granules: Granules) -> None:
        for member in self._members:
            member.unshare(granules)
