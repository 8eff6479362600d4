"""Bad input to whole commands: a code, what it is about, no traceback, nothing left behind."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from gguf_zoo import write_gguf
from safetensors.numpy import load_file, save_file

from furiosa_llm.artifact.reader import read_artifact
from furiosa_llm.backend_rngd.isa.container import PREAMBLE
from furiosa_llm.cli.main import main
from furiosa_llm.errors import FuriosaLLMError
from furiosa_llm.llm.llm import LLM
from furiosa_llm.llm.sampling_params import SamplingParams

BUCKETS = ("-pb", "1,16", "-db", "1,32")
Break = Callable[[Path], object]


def cli(*arguments: object) -> Any:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def build(model: object, out: Path, *options: str) -> tuple[int, str]:
    """Exit code and code of the error of a build that must leave nothing."""
    result = cli("build", model, out, *(options or BUCKETS))
    assert "Traceback" not in result.output
    assert not out.exists()
    assert not list(out.parent.glob(f".{out.name}*"))
    return result.exit_code, result.stderr.partition("error[")[2][:6]  # after progress lines


def edit_config(change: Callable[[dict[str, Any]], object]) -> Break:
    def edit(model: Path) -> None:
        config = json.loads((model / "config.json").read_text())
        change(config)
        (model / "config.json").write_text(json.dumps(config))

    return edit


def edit_weights(change: Callable[[dict[str, Any]], object]) -> Break:
    def edit(model: Path) -> None:
        tensors = load_file(model / "model.safetensors")
        change(tensors)
        save_file(tensors, model / "model.safetensors")

    return edit


def truncate(name: str) -> Break:
    def edit(model: Path) -> None:
        data = (model / name).read_bytes()
        (model / name).write_bytes(data[: len(data) // 2])

    return edit


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (lambda model: (model / "config.json").unlink(), "FRO003"),
        (truncate("config.json"), "FRO004"),
        (edit_config(lambda config: config.update(model_type="nonsense")), "FRO005"),
        (edit_config(lambda config: config.update(architectures=["Nonsense"])), "FRO005"),
        (lambda model: (model / "model.safetensors").unlink(), "CKP001"),
        (truncate("model.safetensors"), "CKP002"),
        (edit_weights(lambda tensors: tensors.pop(NORM)), "CKP005"),
        (edit_weights(lambda tensors: tensors.update({NORM: np.zeros(3, np.float32)})), "CKP005"),
    ],
)
def test_a_broken_model_is_refused(model: Path, tmp_path: Path, damage: Break, code: str) -> None:
    broken = tmp_path / "model"
    shutil.copytree(model, broken)
    damage(broken)
    assert build(broken, tmp_path / "out") == (1, code)


def test_a_model_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert build(tmp_path / "nothing", tmp_path / "out") == (1, "FRO001")


def test_a_truncated_gguf_file_is_refused(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(model, path)
    truncate("model.gguf")(tmp_path)
    assert build(path, tmp_path / "out") == (1, "GGF001")


def test_a_bucket_beyond_the_context_is_refused(model: Path, tmp_path: Path) -> None:
    assert build(model, tmp_path / "out", "-pb", "1,513") == (1, "BLD004")


def test_an_output_that_is_no_artifact_is_kept(model: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    result = cli("build", model, tmp_path, *BUCKETS)
    assert (result.exit_code, result.stderr[:13]) == (1, "error[ART002]")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_prompt_longer_than_the_largest_bucket_is_refused(artifact: Path) -> None:
    result = cli("run", artifact, "--prompt", "x" * 17)
    assert (result.exit_code, result.stderr[:13]) == (1, "error[RUN002]")


@pytest.fixture
def copy(artifact: Path, tmp_path: Path) -> Path:
    """The artifact, to be damaged."""
    shutil.copytree(artifact, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize("command", ["run", "profile", "inspect"])
@pytest.mark.parametrize("size", [0, 10, 1000])
def test_a_truncated_binary_is_refused(copy: Path, command: str, size: int) -> None:
    binary = copy / "prefill-1-16.vedf"
    binary.write_bytes(binary.read_bytes()[:size])
    result = cli(command, copy, *(["--prompt", "x"] if command == "run" else []))
    assert (result.exit_code, result.stderr[:13]) == (1, "error[ART007]")
    result = cli("inspect", binary)
    assert (result.exit_code, result.stderr[:13]) == (1, "error[VED001]")


def test_a_flipped_bit_in_a_binary_is_found(copy: Path) -> None:
    binary = copy / "prefill-1-16.vedf"
    data = bytearray(binary.read_bytes())
    data[len(data) // 2] ^= 4
    binary.write_bytes(data)
    assert cli("profile", copy).stderr.startswith("error[ART007]")
    assert cli("inspect", binary).stderr.startswith("error[VED003]")


def flip_and_mend(artifact: Path, name: str, choose: random.Random) -> None:
    """Flip one bit of a binary, and make its own and the manifest's checksum fit again."""
    binary = artifact / name
    data = bytearray(binary.read_bytes())
    data[choose.randrange(PREAMBLE.size, len(data))] ^= 1 << choose.randrange(8)
    digest = hashlib.sha256(data[PREAMBLE.size :]).digest()
    data[24:56] = digest
    binary.write_bytes(data)
    manifest = json.loads((artifact / "manifest.json").read_text())
    manifest["files"][name]["sha256"] = hashlib.sha256(data).hexdigest()
    (artifact / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("seed", range(40))
def test_a_mended_flip_is_a_coded_error_or_runs(copy: Path, seed: int) -> None:
    flip_and_mend(copy, "prefill-1-16.vedf", random.Random(seed))
    params = SamplingParams(temperature=0, max_tokens=1)
    try:
        read_artifact(copy).timing(read_artifact(copy).buckets[0])
        LLM.load_artifact(copy).generate("hello", params)
    except FuriosaLLMError as error:
        assert error.code[:3] in ("VED", "SIM", "CKP")  # noqa: PT017
