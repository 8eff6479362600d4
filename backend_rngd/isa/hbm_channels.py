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

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .machine import Machine

Array = np.ndarray
Loop = tuple[int, int]
"""(steps, bytes per step)"""

SAMPLE = 8192
"""Requests that are looked at one by one: four windows of a controller's queues."""
BANKS = 1 << 8
"""More than the banks of a channel."""


@dataclass(frozen=True)
class AddressMap:
    """Which bits of an address say what, and how many requests a controller sees."""

    nibble_width: int
    stack_bit: int
    channel_nibble_bits: tuple[int, ...]
    bank_bits: tuple[int, ...]
    bank_group_bits: tuple[int, ...]
    row_bit: int
    queue_entries: int
    unit_bytes: int

    @staticmethod
    @functools.cache
    def of(machine: Machine) -> AddressMap:
        hbm = machine.hbm
        return AddressMap(
            hbm.nibble_width,
            hbm.stack_bit,
            hbm.channel_nibble_bits,
            hbm.bank_bits,
            hbm.bank_group_bits,
            hbm.row_bit,
            hbm.queue_entries_per_channel,
            hbm.unit_bytes,
        )

    @property
    def channels(self) -> int:
        """Channels that an address can name: a stack, and a nibble inside it."""
        return 2 << self.nibble_width


@dataclass(frozen=True)
class Pattern:
    """What the busiest channel has to do for a transfer's requests."""

    requests: float
    row_changes: float
    """Requests that open a row of a bank in which a window holds several rows."""
    same_group: float
    """Requests of the bank group with the most, summed over windows."""


def channel_of(address: Array, bits: AddressMap) -> Array:
    """The channel of each address: the XOR of its nibbles, below the stack's bit."""
    nibble = np.zeros_like(address)
    for bit in bits.channel_nibble_bits:
        nibble ^= address >> bit
    stack = address >> bits.stack_bit & 1
    return stack << bits.nibble_width | nibble & ((1 << bits.nibble_width) - 1)


def channel_cycles(loops: Sequence[Loop], run: int, machine: Machine, sharers: int) -> float:
    """Cycles of the busiest channel while `sharers` PEs make these requests in step.

    `loops` come outermost first around runs of `run` bytes.
    """
    pattern = pattern_of(tuple(loops), run, AddressMap.of(machine))
    delays = machine.hbm.column_delay_dram_cycles
    penalty = delays["same_bank_group"] / delays["different_bank_group"]
    shared = max(
        pattern.requests * machine.hbm_unit_cycles,
        pattern.row_changes * machine.hbm.row_conflict_cycles,
    )
    own = pattern.same_group * machine.hbm_unit_cycles * penalty
    return max(shared * sharers, own)


@functools.lru_cache(maxsize=65536)
def pattern_of(loops: tuple[Loop, ...], run: int, bits: AddressMap) -> Pattern:
    """The requests of a transfer as the channels see them."""
    sample, outer = _split([*loops, (-(-run // bits.unit_bytes), bits.unit_bytes)])
    addresses = _addresses(sample)
    load = np.bincount(channel_of(addresses, bits), minlength=bits.channels).astype(float)
    looked_at = load.max()
    row_changes, same_group = _in_windows(addresses, bits)
    for n, stride in outer:
        shifts = channel_of(np.arange(n, dtype=np.int64) * stride, bits)
        load = _xor_convolution(load, np.bincount(shifts, minlength=bits.channels))
    requests = float(load.max())
    scale = requests / looked_at
    return Pattern(requests, row_changes * scale, same_group * scale)


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


def _in_windows(addresses: Array, bits: AddressMap) -> tuple[int, int]:
    """(row changes, requests of one bank group): the busiest channel's, window by window."""
    channel = channel_of(addresses, bits)
    order = np.argsort(channel, kind="stable")
    channel, addresses = channel[order], addresses[order]
    first = np.searchsorted(channel, np.arange(bits.channels))
    windows = len(addresses)
    window = (np.arange(windows) - first[channel]) // bits.queue_entries
    group = _bits(addresses, bits.bank_group_bits)
    bank = group << len(bits.bank_bits) | _bits(addresses, bits.bank_bits)
    in_group = group * bits.channels * windows + channel * windows + window
    changes = _row_changes(channel * BANKS + bank, window, addresses >> bits.row_bit)
    in_bank = bank * bits.channels * windows + channel * windows + window
    place = np.unique(in_group, return_inverse=True)[1]
    follows_one = np.bincount(place)[place] > 1
    places = bits.channels * windows
    return (
        _busiest(in_bank, changes, windows, places),
        _busiest(in_group, follows_one, windows, places),
    )


def _row_changes(bank: Array, window: Array, row: Array) -> Array:
    """Which requests open a row, when a window serves those of one row together.

    A bank that sees a single row opens it during the command's startup.
    """
    order = np.lexsort((row, window, bank))
    bank, row = bank[order], row[order]
    opens = np.ones(len(bank), bool)
    opens[1:] = (bank[1:] != bank[:-1]) | (row[1:] != row[:-1])
    opens &= np.bincount(bank, weights=opens)[bank] > 1
    changes = np.empty_like(opens)
    changes[order] = opens
    return changes


def _bits(addresses: Array, bits: Sequence[int]) -> Array:
    """The named bits of each address as a number."""
    number = np.zeros_like(addresses)
    for bit in bits:
        number = number << 1 | addresses >> bit & 1
    return number


def _busiest(keys: Array, counted: Array, windows: int, channel_windows: int) -> int:
    """Largest sum over a channel's windows of the key with the most counted requests there.

    A key is (bank or group, channel, window) in one number.
    """
    names, where = np.unique(keys, return_inverse=True)
    counts = np.bincount(where, weights=counted)
    places, at = np.unique(names % channel_windows, return_inverse=True)
    most = np.zeros(len(places))
    np.maximum.at(most, at, counts)
    return int(np.bincount(places // windows, weights=most).max())
