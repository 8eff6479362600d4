"""Devices, ranks and stages on the command line: what reaches the library, what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from furiosa_llm.artifact.builder import ArtifactBuilder
from furiosa_llm.cli.main import main

IMPOSSIBLE = [
    (["--devices", "npu:0:1-2"], "PAR002", ["npu:0:0-1", "npu:0:2-3"]),
    (["--devices", "npu:0,cpu"], "PAR003", ["npu:0"]),
    (["--devices", "npu:0,cuda:0"], "PAR003", ["npu:0"]),
    (["--devices", "npu:0,npu:0:1"], "PAR004", ["npu:0"]),
    (["--devices", "cpu"], "PAR006", ["npu:0:0"]),
    (["--devices", "npu", "-pp", "2"], "PAR001", ["npu:0"]),
    (["-tp", "3"], "PAR007", ["2", "4"]),
    (["-tp", "16"], "PAR008", ["8", "2"]),
    (["-tp", "4", "--devices", "npu:0:0-1"], "PAR005", ["npu:0:0-3"]),
    (["-pp", "2", "--devices", "npu:1:0,npu:0:0"], "PAR009", ["npu:0:0,npu:1:0"]),
    (["-pp", "2", "--devices", "npu:0:0"], "PAR015", ["npu:0:0,npu:1:0"]),
    (["-pp", "2", "--devices", "npu:0:0,npu:0:1,npu:1:0"], "PAR016", ["npu:0:0,npu:0:1"]),
    (["-pp", "5"], "PAR010", ["4"]),
    (["--num-blocks-per-pp-stage", "1,2"], "PAR011", ["1,3", "2,2"]),
    (["--num-blocks-per-pp-stage", "2,2", "-pp", "3"], "PAR012", ["2"]),
    (["--num-blocks-per-pp-stage", "2;2"], "PAR013", ["16,16"]),
    (["-pp", "0"], "PAR014", ["1"]),
]
"""Of a model with four blocks: options, code, what the error must name."""

WITHOUT_COMPILER_LIBRARIES = """
import json, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "transformers", "xdsl", "gguf"}:
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Refuse())
from click.testing import CliRunner
from furiosa_llm.cli.main import main
results = [CliRunner().invoke(main, ["build", *args]) for args in json.loads(sys.argv[1])]
print(json.dumps([[result.exit_code, result.stderr] for result in results]))
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A description of a model, all that an early refusal may look at."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"num_hidden_layers": 4}))
    return tmp_path / "model"


def test_impossible_requests_are_refused_before_torch_is_imported_or_weights_are_looked_for(
    model: Path, tmp_path: Path
) -> None:
    requests = [[str(model), str(tmp_path / "out"), *options] for options, _, _ in IMPOSSIBLE]
    command = [sys.executable, "-c", WITHOUT_COMPILER_LIBRARIES, json.dumps(requests)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    for (options, code, named), (exit_code, text) in zip(IMPOSSIBLE, results, strict=True):
        assert (exit_code, text[:13]) == (2, f"error[{code}]"), (options, text)
        next_step = text.rpartition("next: ")[2]
        assert all(nearest in next_step for nearest in named), text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "devices", "stages"),
    [
        ([], "npu:0:0", None),
        (["-pp", "2"], "npu:0:0,npu:1:0", None),
        (["--num-blocks-per-pp-stage", "1,3"], "npu:0:0,npu:1:0", (1, 3)),
        (["-pp", "2", "--devices", "npu:3:4-5"], "npu:3:4,npu:3:5", None),
        (["-tp", "4", "-pp", "2"], "npu:0:0-3,npu:1:0-3", None),
    ],
)
def test_possible_requests_reach_the_builder(
    monkeypatch: pytest.MonkeyPatch, options: list[str], devices: str, stages: Any
) -> None:
    seen: list[ArtifactBuilder] = []
    monkeypatch.setattr(ArtifactBuilder, "build", lambda self, *_, **__: seen.append(self))
    result = CliRunner().invoke(main, ["build", "M", "O", *options, "--partial-sum", "bf16"])
    assert result.exit_code == 0, result.stderr
    assert seen[0].mesh.name == devices
    assert seen[0].stage_list == stages
    assert seen[0].partial_sum == "bf16"
