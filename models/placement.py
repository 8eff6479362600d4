"""Where a model runs: its replicas, and the blocks of each pipeline stage."""

from __future__ import annotations

from dataclasses import dataclass

from .devices import PeRun
from .mesh import Mesh


@dataclass(frozen=True)
class Stage:
    """One pipeline stage of one replica."""

    run: PeRun
    blocks: int
    """Transformer blocks that it runs."""
    sharers: int
    """PEs that load from its card's HBM at the same time, its own included."""


@dataclass(frozen=True)
class Placement:
    """Replicas of equal stages."""

    mesh: Mesh
    sizes: tuple[int, ...]
    """Transformer blocks of each stage."""

    def replica(self, number: int) -> tuple[Stage, ...]:
        """The stages of a replica, in order."""
        return tuple(
            Stage(run, blocks, self.mesh.sharers(number, stage))
            for stage, (run, blocks) in enumerate(
                zip(self.mesh.replicas[number], self.sizes, strict=True)
            )
        )
