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
