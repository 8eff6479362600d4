"""Pipeline stages: a program's calls, cut where the container says that they may be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .. import errors
from ..backend_rngd.isa.container import Call, Piece, Program, Reload
from ..backend_rngd.isa.expand import Issued, expand_call


@dataclass(frozen=True)
class Stage:
    """Calls that run on PEs of their own, and what they need of the stages before."""

    calls: range
    sends: tuple[Piece, ...] = ()
    """Bytes that come from the stage before, at the same places of the same regions."""
    reloads: tuple[Reload, ...] = ()
    """Transfers to data memory that come first."""


def stages_of(program: Program, starts: Sequence[int]) -> tuple[Stage, ...]:
    """The stages that begin with calls 0 and `starts`. Raises: SIM029."""
    cuts = {cut.call: cut for cut in program.header.stage_cuts}
    for start in starts:
        if start not in cuts or list(starts) != sorted(set(starts)):
            raise errors.no_stage_cut(program.bucket, list(starts), sorted(cuts))
    ends = [*starts, len(program.calls)]
    found = [Stage(range(ends[0]))]
    for start, end in zip(starts, ends[1:], strict=True):
        found.append(Stage(range(start, end), cuts[start].sends, cuts[start].reloads))
    return tuple(found)


def reloaded(program: Program, stage: Stage) -> Iterator[tuple[Call, Issued]]:
    """The transfers that a stage makes first, and the calls whose registers they have."""
    for reload in stage.reloads:
        call = program.calls[reload.call]
        issued = expand_call(program, call).issued
        yield call, next(command for command in issued if command.entry == reload.entry)
