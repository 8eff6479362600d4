"""Groups of slices that have tokens of their own: how a token's positions lie in a group.

A product of few features per slice wastes work: 1,792 features are 28 for each of 64 slices, and
products come in sixteens. A quarter of the slices that holds a quarter of the tokens has four
times as many features: 112 are seven sixteens. Weights are then loaded for each group, from the
layout that all slices together would read; so a group's slice holds whole pieces of that layout.
"""

from __future__ import annotations

from .isa.layout import CHUNK, FeatureOrder, features_per_slice
from .isa.plan import SLICE_ADDRESS_BYTES
from .isa.rules import SLICES_PER_PE

GROUPS = 4
"""More would need too many copies of the weights, fewer would still waste work."""
BANK_LINE_BYTES = 128
"""Bytes after which data memory's banks repeat."""
GAP_BYTES = 2 * CHUNK


def unit_positions(order: FeatureOrder, ring: int) -> int:
    """Positions of a unit: what one of 64 slices would hold, or a chunk if that divides evenly."""
    unit = _unit(order, ring)
    assert unit is not None, (order, ring)
    return unit


def divides(order: FeatureOrder, ring: int) -> bool:
    """Whether `ring` slices can hold whole units of `order`, each equally many."""
    return _unit(order, ring) is not None


def _unit(order: FeatureOrder, ring: int) -> int | None:
    per_slice = features_per_slice(order)
    used = -(-order.positions // per_slice)
    if used % 2:
        return None
    if used % ring == 0 or ring % used == 0:
        return per_slice
    chunks = per_slice // CHUNK
    return CHUNK if used * chunks % ring == 0 and ring % chunks == 0 else None


def unit_stride(size_bytes: int, row_bytes: int) -> int:
    """Bytes from one unit to the next: with a gap where all units would begin in one bank."""
    return size_bytes + (GAP_BYTES if row_bytes % BANK_LINE_BYTES == 0 else 0)


def group_loop(groups: int) -> tuple[int, int, int]:
    """A DMA loop that gives every group the same."""
    return groups, 0, SLICES_PER_PE // groups * SLICE_ADDRESS_BYTES
