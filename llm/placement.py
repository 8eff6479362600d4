"""Where a loaded artifact runs: its replicas, and the blocks of each pipeline stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..artifact.reader import Artifact
from ..models.devices import PeRun
from ..models.mesh import Mesh, make_mesh
from ..models.stages import stage_count, stage_sizes


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


def place(
    artifact: Artifact,
    *,
    devices: str | None = None,
    dp: int | None = None,
    pp: int | None = None,
    sizes: Sequence[int] | None = None,
) -> Placement:
    """What the artifact records, with what is given instead.

    Other stages or replicas than the build's run on the default devices, if none are given.
    Raises: PAR001 to PAR006, PAR009 to PAR012, PAR014 to PAR016.
    """
    recorded = artifact.description.parallel_config
    built_sizes = artifact.manifest.num_blocks_per_pp_stage
    stages = stage_count(pp, sizes, default=recorded.pipeline_parallel_size)
    as_built = stages == recorded.pipeline_parallel_size
    if devices is None and dp is None and as_built:
        devices = artifact.description.devices
    if sizes is None and as_built:
        sizes = built_sizes
    mesh = make_mesh(devices, tp=recorded.tensor_parallel_size, pp=stages, dp=dp)
    return Placement(mesh, stage_sizes(sum(built_sizes), stages, sizes))
