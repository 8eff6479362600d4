"""The same inputs give the same bytes, and every dumped IR file leads to the next."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from dump_chain import check_dumps
from model_zoo import make_model

from furiosa_llm import ArtifactBuilder

BUILD = """
import sys
from furiosa_llm import ArtifactBuilder
builder = ArtifactBuilder(sys.argv[1], "m", prefill_buckets=[(1, 16)], decode_buckets=[(2, 32)])
builder.build("out", num_compile_workers=int(sys.argv[2]))
"""


@pytest.mark.parametrize("kind", ["llama3_rope", "qwen3"])
def test_each_dump_leads_to_the_next(kind: str, tmp_path: Path) -> None:
    model = make_model(kind, tmp_path / "model")
    builder = ArtifactBuilder(model, prefill_buckets=[(1, 16)], decode_buckets=[(2, 32)])
    dumps = tmp_path / "dumps"
    builder.build(tmp_path / "artifact", dump_ir=dumps)
    folders = [dumps, dumps / "prefill-1-16", dumps / "decode-2-32"]
    for folder in folders:
        assert check_dumps(folder) >= 4


def test_hash_seed_directory_and_workers_do_not_change_a_byte(tmp_path: Path) -> None:
    model = make_model("llama", tmp_path / "model")
    digests = []
    for seed in ("1", "2"):  # also the number of workers
        directory = tmp_path / f"place{seed}"
        directory.mkdir()
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", BUILD, str(model), seed]
        subprocess.run(command, cwd=directory, env=environment, check=True, capture_output=True)
        files = sorted((directory / "out").iterdir())
        assert {"prefill-1-16.vedf", "decode-2-32.vedf"} <= {file.name for file in files}
        digests.append({f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files})
    assert digests[0] == digests[1]
