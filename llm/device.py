"""The simulated device as the engine sees it: buckets instead of programs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .. import errors
from ..artifact.reader import Artifact
from ..models.config_types import Bucket
from ..runtime_sim.device import Device
from ..runtime_sim.hbm import TensorSource
from ..runtime_sim.timing import ProgramTiming
from .placement import Stage, place
from .step_inputs import Inputs

LOGITS = "logits"
"""Name of the output that holds them."""


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

        `stages` are those of the build unless they are given. Raises: RUN015.
        """
        stages = place(artifact).replica(0) if stages is None else stages
        if len(stages) > 1:
            raise errors.stages_cannot_run(len(stages))
        self._sharers = stages[0].sharers
        self._artifact = artifact
        self._source = source
        self._slots = slots
        self._machine = machine
        self._device = Device()
        self._loaded: set[Bucket] = set()
        self._timings: dict[Bucket, ProgramTiming] = {}

    @property
    def slots(self) -> int:
        return self._slots

    def run(self, bucket: Bucket, inputs: Inputs) -> NDArray[np.float32]:
        """Raises: ART007, RUN014, VEDxxx, SIMxxx, CKPxxx."""
        program = self._artifact.program(bucket)
        if bucket not in self._loaded:
            self._device.load(program, self._source)
            self._device.allocate_caches(program, self._slots)
            self._loaded.add(bucket)
        known = {io.name for io in program.inputs}
        taken = {name: array for name, array in inputs.items() if name in known}
        outputs = self._device.execute(program, taken)
        if LOGITS not in outputs:
            raise errors.no_logits(bucket.name)
        return outputs[LOGITS].astype(np.float32, copy=False)

    def cycles(self, bucket: Bucket) -> int:
        """Raises: ART007, VEDxxx, SIMxxx."""
        return self._timing(bucket).cycles

    def interval_cycles(self, bucket: Bucket) -> int:
        """Raises: ART007, VEDxxx, SIMxxx."""
        return self._timing(bucket).cycles

    def microseconds(self, cycles: float) -> float:
        return cycles * self._us_per_cycle

    @cached_property
    def _us_per_cycle(self) -> float:
        timing = self._timing(self._artifact.buckets[0])
        return timing.time_us / timing.cycles

    def _timing(self, bucket: Bucket) -> ProgramTiming:
        if bucket not in self._timings:
            machine = () if self._machine is None else (self._machine,)
            self._timings[bucket] = self._artifact.timing(bucket, *machine, sharers=self._sharers)
        return self._timings[bucket]
