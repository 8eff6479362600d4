from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from fake_device import CYCLES, FakeDevice, greedy_answer
from safetensors.numpy import save_file
from small_artifact import ARRAYS, tokenizer_json, write_artifact

from furiosa_llm.artifact.reader import Warn, read_artifact
from furiosa_llm.cli.main import main
from furiosa_llm.llm.llm import LLM
from furiosa_llm.llm.placement import place


@pytest.fixture(autouse=True)
def fake_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Binaries run on `fake_device`; weights are looked up as ever."""

    def load_artifact(
        path: Path,
        *,
        weights_from: Path | None,
        on_step: Any,
        devices: str | None,
        data_parallel_size: int | None,
        pipeline_parallel_size: int | None,
        num_blocks_per_pp_stage: tuple[int, ...] | None,
        warn: Warn,
    ) -> LLM:
        artifact = read_artifact(path)
        placement = place(
            artifact,
            devices=devices,
            dp=data_parallel_size,
            pp=pipeline_parallel_size,
            sizes=num_blocks_per_pp_stage,
        )
        artifact.parameters(weights_from, warn)
        replicas = [FakeDevice(200) for _ in range(placement.mesh.dp)]
        return LLM(artifact, replicas, on_step=on_step)

    monkeypatch.setattr(LLM, "load_artifact", load_artifact)


def run(path: Path, *arguments: str) -> Any:
    return CliRunner().invoke(main, ["run", str(path), *arguments])


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return write_artifact(tmp_path / "a", extra_files={"tokenizer.json": tokenizer_json()})


def test_json_has_outputs_and_metrics(artifact: Path) -> None:
    result = run(artifact, "--prompt", "ab", "--prompt", "c", "--max-tokens", "3", "--json")
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    first, second = content["outputs"]
    assert list(first) == ["prompt", "prompt_token_ids", "token_ids", "text", "finish_reason"]
    assert first["prompt"] == "ab"
    assert first["prompt_token_ids"] == [0, 1]
    assert first["token_ids"] == greedy_answer([0, 1], len(first["token_ids"]))
    assert second["prompt_token_ids"] == [2]
    metrics = content["metrics"]
    assert list(metrics) == [
        "ttft_us",
        "tpot_us",
        "cycles",
        "tokens_per_s",
        "full_pipeline_tokens_per_s",
        "steps",
    ]
    assert metrics["steps"][0] == {
        "bucket": "prefill:1,16",
        "cycles": CYCLES,
        "interval_cycles": CYCLES * 3 // 4,
        "replica": 0,
    }
    assert metrics["cycles"] == sum(step["cycles"] for step in metrics["steps"])


def test_text_goes_to_stdout_with_the_times(artifact: Path) -> None:
    result = run(artifact, "--prompt", "ab", "--max-tokens", "2")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("ab")
    assert "time to first token" in result.stdout
    assert result.stderr == ""


def test_token_ids_in_token_ids_out_without_a_tokenizer(tmp_path: Path) -> None:
    path = write_artifact(tmp_path / "a")
    arguments = ["--prompt-token-ids", "0,1", "--prompt-token-ids", "2", "--max-tokens", "1"]
    result = run(path, *arguments, "--json")
    outputs = json.loads(result.stdout)["outputs"]
    assert [output["prompt_token_ids"] for output in outputs] == [[0, 1], [2]]
    assert [output["prompt"] for output in outputs] == [None, None]
    assert json.loads(result.stdout)["metrics"]["tpot_us"] is None
    shown = run(path, *arguments).stdout
    assert shown.startswith(f"{greedy_answer([0, 1], 1)[0]}\n")


@pytest.mark.parametrize(
    ("arguments", "code", "exit_code"),
    [
        ([], "RUN010", 2),
        (["--prompt", "a", "--prompt-token-ids", "1"], "RUN010", 2),
        (["--prompt-token-ids", "1,x"], "RUN009", 2),
        (["--prompt-token-ids", ""], "RUN009", 2),
        (["--prompt", ""], "RUN001", 1),
        (["--prompt", "a" * 17], "RUN002", 1),
        (["--prompt", "a", "--max-tokens", "32"], "RUN003", 1),
        (["--prompt-token-ids", "99"], "RUN004", 1),
    ],
)
def test_bad_prompts_are_coded_errors(
    artifact: Path, arguments: list[str], code: str, exit_code: int
) -> None:
    result = run(artifact, *arguments)
    assert result.exit_code == exit_code
    assert result.stderr.startswith(f"error[{code}]")
    assert result.stdout == ""


def test_max_tokens_must_be_positive(artifact: Path) -> None:
    assert run(artifact, "--prompt", "a", "--max-tokens", "0").exit_code == 2


def test_no_artifact_no_run(tmp_path: Path) -> None:
    result = run(tmp_path / "not-there", "--prompt", "a")
    assert (result.exit_code, result.stderr[:13]) == (1, "error[ART001]")


def test_without_weights_the_checkpoint_must_be_named(tmp_path: Path) -> None:
    path = write_artifact(tmp_path / "a", weights="skip")
    result = run(path, "--prompt-token-ids", "1")
    assert (result.exit_code, result.stderr[:13]) == (1, "error[RUN006]")
    weights = write_artifact(tmp_path / "b")
    assert run(path, "--prompt-token-ids", "1", "--weights-from", str(weights)).exit_code == 0
    result = run(path, "--prompt-token-ids", "1", "--weights-from", str(tmp_path))
    assert (result.exit_code, result.stderr[:13]) == (1, "error[CKP001]")
    result = run(path, "--prompt-token-ids", "1", "--weights-from", str(tmp_path / "not-there"))
    assert (result.exit_code, result.stderr[:13]) == (2, "error[ENV004]")


def test_weights_that_are_rounded_are_said(tmp_path: Path) -> None:
    path, weights = write_artifact(tmp_path / "a", weights="skip"), tmp_path / "weights"
    weights.mkdir()
    stored = {name: array.astype(np.float32) + np.float32(0.001) for name, array in ARRAYS.items()}
    save_file({**stored, "other": np.ones(3, np.float32)}, weights / "model.safetensors")
    result = run(path, "--prompt-token-ids", "1", "--weights-from", str(weights))
    assert result.exit_code == 0, result.output
    rounded, dropped = result.stderr.splitlines()
    assert rounded.startswith(f"warning: {len(ARRAYS)} tensors are requantized (F32, such as ")
    assert dropped == (
        "warning: 1 tensor is dropped (F32, such as other): the model has no parameter of this name"
    )


def test_replicas_divide_the_prompts(artifact: Path) -> None:
    prompts = ["--prompt", "ab", "--prompt", "c"]
    result = run(artifact, *prompts, "-dp", "2", "--json")
    assert result.exit_code == 0, result.output
    assert {step["replica"] for step in json.loads(result.stdout)["metrics"]["steps"]} == {0, 1}
    assert "throughput" in run(artifact, *prompts, "--devices", "npu:0:0-1").stdout


def test_one_stage_is_not_told_apart_from_all(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--prompt", "ab", "--max-tokens", "2"]
    assert "with every stage busy" in run(artifact, *arguments).stdout
    monkeypatch.setattr(FakeDevice, "interval_cycles", FakeDevice.cycles)
    assert "with every stage busy" not in run(artifact, *arguments).stdout


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (["--devices", "npu:0:1-2"], "PAR002"),
        (["--devices", "cpu"], "PAR006"),
        (["--devices", "npu:1:0,npu:0:0", "-pp", "2"], "PAR009"),
        (["-pp", "5"], "PAR010"),
        (["--num-blocks-per-pp-stage", "1,1"], "PAR011"),
        (["--num-blocks-per-pp-stage", "2,2", "-pp", "4"], "PAR012"),
        (["--num-blocks-per-pp-stage", "x"], "PAR013"),
        (["-dp", "0"], "PAR014"),
        (["--devices", "npu:0:0", "-dp", "2"], "PAR015"),
        (["--devices", "npu:0:0-1,npu:1:0", "-pp", "2"], "PAR016"),
    ],
)
def test_impossible_placements_are_refused_before_weights_are_looked_for(
    tmp_path: Path, options: list[str], code: str
) -> None:
    path = write_artifact(tmp_path / "a", weights="skip")
    result = run(path, "--prompt-token-ids", "1", *options)
    assert (result.exit_code, result.stderr[:13]) == (2, f"error[{code}]")
