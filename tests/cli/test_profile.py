from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from small_artifact import write_artifact

from furiosa_llm.artifact import profile as profile_module
from furiosa_llm.artifact import reader as reader_module
from furiosa_llm.artifact import trace as trace_module
from furiosa_llm.artifact.profile import fold_layers
from furiosa_llm.artifact.reader import Artifact
from furiosa_llm.backend_rngd.isa.machine import Machine, load_machine
from furiosa_llm.backend_rngd.isa.program import Program
from furiosa_llm.cli.main import main
from furiosa_llm.models.config_types import Bucket
from furiosa_llm.models.mesh import make_mesh
from furiosa_llm.runtime_sim.pipeline_timing import PipelineTiming, StageTiming
from furiosa_llm.runtime_sim.spread import Spread
from furiosa_llm.runtime_sim.timing import Bound, ModuleTiming, ProgramTiming

SPREAD = Spread({"dma.startup_cycles": (-5.0, 10.0)})


def module(
    path: str, cycles: int, bound: Bound, engines: dict[str, int], spread: Spread | None = None
) -> ModuleTiming:
    return ModuleTiming(
        path=path,
        cycles=cycles,
        time_us=0.1,
        hbm_bytes=100,
        macs=7,
        engines=engines,
        roofline_cycles=60,
        bound=bound,
        spread=spread or Spread(),
    )


def timing_of(program: Program, cycles: int) -> ProgramTiming:
    paths = ["model.embed_tokens", "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]
    return ProgramTiming(
        bucket=program.bucket,
        cycles=cycles,
        time_us=0.3,
        hbm_bytes=300,
        macs=21,
        hbm_utilization=0.5,
        mac_utilization=0.25,
        modules=tuple(module(path, 100, "HBM", BUSY) for path in paths),
        engines={"dma": 270},
        contexts={"dma": 270, "main": 0},
        roofline_cycles=180,
        bound="HBM",
        spread=SPREAD,
        low_us=0.29,
        high_us=0.31,
        dominant_us="chip.clock_hertz",
    )


@pytest.fixture(autouse=True)
def timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The idle programs of `small_artifact` get times that tests know."""

    def time_program(program: Program, machine: Machine, sharers: int) -> ProgramTiming:
        return timing_of(program, 300 if sharers == 1 else 450)

    def breakdown(program: Program, machine: Machine, sharers: int) -> dict[str, int]:
        return {"compute": 90, "HBM": 210, "exchanges": 0}

    monkeypatch.setattr(reader_module, "time_program", time_program)
    monkeypatch.setattr(profile_module, "breakdown", breakdown)


BUSY = {"dma": 90, "contraction": 7}


def run(tmp_path: Path, *arguments: str) -> tuple[int, str, str]:
    path = str(tmp_path / "a")
    if not Path(path).exists():
        write_artifact(Path(path))
    result = CliRunner().invoke(main, ["profile", path, *arguments])
    return result.exit_code, result.stdout, result.stderr


def test_json_has_every_layer(tmp_path: Path) -> None:
    code, stdout, _ = run(tmp_path, "--machine", "book", "--json")
    assert code == 0
    found = json.loads(stdout)
    assert (found["machine"], found["clock_hertz"]) == ("book", 1e9)
    buckets = found["buckets"]
    assert [entry["bucket"] for entry in buckets] == ["prefill:1,16", "decode:1,32", "decode:4,32"]
    modules = buckets[0].pop("modules")
    assert buckets[0] == {
        "bucket": "prefill:1,16",
        "cycles": 300,
        "low_cycles": 295,
        "high_cycles": 310,
        "dominant": "dma.startup_cycles",
        "time_us": 0.3,
        "low_us": 0.29,
        "high_us": 0.31,
        "dominant_us": "chip.clock_hertz",
        "roofline_cycles": 180,
        "bound": "HBM",
        "hbm_bytes": 300,
        "macs": 21,
        "hbm_utilization": 0.5,
        "mac_utilization": 0.25,
        "hbm_capacity_utilization": 0.0,
        "engines": {"dma": 270},
        "contexts": {"dma": 270, "main": 0},
        "exchanges_by_formula": None,
        "pipeline": None,
        "critical_path": {"compute": 90, "HBM": 210, "exchanges": 0},
        "all_pes": {"cycles": 450, "time_us": 0.3, "roofline_cycles": 180},
    }
    assert found["pes"] == 8
    assert modules[1] == {
        "path": "model.layers.0.mlp.up_proj",
        "cycles": 100,
        "low_cycles": 100,
        "high_cycles": 100,
        "dominant": None,
        "time_us": 0.1,
        "roofline_cycles": 60,
        "bound": "HBM",
        "hbm_bytes": 100,
        "macs": 7,
        "engines": BUSY,
    }


def cells(stdout: str, row: str) -> list[str]:
    """Of the first row that begins so."""
    return next(line for line in stdout.splitlines() if line.startswith(row)).split()


def test_a_bucket_has_its_interval_its_bound_and_what_is_most_uncertain(tmp_path: Path) -> None:
    _, stdout, _ = run(tmp_path)
    expected = ["decode:4,32", "300", "0.3", "us", "-3%", "+3%", "HBM", "60.0%", "50%", "25.0%"]
    assert cells(stdout, "decode:4,32") == expected
    assert "time while all 8 PEs load from HBM: 1.50 x (prefill:1,16), 1.50 x (decode" in stdout
    assert "most uncertain: chip.clock_hertz (prefill:1,16, decode:1,32, decode:4,32)" in stdout


def test_the_critical_path_has_the_kinds_that_are_on_it(tmp_path: Path) -> None:
    lines = [line.strip() for line in run(tmp_path, "--bucket", "decode:4,32")[1].splitlines()]
    header = lines.index("on the critical path") + 1
    assert lines[header].split() == ["bucket", "compute", "HBM"]
    assert lines[header + 2].split() == ["decode:4,32", "30.0%", "70.0%"]


def test_several_ranks_have_times_with_exchanges_by_formula(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same programs on the machine without what was fitted to all-reduces."""
    machines: list[Machine] = []

    def time_program(program: Program, machine: Machine, sharers: int) -> ProgramTiming:
        machines.append(machine)
        return timing_of(program, 200)

    monkeypatch.setattr(profile_module, "time_program", time_program)
    write_artifact(tmp_path / "a", mesh=make_mesh(tp=4))
    _, stdout, _ = run(tmp_path, "--bucket", "decode:4,32")
    assert "by formula, nothing fitted: 200 cycles (decode:4,32)" in stdout
    _, stdout, _ = run(tmp_path, "--bucket", "decode:4,32", "--json")
    assert json.loads(stdout)["buckets"][0]["exchanges_by_formula"]["cycles"] == 200
    for machine in machines:
        assert machine.exchange == load_machine("book").exchange
        assert machine.chip == load_machine().chip


def test_stages_are_timed_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def stage_timing(
        self: Artifact, bucket: Bucket, starts: Any, machine: str, **where: Any
    ) -> Any:
        asked.append((starts, where))
        timing = timing_of(self.program(bucket), 300)
        first = StageTiming(timing, reload_cycles=0, sent_bytes=0, send_cycles=0, busy_cycles=0)
        second = StageTiming(timing, 20, sent_bytes=4096, send_cycles=80, busy_cycles=450)
        return PipelineTiming((first, second))

    monkeypatch.setattr(Artifact, "stage_timing", stage_timing)
    monkeypatch.setattr(profile_module, "starts_after_layers", lambda program, blocks: blocks)
    options = ("--bucket", "decode:4,32", "--num-blocks-per-pp-stage", "1,3")
    devices = ("--devices", "npu:1:4,npu:2:0")
    found = json.loads(run(tmp_path, *options, *devices, "--json")[1])["buckets"][0]["pipeline"]
    assert (found["cycles"], found["interval_cycles"]) == (700, 450)
    assert found["stages"][1] == {
        "devices": "npu:2:0",
        "blocks": 3,
        "cycles": 400,
        "busy_cycles": 450,
        "sent_bytes": 4096,
        "send_cycles": 80,
        "reload_cycles": 20,
        "hbm_capacity_utilization": 0.0,
    }
    assert asked == [([1, 3], {"sharers": 1, "cards": [1, 2]})]
    _, stdout, _ = run(tmp_path, *options)
    assert cells(stdout, "npu:1:0") == ["npu:1:0", "3", "400", "57.1%", "4,096", "80"]
    assert "a step takes 700 cycles, the next can follow after 450" in stdout


def test_tables_add_up_the_layers(tmp_path: Path) -> None:
    code, stdout, _ = run(tmp_path, "--bucket", "decode:4,32")
    assert code == 0
    row = ["model.layers.*.mlp.up_proj", "200", "66.7%", "HBM", "60.0%", "90%", "7%", "200", "14"]
    assert cells(stdout, "model.layers.*.mlp.up_proj") == row
    assert cells(stdout, "dma") == ["dma", "270", "90.0%"]
    assert "prefill:1,16" not in stdout


LAYERS: list[tuple[int, Bound]] = [(10, "HBM"), (30, "latency"), (10, "HBM")]


def test_a_module_of_many_layers_has_the_bound_of_most_of_their_cycles() -> None:
    layers = [
        module(f"layers.{i}.mlp", cycles, bound, {"dma": 1}, SPREAD)
        for i, (cycles, bound) in enumerate(LAYERS)
    ]
    (row,) = fold_layers(layers)
    assert (row.path, row.cycles, row.bound) == ("layers.*.mlp", 50, "latency")
    assert row.engines == {"dma": 3}
    assert row.spread.changes == {"dma.startup_cycles": (-15.0, 30.0)}


def test_without_a_bucket_there_is_one_table_of_all(tmp_path: Path) -> None:
    _, stdout, _ = run(tmp_path)
    assert "decode:4,32" in stdout
    assert "mlp.up_proj" not in stdout


@pytest.mark.parametrize("name", ["decode:2,32", "nonsense"])
def test_an_unknown_bucket_is_refused_with_the_known_ones(tmp_path: Path, name: str) -> None:
    code, _, stderr = run(tmp_path, "--bucket", name)
    assert code == 2
    assert stderr.startswith("error[ART008]")
    assert "at: --bucket\n" in stderr
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
    arguments = ("--trace", str(tmp_path / "t"), "--bucket", "decode:4,32")
    code, stdout, _ = run(tmp_path, *arguments)
    assert code == 0
    assert traced == ["decode:4,32"]
    assert f"trace written to {tmp_path / 't'}" in stdout
    assert json.loads(run(tmp_path, *arguments, "--json")[1])["trace"] == str(tmp_path / "t")


def never(*arguments: object, **keywords: object) -> ProgramTiming:
    raise AssertionError("timed before it was refused")


def test_a_trace_of_several_buckets_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader_module, "time_program", never)
    code, _, stderr = run(tmp_path, "--trace", str(tmp_path / "t"))
    assert code == 2
    assert stderr.startswith("error[ART011]")
    assert "--bucket prefill:1,16" in stderr


def test_a_trace_that_cannot_be_written_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader_module, "time_program", never)
    file = tmp_path / "nowhere" / "t"
    code, _, stderr = run(tmp_path, "--trace", str(file), "--bucket", "decode:4,32")
    assert code == 1
    assert stderr.startswith("error[ART012]")
    assert "cause: No such file or directory\n" in stderr
