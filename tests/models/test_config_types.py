from __future__ import annotations

from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from furiosa_llm.errors import FuriosaLLMError
from furiosa_llm.models.config_types import Bucket, PagedAttentionConfig, SchedulerConfig

sizes = st.integers(1, 1 << 20)


@given(batch=sizes, length=sizes)
def test_prefill_takes_all_tokens_and_has_no_cache(batch: int, length: int) -> None:
    bucket = Bucket.prefill(batch, length)
    assert bucket.is_prefill
    assert not bucket.is_decode
    assert (bucket.input_ids_size, bucket.kv_cache_size) == (length, 0)
    assert Bucket.parse(bucket.name) == bucket


@given(batch=sizes, length=st.integers(2, 1 << 20))
def test_decode_takes_one_token_and_caches_the_rest(batch: int, length: int) -> None:
    bucket = Bucket.decode(batch, length)
    assert bucket.is_decode
    assert not bucket.is_prefill
    assert (bucket.input_ids_size, bucket.kv_cache_size) == (1, length - 1)
    assert Bucket.parse(bucket.name) == bucket


def test_names_are_those_of_the_command_line() -> None:
    assert Bucket.prefill(1, 128).name == "prefill:1,128"
    assert Bucket.decode(4, 256).name == "decode:4,256"


@pytest.mark.parametrize("name", ["", "decode", "decode:4", "decode:0,8", "x:1,2", "decode:1,2 "])
def test_parse_refuses_other_forms(name: str) -> None:
    with pytest.raises(ValueError, match="not of the form"):
        Bucket.parse(name)


def test_buckets_are_values() -> None:
    assert len({Bucket.prefill(1, 8), Bucket.prefill(1, 8), Bucket.decode(1, 8)}) == 2
    with pytest.raises(FrozenInstanceError):
        Bucket.prefill(1, 8).batch_size = 2  # type: ignore[misc]


def test_scheduler_config_survives_a_file(tmp_path: Path) -> None:
    config = SchedulerConfig(npu_queue_limit=3, prefill_chunk_size=64)
    config.export(tmp_path / "scheduler.json")
    assert SchedulerConfig.load(tmp_path / "scheduler.json") == config


@pytest.mark.parametrize(("blocks", "size"), [(0, 1), (1, 0)])
def test_paged_attention_needs_positive_sizes(blocks: int, size: int) -> None:
    with pytest.raises(ValueError, match="positive"):
        PagedAttentionConfig(blocks, size)


@pytest.mark.parametrize(
    "values",
    [
        {"npu_queue_limit": 0},
        {"npu_queue_limit": 2.0},
        {"max_processing_samples": -1},
        {"max_processing_samples": True},
        {"spare_blocks_ratio": 1.0},
        {"spare_blocks_ratio": -0.1},
        {"spare_blocks_ratio": float("nan")},
        {"spare_blocks_ratio": "0.2"},
        {"is_offline": 1},
        {"prefill_chunk_size": 0},
    ],
)
def test_scheduler_values_that_mean_nothing_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(FuriosaLLMError) as caught:
        SchedulerConfig(**values)
    assert caught.value.code == "BLD021"
    assert caught.value.at in values


def test_a_file_with_other_fields_is_refused(tmp_path: Path) -> None:
    (tmp_path / "scheduler.json").write_text('{"npu_queue_limit": 3, "queue": 4}')
    with pytest.raises(FuriosaLLMError, match=r"BLD021.*queue"):
        SchedulerConfig.load(tmp_path / "scheduler.json")
    (tmp_path / "scheduler.json").write_text("[3]")
    with pytest.raises(ValueError, match="not a JSON object"):
        SchedulerConfig.load(tmp_path / "scheduler.json")
