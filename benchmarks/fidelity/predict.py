"""Times of rows, from the bytes of their mappings."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import correlation, mean, median

from furiosa_llm.backend_rngd.isa.container import read_program
from furiosa_llm.backend_rngd.isa.machine import Machine
from furiosa_llm.backend_rngd.isa.program import Program
from furiosa_llm.runtime_sim.spread import Spread
from furiosa_llm.runtime_sim.timing import ProgramTiming, interval_us, time_program

from .rows import Row


@dataclass(frozen=True)
class Prediction:
    """A row's value with its interval; load rates are relative to the mean of their rows."""

    row: Row
    measured: float
    value: float
    low: float | None
    high: float | None
    """Both None for rates relative to each other: what is uncertain scales them all alike."""
    cycles: int
    """Without launch and finish, which a union of commands' times does not hold."""
    dominant: str | None

    @property
    def error(self) -> float:
        """Of the prediction, as a share of the measurement."""
        return self.value / self.measured - 1

    @property
    def inside(self) -> bool | None:
        if self.low is None or self.high is None:
            return None
        return self.low <= self.measured <= self.high

    def without(self, share_low: float, share_high: float) -> Prediction:
        """The interval without an independent part, given by its ends as shares of the value."""
        if self.low is None or self.high is None:
            return self
        down = math.sqrt(max(0.0, (self.value - self.low) ** 2 - (share_low * self.value) ** 2))
        up = math.sqrt(max(0.0, (self.high - self.value) ** 2 - (share_high * self.value) ** 2))
        return replace(self, low=self.value - down, high=self.value + up)

    @property
    def width(self) -> float | None:
        if self.low is None or self.high is None:
            return None
        return (self.high - self.low) / self.value


def programs(rows: Sequence[Row]) -> list[Program]:
    """What a loader would read: the rows' binaries, decoded."""
    return [read_program(row.build()) for row in rows]


def work_cycles(row: Row, program: Program, machine: Machine) -> int:
    """Cycles between launch and finish that the row is about, without intervals."""
    timing = time_program(program, exact(machine))
    return timing.cycles - _left_out_cycles(row, timing, machine)


@functools.cache
def exact(machine: Machine) -> Machine:
    """The machine with all its numbers taken as exact: quicker to time."""
    for path, parameter in machine.parameters.items():
        if isinstance(parameter.value, int | float) and parameter.low != parameter.high:
            machine = machine.replace(path, parameter.value)
    return machine


def predict(
    rows: Sequence[Row], decoded: Sequence[Program], machine: Machine, sharers: int
) -> list[Prediction]:
    """Each row's prediction on `machine` while `sharers` PEs run it in step and share HBM."""
    found = [
        _time(row, program, machine, sharers) for row, program in zip(rows, decoded, strict=True)
    ]
    rates = [p for p in found if p.row.kind == "load-rate"]
    times = [p for p in found if p.row.kind != "load-rate"]
    return [*times, *_relative(rates)]


FRAME = ("control.launch_cycles", "control.finish_cycles")
"""What a union of commands' times does not hold."""


def _left_out_cycles(row: Row, timing: ProgramTiming, machine: Machine) -> int:
    """Of the frame, and of what the row takes as given."""
    given = sum(m.cycles for m in timing.modules if m.path == row.given)
    return machine.control.launch_cycles + machine.control.finish_cycles + given


def _time(row: Row, program: Program, machine: Machine, sharers: int) -> Prediction:
    timing = time_program(program, machine, sharers=sharers)
    cycles = timing.cycles - _left_out_cycles(row, timing, machine)
    own = {name: change for name, change in timing.spread.items() if name not in FRAME}
    low, high, dominant = interval_us(cycles, Spread(own), machine)
    value = machine.microseconds(cycles)
    return Prediction(row, row.measured, value, low, high, cycles, dominant)


def _relative(rates: Sequence[Prediction]) -> list[Prediction]:
    """Times as rates, both sides divided by their means: how many PEs took part is unknown."""
    if not rates:
        return []
    measured = mean(p.measured for p in rates)
    level = mean(p.row.moved_bytes / p.cycles for p in rates)

    def scaled(p: Prediction) -> Prediction:
        value = p.row.moved_bytes / p.cycles / level
        return Prediction(p.row, p.measured / measured, value, None, None, p.cycles, None)

    return [scaled(p) for p in rates]


@dataclass(frozen=True)
class Summary:
    """Of the rows of one kind."""

    rows: int
    mean_error: float
    rank_correlation: float | None
    """Spearman's; None where predictions or measurements have no order."""
    inside: float | None
    """Share of the rows with an interval; None if none has one."""
    median_width: float | None

    @staticmethod
    def of(predictions: Sequence[Prediction]) -> Summary:
        inside = [p.inside for p in predictions if p.inside is not None]
        widths = [p.width for p in predictions if p.width is not None]
        return Summary(
            len(predictions),
            mean(abs(p.error) for p in predictions),
            _rank_correlation(predictions),
            mean(inside) if inside else None,
            median(widths) if widths else None,
        )


def _rank_correlation(predictions: Sequence[Prediction]) -> float | None:
    """Correlation of the ranks, equal values sharing theirs; None where all share one."""
    ranks = [_ranks([p.value for p in predictions]), _ranks([p.measured for p in predictions])]
    if any(len(set(values)) < 2 for values in ranks):
        return None
    return correlation(*ranks)


def _ranks(values: Sequence[float]) -> list[float]:
    return [
        sum(v < value for v in values) + sum(v == value for v in values) / 2 for value in values
    ]
