"""The tokens of a bucket: how a binary pads them, and in which parts its blocks work on them."""

from __future__ import annotations

from dataclasses import dataclass

from ..models.config_types import Bucket
from .isa.rules import LANES
from .kernels.attention_tiling import key_count

SEQUENCE_CHUNK_TOKENS = 64
"""Where there is attention, parts of one sequence are multiples of this, so that the keys before
a part's end are whole key blocks."""
INDEX_BYTES = 4
WORD_BYTES = 8
"""Positions and lengths also become data, and the data memory moves 8 bytes at least."""


@dataclass(frozen=True)
class TokenShape:
    """The tokens of a bucket as its binary sees them."""

    bucket: Bucket
    id_bytes: int = INDEX_BYTES
    """Of a token id in HBM; where ids become data they have a word each."""

    @property
    def sequences(self) -> int:
        return self.bucket.batch_size

    @property
    def tokens(self) -> int:
        """Tokens per sequence, padded to whole lanes when there are several."""
        new = self.bucket.input_ids_size
        return new if new == 1 else -(-new // LANES) * LANES

    @property
    def all_tokens(self) -> int:
        return self.sequences * self.tokens

    @property
    def table_row_bytes(self) -> int:
        return key_count(self.bucket.attention_size) * INDEX_BYTES

    def row_bytes(self, name: str) -> int:
        """Bytes of one sequence's row of a program input."""
        return {
            "input_ids": self.tokens * self.id_bytes,
            "position_ids": self.tokens * WORD_BYTES,
            "slot_mapping": self.tokens * INDEX_BYTES,
            "block_table": self.table_row_bytes,
            "lengths": WORD_BYTES,
        }[name]

    def attended(self, chunk: Chunk) -> int:
        """Keys that a chunk's tokens can see."""
        if self.bucket.is_decode:
            return self.bucket.attention_size
        return min(chunk.first_token + chunk.tokens, self.bucket.attention_size)

    def own_tokens(self, chunk: Chunk) -> range:
        """The tokens of each of the chunk's sequences that are not padding."""
        end = min(chunk.first_token + chunk.tokens, self.bucket.input_ids_size)
        return range(chunk.first_token, end)

    def visible_pairs(self, chunk: Chunk) -> int:
        """(query, key) pairs that causality leaves in one of the chunk's sequences."""
        return sum(self.bucket.kv_cache_size + token + 1 for token in self.own_tokens(chunk))


@dataclass(frozen=True)
class Chunk:
    """Tokens worked on at a time: several whole sequences, or a part of one."""

    first_sequence: int
    sequences: int
    first_token: int
    tokens: int

    @property
    def count(self) -> int:
        return self.sequences * self.tokens

    def first(self, shape: TokenShape) -> int:
        """The chunk's first token among all of the bucket's."""
        return self.first_sequence * shape.tokens + self.first_token


def chunks(shape: TokenShape, limit: int, unit: int) -> list[Chunk]:
    """The bucket's tokens in chunks of at most `limit`.

    Parts of a sequence are multiples of `unit`; empty if `limit` is not.
    """
    if shape.tokens <= limit:
        step = limit // shape.tokens
        return [
            Chunk(first, min(step, shape.sequences - first), 0, shape.tokens)
            for first in range(0, shape.sequences, step)
        ]
    if limit % unit:
        return []
    return [
        Chunk(sequence, 1, first, min(limit, shape.tokens - first))
        for sequence in range(shape.sequences)
        for first in range(0, shape.tokens, limit)
    ]
