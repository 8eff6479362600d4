"""Where a loaded artifact runs: what it records, and what a loader may change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_artifact import write_artifact

from furiosa_llm.artifact.reader import Artifact, read_artifact
from furiosa_llm.llm.placement import place
from furiosa_llm.models.devices import PeRun
from furiosa_llm.models.mesh import make_mesh
from furiosa_llm.models.placement import Stage


def artifact(directory: Path, devices: str = "npu:3:4-7,npu:4:4-7") -> Artifact:
    """Four blocks, built for two stages of four ranks."""
    path = write_artifact(directory / "a", mesh=make_mesh(devices, tp=4, pp=2))
    return read_artifact(path)


@pytest.mark.parametrize(
    ("options", "devices", "sizes"),
    [
        ({}, "npu:3:4-7,npu:4:4-7", (2, 2)),
        ({"pp": 2}, "npu:3:4-7,npu:4:4-7", (2, 2)),
        ({"sizes": (1, 3)}, "npu:3:4-7,npu:4:4-7", (1, 3)),
        ({"pp": 1}, "npu:0:0-3", (4,)),
        ({"pp": 3}, "npu:0:0-3,npu:1:0-3,npu:2:0-3", (2, 1, 1)),
        ({"dp": 2}, "npu:0:0-3,npu:1:0-3,npu:0:4-7,npu:1:4-7", (2, 2)),
        ({"devices": "npu:0"}, "npu:0:0-3,npu:0:4-7", (2, 2)),
        ({"devices": "npu:0", "pp": 1}, "npu:0:0-3,npu:0:4-7", (4,)),
        ({"devices": "npu:0", "sizes": [4]}, "npu:0:0-3,npu:0:4-7", (4,)),
    ],
)
def test_what_is_given_takes_the_place_of_what_is_recorded(
    tmp_path: Path, options: dict[str, Any], devices: str, sizes: tuple[int, ...]
) -> None:
    placement = place(artifact(tmp_path), **options)
    assert placement.mesh.name == devices
    assert placement.sizes == sizes


def test_recorded_replicas_come_back(tmp_path: Path) -> None:
    assert place(artifact(tmp_path, "npu:0,npu:1")).mesh.dp == 2


def test_a_replica_knows_its_stages(tmp_path: Path) -> None:
    placement = place(artifact(tmp_path), devices="npu:0,npu:1", sizes=(3, 1))
    assert placement.replica(1) == (
        Stage(PeRun(1, 0, 4), blocks=3, sharers=4),
        Stage(PeRun(1, 4, 4), blocks=1, sharers=4),
    )
