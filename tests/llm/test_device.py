"""`SimulatedDevice` around a simulator that is replaced here."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from small_artifact import BUCKETS, write_artifact

from furiosa_llm.artifact.reader import Artifact, read_artifact
from furiosa_llm.errors import FuriosaLLMError
from furiosa_llm.llm import device as device_module
from furiosa_llm.llm.device import SimulatedDevice
from furiosa_llm.llm.placement import place

INPUTS: Any = {"input_ids": np.zeros((1, 1), np.int32)}


class Simulator:
    """Records what it is told, and gives `outputs`."""

    def __init__(self) -> None:
        self.told: list[tuple[str, Any]] = []
        self.outputs: dict[str, Any] = {"logits": np.zeros((1, 1, 8), np.float32)}

    def load(self, program: Any, source: Any, stage_starts: tuple[int, ...]) -> None:
        assert stage_starts == ()
        self.told.append(("load", program.bucket))

    def allocate_caches(self, program: Any, slots: int) -> None:
        self.told.append(("caches", slots))

    def execute(self, program: Any, inputs: Any) -> dict[str, Any]:
        self.told.append(("execute", sorted(inputs)))
        return self.outputs


@pytest.fixture
def simulator(monkeypatch: pytest.MonkeyPatch) -> Simulator:
    simulator = Simulator()
    monkeypatch.setattr(device_module, "Device", lambda: simulator)
    return simulator


@pytest.fixture
def artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Artifact:
    def timing(self: Artifact, bucket: Any, machine: str = "book", *, sharers: int) -> Any:
        cycles = 1000 * bucket.batch_size * sharers
        return SimpleNamespace(cycles=cycles, time_us=cycles / 2000)

    monkeypatch.setattr(Artifact, "timing", timing)
    return read_artifact(write_artifact(tmp_path / "a"))


def test_a_binary_is_loaded_once(simulator: Simulator, artifact: Artifact) -> None:
    device = SimulatedDevice(artifact, artifact.parameters(), 10, None)
    for _ in range(2):
        assert device.run(BUCKETS[1], INPUTS).shape == (1, 1, 8)
    assert simulator.told == [
        ("load", "decode:1,32"),
        ("caches", 10),
        # The idle program has no inputs; it gets none that it does not know.
        ("execute", []),
        ("execute", []),
    ]


def test_a_binary_without_logits_is_a_coded_error(simulator: Simulator, artifact: Artifact) -> None:
    simulator.outputs = {}
    device = SimulatedDevice(artifact, artifact.parameters(), 10, None)
    with pytest.raises(FuriosaLLMError, match="RUN014"):
        device.run(BUCKETS[0], INPUTS)


def test_times_are_those_of_the_binaries(simulator: Simulator, artifact: Artifact) -> None:
    device = SimulatedDevice(artifact, artifact.parameters(), 10, "book")
    assert [device.cycles(bucket) for bucket in BUCKETS] == [1000, 1000, 4000]
    assert device.microseconds(3000) == pytest.approx(1.5)
    assert device.slots == 10


def test_replicas_on_one_card_share_its_memory(artifact: Artifact) -> None:
    for devices, factor in (("npu:0:0-1", 2), ("npu:0:0,npu:1:0", 1)):
        stages = place(artifact, devices=devices).replica(1)
        device = SimulatedDevice(artifact, artifact.parameters(), 10, None, stages)
        assert device.cycles(BUCKETS[0]) == factor * 1000
        assert device.interval_cycles(BUCKETS[0]) == factor * 1000


def test_stages_are_timed_one_by_one(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes all of them, the next one can enter after the slowest."""
    asked: list[Any] = []

    def stage_timing(self: Artifact, bucket: Any, starts: Any, **where: Any) -> Any:
        asked.append((starts, where))
        first = SimpleNamespace(timing=SimpleNamespace(cycles=400, time_us=0.2))
        return SimpleNamespace(latency_cycles=1000, slowest_cycles=600, stages=[first])

    monkeypatch.setattr(Artifact, "stage_timing", stage_timing)
    monkeypatch.setattr(device_module, "starts_after_layers", lambda program, layers: tuple(layers))
    stages = place(artifact, pp=2).replica(0)
    device = SimulatedDevice(artifact, artifact.parameters(), 10, None, stages)
    assert device.cycles(BUCKETS[0]) == 1000
    assert device.interval_cycles(BUCKETS[0]) == 600
    assert device.microseconds(1000) == pytest.approx(0.5)
    blocks = tuple(stage.blocks for stage in stages)
    cards = [stage.run.card for stage in stages]
    assert asked == [(blocks, {"sharers": 1, "cards": cards})]
