"""The fits behind machines/silicon.yaml: one constant for all layers, one for sums over PEs.

`dma.startup_cycles` is the one with the smallest mean absolute error over all dense and attention
rows, at the documented clock, found on a grid. Cycles are timed from the bytes at three startups
and interpolated between them. With one half or one group of rows left out the fit is repeated, and
these are predicted by a constant that has not seen them. A fit with the clock free as well tells
whether the documented clock is the right one. (The other constant, `model.time_factor`, is fitted
in `coverage.py`.)

`exchange.message_cycles` is the one whose largest error over the three all-reduce rows is smallest,
with everything else as it stands.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from furiosa_llm.backend_rngd.isa.machine import Machine
from furiosa_llm.backend_rngd.isa.program import Program

from .coverage import fitted_half
from .predict import work_cycles
from .rows import Row

STARTUP = "dma.startup_cycles"
TIMED = (450, 625, 800)
"""Startups at which rows are timed."""
STARTUPS = np.arange(450, 801, 5)
CLOCKS_GHZ = np.arange(180, 221) / 200
DOCUMENTED = 20
"""Where 1 GHz stands in `CLOCKS_GHZ`."""
MESSAGE = "exchange.message_cycles"
TIMED_MESSAGES = (600, 900, 1200)
"""Far beyond a command's length, so that messages wait for each other and cycles are linear."""
MESSAGES = np.arange(600, 1201, 5)
Array = np.ndarray


@dataclass(frozen=True)
class MessageFit:
    """Cycles of a message, for all rows, and the error of each row by a fit without it."""

    message_cycles: int
    error: float
    """The largest of the rows'."""
    left_out: dict[str, tuple[int, float]]
    """Row -> (the fit of the others, the row's error with it)."""


def fit_message(rows: Sequence[Row], decoded: Sequence[Program], machine: Machine) -> MessageFit:
    """The fit of the all-reduce rows."""
    pairs = [(r, p) for r, p in zip(rows, decoded, strict=True) if r.kind == "all-reduce"]
    machines = [machine.replace(MESSAGE, message) for message in TIMED_MESSAGES]
    timed = [[work_cycles(row, program, m) for m in machines] for row, program in pairs]
    cycles = np.array([np.interp(MESSAGES, TIMED_MESSAGES, row) for row in timed])
    measured = np.array([row.measured for row, _ in pairs])
    errors = cycles / (machine.chip.clock_hertz * 1e-6) / measured[:, None] - 1
    best = int(np.abs(errors).max(axis=0).argmin())
    left_out = {}
    for i, (row, _) in enumerate(pairs):
        others = np.delete(np.abs(errors), i, axis=0)
        own = int(others.max(axis=0).argmin())
        left_out[row.name] = (int(MESSAGES[own]), float(errors[i, own]))
    return MessageFit(int(MESSAGES[best]), float(np.abs(errors[:, best]).max()), left_out)


@dataclass(frozen=True)
class Fit:
    """Constants and the mean absolute error of the rows that they were chosen for."""

    startup_cycles: int
    clock_ghz: float
    error: float
    error_of_others: float | None
    """Of the rows that they were not chosen for, if there are any."""


@dataclass(frozen=True)
class LeftOut:
    """A group of rows predicted by the constant that the other groups ask for."""

    group: str
    rows: int
    startup_cycles: int
    error: float


class Fitter:
    """Timed rows; fits are arithmetic on their cycles."""

    def __init__(self, rows: Sequence[Row], decoded: Sequence[Program], machine: Machine) -> None:
        pairs = [
            (row, program)
            for row, program in zip(rows, decoded, strict=True)
            if row.kind in ("dense", "attention")
        ]
        self._groups = [row.group for row, _ in pairs]
        measured = np.array([row.measured for row, _ in pairs])
        machines = [machine.replace(STARTUP, startup) for startup in TIMED]
        cycles = [
            [work_cycles(row, program, other) for other in machines] for row, program in pairs
        ]
        at = np.array([np.interp(STARTUPS, TIMED, row) for row in cycles])
        us = at[:, :, None] / (CLOCKS_GHZ * 1e3)
        self._errors: Array = np.abs(us / measured[:, None, None] - 1)
        """[row, startup, clock]"""

    def fit(self, without: str | None = None) -> Fit:
        """The startup for all rows, or for all but one group's, at the documented clock."""
        return self._fit(np.array([group != without for group in self._groups]))

    def fit_half(self) -> Fit:
        """The startup for every second row alone."""
        return self._fit(np.array(fitted_half(len(self._groups))))

    def fit_with_clock(self) -> Fit:
        """Startup and clock together, for all rows."""
        errors = self._errors.mean(axis=0)
        i, j = np.unravel_index(int(errors.argmin()), errors.shape)
        return Fit(int(STARTUPS[i]), float(CLOCKS_GHZ[j]), float(errors[i, j]), None)

    def _fit(self, used: Array) -> Fit:
        errors = self._errors[:, :, DOCUMENTED]
        i = int(errors[used].mean(axis=0).argmin())
        others = float(errors[~used, i].mean()) if not used.all() else None
        return Fit(int(STARTUPS[i]), 1.0, float(errors[used, i].mean()), others)

    def leave_one_group_out(self) -> list[LeftOut]:
        """Each group in the order of its first row."""
        return [self._left_out(group) for group in dict.fromkeys(self._groups)]

    def _left_out(self, group: str) -> LeftOut:
        startup = self.fit(without=group).startup_cycles
        i = int(np.abs(STARTUPS - startup).argmin())
        own = self._errors[[g == group for g in self._groups]][:, i, DOCUMENTED]
        return LeftOut(group, len(own), startup, float(own.mean()))
