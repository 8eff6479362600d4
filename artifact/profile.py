"""How long the binaries of an artifact take, and what they do when; needs no weights."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .. import errors
from ..backend_rngd.isa.machine import (
    DEFAULT_MACHINE,
    load_machine,
    with_documented_exchanges,
)
from ..models.config_types import Bucket
from ..models.placement import Stage
from ..runtime_sim.breakdown import Part, breakdown
from ..runtime_sim.pipeline_timing import PipelineTiming
from ..runtime_sim.stages import starts_after_layers
from ..runtime_sim.timing import Bound, ModuleTiming, ProgramTiming, time_program
from .reader import Artifact, read_artifact

LAYER = re.compile(r"\.\d+(?=\.|$)")
"""The number of a layer in a module path."""


@dataclass(frozen=True)
class Profile:
    """What `profile` shows of an artifact."""

    machine: str
    clock_hertz: float
    pes: int
    """PEs of the machine."""
    timings: tuple[ProgramTiming, ...]
    together: tuple[ProgramTiming, ...]
    """The same buckets while every PE of the machine is in use: they share HBM."""
    breakdowns: tuple[Mapping[Part, int], ...]
    """Of `timings`: what the cycles on the critical path are spent on."""
    stages: tuple[Stage, ...]
    """Pipeline stages; the other figures are those of one stage that has all PEs of a run."""
    pipelines: tuple[PipelineTiming, ...]
    """The same buckets in these stages; none for a single one."""
    by_formula: tuple[ProgramTiming, ...]
    """The same with exchanges as documented; none for one rank, which exchanges nothing."""

    def to_json(self) -> dict[str, Any]:
        """Everything, in plain types; cycles and microseconds stand beside each other."""
        return {
            "machine": self.machine,
            "clock_hertz": self.clock_hertz,
            "pes": self.pes,
            "buckets": [
                {
                    **_program_json(timing),
                    "critical_path": dict(parts),
                    "exchanges_by_formula": formula and _shared_json(formula),
                    "pipeline": pipeline and _pipeline_json(pipeline, self.stages),
                    "all_pes": _shared_json(shared),
                }
                for timing, shared, parts, formula, pipeline in zip_longest(
                    self.timings, self.together, self.breakdowns, self.by_formula, self.pipelines
                )
            ],
        }


def profile_artifact(
    path: Path,
    *,
    bucket: str | None = None,
    machine: str | Path = DEFAULT_MACHINE,
    stages: Sequence[Stage] = (),
) -> Profile:
    """The simulated time of one bucket, called e.g. `decode:4,256`, or of all.

    `machine` is the name of a machine description, or its file. Several `stages` are timed one by
    one, besides the whole.
    Raises: ART001, ART005 to ART008, VEDxxx, SIMxxx.
    """
    artifact = read_artifact(path)
    buckets = artifact.buckets if bucket is None else (_find(artifact, bucket),)
    loaded = load_machine(machine)
    pes = loaded.chip.pes
    ranks = artifact.description.parallel_config.tensor_parallel_size
    timings, together = (
        tuple(artifact.timing(found, machine, sharers=sharers) for found in buckets)
        for sharers in (ranks, pes)
    )
    breakdowns = tuple(
        breakdown(artifact.program(found), loaded, sharers=ranks) for found in buckets
    )
    by_formula = tuple(
        time_program(artifact.program(found), with_documented_exchanges(loaded), sharers=ranks)
        for found in (buckets if ranks > 1 else ())
    )
    return Profile(
        loaded.name,
        loaded.chip.clock_hertz,
        pes,
        timings,
        together,
        breakdowns,
        tuple(stages),
        tuple(_pipeline(artifact, found, machine, stages) for found in buckets if len(stages) > 1),
        by_formula,
    )


def _pipeline(
    artifact: Artifact, bucket: Bucket, machine: str | Path, stages: Sequence[Stage]
) -> PipelineTiming:
    starts = starts_after_layers(artifact.program(bucket), [stage.blocks for stage in stages])
    return artifact.stage_timing(
        bucket,
        starts,
        machine,
        sharers=max(stage.sharers for stage in stages),
        cards=[stage.run.card for stage in stages],
    )


def trace_artifact(
    path: Path, file: Path, *, bucket: str | None = None, machine: str | Path = DEFAULT_MACHINE
) -> None:
    """Write the Perfetto trace of one bucket to `file`, which is opened before anything is timed.

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


# --- modules ---


def fold_layers(modules: Iterable[ModuleTiming]) -> list[ModuleTiming]:
    """One row for a module of all layers: `model.layers.*.mlp.up_proj`.

    Its bound is that of the layers which take the most cycles.
    """
    folded: dict[str, ModuleTiming] = {}
    bounds: dict[str, Counter[Bound]] = {}
    for module in modules:
        path = LAYER.sub(".*", module.path)
        bounds.setdefault(path, Counter())[module.bound] += module.cycles
        so_far = folded.get(path)
        folded[path] = replace(module, path=path) if so_far is None else _sum(so_far, module)
    return [
        replace(module, bound=bounds[path].most_common(1)[0][0]) for path, module in folded.items()
    ]


def _sum(left: ModuleTiming, right: ModuleTiming) -> ModuleTiming:
    return replace(
        left,
        cycles=left.cycles + right.cycles,
        time_us=left.time_us + right.time_us,
        hbm_bytes=left.hbm_bytes + right.hbm_bytes,
        macs=left.macs + right.macs,
        engines=MappingProxyType(Counter(left.engines) + Counter(right.engines)),
        roofline_cycles=left.roofline_cycles + right.roofline_cycles,
        spread=left.spread + right.spread,
    )


# --- JSON ---


def _program_json(timing: ProgramTiming) -> dict[str, Any]:
    return {
        "bucket": timing.bucket,
        **_common_json(timing),
        "low_us": timing.low_us,
        "high_us": timing.high_us,
        "dominant_us": timing.dominant_us,
        "hbm_utilization": timing.hbm_utilization,
        "mac_utilization": timing.mac_utilization,
        "hbm_capacity_utilization": timing.hbm_capacity_utilization,
        "contexts": dict(timing.contexts),
        "modules": [{"path": m.path, **_common_json(m)} for m in timing.modules],
    }


def _shared_json(timing: ProgramTiming) -> dict[str, Any]:
    """What a run takes under other circumstances; what it does stays the same."""
    return {
        "cycles": timing.cycles,
        "time_us": timing.time_us,
        "roofline_cycles": timing.roofline_cycles,
    }


def _pipeline_json(timing: PipelineTiming, stages: Sequence[Stage]) -> dict[str, Any]:
    return {
        "cycles": timing.latency_cycles,
        "interval_cycles": timing.slowest_cycles,
        "stages": [
            {
                "devices": stage.run.name,
                "blocks": stage.blocks,
                "cycles": own.cycles,
                "busy_cycles": own.busy_cycles,
                "sent_bytes": own.sent_bytes,
                "send_cycles": own.send_cycles,
                "reload_cycles": own.reload_cycles,
                "hbm_capacity_utilization": own.timing.hbm_capacity_utilization,
            }
            for stage, own in zip(stages, timing.stages, strict=True)
        ],
    }


def _common_json(timing: ProgramTiming | ModuleTiming) -> dict[str, Any]:
    return {
        "cycles": timing.cycles,
        "low_cycles": timing.low_cycles,
        "high_cycles": timing.high_cycles,
        "dominant": timing.dominant,
        "time_us": timing.time_us,
        "roofline_cycles": timing.roofline_cycles,
        "bound": timing.bound,
        "hbm_bytes": timing.hbm_bytes,
        "macs": timing.macs,
        "engines": dict(timing.engines),
    }
