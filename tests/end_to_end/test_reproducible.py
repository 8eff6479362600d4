"""The same model gives the same bytes, and every step of the compiler can be repeated by hand."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from itertools import pairwise
from pathlib import Path

import pytest
from click.testing import CliRunner

from furiosa_llm.cli.main import main

SCRIPT = Path(sysconfig.get_path("scripts")) / "furiosa-llm"


def test_hash_seed_and_directory_do_not_show(model: Path, artifact: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / "renamed"
    shutil.copytree(model, moved)
    arguments = ["-pb", "1,16", "-db", "1,32", "-db", "4,32"]
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    command = [SCRIPT, "build", "renamed", "out", *arguments]
    subprocess.run(command, check=True, cwd=moved.parent, env=environment, capture_output=True)
    binaries = sorted(path.name for path in artifact.glob("*.vedf"))
    assert len(binaries) == 3
    for name in [*binaries, "params-00001-of-00001.safetensors"]:
        assert (moved.parent / "out" / name).read_bytes() == (artifact / name).read_bytes(), name


@pytest.mark.parametrize("folder", [".", "prefill-1-16", "decode-1-32", "decode-4-32"])
def test_each_dump_gives_the_next_one(artifact: Path, dumped_ir: Path, folder: str) -> None:
    files = sorted((dumped_ir / folder).glob("*.mlir"))
    assert len(files) > 3
    for before, after in pairwise(files):
        made_by, options = (line.partition(": ")[2] for line in after.read_text().splitlines()[:2])
        passes = made_by + (options if options != "{}" else "")
        result = CliRunner().invoke(main, ["opt", str(before), "--passes", passes])
        assert result.exit_code == 0, result.output
        assert result.stdout == after.read_text(), f"{before.name} -> {after.name}"
