"""What exchanges between ranks cost, from the costs of the commands that they are made of.

Ranks do the same at the same time. A push is a DMA command into a peer's memory and a message: a
card delivers messages one after the other, one from each rank in turn, so a round takes
`ranks · exchange.message_cycles` after its transfer. The compiler chooses algorithms by these
formulas; what a program takes is for the simulator to say, which runs its commands.
"""

from __future__ import annotations

import functools
import math

from .cost import dma_cost, exec_cost
from .dtypes import DType
from .instructions import (
    Birth,
    Commit,
    Context,
    Counter,
    Digit,
    Dma,
    Exec,
    Fate,
    Head,
    Port,
    Reduce,
    Side,
    Space,
    Stream,
    Switch,
    Topology,
    Vector,
)
from .machine import Machine
from .plan import SLICE_ADDRESS_BYTES, plan_dma, plan_exec
from .rules import SLICES_PER_PE

LANES = 8
"""Elements that a pass adds up per cycle."""
SLICE_BITS = SLICES_PER_PE.bit_length() - 1


def message_cycles(machine: Machine, ranks: int) -> int:
    """From the end of a push until the last rank's message of that round has arrived."""
    return ranks * machine.exchange.message_cycles


def all_reduce_cycles(
    machine: Machine,
    ranks: int,
    bytes_per_rank: int,
    algorithm: str,
    *,
    mask: int | None = None,
    dtype: DType = DType.F32,
) -> int:
    """From a summand of `bytes_per_rank` on each of the program's `ranks` to the sum on all.

    Summed are the ranks that differ in bits of `mask` only; all of them without one. `dtype` is
    that of the summands. `algorithm` is `rotate`, `scatter_gather` (of all ranks) or `switch` (of
    2 or 4 ranks of a cluster); docs/cycles.md has the formulas.
    """
    mask = ranks - 1 if mask is None else mask
    group = 1 << mask.bit_count()
    match algorithm:
        case "rotate":
            part = _slice_bytes(bytes_per_rank, dtype)
            return _round(machine, ranks, mask, part) + _add_cycles(machine, group, part, dtype)
        case "scatter_gather":
            return _scatter_gather(machine, ranks, bytes_per_rank, dtype)
        case _:
            assert algorithm == "switch", algorithm
            assert mask in (1, 3), mask
            return _ring_cycles(machine, group, _slice_bytes(bytes_per_rank, dtype), dtype)


def all_gather_cycles(machine: Machine, ranks: int, bytes_per_rank: int) -> int:
    """From a part of `bytes_per_rank` on each rank to all parts on all ranks."""
    part = _slice_bytes(bytes_per_rank, DType.BF16)
    return _round(machine, ranks, ranks - 1, part) + ranks * _dma_cycles(machine, ranks, part, 0)


def reduce_scatter_cycles(
    machine: Machine, ranks: int, bytes_per_rank: int, *, dtype: DType = DType.F32
) -> int:
    """From a summand of `bytes_per_rank` on each rank to a part of the sum on each."""
    part = _slice_bytes(math.ceil(bytes_per_rank / ranks), dtype)
    return (
        _dma_cycles(machine, ranks, part, 0)
        + _round(machine, ranks, ranks - 1, part)
        + _add_cycles(machine, ranks, part, dtype)
    )


def _scatter_gather(machine: Machine, ranks: int, bytes_per_rank: int, dtype: DType) -> int:
    """Each rank sums its part of the tokens; the rounded sums spread by doubling."""
    scatter = reduce_scatter_cycles(machine, ranks, bytes_per_rank, dtype=dtype)
    elements = bytes_per_rank // dtype.bytes_for(1)
    rounded = math.ceil(DType.BF16.bytes_for(elements) / ranks)
    part, bits = _slice_bytes(rounded, DType.BF16), range((ranks - 1).bit_length())
    spread = sum(_round(machine, ranks, 1 << bit, part << bit) for bit in bits)
    return scatter + spread + ranks * _dma_cycles(machine, ranks, part, 0)


def _slice_bytes(bytes_per_rank: int, dtype: DType) -> int:
    """What each slice of a PE holds of a tensor that is spread over them, in whole packets."""
    packet = dtype.bytes_for(LANES)
    return math.ceil(bytes_per_rank / SLICES_PER_PE / packet) * packet


def _round(machine: Machine, ranks: int, mask: int, slice_bytes: int) -> int:
    """Pushes to all ranks that differ in bits of `mask`, after each of them said "go on".

    The engine sends one push after the other; each is a message that follows the ones before it.
    """
    peers = [peer for peer in range(1, mask + 1) if not peer & ~mask]
    message = message_cycles(machine, ranks)
    sent = arrived = 0
    for peer in peers:
        sent += _dma_cycles(machine, ranks, slice_bytes, peer)
        arrived = max(sent, arrived) + message
    return machine.exchange.signal_cycles + arrived + machine.exchange.signal_cycles


@functools.lru_cache(maxsize=4096)
def _dma_cycles(machine: Machine, ranks: int, slice_bytes: int, peer: int) -> int:
    """Every slice's bytes to the same slice of a peer, or to another place of its own."""
    transfer = Dma(
        head=Head(Context.DMA),
        n=(SLICES_PER_PE,),
        run=slice_bytes,
        source=Side(Space.DM, 0, (SLICE_ADDRESS_BYTES,)),
        destination=Side(Space.DM, slice_bytes, (SLICE_ADDRESS_BYTES,), peer=peer),
    )
    return dma_cost(plan_dma(transfer, ""), machine, ranks).total_cycles


def _add_cycles(machine: Machine, slots: int, slice_bytes: int, dtype: DType) -> int:
    """A pass that adds the slots up."""
    counters = (
        Counter(slice_bytes // dtype.bytes_for(LANES), a=dtype.bytes_for(LANES), commit=2 * LANES),
        Counter(slots, fate=Fate.VSUM, a=slice_bytes),
    )
    return _pass_cycles(machine, counters, dtype, Switch(), 0)


def _ring_cycles(machine: Machine, group: int, slice_bytes: int, dtype: DType) -> int:
    """A pass of `group` fused PEs that adds up what their slices of one number hold."""
    counters = (
        Counter(slice_bytes // dtype.bytes_for(LANES), a=dtype.bytes_for(LANES), commit=2 * LANES),
        Counter(group, birth=Birth.SLICE, slices=SLICES_PER_PE, fate=Fate.VSUM),
    )
    ring = Switch(Topology.BROADCAST1, group * SLICES_PER_PE, (Digit(0, SLICE_BITS, slices=1),))
    return _pass_cycles(machine, counters, dtype, ring, group.bit_length() - 1)


@functools.lru_cache(maxsize=4096)
def _pass_cycles(
    machine: Machine, counters: tuple[Counter, ...], dtype: DType, switch: Switch, group: int
) -> int:
    command = Exec(
        head=Head(Context.MAIN),
        counters=tuple(counter for counter in counters if counter.n > 1),
        a=Port(0, dtype),
        stream=Stream(LANES, cast=None if dtype == DType.F32 else DType.F32),
        switch=switch,
        vector=Vector(reduce=Reduce.ADD),
        commit_port=Port(0, DType.BF16),
        commit=Commit(columns=LANES, column_stride=2),
        group=group,
    )
    return exec_cost(plan_exec(command, ""), machine).total_cycles
