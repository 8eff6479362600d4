"""The simulated device as the engine sees it: buckets instead of programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .. import errors
from ..artifact.reader import Artifact
from ..models.config_types import Bucket
from ..models.placement import Stage
from ..runtime_sim.device import Device
from ..runtime_sim.hbm import TensorSource
from ..runtime_sim.stages import starts_after_layers
from .placement import place
from .step_inputs import Inputs

LOGITS = "logits"
"""Name of the output that holds them."""


@dataclass(frozen=True)
class _Times:
    """Of one bucket."""

    cycles: int
    interval_cycles: int
    us_per_cycle: float


class SimulatedDevice:
    """Runs an artifact's binaries. Each is read, bound and timed when its bucket is first used."""

    def __init__(
        self,
        artifact: Artifact,
        source: TensorSource,
        slots: int,
        machine: str | Path | None,
        stages: Sequence[Stage] | None = None,
    ) -> None:
        """`machine` is the machine description that times are taken from; None: the default.

        `stages` are those of the build unless they are given.
        """
        self._stages = place(artifact).replica(0) if stages is None else stages
        self._artifact = artifact
        self._source = source
        self._slots = slots
        self._machine = machine
        self._device = Device()
        self._loaded: set[Bucket] = set()
        self._times: dict[Bucket, _Times] = {}

    @property
    def slots(self) -> int:
        return self._slots

    def run(self, bucket: Bucket, inputs: Inputs) -> NDArray[np.float32]:
        """Raises: ART007, RUN014, VEDxxx, SIMxxx, CKPxxx."""
        program = self._artifact.program(bucket)
        if bucket not in self._loaded:
            self._device.load(program, self._source, self._starts(bucket))
            self._device.allocate_caches(program, self._slots)
            self._loaded.add(bucket)
        known = {io.name for io in program.inputs}
        taken = {name: array for name, array in inputs.items() if name in known}
        outputs = self._device.execute(program, taken)
        if LOGITS not in outputs:
            raise errors.no_logits(bucket.name)
        return outputs[LOGITS].astype(np.float32, copy=False)

    def cycles(self, bucket: Bucket) -> int:
        """Of a step through all stages. Raises: ART007, VEDxxx, SIMxxx."""
        return self._times_of(bucket).cycles

    def interval_cycles(self, bucket: Bucket) -> int:
        """Of the slowest stage. Raises: ART007, VEDxxx, SIMxxx."""
        return self._times_of(bucket).interval_cycles

    def microseconds(self, cycles: float) -> float:
        return cycles * self._us_per_cycle

    @cached_property
    def _us_per_cycle(self) -> float:
        return self._times_of(self._artifact.buckets[0]).us_per_cycle

    def _starts(self, bucket: Bucket) -> tuple[int, ...]:
        """Calls of the bucket's program that begin stages."""
        if len(self._stages) == 1:
            return ()
        blocks = [stage.blocks for stage in self._stages]
        return starts_after_layers(self._artifact.program(bucket), blocks)

    def _times_of(self, bucket: Bucket) -> _Times:
        if bucket not in self._times:
            self._times[bucket] = self._timed(bucket)
        return self._times[bucket]

    def _timed(self, bucket: Bucket) -> _Times:
        machine = () if self._machine is None else (self._machine,)
        sharers = max(stage.sharers for stage in self._stages)
        if len(self._stages) == 1:
            timing = self._artifact.timing(bucket, *machine, sharers=sharers)
            return _Times(timing.cycles, timing.cycles, timing.time_us / timing.cycles)
        starts = self._starts(bucket)
        cards = [stage.run.card for stage in self._stages]
        found = self._artifact.stage_timing(bucket, starts, *machine, sharers=sharers, cards=cards)
        first = found.stages[0].timing
        return _Times(found.latency_cycles, found.slowest_cycles, first.time_us / first.cycles)
