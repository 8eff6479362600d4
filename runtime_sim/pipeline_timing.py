"""Times of pipeline stages: what each takes, what is sent between them, and who is slowest.

A step goes through the stages one after the other, so its time is their sum and that of the sends.
Stages work on different steps at the same time, so the slowest one says how many there are in a
second; those of one card then share its HBM. What a stage loads again at its beginning counts as
one transfer after the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..backend_rngd.isa.cost import dma_cost
from ..backend_rngd.isa.instructions import Context, Dma, Head, Side, Space
from ..backend_rngd.isa.machine import Machine
from ..backend_rngd.isa.plan import DmaPlan, plan_dma
from ..backend_rngd.isa.program import Program
from .stages import Stage, reloaded, stages_of
from .timing import ProgramTiming, time_program

RUN_BYTES = 1 << 16
"""Bytes of a run when results are copied inside a card."""


@dataclass(frozen=True)
class StageTiming:
    """One stage in one step; bytes are a rank's."""

    timing: ProgramTiming
    """Of its calls, launch and finish included."""
    reload_cycles: int
    sent_bytes: int
    """What it gets from the stage before."""
    send_cycles: int
    busy_cycles: int
    """From what it gets to its last result while the other stages of its card work too."""

    @property
    def cycles(self) -> int:
        """The same while they stand still."""
        return self.send_cycles + self.reload_cycles + self.timing.cycles


@dataclass(frozen=True)
class PipelineTiming:
    """A step through all stages."""

    stages: tuple[StageTiming, ...]

    @property
    def latency_cycles(self) -> int:
        """From the first stage's launch to the last one's finish."""
        return sum(stage.cycles for stage in self.stages)

    @property
    def slowest_cycles(self) -> int:
        """Between two steps' results when the pipeline is full."""
        return max(stage.busy_cycles for stage in self.stages)


def time_stages(
    program: Program,
    machine: Machine,
    starts: Sequence[int],
    *,
    sharers: int = 1,
    cards: Sequence[int] = (),
) -> PipelineTiming:
    """Time one step of `program` cut before the calls `starts`.

    `cards` names the card of each stage; without it each has one of its own. Raises: as
    `time_program`, SIM029.
    """
    stages = stages_of(program, starts)
    cards = cards or range(len(stages))
    ranks = program.header.tensor_parallel_size
    found = []
    for number, stage in enumerate(stages):
        sizes = [piece.size for piece in stage.sends]
        across = number > 0 and cards[number] != cards[number - 1]
        send = send_cycles(sizes, ranks, machine, across_cards=across)
        alone = max(sharers, ranks)
        timing, reload_cycles = _work(program, stage, machine, alone)
        busy = send + reload_cycles + timing.cycles
        together = sum(card == cards[number] for card in cards)
        if together > 1:
            busy_timing, busy_reload = _work(program, stage, machine, alone * together)
            busy = send + busy_reload + busy_timing.cycles
        found.append(StageTiming(timing, reload_cycles, sum(sizes), send, busy))
    return PipelineTiming(tuple(found))


def _work(
    program: Program, stage: Stage, machine: Machine, sharers: int
) -> tuple[ProgramTiming, int]:
    """A stage's calls, and the cycles of what it loads again before them."""
    plans = [issued.plan for _, issued in reloaded(program, stage)]
    reloads = [
        dma_cost(plan, machine, sharers).total_cycles for plan in plans if isinstance(plan, DmaPlan)
    ]
    return time_program(program, machine, sharers=sharers, calls=stage.calls), sum(reloads)


def send_cycles(sizes: Sequence[int], ranks: int, machine: Machine, *, across_cards: bool) -> int:
    """Cycles to bring so many bytes of each rank to the next stage.

    On one card each rank's DMA engine copies inside HBM. Between cards all ranks' bytes go over
    PCIe one after the other, behind the latency of a transfer from card to card.
    """
    if not sizes:
        return 0
    if across_cards:
        moved = sum(sizes) * ranks / machine.exchange.pcie_bytes_per_cycle
        return machine.exchange.p2p_latency_cycles + math.ceil(moved)
    return sum(_copy_cycles(size, ranks, machine) for size in sizes)


def _copy_cycles(size: int, ranks: int, machine: Machine) -> int:
    runs, run = -(-size // RUN_BYTES), min(size, RUN_BYTES)
    copy = Dma(
        head=Head(Context.DMA),
        n=(runs,),
        run=run,
        source=Side(Space.HBM, 0, (RUN_BYTES,)),
        destination=Side(Space.HBM, 0, (RUN_BYTES,)),
    )
    return dma_cost(plan_dma(copy, "send"), machine, ranks).total_cycles
