"""How many rows lie inside their intervals, with and without what is unknown of the model itself.

`model.time_factor` is 1 with a range [1 / f, f]. `f` is the least that puts a stated share of one
half of the rows inside; how many of the other half are inside then is a test of it. A row's
interval has parts from the machine's other numbers, which are independent of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from furiosa_llm.backend_rngd.isa.machine import Machine

from .predict import Prediction, Summary

FACTOR = "model.time_factor"
SHARE = 0.85
"""Of the fitted half, to lie inside."""


def fitted_half(count: int) -> list[bool]:
    """Which rows constants are fitted to: the first, the third, ... in the order of the files."""
    return [i % 2 == 0 for i in range(count)]


@dataclass(frozen=True)
class Coverage:
    """The factor that the fitted half asks for, and shares of rows inside their intervals."""

    factor: float
    fitted_half: Summary
    other_half: Summary
    without_factor: Summary
    """All rows, with the model taken as exact."""


def coverage(predictions: Sequence[Prediction], machine: Machine) -> Coverage:
    """Of predictions with an interval, on the machine that made them."""
    rows = [p for p in predictions if p.low is not None]
    halves = fitted_half(len(rows))
    own = machine.parameters[FACTOR]
    assert own.low is not None
    assert own.high is not None
    narrow = [p.without(1 - own.low, own.high - 1) for p in rows]
    needed = sorted(needed_factor(p) for p, used in zip(narrow, halves, strict=True) if used)
    return Coverage(
        needed[min(len(needed), math.ceil((len(needed) + 1) * SHARE)) - 1],
        Summary.of([p for p, used in zip(rows, halves, strict=True) if used]),
        Summary.of([p for p, used in zip(rows, halves, strict=True) if not used]),
        Summary.of(narrow),
    )


def needed_factor(p: Prediction) -> float:
    """The least f whose range [1 / f, f] puts the measurement inside, given the other parts."""
    assert p.low is not None
    assert p.high is not None
    missed = abs(p.measured - p.value)
    if p.measured > p.value:
        return 1 + math.sqrt(max(0.0, missed**2 - (p.high - p.value) ** 2)) / p.value
    return 1 / (1 - math.sqrt(max(0.0, missed**2 - (p.value - p.low) ** 2)) / p.value)
