"""One small model and the demo model with their artifacts, built once for all tests here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_zoo import make_model
from token_equality import EagerReference

from furiosa_llm import LLM
from furiosa_llm.artifact.builder import ArtifactBuilder
from furiosa_llm.frontend.source import open_model
from furiosa_llm.models.demo import demo_model_path


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


@pytest.fixture(scope="session")
def demo_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("smollm2") / "artifact"
    builder = ArtifactBuilder(
        demo_model_path(),
        "smollm2",
        prefill_buckets=[(1, 128)],
        decode_buckets=[(1, 256), (4, 256)],
    )
    builder.build(path)
    return path


@pytest.fixture(scope="session")
def demo(demo_artifact: Path) -> LLM:
    return LLM.load_artifact(demo_artifact)


@pytest.fixture(scope="session")
def reference() -> EagerReference:
    from transformers import LlamaForCausalLM

    source = open_model(demo_model_path())
    config = source.config
    config._attn_implementation = "eager"
    model: Any = LlamaForCausalLM(config).to(torch.float32)  # type: ignore[arg-type]
    state = {
        name: torch.from_numpy(source.checkpoint.read(name).astype(np.float32))
        for name in source.checkpoint.tensors
    }
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert set(missing) <= {"lm_head.weight"}
    assert not unexpected
    model.tie_weights()
    return EagerReference(model)
