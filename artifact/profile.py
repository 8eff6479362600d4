"""How long the binaries of an artifact take, and what they do when; needs no weights."""

from __future__ import annotations

from pathlib import Path

from .. import errors
from ..backend_rngd.isa.machine import DEFAULT_MACHINE, load_machine
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


def trace_artifact(
    path: Path, file: Path, *, bucket: str | None = None, machine: str | Path = DEFAULT_MACHINE
) -> None:
    """Write the Perfetto trace of one bucket to `file`.

    Raises: ART011 if there are several buckets and none is named, ART012, and what
    `profile_artifact` raises.
    """
    from .trace import write_trace

    artifact = read_artifact(path)
    if bucket is None and len(artifact.buckets) > 1:
        raise errors.trace_needs_bucket([known.name for known in artifact.buckets])
    found = artifact.buckets[0] if bucket is None else _find(artifact, bucket)
    write_trace(artifact.program(found), load_machine(machine), file)


def _find(artifact: Artifact, name: str) -> Bucket:
    """Raises: ART008, also for what is no bucket's name."""
    for bucket in artifact.buckets:
        if bucket.name == name:
            return bucket
    raise errors.no_such_bucket(name, [bucket.name for bucket in artifact.buckets])
