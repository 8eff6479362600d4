"""Finds reads of bytes that nothing has written, before a program runs for the first time.

Addresses do not depend on data (but for rows of index lists, which only name parameters, tables
and KV caches), so one walk over the program with a shadow of the memories, in which a byte is
0xFF once it is written, finds every such read. Execution itself then pays nothing.

On-chip memories start unwritten with each run of the program, so nothing can be left over from
another one. What is read is what is evaluated: lanes and columns that are not committed, and
slices that do not work, may hold anything. Copying unwritten HBM to data memory is not yet a
fault; reading the copy is. KV caches count as written: unused slots hold NaN and are selected
away. A call that only repeats an earlier one for another layer is not walked again, because
what was written stays written.

Ranks write the same bytes of their memories at the same time, so one shadow stands for all of them,
unless addresses depend on the rank or passes work on several: then each rank has its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from .. import errors
from ..backend_rngd.isa.expand import Issued, call_registers, expand_call
from ..backend_rngd.isa.instructions import MAX_RANKS, Control, Exec, Indirect, Sink, Space
from ..backend_rngd.isa.plan import DmaPlan, ExecPlan, Memory
from ..backend_rngd.isa.program import Call, Program
from ..backend_rngd.isa.rules import DM_BYTES
from .axes import Axis, Pass
from .commit import WRITTEN, Commit
from .contraction import RegisterRows, group_axes
from .dma_values import End, Sides, bind_end, region_of
from .exec_values import PortAddresses, is_move, pass_of, rows_window, store_target, store_window
from .hbm import Buffer, Region
from .memory import ChipMemory
from .ranks import Chips, Rank
from .register_file import LaneWindow
from .stages import Stage, reloaded
from .stream import StreamReader
from .tensor_io import element_view
from .vector import VectorProgram

Array = np.ndarray
Namer = Callable[[Call, Issued], str]


def check_initialised(
    program: Program, stages: Sequence[Stage], regions: Sequence[Region], name: Namer
) -> None:
    """Walk `program`, each stage on memories of its own.

    Raises: SIM012 (a read), SIM023 (an output that is not all written).
    """
    ranks = _shadows(program)
    shadow = _Shadow(regions, ranks)
    for number, stage in enumerate(stages):
        if number:
            shadow = shadow.next_stage(stage, regions)
        for call, issued in reloaded(program, stage):
            shadow.visit(issued, call_registers(call), lambda: name(call, issued))  # noqa: B023
        _walk(program, stage, shadow, regions, name)
    for number, region in enumerate(program.regions):
        if region.output is not None:
            for content in shadow.contents(number):
                missing = np.argwhere(element_view(region.output, content) == 0)
                if len(missing):
                    raise errors.unwritten_output(region.output.name, str(missing[0].tolist()))


def _walk(
    program: Program, stage: Stage, shadow: _Shadow, regions: Sequence[Region], name: Namer
) -> None:
    walked: set[tuple[object, ...]] = set()
    for call in program.calls[stage.calls.start : stage.calls.stop]:
        expanded = expand_call(program, call)
        key = (call.block, *_tracked_bindings(call, regions))
        if key in walked:
            continue
        walked.add(key)
        for issued in expanded.issued:
            shadow.visit(issued, expanded.registers, lambda: name(call, issued))  # noqa: B023


def _shadows(program: Program) -> int:
    """Ranks whose memories can differ in what has been written."""
    commands = [c for c in program.commands if not isinstance(c, Control)]
    differ = any(
        c.group if isinstance(c, Exec) else c.source.rank_stride or c.destination.rank_stride
        for c in commands
    )
    return program.header.tensor_parallel_size if differ else 1


def _tracked_bindings(call: Call, regions: Sequence[Region]) -> list[tuple[int, int, int]]:
    """(register, region, offset); regions that are not tracked are all alike."""
    return [
        (b.register_number, *((b.region, b.offset) if regions[b.region].tracked else (-1, 0)))
        for b in call.bindings
    ]


class _Shadow:
    """For each byte of the chips and of the tracked regions: 0xFF if it has been written."""

    def __init__(self, regions: Sequence[Region], ranks: int) -> None:
        self._chips = Chips(ranks, fill=0)
        self._ranks = [
            Rank(memory, [_unwritten(r) if r.tracked else r for r in regions])
            for memory in self._chips.of_rank
        ]

    def next_stage(self, stage: Stage, regions: Sequence[Region]) -> _Shadow:
        """The memories of `stage`, which has only what it is sent."""
        after = _Shadow(regions, len(self._ranks))
        for piece in stage.sends:
            part = slice(piece.offset, piece.offset + piece.size)
            pairs = zip(self.contents(piece.region), after.contents(piece.region), strict=True)
            for old, new in pairs:
                new[part] = old[part]
        return after

    def contents(self, number: int) -> list[Array]:
        """Each rank's bytes of a region."""
        return [rank.regions[number].content() for rank in self._ranks]

    def visit(self, issued: Issued, registers: Sequence[int], where: Callable[[], str]) -> None:
        plan = issued.plan
        if isinstance(plan, ExecPlan):
            resolved = [address.resolve(registers) for address in issued.addresses]
            together = 1 << plan.command.group
            for first in range(0, len(self._ranks), together):
                _Pass(self._chips.of_group(first, together)).visit(plan, resolved, where)
            return
        for rank in range(len(self._ranks)):
            resolved = [address.resolve(registers, rank) for address in issued.addresses]
            # A single shadow is everybody's, also that of any peer.
            ranks = self._ranks if len(self._ranks) > 1 else self._ranks * MAX_RANKS
            _transfer(plan, resolved, Sides.of(plan.command, rank, ranks), where)


class _Pass:
    """What a pass reads and writes on chip."""

    def __init__(self, chip: ChipMemory) -> None:
        self._chip = chip

    def visit(self, plan: ExecPlan, resolved: Sequence[int], where: Callable[[], str]) -> None:
        work, at = pass_of(plan), PortAddresses.of(plan, resolved)
        reads = _Reads(plan, resolved, self._chip, where)
        for port, address in enumerate((at.a, at.b)[: 1 + plan.command.stream.pair]):
            if plan.command.generate is not None:
                break
            reader = StreamReader(work, port, work.axes, raw=True)
            if reader.gathers:
                reads.check_hull(port)
                continue
            reads.check(port, lambda: reader.view(self._chip.dm, DM_BYTES, address))  # noqa: B023
        order, shapes = work.axes, [tuple(axis.n for axis in work.axes)]
        if plan.command.switch.bitmap is not None:
            reads.check_hull(len(plan.ports) - 2)
        if plan.command.contraction is not None:
            groups = group_axes(work, shared=False)
            order, shapes = groups.result, [groups.result_shape]
            window = rows_window(work, at, self._chip)
            window.load(plan.slices)
            rows = RegisterRows(work, groups)
            if plan.command.trf.dtype.bits < 8:
                span = plan.footprints[1]
                reads.check_lanes(1, window, at.trf + span.low, at.trf + span.high)
            else:
                reads.check(1, lambda: rows.view(window, at.trf), window.buffer)
        if plan.uses_vrf:
            self._check_vrf(work, at, order, shapes, reads)
        sink = plan.command.commit.sink
        if sink == Sink.DM:
            raw = is_move(work)
            Commit(work, order, at.commit, self._chip, raw).mark()
        elif sink == Sink.VRF:
            _mark(store_target(work, at.commit, self._chip.vrf))
        else:
            store = store_window(work, at, self._chip)
            start, lane_bytes = store.start + at.commit, store.lane_bytes
            store.load(plan.slices)
            _mark(store_target(work, start, store.buffer, lane_bytes))
            store.store(plan.slices)

    def _check_vrf(
        self,
        work: Pass,
        at: PortAddresses,
        order: Sequence[Axis],
        shapes: list[tuple[int, ...]],
        reads: _Reads,
    ) -> None:
        """Compiling the units asks for exactly the operands that they read."""
        vector = work.plan.command.vector
        port = len(work.plan.ports) - 2 - (work.plan.command.switch.bitmap is not None)

        def register(shape: tuple[int, ...], strides: tuple[int, ...], group: int) -> Array:
            start = at.vrf + group * vector.vrf_pair
            view = np.ndarray(shape, np.int32, self._chip.vrf, start, strides)
            reads.check(port, lambda: view)
            return view

        VectorProgram(work, order, shapes * (1 + work.plan.command.stream.pair), False, register)


# --- transfers ---


def _transfer(
    plan: DmaPlan, resolved: Sequence[int], sides: Sides, where: Callable[[], str]
) -> None:
    c = plan.command
    source = bind_end(c.source, resolved[0], sides.source)
    target = bind_end(c.destination, resolved[1], sides.destination)
    if c.source.space == Space.DM:
        dm = sides.source.memory.dm
        _must_be_written(source.view(c.n, c.run, 1), dm, Memory.DM, where)
        content = None
    else:
        tracked = region_of(resolved[0], sides.source.regions).tracked
        content = source if tracked and c.indirect == Indirect.NONE else None
    if c.destination.space == Space.HBM:
        region = region_of(resolved[1], sides.destination.regions)
        if not region.tracked:
            return
        if c.indirect == Indirect.DESTINATION:
            region.content()[:] = WRITTEN
            return
    _copy(content, target, c.n, c.run)


def _copy(content: End | None, target: End, n: Sequence[int], run: int) -> None:
    """Copy marks; without `content` everything is written."""
    view = target.view(n, run, 1)
    view[...] = WRITTEN if content is None else content.view(n, run, 1)


def _unwritten(region: Region) -> Region:
    shadow = Buffer(region.name, region.size, writable=True, tracked=True)
    shadow.content()[:] = 0
    return shadow


def _mark(target: Array) -> None:
    """Set every byte of the elements."""
    target.view(f"i{target.itemsize}")[...] = -1


class _Reads:
    """Checks what the ports of one pass read."""

    def __init__(
        self,
        plan: ExecPlan,
        resolved: Sequence[int],
        chip: ChipMemory,
        where: Callable[[], str],
    ) -> None:
        self._plan, self._resolved, self._chip, self._where = plan, resolved, chip, where

    def check(self, port: int, elements: Callable[[], Array], window: Array | None = None) -> None:
        """`elements` gives a view of all that is read, in `window` for the TRF. Raises: SIM012."""
        f, base = self._plan.footprints[port], self._resolved[port]
        if window is not None:
            _must_be_written(elements(), window, f.memory, self._where)
            return
        memory = self._chip.vrf if f.memory == Memory.VRF else self._chip.dm
        # Most buffers are written from end to end, which is quick to see.
        hull = memory[: self._plan.slices, base + f.low : base + f.high]
        if not hull.all():
            _must_be_written(elements(), memory, f.memory, self._where)

    def check_hull(self, port: int) -> None:
        """All bytes of data memory between the first and the last that is read. Raises: SIM012."""
        f, base = self._plan.footprints[port], self._resolved[port]
        hull = self._chip.dm[: self._plan.slices, base + f.low : base + f.high]
        _must_be_written(hull, self._chip.dm, f.memory, self._where)

    def check_lanes(self, port: int, window: LaneWindow, low: int, high: int) -> None:
        """Bytes [low, high) of every lane that a contraction uses. Raises: SIM012."""
        shape = (self._plan.slices, self._plan.command.commit.lanes, high - low)
        strides = (window.buffer.shape[1], window.lane_bytes, 1)
        lanes = np.ndarray(shape, np.uint8, window.buffer, window.start + low, strides)
        memory = self._plan.footprints[port].memory
        _must_be_written(lanes, window.buffer, memory, self._where)


def _must_be_written(view: Array, memory: Array, which: Memory, where: Callable[[], str]) -> None:
    """`view` is a part of `memory`. Raises: SIM012, with the first place that is unwritten."""
    missing = view.view(f"i{view.itemsize}") != -1
    if missing.any():
        index = np.unravel_index(int(missing.argmax()), missing.shape)
        start = view.ctypes.data - memory.ctypes.data
        at = start + sum(int(i) * s for i, s in zip(index, view.strides, strict=True))
        slice_number, byte = divmod(at, memory.shape[1])
        raise errors.uninitialised_read(
            where(), f"a read of {which.name}", f"byte {byte:#x} of slice {slice_number}"
        )
