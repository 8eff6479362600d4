"""Run sequences to their ends on a device, counting simulated cycles."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..models.config_types import Bucket
from .outputs import Step
from .scheduler import Scheduler
from .sequence import Sequence
from .step_inputs import Inputs, Padding, step_inputs


class Device(Protocol):
    """What runs binaries; keys and values stay in its KV cache between runs."""

    @property
    def slots(self) -> int:
        """Tokens that the KV cache holds, padding's included."""
        ...

    def run(self, bucket: Bucket, inputs: Inputs) -> NDArray[np.float32]:
        """Logits [B, rows, V]: one row of each sequence's last token, or one of every token."""
        ...

    def cycles(self, bucket: Bucket) -> int:
        """Simulated cycles of one run."""
        ...

    def interval_cycles(self, bucket: Bucket) -> int:
        """Cycles after which another run could follow: those of the slowest pipeline stage."""
        ...

    def microseconds(self, cycles: float) -> float:
        """Cycles as time."""
        ...


def run_to_end(
    sequences: Iterable[Sequence],
    scheduler: Scheduler,
    device: Device,
    padding: Padding,
    on_step: Callable[[Step], None],
    replica: int = 0,
) -> list[Step]:
    """Finish all sequences; returns the steps in the order in which they ran."""
    for sequence in sequences:
        scheduler.add(sequence)
    steps: list[Step] = []
    now_cycles = 0
    while (batch := scheduler.next_batch()) is not None:
        bucket = batch.bucket
        step = Step(bucket, device.cycles(bucket), device.interval_cycles(bucket), replica)
        inputs = step_inputs(batch, padding)
        logits = device.run(bucket, inputs)
        now_cycles += step.cycles
        for row, sequence in enumerate(batch.sequences):
            last = sequence.length - sequence.cached - 1 if logits.shape[1] > 1 else 0
            sequence.accept(logits[row, last], now_cycles)
            if sequence.finish_reason:
                scheduler.finish(sequence)
        steps.append(step)
        on_step(step)
    return steps
