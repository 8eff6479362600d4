from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from small_artifact import write_artifact

from furiosa_llm.artifact import reader as reader_module
from furiosa_llm.artifact import trace as trace_module
from furiosa_llm.backend_rngd.isa.container import Program
from furiosa_llm.backend_rngd.isa.machine import Machine
from furiosa_llm.cli.main import main
from furiosa_llm.runtime_sim.timing import ModuleTiming, ProgramTiming


@pytest.fixture(autouse=True)
def timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The idle programs of `small_artifact` get times that tests know."""

    def time_program(program: Program, machine: Machine) -> ProgramTiming:
        paths = ["model.embed_tokens", "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]
        rows = [ModuleTiming(path, 10, 0.01, 100, 7) for path in paths]
        return ProgramTiming(program.bucket, 30, 0.03, 300, 21, 0.5, 0.25, tuple(rows), {}, {})

    monkeypatch.setattr(reader_module, "time_program", time_program)


def run(tmp_path: Path, *arguments: str) -> tuple[int, str, str]:
    path = str(write_artifact(tmp_path / "a"))
    result = CliRunner().invoke(main, ["profile", path, *arguments])
    return result.exit_code, result.stdout, result.stderr


def test_json_has_every_layer(tmp_path: Path) -> None:
    code, stdout, _ = run(tmp_path, "--json")
    assert code == 0
    buckets = json.loads(stdout)["buckets"]
    assert [entry["bucket"] for entry in buckets] == ["prefill:1,16", "decode:1,32", "decode:4,32"]
    modules = buckets[0].pop("modules")
    assert buckets[0] == {
        "bucket": "prefill:1,16",
        "cycles": 30,
        "time_us": 0.03,
        "hbm_bytes": 300,
        "macs": 21,
        "hbm_utilization": 0.5,
        "mac_utilization": 0.25,
    }
    assert modules[1] == {
        "path": "model.layers.0.mlp.up_proj",
        "cycles": 10,
        "time_us": 0.01,
        "hbm_bytes": 100,
        "macs": 7,
    }


def test_tables_add_up_the_layers(tmp_path: Path) -> None:
    code, stdout, _ = run(tmp_path, "--bucket", "decode:4,32")
    assert code == 0
    (row,) = [line for line in stdout.splitlines() if "mlp.up_proj" in line]
    cells = [cell.strip() for cell in row.strip("│┃ ").split("│")]
    assert cells == ["model.layers.*.mlp.up_proj", "20", "0.0 us", "200", "14", "66.7%"]
    assert "prefill:1,16" not in stdout


def test_without_a_bucket_there_is_one_table_of_all(tmp_path: Path) -> None:
    _, stdout, _ = run(tmp_path)
    assert "decode:4,32" in stdout
    assert "mlp.up_proj" not in stdout


@pytest.mark.parametrize("name", ["decode:2,32", "nonsense"])
def test_an_unknown_bucket_is_refused_with_the_known_ones(tmp_path: Path, name: str) -> None:
    code, _, stderr = run(tmp_path, "--bucket", name)
    assert code == 2
    assert stderr.startswith("error[ART008]")
    assert "decode:4,32" in stderr


def test_a_machine_file_that_is_not_there_is_a_coded_error(tmp_path: Path) -> None:
    code, _, stderr = run(tmp_path, "--machine", "not-there.yaml")
    assert code in (1, 2)
    assert stderr.startswith("error[VED021]")


# --- traces ---


def test_a_trace_is_of_the_bucket_that_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced: list[str] = []

    def write_trace(program: Program, machine: Machine, file: Path) -> None:
        traced.append(program.bucket)

    monkeypatch.setattr(trace_module, "write_trace", write_trace)
    code, _, _ = run(tmp_path, "--trace", str(tmp_path / "t"), "--bucket", "decode:4,32")
    assert code == 0
    assert traced == ["decode:4,32"]


def test_a_trace_of_several_buckets_is_refused(tmp_path: Path) -> None:
    code, _, stderr = run(tmp_path, "--trace", str(tmp_path / "t"))
    assert code == 2
    assert stderr.startswith("error[ART011]")
    assert "--bucket prefill:1,16" in stderr
