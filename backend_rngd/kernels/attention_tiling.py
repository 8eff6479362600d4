"""How attention divides its work: slices over sequences, heads and keys; rows and keys into tiles.

The keys of a sequence are dealt to the splits of its group in runs of KEY_UNIT, so that the first
keys of every split are the first keys of the sequence: what causality hides can be left out in all
slices alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

from ..emitter import power_of_two_at_least, power_of_two_at_most
from ..isa.layout import KEY_RUN, FeatureOrder, features_per_slice
from ..isa.rules import LANES, SLICES_PER_PE, TRF_BYTES

KEY_UNIT = KEY_RUN
"""Keys per slice come in multiples of this, so that a row of probabilities is whole packets."""
KEY_TILE_BYTES = 131072
"""Keys and values of one tile in a slice; a few tiles are in memory at a time."""
SCORE_BYTES = 65536
"""f32 scores of one tile of query rows and one segment of keys in a slice."""
PART_BYTES = 131072
"""f32 results of a tile of query rows, of all segments that wait to be merged."""
REGISTER_BYTES = TRF_BYTES // 2
"""Query rows and probabilities take one half of the register file each."""
MASK_KEYS = 512
"""Keys whose masks are in the VRF at a time."""
MASK_BYTES = 4096
"""Bias of the keys that causality may hide from a tile of rows, in the VRF."""
MAX_ROWS = 128
"""Query rows of a tile, where there are many tokens; their statistics share the VRF."""
PADDING_SHARE = 2
"""Splits may pad a sequence's keys by one part in so many."""


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

    @property
    def slices(self) -> int:
        return self.sequences * self.kv_heads * self.splits

    @property
    def unit(self) -> int:
        """Keys of a sequence that are KEY_UNIT keys of each slice."""
        return self.splits * KEY_UNIT

    def up_to(self, keys: int) -> int:
        """Keys per slice among which the first `keys` of the sequence are."""
        return min(self.keys, -(-keys // self.unit) * KEY_UNIT)

    def within(self, keys: int) -> int:
        """Keys per slice that are all among the first `keys` of the sequence."""
        return min(self.keys, keys // self.unit * KEY_UNIT)

    def later(self, rounds: int) -> Round:
        """The same for sequences so many rounds further on."""
        return replace(self, first_sequence=self.first_sequence + rounds * self.sequences)


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
    def token_blocks(self) -> int:
        """Blocks of one head."""
        return max(1, self.tokens // self.lanes)


@dataclass(frozen=True)
class Span:
    """Keys first … first + count - 1 of each slice."""

    first: int
    count: int

    @property
    def end(self) -> int:
        return self.first + self.count

    def parts(self, count: int) -> list[Span]:
        """The span in `count` parts of whole units, as equal as they can be."""
        units = self.count // KEY_UNIT
        edges = [units * i // count * KEY_UNIT for i in range(count + 1)]
        return [Span(self.first + low, high - low) for low, high in pairwise(edges) if high > low]

    def at_most(self, keys: int) -> list[Span]:
        """The fewest equal parts of at most `keys` keys."""
        return self.parts(_parts(self.count, keys)) if self.count else []

    def split(self, key: int) -> tuple[Span, Span]:
        """The keys before `key` and those from it on."""
        at = min(max(key, self.first), self.end)
        return Span(self.first, at - self.first), Span(at, self.end - at)


@dataclass(frozen=True)
class Segments:
    """The keys that a tile of rows sees, in segments; each has its own maxima and sums.

    A segment's keys and values are loaded together: a slot of the cache is one run for all heads.
    """

    spans: tuple[Span, ...]
    together: int
    """Segments whose results are merged at a time."""


def key_count(attended: int) -> int:
    """Keys of a block table that the kernel walks to attend to the first `attended` ones."""
    return -(-attended // SLICES_PER_PE) * SLICES_PER_PE


def attention_rounds(sequences: int, kv_heads: int, attended: int, table: int) -> list[Round]:
    """Rounds for `attended` keys per sequence, whose block tables have `table` entries."""
    heads_at_a_time = min(kv_heads, SLICES_PER_PE)
    sequences_at_a_time = max(1, min(sequences, SLICES_PER_PE // heads_at_a_time))
    rounds = []
    for head in range(0, kv_heads, heads_at_a_time):
        heads = min(heads_at_a_time, kv_heads - head)
        for first in range(0, sequences, sequences_at_a_time):
            count = min(sequences_at_a_time, sequences - first)
            splits, keys = _split_keys(attended, table, SLICES_PER_PE // (count * heads))
            rounds.append(Round(first, count, head, heads, splits, keys))
    return rounds


def _split_keys(attended: int, table: int, most: int) -> tuple[int, int]:
    """(splits, keys per slice): a power of two, for the ring; fewest keys per slice, then in all.

    The keys of all splits are entries of the table, and not many more than `attended`.
    """
    limit = min(table, attended + attended // PADDING_SHARE + KEY_UNIT)
    choices = []
    splits = 1
    while splits <= power_of_two_at_most(most):
        keys = -(-attended // (splits * KEY_UNIT)) * KEY_UNIT
        if splits * keys <= limit or splits == 1:
            choices.append((keys, splits * keys, splits))
        splits *= 2
    keys, _, splits = min(choices)
    return splits, keys


def dealt_run(order: FeatureOrder, ring: int, tokens: int) -> int | None:
    """Tokens of a sequence that each group of `ring` slices gets in turn: those of a row tile.

    None if the group's slices do not hold all query heads of a tile, in equal parts.
    """
    per_slice = features_per_slice(order)
    parts = order.padded // per_slice
    regular = parts > 1 and parts * per_slice == order.padded and ring % parts == 0
    tiles = list(row_tiles(order.heads, tokens, order.padded))
    alike = {(tile.heads, tile.tokens, tile.count) for tile in tiles}
    heads, run, _ = tiles[0].heads, tiles[0].tokens, tiles[0].count
    if not regular or len(alike) > 1 or heads < order.heads:
        return None
    return run


def row_tiles(query_heads: int, tokens: int, head_dim: int) -> Iterator[Rows]:
    """Tiles whose queries fit half of the register file."""
    if tokens == 1:
        lanes = min(LANES, max(2, power_of_two_at_least(query_heads)))
        step = _row_limit(lanes, head_dim)
        for head in range(0, query_heads, step):
            heads = min(step, query_heads - head)
            yield Rows(head, heads, 0, 1, lanes, -(-heads // lanes) * lanes)
        return
    limit = _row_limit(LANES, head_dim)
    heads_at_a_time = min(query_heads, limit // LANES)
    step = _even(tokens, limit // heads_at_a_time, LANES)
    for token in range(0, tokens, step):
        count = min(step, tokens - token)
        for head in range(0, query_heads, heads_at_a_time):
            heads = min(heads_at_a_time, query_heads - head)
            yield Rows(head, heads, token, count, LANES, heads * count)


def segments(rows: Rows, keys: int, head_dim: int, pitch: int | None) -> Segments:
    """Segments of the first `keys` keys of a slice.

    `pitch` is the bytes of a key and its value, if they have to be loaded.
    """
    register = REGISTER_BYTES // rows.lanes // (2 * rows.blocks)
    most = _at_most(min(SCORE_BYTES // (4 * rows.count), register))
    if pitch is not None:
        most = min(most, _at_most(KEY_TILE_BYTES // pitch))
    together = max(2, PART_BYTES // (rows.count * head_dim * 4))
    return Segments(tuple(Span(0, keys).at_most(most)), together)


def _parts(keys: int, most: int) -> int:
    return math.ceil(keys / most)


def _at_most(keys: int) -> int:
    """Whole units of keys, one at least."""
    return max(KEY_UNIT, keys // KEY_UNIT * KEY_UNIT)


def _even(total: int, most: int, unit: int) -> int:
    """The step, a multiple of `unit`, of the fewest nearly equal parts of at most `most`."""
    parts = math.ceil(total / max(unit, most // unit * unit))
    return -(-total // (parts * unit)) * unit


def _row_limit(lanes: int, head_dim: int) -> int:
    """Rows of a tile, a multiple of `lanes`."""
    rows = REGISTER_BYTES // (2 * head_dim) // lanes * lanes
    return max(lanes, min(rows, MAX_ROWS))
