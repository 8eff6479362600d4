"""The inputs of a bucket for sequences of given lengths, the rest padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from furiosa_llm.models.config_types import Bucket

Array = np.ndarray[Any, Any]
PADDING_ID = 0
"""A token that stands only where there is padding; its row of the embedding is garbage."""


def sequence_inputs(
    bucket: Bucket, lengths: Sequence[int], rng: np.random.Generator, slots: int
) -> dict[str, Array]:
    """All inputs; `input_ids` are still padding. Slots are dealt at random, slot 0 to nobody."""
    batch, new, width = bucket.batch_size, bucket.input_ids_size, bucket.attention_size
    free = 1 + rng.permutation(slots - 1).astype(np.int32)
    found = {
        "input_ids": np.full((batch, new), PADDING_ID, np.int32),
        "position_ids": np.ones((batch, new), np.int32),
        "slot_mapping": np.zeros((batch, new), np.int32),
        "block_table": np.zeros((batch, width), np.int32),
        "lengths": np.ones(batch, np.int32),
    }
    for row, length in enumerate(lengths):
        count = 1 if bucket.is_decode else length
        own, free = free[:length], free[length:]
        found["position_ids"][row, :count] = np.arange(length - count, length)
        found["slot_mapping"][row, :count] = own[length - count :]
        found["block_table"][row, :length] = own
        found["lengths"][row] = length
    return found


def prefill_inputs(tokens: Sequence[int], width: int) -> dict[str, Array]:
    count = len(tokens)
    inputs = {
        "input_ids": np.zeros((1, width), np.int32),
        "position_ids": np.ones((1, width), np.int32),
        "slot_mapping": np.zeros((1, width), np.int32),
        "block_table": np.zeros((1, width), np.int32),
        "lengths": np.array([count], np.int32),
    }
    inputs["input_ids"][0, :count] = tokens
    inputs["position_ids"][0, :count] = np.arange(count)
    inputs["slot_mapping"][0, :count] = inputs["block_table"][0, :count] = np.arange(1, count + 1)
    return inputs


def decode_inputs(token: int, length: int, width: int) -> dict[str, Array]:
    table = np.zeros((1, width), np.int32)
    table[0, :length] = np.arange(1, length + 1)
    return {
        "input_ids": np.array([[token]], np.int32),
        "position_ids": np.array([[length - 1]], np.int32),
        "slot_mapping": np.array([[length]], np.int32),
        "block_table": table,
        "lengths": np.array([length], np.int32),
    }
