"""What must hold of a command's addresses before it is executed: bounds and alignment.

The decoder has checked what can be seen in a record. Here registers are known, so every map of a
pass or a transfer is held against its memory, its region and its buffer. Row numbers of index
lists are data: they are checked when they are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from .. import errors
from ..backend_rngd.isa.expand import Issued
from ..backend_rngd.isa.instructions import Birth, Dma, Exec, Indirect, Side, Space
from ..backend_rngd.isa.plan import (
    REGION_SHIFT,
    SLICE_ADDRESS_BYTES,
    DmaPlan,
    ExecPlan,
    Footprint,
    Memory,
    Plan,
    capacity_bytes,
)
from ..backend_rngd.isa.rules import DM_BYTES
from .axes import element_bytes
from .hbm import Region

Where = Callable[[], str]
MAX_STREAM = 1 << 29
"""Elements that one pass may stream: they are all held at once."""
MAX_WORK = 1 << 34
"""Products, elements or bytes of one command."""
DM_WRITE_BYTES = 8
"""Alignment of what the DMA engine writes to data memory."""


def check_exec(plan: ExecPlan, resolved: Sequence[int], slices: int, where: Where) -> None:
    """Raises: SIM010, SIM011, SIM015, SIM017, SIM018."""
    c = plan.command
    _check_work(plan.slices * plan.steps * c.stream.elements, MAX_STREAM, where)
    _check_work(work_of(plan), MAX_WORK, where)
    if plan.slices > slices:
        raise errors.no_such_slice(where(), f"the pass works in {plan.slices} slices", slices)
    _check_ring(plan, where)
    for port, footprint, address in zip(plan.ports, plan.footprints, resolved, strict=True):
        end = capacity_bytes(footprint.memory, c.file_lanes)
        _check_span(0, port.limit, end, f"a limit in {footprint.memory.name}", where)
        end = port.limit or end
        what = f"a {'write' if footprint.write else 'read'} of {footprint.memory.name}"
        _check_span(address + footprint.low, address + footprint.high, end, what, where)
        unit = 8 if footprint.write else element_bytes(port.dtype)
        if footprint.memory == Memory.VRF:
            unit = 4
        if footprint.memory == Memory.TRF:
            unit = element_bytes(port.dtype)
        _check_unit(address, unit, what, where)
    _check_vrf_strides(c, where)


def work_of(plan: Plan) -> int:
    """What a command computes: products, elements or bytes."""
    if isinstance(plan, DmaPlan):
        return plan.bytes
    c = plan.command
    return plan.slices * plan.steps * c.stream.elements * c.commit.lanes


def _check_work(amount: int, limit: int, where: Where) -> None:
    if amount > limit:
        raise errors.too_much_work(where(), "the command", amount, limit)


def _check_ring(plan: ExecPlan, where: Where) -> None:
    """Source slices stay in the ring of the slice that receives them."""
    c = plan.command
    steps = [((1 << d.bits), d.slices) for d in c.switch.digits]
    steps += [(k.n, k.slices) for k in c.counters if k.birth == Birth.SLICE]
    low = sum(min(0, v * (n - 1)) for n, v in steps)
    high = sum(max(0, v * (n - 1)) for n, v in steps)
    if low < 0 or high >= max(c.switch.ring, 1):
        what = f"packets come from slices {low} to {high} of a ring"
        raise errors.no_such_slice(where(), what, c.switch.ring)


def _check_vrf_strides(c: Exec, where: Where) -> None:
    v = c.vector
    for stride in (*(k.vrf for k in c.counters), v.vrf_lane, v.vrf_column, v.vrf_pair):
        _check_unit(stride, 4, "a stride of the VRF", where)


def check_dma(
    issued: Issued,
    rank: int,
    resolved: Sequence[int],
    regions: Sequence[Region],
    slices: int,
    where: Where,
) -> None:
    """A transfer that `rank` executes; every rank has as many slices and such regions.

    Raises: SIM010, SIM011, SIM014, SIM015, SIM017, SIM018.
    """
    plan = issued.plan
    assert isinstance(plan, DmaPlan)
    _check_work(work_of(plan), MAX_WORK, where)
    c = plan.command
    source, destination, *index = plan.footprints
    _check_side(c.source, source, resolved[0], regions, slices, where)
    _check_side(c.destination, destination, resolved[1], regions, slices, where)
    for side, address, at in zip(
        (c.source, c.destination), issued.addresses, resolved, strict=False
    ):
        if side.limit:
            start = address.offset_of(rank)
            _check_limit(side, c, start, at - start, regions, slices, where)
    if c.destination.space == Space.DM:
        for value in (resolved[1], c.run, *c.destination.strides):
            _check_unit(value, DM_WRITE_BYTES, "a write to DM by DMA", where)
    elif not regions[resolved[1] >> REGION_SHIFT].writable:
        name = regions[resolved[1] >> REGION_SHIFT].name
        raise errors.read_only_region(where(), name)
    if c.index is not None:
        walks = c.source if c.indirect == Indirect.SOURCE else c.destination
        if walks.space != Space.HBM:
            raise errors.not_executable(where(), "an index list that addresses data memory")
        _check_hbm(index[0], resolved[2], regions, where)
        _check_unit(resolved[2], 4, "the address of an index list", where)
        for stride in c.index.strides:
            _check_unit(stride, 4, "a stride of an index list", where)


def _check_limit(
    side: Side,
    c: Dma,
    offset: int,
    register: int,
    regions: Sequence[Region],
    slices: int,
    where: Where,
) -> None:
    """A side's limit lies in its memory, and the side before its limit."""
    room = slices * SLICE_ADDRESS_BYTES
    if side.space == Space.HBM:
        room = regions[register >> REGION_SHIFT].size - (register & ((1 << REGION_SHIFT) - 1))
    _check_span(0, side.limit, room, "a limit, relative to its register,", where)
    end = offset + _reach(side, c.n) + c.run
    _check_span(0, end, side.limit, "a transfer, relative to its register,", where)


def _reach(side: Side, n: Iterable[int]) -> int:
    """Bytes from a side's base to its last run, rows of an index list aside."""
    return sum(max(0, v * (k - 1)) for k, v in zip(n, side.strides, strict=True))


def _check_side(
    side: Side,
    footprint: Footprint,
    address: int,
    regions: Sequence[Region],
    slices: int,
    where: Where,
) -> None:
    if side.space == Space.HBM:
        _check_hbm(footprint, address, regions, where)
        return
    first, local = divmod(address, SLICE_ADDRESS_BYTES)
    low, high = first + footprint.slice_low, first + footprint.slice_high
    if low < 0 or high > slices:
        what = f"a transfer touches slices {low} to {high - 1}"
        raise errors.no_such_slice(where(), what, slices)
    _check_span(local + footprint.low, local + footprint.high, DM_BYTES, "a transfer in DM", where)


def _check_hbm(footprint: Footprint, address: int, regions: Sequence[Region], where: Where) -> None:
    number, offset = address >> REGION_SHIFT, address & ((1 << REGION_SHIFT) - 1)
    if not 0 <= number < len(regions):
        raise errors.out_of_bounds(where(), "a transfer in HBM", address, address, 0)
    region = regions[number]
    what = f"a transfer in region {region.name}"
    _check_span(offset + footprint.low, offset + footprint.high, region.size, what, where)


def _check_span(low: int, high: int, end: int, what: str, where: Where) -> None:
    if low < 0 or high > end:
        raise errors.out_of_bounds(where(), what, low, high, end)


def _check_unit(value: int, unit: int, what: str, where: Where) -> None:
    if value % unit:
        raise errors.misaligned(where(), what, value, unit)
