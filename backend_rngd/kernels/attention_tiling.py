"""How attention divides its work: slices over sequences, heads and keys; rows into tiles."""

from __future__ import annotations

from dataclasses import dataclass

from ..emitter import power_of_two_at_least, power_of_two_at_most
from ..isa.rules import LANES, SLICES_PER_PE, TRF_BYTES

KEY_TILE_BYTES = 65536
"""Keys and values of one tile in a slice."""
SCORE_TILE_BYTES = 65536
"""f32 scores of one tile of query rows in a slice."""
KEY_UNIT = 8
"""Keys per slice come in multiples of this, so that a row of probabilities is whole packets."""
VRF_ROWS = 1024
"""Rows whose statistics fit the VRF at 8 bytes each."""


@dataclass(frozen=True)
class Round:
    """Sequences and kv heads that the slices work on at a time.

    Slice ((sequence · kv_heads) + head) · splits + split; the other slices rest.
    """

    first_sequence: int
    sequences: int
    first_head: int
    kv_heads: int
    splits: int
    keys: int
    """Keys per slice."""
    key_tile: int
    """Keys per slice in memory at a time; divides `keys`."""

    @property
    def slices(self) -> int:
        return self.sequences * self.kv_heads * self.splits


@dataclass(frozen=True)
class Rows:
    """Query rows of one tile: `heads` query heads of each group times `tokens` tokens."""

    first_head: int
    heads: int
    first_token: int
    tokens: int
    lanes: int
    count: int
    """Rows with padding, a multiple of `lanes`."""

    @property
    def blocks(self) -> int:
        return self.count // self.lanes

    @property
    def needs_zeros(self) -> bool:
        return self.count != self.heads * self.tokens


def key_count(attended: int) -> int:
    """Keys of a block table that the kernel walks to attend to the first `attended` ones."""
    return -(-attended // SLICES_PER_PE) * SLICES_PER_PE


def attention_rounds(sequences: int, kv_heads: int, attended: int, head_bytes: int) -> list[Round]:
    """Rounds for `attended` keys per sequence; `head_bytes` is K and V of one key and head."""
    keys = key_count(attended)
    heads_at_a_time = min(kv_heads, SLICES_PER_PE)
    sequences_at_a_time = max(1, min(sequences, SLICES_PER_PE // heads_at_a_time))
    rounds = []
    for first in range(0, sequences, sequences_at_a_time):
        count = min(sequences_at_a_time, sequences - first)
        for head in range(0, kv_heads, heads_at_a_time):
            heads_now = min(heads_at_a_time, kv_heads - head)
            # Splits are a power of two, for the ring, and share the keys in whole units.
            units = keys // KEY_UNIT
            most = power_of_two_at_most(SLICES_PER_PE // (count * heads_now))
            splits = min(most, units & -units)
            per_slice = keys // splits
            tile = _divisor_at_most(per_slice, max(KEY_UNIT, KEY_TILE_BYTES // head_bytes))
            rounds.append(Round(first, count, head, heads_now, splits, per_slice, tile))
    return rounds


def _divisor_at_most(value: int, limit: int) -> int:
    """Largest multiple of KEY_UNIT that divides `value` and is at most `limit`."""
    return max(d for d in range(KEY_UNIT, limit + 1, KEY_UNIT) if value % d == 0)


def row_tiles(query_heads: int, tokens: int, keys: int, head_dim: int) -> list[Rows]:
    """Tiles whose queries and probabilities fit the register file and whose scores fit a tile."""
    if tokens == 1:
        lanes = min(LANES, max(2, power_of_two_at_least(query_heads)))
        step = min(query_heads, max(lanes, _row_limit(lanes, keys, head_dim) // lanes * lanes))
        tiles = [(h, min(step, query_heads - h), 0, 1) for h in range(0, query_heads, step)]
        return [Rows(h, n, t, m, lanes, -(-n // lanes) * lanes) for h, n, t, m in tiles]
    limit = _row_limit(LANES, keys, head_dim)
    at_a_time = max(1, min(query_heads, limit // tokens))
    token_step = tokens if limit >= tokens else max(LANES, limit // LANES * LANES)
    return [
        Rows(h, n, t, m, LANES, n * m)
        for h in range(0, query_heads, at_a_time)
        for n in [min(at_a_time, query_heads - h)]
        for t in range(0, tokens, token_step)
        for m in [min(token_step, tokens - t)]
    ]


def _row_limit(lanes: int, keys: int, head_dim: int) -> int:
    per_lane = TRF_BYTES // lanes
    rows = min(per_lane // (2 * head_dim), per_lane // (2 * keys)) * lanes
    return max(lanes, min(rows, SCORE_TILE_BYTES // (4 * keys), VRF_ROWS))
