"""A checkpoint whose KV caches alone are quantised, against the library that wrote it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from quantized_zoo import FP8_CACHE, write_compressed_tensors
from token_equality import EagerReference, greedy_tokens

from furiosa_llm import LLM, ArtifactBuilder
from furiosa_llm.artifact.reader import read_artifact

PROMPTS = [[3], [5, 77, 200, 13, 8], list(range(40, 72))]
NEW_TOKENS = 8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("codes") / "model"
    return write_compressed_tensors(path, {}, kv_cache_scheme=FP8_CACHE)


@pytest.fixture(scope="module")
def reference(model: Path) -> EagerReference:
    """compressed-tensors' own execution; scales follow the type that a model is loaded in."""
    load = transformers.AutoModelForCausalLM.from_pretrained
    reference = EagerReference(load(model, dtype=torch.float32))
    reference.rounded = load(model, dtype=torch.bfloat16)
    return reference


def greedy(reference: EagerReference, prompt: list[int]) -> list[int]:
    """Of bf16, each token from all that come before it."""
    tokens: list[int] = []
    for _ in range(NEW_TOKENS):
        _, rounded = reference.logits([*prompt, *tokens])
        tokens.append(int(rounded[-1].argmax()))
    return tokens


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.long)])
def test_tokens_are_those_of_the_library(
    model: Path, reference: EagerReference, ranks: int, tmp_path: Path
) -> None:
    ArtifactBuilder(
        model,
        prefill_buckets=[(1, 32)],
        decode_buckets=[(4, 64)],
        tensor_parallel_size=ranks,
    ).build(tmp_path / "artifact")
    artifact = read_artifact(tmp_path / "artifact")
    for bucket in artifact.buckets:
        assert {io.dtype for io in artifact.program(bucket).caches} == {"f8e4m3"}
    found = greedy_tokens(LLM.load_artifact(tmp_path / "artifact"), PROMPTS, NEW_TOKENS)
    for prompt, tokens in zip(PROMPTS, found, strict=True):
        print(reference.tie(prompt, greedy(reference, prompt), tokens) or "equal")
