from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import pytest
from fake_device import CYCLES, FakeDevice, greedy_answer
from hypothesis import given
from hypothesis import strategies as st

from furiosa_llm.llm.engine import run_to_end
from furiosa_llm.llm.kv_blocks import KvBlocks
from furiosa_llm.llm.outputs import Step
from furiosa_llm.llm.sampling_params import SamplingParams
from furiosa_llm.llm.scheduler import Scheduler, choose_bucket
from furiosa_llm.llm.sequence import Sequence
from furiosa_llm.llm.step_inputs import Padding
from furiosa_llm.models.config_types import Bucket

PREFILL, DECODE = Bucket.prefill, Bucket.decode
PADDING = Padding(position_id=1, block=0)
GREEDY = SamplingParams(temperature=0)


def sequence(index: int, prompt: Seq[int], max_tokens: int) -> Sequence:
    random = np.random.default_rng(0)
    return Sequence(index, list(prompt), GREEDY, max_tokens, frozenset(), random)


def run(
    sequences: Seq[Sequence], buckets: Seq[Bucket], *, slots: int = 1000, all_rows: bool = False
) -> list[Step]:
    blocks = KvBlocks(slots)
    device = FakeDevice(slots, all_rows=all_rows)
    steps = run_to_end(sequences, Scheduler(buckets, blocks), device, PADDING, lambda _: None)
    assert blocks.free_blocks == blocks.usable_blocks, "finished sequences hold no blocks"
    return steps


def names(steps: Seq[Step]) -> list[str]:
    return [step.bucket.name for step in steps]


@pytest.mark.parametrize(
    ("count", "length", "expected"),
    [
        (1, 100, DECODE(1, 128)),
        (1, 129, DECODE(1, 256)),  # too long for the small one
        (2, 100, DECODE(4, 256)),  # the smallest that takes both
        (4, 256, DECODE(4, 256)),
        (9, 100, DECODE(4, 256)),  # none takes all: the one that takes most
    ],
)
def test_the_smallest_bucket_that_fits_is_chosen(count: int, length: int, expected: Bucket) -> None:
    buckets = [DECODE(4, 512), DECODE(1, 256), DECODE(4, 256), DECODE(1, 128)]
    assert choose_bucket(buckets, count, length) == expected


def test_one_sequence_is_prefilled_then_decoded_token_by_token() -> None:
    only = sequence(0, [3, 1, 4], max_tokens=4)
    steps = run([only], [PREFILL(1, 4), DECODE(1, 8)])
    assert names(steps) == ["prefill:1,4", *["decode:1,8"] * 3]
    assert only.answer == greedy_answer([3, 1, 4], 4)
    assert only.finish_reason == "length"
    assert only.token_cycles == [CYCLES, 2 * CYCLES, 3 * CYCLES, 4 * CYCLES]


def test_a_single_token_needs_no_decode_bucket() -> None:
    assert names(run([sequence(0, [1], 1)], [PREFILL(1, 4)])) == ["prefill:1,4"]


def test_sequences_of_different_lengths_share_a_decode_step() -> None:
    prompts = [[1], [2, 3, 4], [5, 6]]
    sequences = [sequence(i, prompt, 3) for i, prompt in enumerate(prompts)]
    steps = run(sequences, [PREFILL(1, 4), DECODE(1, 8), DECODE(4, 8)])
    assert names(steps) == [*["prefill:1,4"] * 3, *["decode:4,8"] * 2]
    for s, prompt in zip(sequences, prompts, strict=True):
        assert s.answer == greedy_answer(prompt, 3)


def test_prompts_share_a_prefill_bucket_with_room_for_several() -> None:
    sequences = [sequence(i, [1] * (i + 1), 1) for i in range(5)]
    steps = run(sequences, [PREFILL(1, 8), PREFILL(4, 8)])
    assert names(steps) == ["prefill:4,8", "prefill:1,8"]


def test_more_sequences_than_the_largest_bucket_run_in_groups() -> None:
    sequences = [sequence(i, [i], 2) for i in range(5)]
    steps = run(sequences, [PREFILL(1, 4), DECODE(2, 8)])
    assert names(steps) == [*["prefill:1,4"] * 5, *["decode:2,8"] * 3]
    assert [s.answer for s in sequences] == [greedy_answer([i], 2) for i in range(5)]


def test_a_long_sequence_does_not_keep_short_ones_from_a_wide_bucket() -> None:
    prompts = [[1] * 10, [2], [3]]
    sequences = [sequence(i, prompt, 2) for i, prompt in enumerate(prompts)]
    steps = run(sequences, [PREFILL(1, 16), DECODE(1, 16), DECODE(4, 8)])
    assert names(steps)[3:] == ["decode:1,16", "decode:4,8"]


def test_a_sequence_waits_until_the_cache_has_room_for_all_of_it() -> None:
    # 4 usable slots; each sequence needs 3.
    sequences = [sequence(i, [1, 2], 2) for i in range(2)]
    steps = run(sequences, [PREFILL(1, 4), DECODE(4, 8)], slots=5)
    assert names(steps) == ["prefill:1,4", "decode:4,8"] * 2


@given(
    prompts=st.lists(st.lists(st.integers(0, 7), min_size=1, max_size=8), min_size=1, max_size=7),
    max_tokens=st.integers(1, 6),
    slots=st.integers(14, 60),
    prefill_batch=st.integers(1, 3),
    decode_batches=st.sets(st.integers(1, 4), min_size=1),
    all_rows=st.booleans(),
)
def test_every_sequence_gets_the_tokens_it_would_get_alone(
    prompts: list[list[int]],
    max_tokens: int,
    slots: int,
    prefill_batch: int,
    decode_batches: set[int],
    all_rows: bool,
) -> None:
    sequences = [sequence(i, prompt, max_tokens) for i, prompt in enumerate(prompts)]
    buckets = [PREFILL(prefill_batch, 4), PREFILL(1, 8), *(DECODE(b, 14) for b in decode_batches)]
    run(sequences, buckets, slots=slots, all_rows=all_rows)
    for s, prompt in zip(sequences, prompts, strict=True):
        assert s.answer == greedy_answer(prompt, max_tokens)
