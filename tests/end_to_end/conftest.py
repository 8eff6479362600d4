"""One small model and its artifact, built once for all tests here."""

from __future__ import annotations

from pathlib import Path

import pytest
from model_zoo import make_model

from furiosa_llm.artifact.builder import ArtifactBuilder


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory: Llama with two layers and a byte tokenizer."""
    return make_model("llama", tmp_path_factory.mktemp("model") / "tiny-llama", tokenizer=True)


@pytest.fixture(scope="session")
def dumped_ir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the build of `artifact` dumps its IR."""
    return tmp_path_factory.mktemp("ir")


@pytest.fixture(scope="session")
def artifact(model: Path, dumped_ir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefill (1,16), decode (1,32) and (4,32)."""
    path = tmp_path_factory.mktemp("artifact") / "tiny-llama"
    builder = ArtifactBuilder(model, prefill_buckets=[(1, 16)], decode_buckets=[(1, 32), (4, 32)])
    builder.build(path, dump_ir=dumped_ir)
    return path
