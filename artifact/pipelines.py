"""`pipelines` of `artifact.json`: a bucket's binary as tasks, one for each pipeline stage.

All stages run the same binary, each its own calls. What a stage has left in HBM for later ones goes
through a `send` and a `recv` of one group, as bytes of each rank; KV caches stay where they are.
Stages are those of the build: a loader may cut the calls elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..backend_rngd.isa.instructions import Dma
from ..backend_rngd.isa.program import Call, Piece, Program
from ..runtime_sim.stages import Stage, reloaded, stages_of, starts_after_layers
from .schema import PipelineTensor, StageCalls, Supertask


@dataclass(frozen=True)
class Tasks:
    """What a pipeline's JSON says about a program in stages."""

    supertasks: dict[str, Supertask]
    sent: dict[str, PipelineTensor]
    """Tensors between stages."""
    stages: tuple[StageCalls, ...]


def tasks_of(program: Program, blocks: Sequence[int], blob: str) -> Tasks:
    """The tasks of a program whose stages have so many transformer blocks.

    Raises: SIM029 if the program cannot be cut there.
    """
    starts = starts_after_layers(program, blocks) if len(blocks) > 1 else ()
    stages = stages_of(program, starts)
    inputs = tuple(io.name for io in program.inputs)
    outputs = tuple(io.name for io in program.outputs)
    tasks = [Supertask(kind="input", inputs=(), outputs=inputs)]
    for number, stage in enumerate(stages):
        given = _names(program, number, stage.sends)
        last = number == len(stages) - 1
        made = outputs if last else _names(program, number, stages[number + 1].sends, sent=True)
        if number:
            before = _names(program, number - 1, stage.sends, sent=True)
            tasks += _exchanges(number, before, given)
        tasks.append(
            Supertask(
                kind="edf",
                inputs=(*_read(program, stage), *given),
                outputs=made,
                device=str(number),
                data_blob=blob,
            )
        )
    tasks.append(Supertask(kind="output", inputs=outputs, outputs=()))
    return Tasks(
        {str(number): task for number, task in enumerate(tasks)},
        dict(_sent(program, stages)),
        tuple(
            StageCalls(device=str(number), first=stage.calls.start, end=stage.calls.stop)
            for number, stage in enumerate(stages)
        ),
    )


def _exchanges(stage: int, before: Sequence[str], after: Sequence[str]) -> Iterator[Supertask]:
    """A send of the stage before for each tensor, and the recv of it."""
    for number, (gives, takes) in enumerate(zip(before, after, strict=True)):
        group = f"{stage - 1}-{stage}.{number}"
        yield Supertask(
            kind="send", inputs=(gives,), outputs=(), device=str(stage - 1), group=group
        )
        yield Supertask(kind="recv", inputs=(), outputs=(takes,), device=str(stage), group=group)


def _sent(program: Program, stages: Sequence[Stage]) -> Iterator[tuple[str, PipelineTensor]]:
    for number, stage in enumerate(stages[1:], start=1):
        for names in (
            _names(program, number - 1, stage.sends, sent=True),
            _names(program, number, stage.sends),
        ):
            for name, piece in zip(names, stage.sends, strict=True):
                yield name, PipelineTensor(shape=(piece.size,), dtype="u8")


def _names(
    program: Program, stage: int, pieces: Sequence[Piece], *, sent: bool = False
) -> tuple[str, ...]:
    """What one stage calls bytes that it has got, or has to send."""
    side = "sent" if sent else "received"
    return tuple(
        f"stage.{stage}.{side}.{program.regions[piece.region].name}.{piece.offset}"
        for piece in pieces
    )


def _read(program: Program, stage: Stage) -> tuple[str, ...]:
    """The inputs and parameters that a stage's calls, or what it loads first, are bound to."""
    calls = program.calls[stage.calls.start : stage.calls.stop]
    regions = {binding.region for call in calls for binding in call.bindings}
    for call, issued in reloaded(program, stage):
        assert isinstance(issued.command, Dma)
        regions |= _regions(call, issued.command)
    tables = [program.regions[number] for number in sorted(regions)]
    inputs = [table.input.name for table in tables if table.input is not None]
    parameters = [table.parameter.tensor for table in tables if table.parameter is not None]
    return tuple(dict.fromkeys((*inputs, *parameters)))


def _regions(call: Call, command: Dma) -> set[int]:
    """Regions that a transfer's registers point at."""
    index = () if command.index is None else (command.index.register,)
    registers = {command.source.register, *index}
    return {b.region for b in call.bindings if b.register_number in registers}
