"""Golden tests 5 to 7: channels and rows of HBM, networks of the data memory."""

from __future__ import annotations

import math

import numpy as np
import pytest
from golden_commands import BOOK, SLICE, dma, time_dma

from furiosa_llm.backend_rngd.isa.hbm_channels import AddressMap, channel_of, pattern_of
from furiosa_llm.backend_rngd.isa.instructions import Dma, Side, Space

ROW = 1 << 21
"""Bytes from a row of a bank to the next one."""
MAP = AddressMap.of(BOOK)


def test_5_a_new_row_at_every_request() -> None:
    # 524,288 requests over 32 channels, each to another row of the same bank: 40 cycles each.
    # Rows come fastest, 512 of them; around them all units of bank 0, stack and channel bits first.
    rows = dma(
        (32, 32, 512),
        Side(Space.HBM, 0, (1 << 14, 256, ROW)),
        Side(Space.DM, 0, (8192, 256, SLICE)),
    )
    cost = time_dma(rows)
    assert cost.requests == 524_288
    assert cost.read_cycles == 524_288 // 32 * 40
    assert cost.total_cycles == 655_360 + 500
    # A queue of 64 entries holds no two requests of one row, so its order does not matter.
    assert time_dma(rows, BOOK.replace("hbm.queue_entries_per_channel", 1)) == cost


def test_5_an_open_row_costs_nothing() -> None:
    # The same bytes with the units of a row together.
    together = dma(
        (512, 32, 32),
        Side(Space.HBM, 0, (ROW, 1 << 14, 256)),
        Side(Space.DM, 0, (SLICE, 8192, 256)),
    )
    assert time_dma(together).read_cycles == 524_288


def test_6_a_missing_stack_bit_halves_the_channels() -> None:
    # 4,096 requests of eight engines with bit 8 always 0: 16 channels, 5.3 cycles a request.
    half = dma((512,), Side(Space.HBM, 0, (512,)), Side(Space.DM, 0, (256,)))
    cost = time_dma(half, sharers=8)
    assert cost.requests * 8 == 4_096
    # One slice takes them at 128 B per cycle, which hides nothing here: look at the reads.
    assert cost.read_cycles == 1_357
    whole = dma((512,), Side(Space.HBM, 0, (256,)), Side(Space.DM, 0, (256,)))
    assert time_dma(whole, sharers=8).read_cycles == math.ceil(4_096 / 32 * 5.29986)
    spread = dma((8, 64), Side(Space.HBM, 0, (32768, 512)), Side(Space.DM, 0, (256, SLICE)))
    assert time_dma(spread, sharers=8).total_cycles == 1_357 + 500


def rows_of(requests: int) -> Dma:
    """`requests` of 256 B out of one network of 32 slices."""
    source = Side(Space.DM, 0, (256, SLICE))
    return dma((requests // 32, 32), source, Side(Space.HBM, 0, (8192, 256)))


def test_7_uneven_rows_over_four_networks() -> None:
    # A = 15 rows over four DMNs: three move 4 rows in one command, the last 3 rows in two.
    full, rest = time_dma(rows_of(128)), [time_dma(rows_of(64)), time_dma(rows_of(32))]
    assert (full.requests, full.total_cycles) == (128, 256 + 500)
    assert sum(cost.requests for cost in rest) == 96
    assert sum(cost.read_cycles for cost in rest) == 192
    # The engines work side by side, so the last one decides.
    slowest = max(full.total_cycles, sum(cost.total_cycles for cost in rest))
    assert slowest == 192 + 1_000 == 1_192


# --- the channels ---


def test_channels_are_the_documented_xor() -> None:
    address = np.array([0, 256, 512, 1 << 13, 1 << 17, 1 << 21, 1 << 25, 512 | 1 << 13, 1 << 29])
    assert channel_of(address, MAP).tolist() == [0, 16, 1, 1, 1, 1, 1, 0, 0]


@pytest.mark.parametrize(
    "loops", [((7, 1 << 20), (65, 8192)), ((3, 4096 * 3), (100, 768)), ((40, 1 << 13), (33, 512))]
)
def test_the_busiest_channel_is_the_counted_one(loops: tuple[tuple[int, int], ...]) -> None:
    addresses = [
        i * loops[0][1] + j * loops[1][1] + k
        for i in range(loops[0][0])
        for j in range(loops[1][0])
        for k in (0, 256)
    ]
    counted = np.bincount(channel_of(np.array(addresses), MAP), minlength=32).max()
    assert pattern_of(loops, 512, MAP).requests == counted


def test_long_transfers_are_not_walked_request_by_request() -> None:
    # 4 GB in powers of two: exact by XOR convolution, since shifts carry into nothing.
    pattern = pattern_of(((1 << 12, 1 << 20),), 1 << 20, MAP)
    assert pattern.requests == (1 << 32) / 256 / 32
    assert pattern.row_changes * 40 < pattern.requests * 5.3
    skewed = pattern_of(((1 << 14, 1 << 13),), 256, MAP)
    assert skewed.requests == 1 << 10  # bits 13 and up alone reach 16 channels
