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
from ..backend_rngd.isa.container import Call, Program, TensorIo
from ..backend_rngd.isa.expand import Issued, expand_block, expand_call, module_path
from ..backend_rngd.isa.ordering import check_order, summary
from ..backend_rngd.isa.plan import ExecPlan, Plan
from .checks import check_dma, check_exec, work_of
from .dma_values import Sides, bind_dma
from .exec_values import Step, bind_exec
from .hbm import TensorSource
from .initialised import check_initialised
from .loader import Loader
from .ranks import Chips, Rank
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

    inputs: dict[str, Array]
    outputs: dict[str, _Output]
    steps: tuple[Step, ...]


class Device:
    """Processing elements with their HBM: as many as the ranks of the programs that it runs."""

    def __init__(self, *, weight_cache_bytes: int | None = None) -> None:
        """`weight_cache_bytes`: room for decoded weights; by default half of the host's memory."""
        self._chips: dict[int, Chips] = {}
        """The slices by number of ranks."""
        self._weights = WeightCache(weight_cache_bytes)
        self._loader = Loader()
        self._bound: dict[Program, _Bound] = {}
        self._passes: dict[tuple[int, ...], tuple[Plan, Step]] = {}
        """Bound passes by memory, plan and addresses; the plan is kept so that its id stays its."""

    def load(self, program: Program, source: TensorSource) -> None:
        """Let the program's parameters come from `source`, which is asked when they are used.

        `source(name)` gives a checkpoint tensor in its own layout: bf16, or f16 or f32, which are
        rounded. A parameter that another program has loaded keeps its source.
        """
        self._loader.give_source(program, source)

    def allocate_caches(self, program: Program, slots: int) -> None:
        """Make KV caches with `slots` slots, filled with NaN, for the program's layers and ranks.

        Caches that other programs have allocated with as many slots are shared and keep their
        content; a different number of slots makes new ones.
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
        for name, target in bound.inputs.items():
            target[...] = inputs[name]
        with np.errstate(all="ignore"):
            for step in bound.steps:
                step()
        self._loader.forget_placed()
        return {name: output.value() for name, output in bound.outputs.items()}

    def _bind(self, program: Program) -> _Bound:
        check_order(program)
        regions = self._loader.regions(program)
        _check_program_work(program)
        count = program.header.tensor_parallel_size
        if count not in self._chips:
            self._chips[count] = Chips(count)
        chips = self._chips[count]
        ranks = [Rank(*pair) for pair in zip(chips.of_rank, regions, strict=True)]
        steps = tuple(
            step for call in program.calls for step in self._bind_call(program, call, chips, ranks)
        )

        def name(call: Call, issued: Issued) -> str:
            return place(program, call, issued)

        check_initialised(program, regions[0], name)
        inputs, outputs = {}, {}
        for number, table in enumerate(program.regions):
            if table.input is not None:
                content = regions[0][number].content()
                content[:] = 0
                inputs[table.input.name] = element_view(table.input, content)
            if table.output is not None:
                io = table.output
                parts = tuple(element_view(io, own[number].content()) for own in regions)
                outputs[io.name] = _Output(io, parts)
        return _Bound(inputs, outputs, steps)

    def _bind_call(
        self, program: Program, call: Call, chips: Chips, ranks: Sequence[Rank]
    ) -> Iterator[Step]:
        expanded = expand_call(program, call)
        for issued in expanded.issued:

            def where(issued: Issued = issued) -> str:
                return place(program, call, issued)

            if isinstance(issued.plan, ExecPlan):
                resolved = tuple(a.resolve(expanded.registers) for a in issued.addresses)
                yield from self._bind_pass(issued.plan, resolved, chips, where)
                continue
            for rank, own in enumerate(ranks):
                resolved = tuple(a.resolve(expanded.registers, rank) for a in issued.addresses)
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
