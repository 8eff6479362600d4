"""The simulated device: runs programs on real values.

    device = Device()
    device.load(program, source)            # where parameters come from; read when first used
    device.allocate_caches(program, slots)
    outputs = device.execute(program, {"input_ids": ..., ...})

Parameters, tables, KV caches and decoded weights are shared between programs, so a prefill and a
decode bucket of one model cost their weights once. The first run of a program checks it and binds
every call to views of the memories; later runs only compute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .. import errors
from ..backend_rngd.isa.expand import Issued, expand_block, expand_call, module_path
from ..backend_rngd.isa.ordering import check_order, summary
from ..backend_rngd.isa.plan import ExecPlan, Plan
from ..backend_rngd.isa.program import Call, Program, TensorIo
from .checks import check_dma, check_exec, work_of
from .dma_values import Sides, bind_dma
from .exec_values import Step, bind_exec
from .hbm import Region, TensorSource
from .initialised import check_initialised
from .loader import Loader
from .ranks import Chips, Rank
from .stages import Stage, reloaded, stages_of
from .tensor_io import check_inputs, element_view
from .weights import WeightCache

Array = np.ndarray
MAX_PROGRAM_WORK = 1 << 44
"""Products of a run: minutes, and enough for the prefill of a model with 8 billion parameters."""
LEAST_WORK = 1 << 22
"""What a command counts for at least."""


@dataclass(frozen=True)
class _Output:
    """An output's elements on each rank."""

    io: TensorIo
    parts: tuple[Array, ...]

    def value(self) -> Array:
        """A copy of the whole of it."""
        if self.io.cut is None:
            return self.parts[0].copy()
        return self.io.cut.assemble(self.parts)


@dataclass(frozen=True)
class _Bound:
    """A program with its addresses resolved."""

    inputs: dict[str, tuple[Array, ...]]
    """For each stage."""
    outputs: dict[str, _Output]
    steps: tuple[Step, ...]


class Device:
    """Processing elements with their HBM: one for each rank of each stage of its programs."""

    def __init__(self, *, weight_cache_bytes: int | None = None) -> None:
        """`weight_cache_bytes`: room for decoded weights; by default half of the host's memory."""
        self._chips: dict[tuple[int, int], Chips] = {}
        """The slices by number of ranks and stage."""
        self._starts: dict[Program, tuple[int, ...]] = {}
        """Calls that begin pipeline stages."""
        self._weights = WeightCache(weight_cache_bytes)
        self._loader = Loader()
        self._bound: dict[Program, _Bound] = {}
        self._passes: dict[tuple[int, ...], tuple[Plan, Step]] = {}
        """Bound passes by memory, plan and addresses; the plan is kept so that its id stays its."""

    def load(
        self, program: Program, source: TensorSource, stage_starts: Sequence[int] = ()
    ) -> None:
        """Let the program's parameters come from `source`, which is asked when they are used.

        `source(name)` gives a checkpoint tensor in its own layout: bf16, or f16 or f32, which are
        rounded. A parameter that another program has loaded keeps its source. The calls
        `stage_starts` each begin another pipeline stage, on memories of its own. Raises: SIM029.
        """
        stages_of(program, stage_starts)
        self._starts[program] = tuple(stage_starts)
        self._bound.pop(program, None)
        self._loader.give_source(program, source)

    def allocate_caches(self, program: Program, slots: int) -> None:
        """Make KV caches with `slots` slots, filled with NaN, for the program's layers and ranks.

        Caches that other programs have allocated with as many slots are shared and keep their
        content; a different number of slots makes new ones.
        Raises: SIM019 if the host's memory is too small for them.
        """
        if self._loader.allocate_caches(program, slots):
            self._bound.clear()

    def cache(self, layer: int, rank: int = 0) -> Array:
        """u8[slots, slot bytes]: a rank's KV cache of a layer, writable. Raises: SIM022."""
        io, buffer = self._loader.cache(layer, rank)
        return buffer.content().reshape(-1, io.slot_bytes)

    def execute(self, program: Program, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run `program` once: name -> array for its outputs, put together from its ranks.

        Ranks go in step, command by command. Raises: SIM020 (inputs), SIM022 (not loaded), SIM001
        to SIM007, SIM010 to SIM018, SIM023 to SIM026 (the program breaks a rule), SIM013 (an input
        is out of range), SIM019 and SIM028 (the host's memory), SIM021 (a tensor does not fit).
        """
        check_inputs(program.inputs, inputs)
        try:
            return self._run(program, inputs)
        except MemoryError:
            raise errors.host_memory_exhausted(program.bucket) from None

    def _run(self, program: Program, inputs: Mapping[str, Array]) -> dict[str, Array]:
        bound = self._bound.get(program)
        if bound is None:
            bound = self._bind(program)
            self._bound[program] = bound
        for name, targets in bound.inputs.items():
            for target in targets:
                target[...] = inputs[name]
        with np.errstate(all="ignore"):
            for step in bound.steps:
                step()
        self._loader.forget_placed()
        return {name: output.value() for name, output in bound.outputs.items()}

    def _bind(self, program: Program) -> _Bound:
        check_order(program)
        stages = stages_of(program, self._starts.get(program, ()))
        regions = [self._loader.regions(program) for _ in stages]
        _check_program_work(program)
        steps: list[Step] = []
        for number, stage in enumerate(stages):
            if number:
                steps.append(_send(stage, regions[number - 1], regions[number]))
            steps += self._bind_stage(program, number, stage, regions[number])

        def name(call: Call, issued: Issued) -> str:
            return place(program, call, issued)

        check_initialised(program, stages, regions[0][0], name)
        inputs, outputs = {}, {}
        for number, table in enumerate(program.regions):
            if table.input is not None:
                contents = [of_stage[0][number].content() for of_stage in regions]
                for content in contents:
                    content[:] = 0
                inputs[table.input.name] = tuple(element_view(table.input, c) for c in contents)
            if table.output is not None:
                io = table.output
                parts = tuple(element_view(io, own[number].content()) for own in regions[-1])
                outputs[io.name] = _Output(io, parts)
        return _Bound(inputs, outputs, tuple(steps))

    def _bind_stage(
        self, program: Program, number: int, stage: Stage, regions: Sequence[Sequence[Region]]
    ) -> Iterator[Step]:
        """`regions` are those of each rank of the stage."""
        key = (len(regions), number)
        if key not in self._chips:
            self._chips[key] = Chips(len(regions))
        chips = self._chips[key]
        ranks = [Rank(*pair) for pair in zip(chips.of_rank, regions, strict=True)]
        for call, issued in reloaded(program, stage):
            yield from self._bind_command(program, call, issued, chips, ranks)
        for call in program.calls[stage.calls.start : stage.calls.stop]:
            for issued in expand_call(program, call).issued:
                yield from self._bind_command(program, call, issued, chips, ranks)

    def _bind_command(
        self, program: Program, call: Call, issued: Issued, chips: Chips, ranks: Sequence[Rank]
    ) -> Iterator[Step]:
        """The command on all ranks."""
        registers = expand_call(program, call).registers

        def where() -> str:
            return place(program, call, issued)

        if isinstance(issued.plan, ExecPlan):
            resolved = tuple(a.resolve(registers) for a in issued.addresses)
            yield from self._bind_pass(issued.plan, resolved, chips, where)
            return
        for rank, own in enumerate(ranks):
            resolved = tuple(a.resolve(registers, rank) for a in issued.addresses)
            check_dma(issued, rank, resolved, own.regions, own.memory.slices, where)
            sides = Sides.of(issued.plan.command, rank, ranks)
            yield bind_dma(issued.plan, resolved, sides, self._weights, where)

    def _bind_pass(
        self, plan: ExecPlan, resolved: tuple[int, ...], chips: Chips, where: Callable[[], str]
    ) -> Iterator[Step]:
        """One step for each group of ranks that runs the pass together."""
        together = 1 << plan.command.group
        for first in range(0, len(chips.of_rank), together):
            memory = chips.of_group(first, together)
            key = (id(memory), id(plan), *resolved)
            if key not in self._passes:
                check_exec(plan, resolved, memory.slices, where)
                self._passes[key] = plan, bind_exec(plan, resolved, memory, self._weights, where)
            yield self._passes[key][1]


def _send(
    stage: Stage, before: Sequence[Sequence[Region]], after: Sequence[Sequence[Region]]
) -> Step:
    """Each rank's bytes of one stage to the same rank of the next."""
    copies = []
    for piece in stage.sends:
        part = slice(piece.offset, piece.offset + piece.size)
        for old, new in zip(before, after, strict=True):
            copies.append((new[piece.region].content()[part], old[piece.region].content()[part]))

    def send() -> None:
        for target, content in copies:
            target[...] = content

    return send


def _check_program_work(program: Program) -> None:
    """Raises: SIM018."""
    work_of_block = {
        i: sum(max(work_of(issued.plan), LEAST_WORK) for issued in expand_block(program, block))
        for i, block in enumerate(program.blocks)
    }
    work = sum(work_of_block[call.block] for call in program.calls)
    if work > MAX_PROGRAM_WORK:
        raise errors.too_much_work(program.bucket, "the program", work, MAX_PROGRAM_WORK)


def place(program: Program, call: Call, issued: Issued) -> str:
    """A command as errors name it: its module, then its block, entry and kind."""
    module = module_path(program, call, issued.command)
    block = program.blocks[call.block].name
    where = f"{block}[{issued.entry}] {summary(issued)}"
    return f"{module}: {where}" if module else where
