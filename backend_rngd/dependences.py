"""Which commands of a stretch must keep their order, before any buffer has an address.

Two commands depend on each other if both touch bytes of one buffer and one of them writes them.
Footprints are hulls, as in `isa.ordering`. A buffer of the register file that commands see in
different numbers of lanes counts as a whole, and so does a buffer in which the commands of a
repeat's body move at different paces: what they share changes from turn to turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from xdsl.ir import SSAValue

from .isa.instructions import Exec
from .isa.plan import SLICE_ADDRESS_BYTES, DmaPlan, ExecPlan, Footprint, Memory
from .isa.rules import SLICES_PER_PE
from .rngd import ArriveOp, DmaOp, ExecOp, steps_of

Command = ExecOp | DmaOp | ArriveOp
EVERYTHING = 1 << 62


class Touch(NamedTuple):
    """Bytes [low, high) of slices [slice_low, slice_high) of a buffer, before any repeat."""

    buffer: SSAValue
    low: int
    high: int
    slice_low: int
    slice_high: int
    write: bool
    pace: tuple[int, ...]
    """What has to be the same for two touches to be comparable: steps, lanes."""


def arrival(op: ArriveOp) -> list[Touch]:
    """What a message from a peer writes."""
    low = op.offset.value.data
    return [Touch(op.buffer, low, low + op.size.value.data, 0, SLICES_PER_PE, True, ())]


def touches(op: ExecOp | DmaOp, plan: ExecPlan | DmaPlan, ranks: int) -> list[Touch]:
    """What a command touches, port by port, on any of the ranks."""
    found = []
    for (name, buffer), footprint, base in zip(
        op.ports().items(), plan.footprints, _bases(plan), strict=True
    ):
        pace = steps_of(op, name)
        if footprint.memory == Memory.TRF and isinstance(plan, ExecPlan):
            pace = (*pace, plan.command.trf_lanes)
        touch = _touch(buffer, footprint, base, pace)
        found.append(touch._replace(high=touch.high + _spread_over_ranks(op, name, ranks)))
    return found


def _spread_over_ranks(op: ExecOp | DmaOp, port: str, ranks: int) -> int:
    """Bytes by which the places where ranks begin differ."""
    if not isinstance(op, DmaOp) or port == "index":
        return 0
    side = op.dma.source if port == "source" else op.dma.destination
    return (ranks - 1) * side.rank_stride


def _bases(plan: ExecPlan | DmaPlan) -> list[int]:
    command = plan.command
    if isinstance(command, Exec):
        assert isinstance(plan, ExecPlan)
        return [port.base for port in plan.ports]
    parts = (command.source, command.destination, command.index)
    return [part.base for part in parts if part is not None]


def _touch(buffer: SSAValue, f: Footprint, base: int, pace: tuple[int, ...]) -> Touch:
    shift = 0
    if f.memory == Memory.DM:
        shift, base = divmod(base, SLICE_ADDRESS_BYTES)
    slices = (f.slice_low + shift, f.slice_high + shift)
    if f.whole_region:
        return Touch(buffer, 0, EVERYTHING, *slices, f.write, pace)
    return Touch(buffer, base + f.low, base + f.high, *slices, f.write, pace)


def dependences(touched: Sequence[Sequence[Touch]]) -> list[tuple[int, ...]]:
    """For each command, the earlier ones that it must follow; those that follow from them may lack.

    `touched[i]` is what command i touches.
    """
    histories: dict[SSAValue, _History] = {}
    for touch in (touch for one in touched for touch in one):
        history = histories.setdefault(touch.buffer, _History(touch.pace))
        history.exact = history.exact and history.pace == touch.pace
        history.written = history.written or touch.write
    found = []
    for i, one in enumerate(touched):
        after: set[int] = set()
        for touch in one:
            history = histories[touch.buffer]
            if history.written:
                after |= history.conflicts(touch)
        for touch in one:
            if histories[touch.buffer].written:
                histories[touch.buffer].add(i, touch)
        found.append(tuple(sorted(after)))
    return found


class _History:
    """The touches of a buffer that later ones can still depend on."""

    def __init__(self, pace: tuple[int, ...]) -> None:
        self.pace = pace
        self.exact = True
        self.written = False
        self._reads: list[tuple[int, Touch]] = []
        self._writes: list[tuple[int, Touch]] = []

    def _seen(self, touch: Touch) -> Touch:
        if self.exact:
            return touch
        return Touch(touch.buffer, 0, EVERYTHING, 0, EVERYTHING, touch.write, ())

    def conflicts(self, touch: Touch) -> set[int]:
        """Commands that the one with this touch must follow."""
        now = self._seen(touch)
        past = [*self._writes, *self._reads] if now.write else self._writes
        return {i for i, old in past if _overlap(old, now)}

    def add(self, i: int, touch: Touch) -> None:
        """Remember the touch. A write hides what it covers: who conflicts with that follows it."""
        now = self._seen(touch)
        if not now.write:
            self._reads.append((i, now))
            return
        self._reads = [(j, old) for j, old in self._reads if j == i or not _covers(now, old)]
        self._writes = [(j, old) for j, old in self._writes if not _covers(now, old)]
        self._writes.append((i, now))


def _overlap(a: Touch, b: Touch) -> bool:
    return (
        a.low < b.high
        and b.low < a.high
        and a.slice_low < b.slice_high
        and b.slice_low < a.slice_high
    )


def _covers(a: Touch, b: Touch) -> bool:
    return (
        a.low <= b.low
        and b.high <= a.high
        and a.slice_low <= b.slice_low
        and b.slice_high <= a.slice_high
    )
