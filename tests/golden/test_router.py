"""Golden test 18: the routers of the switch on their own."""

from __future__ import annotations

import pytest
from golden_commands import BOOK

from furiosa_llm.backend_rngd.isa.router import broadcast_trace


def test_18_two_slices_broadcast_two_packets_each() -> None:
    left, right = broadcast_trace(2, 2, BOOK)
    assert left == [True, True, True, True, False]
    assert right == [False, True, True, True, True]


@pytest.mark.parametrize("ring", [2, 4, 16, 64])
@pytest.mark.parametrize("times", [1, 3, 8])
def test_with_room_a_ring_takes_the_formula_and_a_cycle_per_hop(ring: int, times: int) -> None:
    roomy = BOOK.replace("switch.router_buffer_packets", 2 * ring)
    trace = broadcast_trace(ring, times, roomy)
    assert all(sum(got) == ring * times for got in trace)
    assert len(trace[0]) == ring * times + ring - 1
    assert trace[0].index(False) == ring * times  # the first slice never waits


def test_less_room_or_longer_links_never_make_it_faster() -> None:
    cycles = [
        len(broadcast_trace(8, 4, BOOK.replace(f"switch.{name}", value))[0])
        for name, values in (("router_buffer_packets", (16, 2, 1)), ("hop_cycles", (1, 2, 3)))
        for value in values
    ]
    assert cycles[:3] == sorted(cycles[:3])
    assert cycles[3:] == sorted(cycles[3:])
