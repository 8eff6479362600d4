"""The same inputs give the same bytes, and every dumped IR file leads to the next."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from model_zoo import make_model

from furiosa_llm import ArtifactBuilder
from furiosa_llm.backend_rngd.pipeline import DIALECTS, PASSES
from furiosa_llm.passes.dump import read_header
from furiosa_llm.passes.opt_tool import run_opt

BUILD = """
import sys
from furiosa_llm import ArtifactBuilder
ArtifactBuilder(sys.argv[1], "m", prefill_buckets=[(1, 16)], decode_buckets=[(2, 32)]).build("out")
"""


def first_item(passes: str) -> str:
    """The first pass of `a{x=1,2},b`, commas in braces aside."""
    depth = 0
    for i, character in enumerate(passes):
        depth += (character == "{") - (character == "}")
        if character == "," and depth == 0:
            return passes[:i]
    return passes


@pytest.mark.parametrize("kind", ["llama3_rope", "qwen3"])
def test_each_dump_leads_to_the_next(kind: str, tmp_path: Path) -> None:
    model = make_model(kind, tmp_path / "model")
    builder = ArtifactBuilder(model, prefill_buckets=[(1, 16)], decode_buckets=[(2, 32)])
    dumps = tmp_path / "dumps"
    builder.build(tmp_path / "artifact", dump_ir=dumps)
    folders = [dumps, dumps / "prefill-1-16", dumps / "decode-2-32"]
    for folder in folders:
        files = sorted(folder.glob("*.mlir"))
        assert len(files) >= 5
        for before, after in pairwise(files):
            text = before.read_text()
            header = read_header(text)
            assert header is not None
            _, _, following = header
            made = run_opt(text, first_item(following), registry=PASSES, extra_dialects=DIALECTS)
            assert made == after.read_text(), (before, after)


def test_hash_seed_and_directory_do_not_change_a_byte(tmp_path: Path) -> None:
    model = make_model("llama", tmp_path / "model")
    digests = []
    for seed in ("1", "2"):
        directory = tmp_path / f"place{seed}"
        directory.mkdir()
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", BUILD, str(model)]
        subprocess.run(command, cwd=directory, env=environment, check=True, capture_output=True)
        files = sorted((directory / "out").iterdir())
        assert {"prefill-1-16.vedf", "decode-2-32.vedf"} <= {file.name for file in files}
        digests.append({f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files})
    assert digests[0] == digests[1]
