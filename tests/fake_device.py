"""A device for tests of the runtime: a KV cache in memory, and a model that is plain arithmetic.

Every step checks that the binary's inputs obey the rules of padding, and that each sequence
finds all its earlier tokens in the cache, in order. The next token is a function of them.
"""

from __future__ import annotations

import zlib

import numpy as np
from numpy.typing import NDArray

from furiosa_llm.llm.step_inputs import Inputs
from furiosa_llm.models.config_types import Bucket

CYCLES = 100
NOT_A_TOKEN = -1
POSITION_PAD = 1
PADDING_SLOT = 0


class FakeDevice:
    """One slot of the cache holds the token written to it."""

    def __init__(self, slots: int, vocabulary: int = 8, *, all_rows: bool = False) -> None:
        self.slots = slots
        self.vocabulary = vocabulary
        self.all_rows = all_rows
        self.cache = np.full(slots, NOT_A_TOKEN)
        self.runs: list[Bucket] = []

    def cycles(self, bucket: Bucket) -> int:
        """More for a larger bucket, so that tests see which one ran."""
        return CYCLES * bucket.batch_size

    def interval_cycles(self, bucket: Bucket) -> int:
        """As of two stages, one of which takes three quarters of the time."""
        return self.cycles(bucket) * 3 // 4

    def microseconds(self, cycles: float) -> float:
        return cycles / 1000

    def run(self, bucket: Bucket, inputs: Inputs) -> NDArray[np.float32]:
        self.runs.append(bucket)
        self._check_shapes(bucket, inputs)
        rows = bucket.input_ids_size if self.all_rows else 1
        logits = np.full((bucket.batch_size, rows, self.vocabulary), np.nan, np.float32)
        for b, length in enumerate(inputs["lengths"]):
            if inputs["slot_mapping"][b, 0] == PADDING_SLOT:  # a row without a sequence
                assert length == 1
                self._check_padding(inputs, b, 0)
                continue
            new = 1 if bucket.is_decode else int(length)
            tokens = self._cached_tokens(inputs, b, int(length), new)
            last = new - 1 if self.all_rows else 0
            logits[b, last] = next_logits(tokens, self.vocabulary)
        return logits

    def _check_shapes(self, bucket: Bucket, inputs: Inputs) -> None:
        batch, new = bucket.batch_size, bucket.input_ids_size
        shapes = {name: array.shape for name, array in inputs.items()}
        assert shapes == {
            "input_ids": (batch, new),
            "position_ids": (batch, new),
            "slot_mapping": (batch, new),
            "block_table": (batch, bucket.attention_size),
            "lengths": (batch,),
        }
        assert all(array.dtype == np.int32 for array in inputs.values())

    def _check_padding(self, inputs: Inputs, b: int, new: int) -> None:
        assert (inputs["slot_mapping"][b, new:] == PADDING_SLOT).all()
        assert (inputs["position_ids"][b, new:] == POSITION_PAD).all()
        assert (inputs["block_table"][b, inputs["lengths"][b] :] == PADDING_SLOT).all()

    def _cached_tokens(self, inputs: Inputs, b: int, length: int, new: int) -> list[int]:
        """Write the new tokens, then read the whole sequence through its block table."""
        self._check_padding(inputs, b, new)
        positions = inputs["position_ids"][b, :new]
        assert positions.tolist() == list(range(length - new, length))
        slots = inputs["slot_mapping"][b, :new]
        assert (slots != PADDING_SLOT).all()
        self.cache[slots] = inputs["input_ids"][b, :new]
        table = inputs["block_table"][b, :length]
        assert len(set(table.tolist())) == length
        tokens = self.cache[table]
        assert (tokens != NOT_A_TOKEN).all()
        return [int(token) for token in tokens]


def next_logits(tokens: list[int], vocabulary: int) -> NDArray[np.float32]:
    """Logits that depend on every token and its place."""
    logits = np.zeros(vocabulary, np.float32)
    logits[expected_token(tokens, vocabulary)] = 1.0
    return logits


def expected_token(tokens: list[int], vocabulary: int) -> int:
    """What greedy decoding gives after `tokens`."""
    return zlib.crc32(bytes(tokens)) % vocabulary


def greedy_answer(prompt: list[int], count: int, vocabulary: int = 8) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(expected_token(tokens, vocabulary))
    return tokens[len(prompt) :]
