"""Every supported family, as a tiny random model, from its checkpoint to equal tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from model_zoo import KINDS, RELATIVES, load_reference, make_model
from token_equality import EagerReference, greedy_tokens, rms

from furiosa_llm import LLM, ArtifactBuilder
from furiosa_llm.errors import CompileError

PROMPTS = [[3], [5, 77, 200, 13, 8], list(range(40, 72))]
NEW_TOKENS = 16


def build(model: Path, artifact: Path) -> LLM:
    builder = ArtifactBuilder(model, prefill_buckets=[(1, 32)], decode_buckets=[(2, 64)])
    builder.build(artifact)
    return LLM.load_artifact(artifact)


def check_tokens(llm: LLM, reference: EagerReference) -> None:
    for prompt, found in zip(PROMPTS, greedy_tokens(llm, PROMPTS, NEW_TOKENS), strict=True):
        reference.tie(prompt, reference.greedy(prompt, NEW_TOKENS), found)


@pytest.mark.parametrize("kind", [*KINDS, *RELATIVES])
def test_a_family_gives_the_tokens_of_eager(kind: str, tmp_path: Path) -> None:
    model = make_model(kind, tmp_path / "model", seed=1)
    check_tokens(build(model, tmp_path / "artifact"), EagerReference(load_reference(model)))


ODD: dict[str, Any] = {
    "hidden_size": 84,
    "intermediate_size": 150,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 20,
    "vocab_size": 301,
    "num_hidden_layers": 3,
}


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_sizes_that_divide_nothing(kind: str, tmp_path: Path) -> None:
    model = make_model(kind, tmp_path / "model", seed=2, **ODD)
    check_tokens(build(model, tmp_path / "artifact"), EagerReference(load_reference(model)))


def test_all_rows_of_logits_err_no_more_than_eager(tmp_path: Path) -> None:
    from furiosa_llm.artifact.reader import read_artifact
    from furiosa_llm.llm.device import SimulatedDevice
    from furiosa_llm.models.config_types import Bucket

    model = make_model("llama", tmp_path / "model", seed=3)
    bucket = Bucket.prefill(1, 32)
    builder = ArtifactBuilder(
        model, prefill_buckets=[(1, 32)], calculate_logit_only_for_last_token=False
    )
    builder.build(tmp_path / "artifact")
    artifact = read_artifact(tmp_path / "artifact")
    device = SimulatedDevice(artifact, artifact.parameters(None), slots=33, machine=None)
    tokens = np.arange(7, 39, dtype=np.int32)
    row = np.arange(32, dtype=np.int32)
    inputs = {
        "input_ids": tokens[None],
        "position_ids": row[None],
        "slot_mapping": row[None] + 1,
        "block_table": row[None] + 1,
        "lengths": np.array([32], np.int32),
    }
    exact, rounded = EagerReference(load_reference(model)).logits(tokens.tolist())
    found = device.run(bucket, inputs)[0]
    assert found.shape == exact.shape
    assert rms(found - exact) <= 1.5 * rms(rounded - exact)


def test_a_window_that_covers_the_bucket_changes_nothing(tmp_path: Path) -> None:
    model = make_model("mistral", tmp_path / "model", seed=1, sliding_window=64)
    check_tokens(build(model, tmp_path / "artifact"), EagerReference(load_reference(model)))


def test_a_window_shorter_than_the_bucket_is_refused_by_name(tmp_path: Path) -> None:
    model = make_model("mistral", tmp_path / "model", sliding_window=16)
    with pytest.raises(CompileError) as caught:
        build(model, tmp_path / "artifact")
    assert caught.value.code == "BCK001"
    assert "window" in caught.value.cause
    assert not (tmp_path / "artifact").exists()
