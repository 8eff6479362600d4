"""How the heads of attention are spread over ranks: the same grouped attention on each.

A rank has the same number of KV slots, and the same number of query slots for each of them; query
slot i reads KV slot i // g. A KV head whose query heads are on several ranks is repeated there;
slots that are left over hold zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from ..ir.dist_cut import CutAttr, Range

CONTEXT_TOKENS = 4096
"""Cached tokens that weigh against weights when heads are spread. It is one number for all
buckets, because they share one copy of the weights."""

HEADS_DIM = 1
"""Of queries, keys and values [B, heads, T, H] and of caches [S, heads, 2, H]."""


@dataclass(frozen=True)
class HeadSplit:
    """KV heads and query heads of one attention, spread over ranks."""

    query_heads: int
    kv_heads: int
    head_size: int
    ranks: int
    group: int
    """Query slots for each KV slot."""

    @cached_property
    def _groups(self) -> list[tuple[int, Range]]:
        """(KV head, query heads that read it together), in order."""
        served = self.query_heads // self.kv_heads
        return [
            (kv, (first, min(first + self.group, (kv + 1) * served)))
            for kv in range(self.kv_heads)
            for first in range(kv * served, (kv + 1) * served, self.group)
        ]

    @property
    def kv_slots(self) -> int:
        """Of each rank."""
        return -(-len(self._groups) // self.ranks)

    @property
    def query_slots(self) -> int:
        """Of each rank."""
        return self.kv_slots * self.group

    @property
    def elements(self) -> int:
        """What a rank reads for one token: its weights, and the keys and values of a context."""
        width = self.query_heads * self.head_size  # about the width of the model
        weights = 2 * (self.query_slots + self.kv_slots) * self.head_size * width
        return weights + 2 * self.kv_slots * self.head_size * CONTEXT_TOKENS

    @property
    def has_full_slots(self) -> bool:
        """Whether padding is whole KV slots with their query slots."""
        return self.query_heads // self.kv_heads % self.group == 0

    @property
    def padding(self) -> int:
        """Query slots that hold zeros, on all ranks."""
        return self.ranks * self.query_slots - self.query_heads

    def kv_cut(self) -> CutAttr:
        """Of keys, values and the cache."""
        return self._cut(1, [(kv, kv + 1) for kv, _ in self._groups])

    def query_cut(self) -> CutAttr:
        """Of the queries."""
        return self._cut(self.group, [heads for _, heads in self._groups])

    def _cut(self, length: int, held: list[Range]) -> CutAttr:
        count = self.kv_slots
        slots: list[Range | None] = [*held, *[None] * (count * self.ranks - len(held))]
        ranks = [slots[rank * count : (rank + 1) * count] for rank in range(self.ranks)]
        return CutAttr(HEADS_DIM, length, ranks)


def split_heads(
    query_heads: int, kv_heads: int, head_size: int, ranks: int, *, full_slots: bool = False
) -> HeadSplit:
    """The spread with the fewest bytes per rank, and among those the one with least padding.

    With `full_slots` no query slot is padding unless its KV slot is: the others hold numbers,
    which are not to be counted where a token's largest one is looked for.
    """
    splits = (
        HeadSplit(query_heads, kv_heads, head_size, ranks, group)
        for group in range(query_heads // kv_heads, 0, -1)
    )
    splits = (split for split in splits if split.has_full_slots or not full_slots)
    return min(splits, key=lambda split: (split.elements, split.padding))
