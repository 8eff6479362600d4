"""Where a loaded artifact runs: what it records, with what a loader asks for instead."""

from __future__ import annotations

from collections.abc import Sequence

from ..artifact.reader import Artifact
from ..models.mesh import make_mesh
from ..models.placement import Placement
from ..models.stages import stage_count, stage_sizes


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
    Raises: PAR001 to PAR006, PAR009 to PAR012, PAR014 to PAR016, PAR018.
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
