"""How long the binaries of an artifact take; needs no weights."""

from __future__ import annotations

from pathlib import Path

from .. import errors
from ..backend_rngd.isa.machine import DEFAULT_MACHINE
from ..models.config_types import Bucket
from ..runtime_sim.timing import ProgramTiming
from .reader import Artifact, read_artifact


def profile_artifact(
    path: Path, *, bucket: str | None = None, machine: str | Path = DEFAULT_MACHINE
) -> list[ProgramTiming]:
    """The simulated time of one bucket, called e.g. `decode:4,256`, or of all.

    `machine` is the name of a machine description, or its file.
    Raises: ART001, ART005 to ART008, VEDxxx, SIMxxx.
    """
    artifact = read_artifact(path)
    buckets = artifact.buckets if bucket is None else [_find(artifact, bucket)]
    return [artifact.timing(found, machine) for found in buckets]


def _find(artifact: Artifact, name: str) -> Bucket:
    """Raises: ART008, also for what is no bucket's name."""
    for bucket in artifact.buckets:
        if bucket.name == name:
            return bucket
    raise errors.no_such_bucket(name, [bucket.name for bucket in artifact.buckets])
