"""A program's run command by command, for traces: the same clock as `timing.py`, unrolled."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..backend_rngd.isa.instructions import Context, Dma, Exec, Instruction
from ..backend_rngd.isa.machine import Machine
from ..backend_rngd.isa.program import Program
from .blocks import Costs, row_name, run_clock
from .clock import Event, Events


@dataclass(frozen=True, slots=True)
class TimedCommand:
    """One command at one time. Cycles count from the program's launch."""

    call: int
    entry: int
    """Its place in the block's issue list; repeats issue an entry more than once."""
    context: Context
    start: int
    end: int
    module: str
    kind: str
    """`contraction`, `vector` (passes with vector work alone), `move` or `dma`."""
    waits_for: tuple[int, ...]
    """Places in the timeline of the commands whose signals it takes."""


def timeline(program: Program, machine: Machine, *, sharers: int = 1) -> Iterator[TimedCommand]:
    """Every command of one run in program order, repeats unrolled.

    It begins after the launch; what `time_program` counts as finish follows its last command.
    Raises: VED011, SIM001 to SIM003, SIM005, SIM006.
    """
    costs = Costs(program, machine, sharers)
    clocks = [run_clock(program, block, costs) for block in program.blocks]
    index, time = 0, machine.control.launch_cycles
    for number, call in enumerate(program.calls):
        block = program.blocks[call.block]
        commands = program.block_commands(block)
        paths = [row_name(program, call, entry) for entry in block.provenance]
        for event, shift in _unrolled(clocks[call.block].events, time):
            command = event.command
            yield TimedCommand(
                call=number,
                entry=command.entry,
                context=Context(command.context),
                start=shift + event.start,
                end=shift + event.end,
                module=paths[command.link[0]],
                kind=_kind(commands[command.entry]),
                waits_for=tuple(index - ago for ago in event.waits_for),
            )
            index += 1
        time += clocks[call.block].end


def _kind(command: Instruction) -> str:
    if isinstance(command, Dma):
        return "dma"
    assert isinstance(command, Exec)
    if command.contraction is not None:
        return "contraction"
    return "vector" if command.vector.used else "move"


def _unrolled(events: Events, shift: int) -> Iterator[tuple[Event, int]]:
    """Events with the cycles by which they come later than recorded."""
    for event in events:
        if isinstance(event, Event):
            yield event, shift
        else:
            for iteration in range(event.count):
                yield from _unrolled(event.events, shift + iteration * event.period)
