"""How the requests of a transfer meet HBM's channels, banks and rows.

An address picks its channel by a documented XOR of its bits, so an access pattern may favour few
channels, or change rows at every request. What counts is the order of requests: a controller
looks at 64 waiting requests per channel and serves those of an open row first (FR-FCFS).

The innermost loops are looked at request by request, up to a few thousand; the loops around them
shift that pattern, and a shift by a multiple of the pattern's size permutes channels by an XOR, so
their histograms combine by XOR convolution. Where a region lies permutes the channels too and
changes no maximum: regions count as lying at multiples of 512 MB, beyond the bits of the hash.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .machine import Machine

Array = np.ndarray
Loop = tuple[int, int]
"""(steps, bytes per step)"""

SAMPLE = 8192
"""Requests that are looked at one by one: four windows of a controller's queues."""
NIBBLE = 4
CHANNELS = 2 << NIBBLE
"""Channels that an address can name: a stack, and a nibble inside it."""


def channel_of(address: Array, machine: Machine) -> Array:
    """The channel of each address: the XOR of its nibbles, below the stack's bit."""
    nibble = np.zeros_like(address)
    for bit in machine.hbm.channel_nibble_bits:
        nibble ^= address >> bit
    stack = address >> machine.hbm.stack_bit & 1
    return stack << NIBBLE | nibble & ((1 << NIBBLE) - 1)


def channel_cycles(loops: Sequence[Loop], run: int, machine: Machine, sharers: int) -> float:
    """Cycles of the busiest channel while `sharers` PEs make these requests in step.

    `loops` come outermost first around runs of `run` bytes.
    """
    unit = machine.hbm.unit_bytes
    sample, outer = _split([*loops, (-(-run // unit), unit)])
    addresses = _addresses(sample)
    load = np.bincount(channel_of(addresses, machine), minlength=CHANNELS).astype(float)
    slowdown = _slowdown(addresses, load, machine)
    for n, stride in outer:
        shifts = channel_of(np.arange(n, dtype=np.int64) * stride, machine)
        load = _xor_convolution(load, np.bincount(shifts, minlength=CHANNELS))
    load *= CHANNELS / machine.hbm.channels
    plain = float(load.max()) * machine.hbm_unit_cycles
    return max(plain * sharers, plain * slowdown[0] * sharers, plain * slowdown[1])


def spread_cycles(requests: int, machine: Machine, sharers: int) -> float:
    """The same for requests that any channel may get."""
    return requests / machine.hbm.channels * machine.hbm_unit_cycles * sharers


def _split(loops: Sequence[Loop]) -> tuple[list[Loop], list[Loop]]:
    """(loops to look at, loops around them); the loop in between is divided."""
    inner: list[Loop] = []
    outer = [loop for loop in loops if loop[0] > 1]
    room = SAMPLE
    while outer and room > 1:
        n, stride = outer.pop()
        taken = min(n, 1 << (room.bit_length() - 1)) if n > room else n
        inner.insert(0, (taken, stride))
        if taken < n:
            outer.append((-(-n // taken), stride * taken))
        room //= taken
    return inner, outer


def _addresses(loops: Sequence[Loop]) -> Array:
    """i64: where each request of the loops goes, in order."""
    addresses = np.zeros(1, np.int64)
    for n, stride in loops:
        addresses = (addresses[:, None] + np.arange(n, dtype=np.int64) * stride).reshape(-1)
    return addresses


def _xor_convolution(left: Array, right: Array) -> Array:
    numbers = np.arange(len(left))
    combined: Array = left[numbers[:, None] ^ numbers] @ right
    return combined


def _slowdown(addresses: Array, load: Array, machine: Machine) -> tuple[float, float]:
    """How much longer channels take for changing rows, and for staying in one bank group.

    Both as a multiple of what the busiest channel takes from open rows.
    """
    hbm = machine.hbm
    channel = channel_of(addresses, machine)
    order = np.argsort(channel, kind="stable")
    channel, addresses = channel[order], addresses[order]
    first = np.searchsorted(channel, np.arange(CHANNELS))
    window = (np.arange(len(addresses)) - first[channel]) // hbm.queue_entries_per_channel
    place = channel * len(addresses) + window
    group = place << len(hbm.bank_group_bits) | _bits(addresses, hbm.bank_group_bits)
    bank = group << len(hbm.bank_bits) | _bits(addresses, hbm.bank_bits)
    base = load.max() * machine.hbm_unit_cycles
    rows = np.unique(np.stack([bank, addresses >> hbm.row_bit]), axis=1)[0]
    changes = _busiest(rows, len(hbm.bank_group_bits) + len(hbm.bank_bits), len(addresses))
    delays = hbm.column_delay_dram_cycles
    penalty = delays["same_bank_group"] / delays["different_bank_group"]
    in_group = _busiest(group, len(hbm.bank_group_bits), len(addresses))
    return (
        changes * hbm.row_conflict_cycles / base,
        in_group * machine.hbm_unit_cycles * penalty / base,
    )


def _bits(addresses: Array, bits: Sequence[int]) -> Array:
    """The named bits of each address as a number."""
    number = np.zeros_like(addresses)
    for bit in bits:
        number = number << 1 | addresses >> bit & 1
    return number


def _busiest(keys: Array, shift: int, windows: int) -> int:
    """Largest sum over a channel's windows of the most frequent key there; keys hold the place.

    A key that stands alone in its window follows nothing that it could conflict with.
    """
    names, counts = np.unique(keys, return_counts=True)
    counts = np.where(counts > 1, counts, 0)
    places, where = np.unique(names >> shift, return_inverse=True)
    most = np.zeros(len(places), np.int64)
    np.maximum.at(most, where, counts)
    return int(np.bincount(places // windows, weights=most).max())
