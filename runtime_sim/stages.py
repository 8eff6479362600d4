"""Pipeline stages: a program's calls, cut where the container says that they may be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .. import errors
from ..backend_rngd.isa.expand import Issued, expand_call
from ..backend_rngd.isa.program import Call, Piece, Program, Reload


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


def starts_after_layers(program: Program, layers: Sequence[int]) -> tuple[int, ...]:
    """Where stages begin that have so many layers each: layers are told apart by their caches.

    What comes before the first layer is the first stage's, what comes behind the last the last's.
    A layer begins with the first call that has its module. Raises: SIM029.
    """
    used = _cache_users(program)
    starts: list[int] = []
    first = 0
    for count in layers[:-1]:
        first += count
        prefix = program.calls[min(used[first])].prefix if first in used else None
        begin = max(used.get(first - 1, [0])) + 1
        own = [i for i in range(begin, len(program.calls)) if program.calls[i].prefix == prefix]
        starts.append(own[0] if own else len(program.calls))
    stages_of(program, starts)
    return tuple(starts)


def _cache_users(program: Program) -> dict[int, list[int]]:
    """For each layer, the calls that use its KV cache."""
    users: dict[int, list[int]] = {}
    for number, call in enumerate(program.calls):
        for binding in call.bindings:
            cache = program.regions[binding.region].cache
            if cache is not None:
                users.setdefault(cache.layer, []).append(number)
    return users


def reloaded(program: Program, stage: Stage) -> Iterator[tuple[Call, Issued]]:
    """The transfers that a stage makes first, and the calls whose registers they have."""
    for reload in stage.reloads:
        call = program.calls[reload.call]
        issued = expand_call(program, call).issued
        yield call, next(command for command in issued if command.entry == reload.entry)
