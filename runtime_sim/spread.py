"""How far times may be off: the ranges of a machine's numbers, carried through to cycles.

The rule is first order. Each number with a range is put to both ends of it, alone, and every
distinct command is costed again; the changes add up along the critical path, for a number is off
by the same amount wherever it is used. Numbers are independent of each other, so their changes
combine as the root of the sum of squares. What a change does to the order of things, that another
path may become critical, is not seen.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from ..backend_rngd.isa.cost import dma_cost, exec_cost
from ..backend_rngd.isa.machine import Machine
from ..backend_rngd.isa.plan import DmaPlan, Plan

Change = tuple[float, float]
"""Cycles more (or less, below 0) with a number at the low and at the high end of its range."""
EXEC_SECTIONS = frozenset(
    ("fetch", "commit", "stream", "switch", "contraction", "vector", "transpose", "control", "dm")
)
DMA_SECTIONS = frozenset(("chip", "hbm", "dm", "dma"))
"""Sections of a machine file that the costs of a command read."""


@dataclass(frozen=True)
class Spread:
    """What the ranges of a machine's numbers do to a time, by the number's name."""

    changes: Mapping[str, Change] = field(default_factory=lambda: MappingProxyType({}))

    def __add__(self, other: Spread) -> Spread:
        """The spread of a sum."""
        total = dict(self.changes)
        for name, (low, high) in other.changes.items():
            known = total.get(name, (0.0, 0.0))
            total[name] = (known[0] + low, known[1] + high)
        return Spread(MappingProxyType(total))

    def __mul__(self, times: int) -> Spread:
        """The spread of so many equal times, one after the other."""
        return Spread(
            MappingProxyType({n: (low * times, high * times) for n, (low, high) in self.items()})
        )

    def items(self) -> list[tuple[str, Change]]:
        return list(self.changes.items())

    @property
    def down(self) -> float:
        """Cycles by which the time may be shorter."""
        return math.hypot(*(min(0.0, *change) for change in self.changes.values()))

    @property
    def up(self) -> float:
        """Cycles by which the time may be longer."""
        return math.hypot(*(max(0.0, *change) for change in self.changes.values()))

    @property
    def dominant(self) -> str | None:
        """The number that matters most; None when all are exact."""
        sizes = {name: max(map(abs, change)) for name, change in self.changes.items()}
        name = max(sizes, key=lambda name: sizes[name], default=None)
        return name if name is not None and sizes[name] > 0 else None


@functools.lru_cache(maxsize=64)
def ranged(machine: Machine) -> tuple[tuple[str, tuple[Machine, Machine]], ...]:
    """Every number with a range: its name, and the machine with it at either end."""
    return tuple(
        (path, (machine.replace(path, p.low), machine.replace(path, p.high)))
        for path, p in machine.parameters.items()
        if p.low is not None and p.high is not None and p.low < p.high
    )


def command_spread(plan: Plan, machine: Machine, sharers: int) -> Spread:
    """The spread of one command's cycles."""
    sections = DMA_SECTIONS if isinstance(plan, DmaPlan) else EXEC_SECTIONS
    nominal = _cycles(plan, machine, sharers)
    changes: dict[str, Change] = {}
    for path, (low, high) in ranged(machine):
        if path.split(".")[0] in sections:
            change = tuple(_cycles(plan, end, sharers) - nominal for end in (low, high))
            if any(change):
                changes[path] = (change[0], change[1])
    return Spread(MappingProxyType(changes))


def number_spread(machine: Machine, path: str, times: int = 1) -> Spread:
    """The spread of `times` times the number itself, which is a count of cycles."""
    p = machine.parameters[path]
    assert isinstance(p.value, int | float)
    assert p.low is not None
    assert p.high is not None
    change = ((p.low - p.value) * times, (p.high - p.value) * times)
    return Spread(MappingProxyType({path: change} if any(change) else {}))


def _cycles(plan: Plan, machine: Machine, sharers: int) -> float:
    if isinstance(plan, DmaPlan):
        return dma_cost(plan, machine, sharers).total_cycles
    return exec_cost(plan, machine).total_cycles
