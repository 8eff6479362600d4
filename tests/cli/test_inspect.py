from __future__ import annotations

import hashlib
import json
from pathlib import Path

from click.testing import CliRunner
from small_artifact import write_artifact

from furiosa_llm.cli.main import main
from furiosa_llm.models.mesh import make_mesh


def test_json_of_an_artifact(tmp_path: Path) -> None:
    path = write_artifact(tmp_path / "a")
    result = CliRunner().invoke(main, ["inspect", str(path), "--json"])
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert summary["model"] == {
        "id": "tiny",
        "architecture": "TinyForCausalLM",
        "vocabulary_size": 8,
    }
    # 4 layers of one head: 16 bf16 features of a key and of a value.
    assert summary["kv_cache"] == {"dtypes": ["bf16"], "bytes_per_token": 256}
    assert summary["parallel"] == {
        "devices": "npu:0:0",
        "tensor_parallel_size": 1,
        "num_blocks_per_pp_stage": [4],
        "partial_sum": "f32",
    }
    bucket = summary["buckets"][2]
    assert bucket["bucket"] == "decode:4,32"
    assert bucket["file"] == "decode-4-32.vedf"
    data = (path / bucket["file"]).read_bytes()
    assert bucket["sha256"] == hashlib.sha256(data).hexdigest()
    assert bucket["commands"] == 1
    assert 0 < bucket["code_bytes"] < len(data)
    assert summary["parameters"][1] == {
        "name": "model.norm.weight",
        "shape": [4],
        "dtype": "bfloat16",
        "elements": 4,
        "file": "params-00001-of-00001.safetensors",
    }


def test_tables_of_an_artifact(tmp_path: Path) -> None:
    mesh = make_mesh("npu:0:0-3,npu:1:0-3", tp=4, pp=2)
    result = CliRunner().invoke(main, ["inspect", str(write_artifact(tmp_path / "a", mesh=mesh))])
    assert result.exit_code == 0, result.output
    named = ("tiny (TinyForCausalLM)", "decode:4,32", "decode-4-32.vedf")
    for text in (*named, "npu:0:0-3,npu:1:0-3", "2, 2"):
        assert text in result.stdout


def test_one_binary(tmp_path: Path) -> None:
    path = write_artifact(tmp_path / "a") / "prefill-1-16.vedf"
    table = CliRunner().invoke(main, ["inspect", str(path)])
    assert table.exit_code == 0, table.output
    assert "prefill:1,16" in table.stdout
    result = CliRunner().invoke(main, ["inspect", str(path), "--json"])
    summary = json.loads(result.stdout)
    assert summary["bucket"] == "prefill:1,16"
    assert summary["blocks"] == [
        {"name": "block", "commands": 1, "code_bytes": summary["code_bytes"], "calls": 4}
    ]


def test_disassembly(tmp_path: Path) -> None:
    path = write_artifact(tmp_path / "a") / "prefill-1-16.vedf"
    result = CliRunner().invoke(main, ["inspect", str(path), "--disasm"])
    assert result.exit_code == 0, result.output
    assert "block 0 block: 1 entries" in result.stdout


def test_nothing_there(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["inspect", str(tmp_path / "not-there")])
    assert (result.exit_code, result.stderr[:13]) == (1, "error[ART001]")
    result = CliRunner().invoke(main, ["inspect", str(tmp_path / "x.vedf"), "--disasm"])
    assert (result.exit_code, result.stderr[:13]) == (1, "error[ART009]")


def test_an_artifact_has_no_single_disassembly(tmp_path: Path) -> None:
    path = write_artifact(tmp_path / "a")
    result = CliRunner().invoke(main, ["inspect", str(path), "--disasm"])
    assert (result.exit_code, result.stderr[:13]) == (1, "error[ART010]")
    assert f"`furiosa-llm inspect {path}` lists the .vedf files" in result.stderr


def test_a_file_that_is_no_binary(tmp_path: Path) -> None:
    (tmp_path / "x.vedf").write_bytes(b"x")
    result = CliRunner().invoke(main, ["inspect", str(tmp_path / "x.vedf")])
    assert (result.exit_code, result.stderr[:13]) == (1, "error[VED001]")
