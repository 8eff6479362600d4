"""The arrays that a binary takes, filled from the sequences of a batch and padded to the bucket.

B sequences, T new tokens, A tokens to attend to.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .scheduler import Batch

Inputs = dict[str, NDArray[np.int32]]


@dataclass(frozen=True)
class Padding:
    """What stands where no sequence has a token."""

    position_id: int
    block: int
    token_id: int = 0


def step_inputs(batch: Batch, padding: Padding) -> Inputs:
    """input_ids, position_ids and slot_mapping [B, T], block_table [B, A], lengths [B].

    Tokens stand at the start of their row. A row without a sequence has length 1, so that its
    last token can be looked up like any other.
    """
    bucket = batch.bucket
    new = (bucket.batch_size, bucket.input_ids_size)
    inputs = {
        "input_ids": np.full(new, padding.token_id, np.int32),
        "position_ids": np.full(new, padding.position_id, np.int32),
        "slot_mapping": np.full(new, padding.block, np.int32),
        "block_table": np.full((bucket.batch_size, bucket.attention_size), padding.block, np.int32),
        "lengths": np.ones(bucket.batch_size, np.int32),
    }
    for row, sequence in enumerate(batch.sequences):
        first, end = sequence.cached, sequence.length
        count = end - first
        inputs["input_ids"][row, :count] = sequence.tokens[first:]
        inputs["position_ids"][row, :count] = range(first, end)
        inputs["slot_mapping"][row, :count] = sequence.blocks[first:end]
        inputs["block_table"][row, :end] = sequence.blocks[:end]
        inputs["lengths"][row] = end
    return inputs
