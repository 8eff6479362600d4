"""Artifacts for several ranks give the tokens of one rank."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from model_zoo import load_reference, make_model
from token_equality import EagerReference, greedy_tokens

from furiosa_llm import LLM, ArtifactBuilder
from furiosa_llm.models.demo import demo_model_path

PROMPTS = [[3], [5, 77, 200, 13, 8], list(range(40, 72))]
NEW_TOKENS = 16
ODD: dict[str, Any] = {
    "hidden_size": 90,
    "intermediate_size": 150,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 12,
    "vocab_size": 301,
    "num_hidden_layers": 3,
}
"""Heads, widths and vocabulary that no number of ranks divides."""
SENTENCES = (
    "The",
    "The capital of France is",
    "def fibonacci(n: int) -> int:\n    if n < 2:\n        return n\n    return",
    "Once upon a time, in a village by the sea, there lived a",
)


def build(model: Path, artifact: Path, buckets: Any, **options: Any) -> LLM:
    ArtifactBuilder(model, **buckets, **options).build(artifact)
    return LLM.load_artifact(artifact)


def check_ties(
    reference: EagerReference,
    prompts: Sequence[Sequence[int]],
    expected: list[list[int]],
    found: list[list[int]],
) -> None:
    for prompt, one, many in zip(prompts, expected, found, strict=True):
        tie = reference.tie(prompt, one, many)
        print(tie or "equal")


# --- tiny models of odd sizes ---


@pytest.mark.parametrize(
    ("ranks", "partial_sum"),
    [
        (4, "f32"),
        pytest.param(2, "bf16", marks=pytest.mark.long),
        pytest.param(4, "bf16", marks=pytest.mark.long),
        pytest.param(8, "f32", marks=pytest.mark.long),
    ],
)
def test_ranks_that_divide_nothing_give_the_tokens_of_one(
    tmp_path: Path, ranks: int, partial_sum: str
) -> None:
    model = make_model("llama", tmp_path / "model", seed=2, **ODD)
    buckets = {"prefill_buckets": [(1, 32)], "decode_buckets": [(2, 64)]}
    one = build(model, tmp_path / "one", buckets)
    many = build(
        model, tmp_path / "many", buckets, tensor_parallel_size=ranks, partial_sum=partial_sum
    )
    expected, found = (greedy_tokens(llm, PROMPTS, NEW_TOKENS) for llm in (one, many))
    check_ties(EagerReference(load_reference(model)), PROMPTS, expected, found)


@pytest.mark.parametrize("ranks", [1, pytest.param(4, marks=pytest.mark.long)])
def test_stages_chosen_at_load_give_the_same_tokens(tmp_path: Path, ranks: int) -> None:
    """The same commands on the same bytes, so not even ties differ; nothing is compiled again."""
    model = make_model("llama", tmp_path / "model", seed=2, **ODD)
    buckets = {"prefill_buckets": [(1, 32)], "decode_buckets": [(2, 64)]}
    one = build(model, tmp_path / "a", buckets, tensor_parallel_size=ranks)
    expected = greedy_tokens(one, PROMPTS, NEW_TOKENS)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").iterdir()}
    for stages in (2, 3):
        llm = LLM.load_artifact(tmp_path / "a", pipeline_parallel_size=stages)
        assert greedy_tokens(llm, PROMPTS, NEW_TOKENS) == expected
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "a").iterdir()} == files


@pytest.mark.long
def test_stages_of_the_build_give_the_same_tokens(tmp_path: Path) -> None:
    model = make_model("llama", tmp_path / "model", seed=2, **ODD)
    buckets = {"prefill_buckets": [(1, 32)], "decode_buckets": [(2, 64)]}
    one = build(model, tmp_path / "a", buckets)
    two = build(model, tmp_path / "b", buckets, num_blocks_per_pp_stage=[1, 2])
    assert greedy_tokens(two, PROMPTS, NEW_TOKENS) == greedy_tokens(one, PROMPTS, NEW_TOKENS)


# --- SmolLM2-135M: 9 heads, 3 KV heads ---


@pytest.fixture(scope="module")
def expected(demo: LLM) -> list[list[int]]:
    return greedy_tokens(demo, prompts_of(demo), NEW_TOKENS)


def prompts_of(demo: LLM) -> list[list[int]]:
    return [demo.tokenizer.encode(text) for text in SENTENCES]


@pytest.mark.long
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ranks_of_smollm2_give_the_tokens_of_one(
    demo: LLM,
    expected: list[list[int]],
    reference: EagerReference,
    tmp_path: Path,
    ranks: int,
) -> None:
    buckets = {"prefill_buckets": [(1, 128)], "decode_buckets": [(4, 256)]}
    llm = build(demo_model_path(), tmp_path / "a", buckets, tensor_parallel_size=ranks)
    prompts = prompts_of(demo)
    found = greedy_tokens(llm, prompts, NEW_TOKENS)
    check_ties(reference, prompts, expected, found)
    staged = LLM.load_artifact(tmp_path / "a", pipeline_parallel_size=2)
    assert greedy_tokens(staged, prompts, NEW_TOKENS) == found


@pytest.mark.long
@pytest.mark.parametrize(
    "options",
    [
        {"pipeline_parallel_size": 2},
        {"pipeline_parallel_size": 3, "devices": "npu:0:0,npu:0:1,npu:1:0"},
        {"pipeline_parallel_size": 4},
        {"num_blocks_per_pp_stage": (1, 28, 1)},
        {"pipeline_parallel_size": 2, "data_parallel_size": 2},
    ],
    ids=str,
)
def test_an_artifact_built_for_one_stage_loads_with_several(
    demo: LLM, demo_artifact: Path, expected: list[list[int]], options: dict[str, Any]
) -> None:
    staged = LLM.load_artifact(demo_artifact, **options)
    assert greedy_tokens(staged, prompts_of(demo), NEW_TOKENS) == expected
    assert staged.metrics is not None
    assert staged.metrics.full_pipeline_tokens_per_s > staged.metrics.tokens_per_s
