"""Where a program's calls may be cut into pipeline stages, and what a cut has to bring along.

A stage begins with nothing but the model's inputs, parameters and tables. What earlier calls have
left in HBM for later ones is sent; constants that calls find in data memory because an earlier call
loaded them (`chain.py`) are loaded again. A cut through a layer's KV cache, or through results that
stand in data memory, is none. What is sent of a region is one run: it may be more than what is
read, never less.
"""

from __future__ import annotations

import functools
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from .isa.expand import Issued, expand_block
from .isa.instructions import Birth, Control, Dma, Exec, Space
from .isa.plan import SLICE_ADDRESS_BYTES, DmaPlan, ExecPlan, Footprint, Memory
from .isa.program import Block, Call, Header, Piece, Program, Reload, StageCut
from .isa.rules import DM_BYTES, SLICES_PER_PE

Span = tuple[int, int]
WHOLE: Span = (0, 1 << 40)
"""Of a region, whatever its size."""
MOST_RUNS = 1024
"""Transfers of more runs count as all bytes from the first run to the last."""


class Spans:
    """A set of bytes: disjoint spans in ascending order."""

    def __init__(self, spans: Iterable[Span] = ()) -> None:
        self._spans: list[Span] = []
        for span in spans:
            self.add(*span)

    def __iter__(self) -> Iterator[Span]:
        return iter(self._spans)

    def copy(self) -> Spans:
        other = Spans()
        other._spans = list(self._spans)
        return other

    def add(self, low: int, high: int) -> None:
        first = bisect_left(self._spans, low, key=_end)
        last = bisect_right(self._spans, high, key=_start)
        if first < last:
            low = min(low, self._spans[first][0])
            high = max(high, self._spans[last - 1][1])
        self._spans[first:last] = [(low, high)]

    def remove(self, low: int, high: int) -> None:
        first, last = self._between(low, high)
        if first < last:
            ends = (self._spans[first][0], low), (high, self._spans[last - 1][1])
            self._spans[first:last] = [part for part in ends if part[0] < part[1]]

    def common(self, low: int, high: int) -> list[Span]:
        """What it has of [low, high)."""
        first, last = self._between(low, high)
        return [(max(a, low), min(b, high)) for a, b in self._spans[first:last]]

    def _between(self, low: int, high: int) -> tuple[int, int]:
        """The first span that has some of these bytes, and the one after the last."""
        first = bisect_right(self._spans, low, key=_end)
        return first, bisect_left(self._spans, high, key=_start)


def _start(span: Span) -> int:
    return span[0]


def _end(span: Span) -> int:
    return span[1]


@dataclass
class _Use:
    """What a block does to a memory: bytes read before it writes them, and bytes written."""

    reads: Spans = field(default_factory=Spans)
    writes: Spans = field(default_factory=Spans)
    fills: Spans = field(default_factory=Spans)
    """Bytes that are certainly written, every one."""

    def read(self, low: int, high: int) -> None:
        left = Spans([(low, high)])
        for span in self.fills:
            left.remove(*span)
        for span in left:
            self.reads.add(*span)


@dataclass
class _BlockUse:
    """A block's use of data memory, and of HBM by register, relative to the register's value."""

    dm: _Use = field(default_factory=_Use)
    hbm: dict[int, _Use] = field(default_factory=dict)
    owned: dict[int | None, Spans] = field(default_factory=dict)
    """What each transfer of its list, or something else, has written last in data memory."""


class _Slices:
    """Slices that all commands treat alike, as parts of one row of bytes.

    Byte b of part p has number p · 512 KB + b, so that sets of bytes need not know of slices.
    """

    def __init__(self, program: Program) -> None:
        bounds = {0, SLICES_PER_PE}
        for block in program.blocks:
            for issued in expand_block(program, block):
                for address, f in zip(issued.addresses, issued.plan.footprints, strict=True):
                    if f.memory == Memory.DM:
                        bounds |= set(_slices(issued, address.offset, f))
        self._bounds = sorted(bounds)

    def spans(self, issued: Issued, at: int, f: Footprint) -> Iterator[Span]:
        """The bytes of a footprint around an address."""
        local = at % SLICE_ADDRESS_BYTES if isinstance(issued.plan, DmaPlan) else at
        low, high = _slices(issued, at, f)
        for part, (first, end) in enumerate(pairwise(self._bounds)):
            if low <= first and end <= high:
                start = part * DM_BYTES + local
                yield start + f.low, start + f.high


def _slices(issued: Issued, at: int, f: Footprint) -> tuple[int, int]:
    """First slice and the one past the last; of a group's pass those of one rank."""
    plan = issued.plan
    low, high = f.slice_low, f.slice_high
    if isinstance(plan, DmaPlan):
        shift = at // SLICE_ADDRESS_BYTES
        low, high = low + shift, high + shift
    elif not f.write and not plan.command.group and plan.command.switch.bitmap is None:
        low, high = _sources(plan)
    return min(low, SLICES_PER_PE), min(high, SLICES_PER_PE)


def _sources(plan: ExecPlan) -> tuple[int, int]:
    """The slices whose packets a pass reads, which the switch may bring to many more."""
    steps = [(axis.n, axis.slices) for axis in plan.slice_axes]
    steps += [(k.n, k.slices) for k in plan.counters if k.birth == Birth.SLICE]
    low = sum(min(0, (n - 1) * slices) for n, slices in steps)
    return low, sum(max(0, (n - 1) * slices) for n, slices in steps) + 1


def _block_use(program: Program, block: Block, slices: _Slices) -> _BlockUse:
    repeated = _repeated(program, block)
    scratch = _scratch_registers(program, block)
    use = _BlockUse()
    writers: dict[tuple[Span, int | None], None] = {}
    seen: set[tuple[object, ...]] = set()
    for issued in expand_block(program, block):
        for write in (False, True):
            ranks = program.header.tensor_parallel_size
            for touch in _touches(issued, write, slices, ranks, scratch):
                # Most accesses repeat one before them; a read may come after a write of its bytes.
                key = (write, *touch)
                if key not in seen:
                    seen.add(key)
                    _note(use, issued, write, *touch)
                if write and touch[0] is None:
                    loaded = isinstance(issued.command, Dma) and issued.entry not in repeated
                    writer = (touch[1], issued.entry if loaded else None)
                    writers.pop(writer, None)
                    writers[writer] = None
    for (low, high), owner in writers:
        for spans in use.owned.values():
            spans.remove(low, high)
        use.owned.setdefault(owner, Spans()).add(low, high)
    return use


def _note(
    use: _BlockUse, issued: Issued, write: bool, register: int | None, span: Span, dense: bool
) -> None:
    memory = use.dm if register is None else use.hbm.setdefault(register, _Use())
    if not write:
        memory.read(*span)
        return
    memory.writes.add(*span)
    # What a pass or a transfer leaves out of its hull in data memory, reading it is a fault.
    if dense or register is None:
        memory.fills.add(*span)


Touch = tuple[int | None, Span, bool]
"""The register, or None for data memory; bytes; whether all of them."""


def _touches(
    issued: Issued, write: bool, slices: _Slices, ranks: int, scratch: set[int]
) -> Iterator[Touch]:
    """Transfers between HBM and slices leave gaps; in `scratch` they are told apart."""
    footprints = zip(issued.addresses, issued.plan.footprints, strict=True)
    for number, (address, f) in enumerate(footprints):
        if f.write != write or f.memory not in (Memory.DM, Memory.HBM):
            continue
        register = address.register if address.register is not None else 0
        for rank in range(ranks if address.rank_stride else 1):
            at = address.offset_of(rank)
            if f.memory == Memory.DM:
                for span in slices.spans(issued, at, f):
                    yield None, span, True
            else:
                assert isinstance(issued.plan, DmaPlan)
                side = number if register in scratch else None
                for span, dense in _in_hbm(at, f, issued.plan, side):
                    yield register, span, dense


def _in_hbm(at: int, f: Footprint, plan: DmaPlan, side: int | None) -> Iterator[tuple[Span, bool]]:
    """The bytes of a footprint: run by run for the transfer's source (0) or destination (1)."""
    sides = plan.command.source, plan.command.destination
    if f.whole_region:
        yield WHOLE, False
    elif side is None or side >= len(sides) or plan.runs > MOST_RUNS:
        yield (at + f.low, at + f.high), plan.bytes == f.high - f.low
    else:
        for low, high in _runs(plan.command.n, sides[side].strides, plan.command.run):
            yield (at + low, at + high), True


@functools.lru_cache(maxsize=4096)
def _runs(counts: tuple[int, ...], strides: tuple[int, ...], run: int) -> tuple[Span, ...]:
    """What the loops of one side of a transfer touch."""
    starts = {0}
    for count, stride in zip(counts, strides, strict=True):
        starts = {start + i * stride for start in starts for i in range(count)}
    return tuple(Spans((start, start + run) for start in sorted(starts)))


def _scratch_registers(program: Program, block: Block) -> set[int]:
    """Registers through which a block's calls reach what other calls have left in HBM."""
    number = program.blocks.index(block)
    return {
        binding.register_number
        for call in program.calls
        if call.block == number
        for binding in call.bindings
        if program.regions[binding.region].scratch_bytes
    }


def _repeated(program: Program, block: Block) -> set[int]:
    """Entries inside repeats."""
    inside: set[int] = set()
    for i, command in enumerate(program.block_commands(block)):
        if isinstance(command, Control):
            inside.update(range(i + 1, i + 1 + command.length))
    return inside


def with_stage_cuts(program: Program) -> Program:
    """The program with all cuts between its calls at which a stage may begin."""
    cuts = tuple(_cuts(program))
    return Program(program.header.model_copy(update={"stage_cuts": cuts}), program.commands)


def _cuts(program: Program) -> Iterator[StageCut]:
    slices = _Slices(program)
    uses = [_block_use(program, block, slices) for block in program.blocks]
    calls, header = program.calls, program.header
    live = _live_before(header, calls, uses)
    crossed = _crossed_caches(header, calls)
    written: dict[int, Spans] = {}
    owners = _Owners(program)
    for number, call in enumerate(calls):
        dm, hbm = live[number]
        reloads = owners.of(dm)
        if number and not crossed[number] and reloads is not None:
            yield StageCut(call=number, sends=tuple(_sends(header, hbm, written)), reloads=reloads)
        use = uses[call.block]
        for region, span in _bound(header, call, use, "writes"):
            written.setdefault(region, Spans()).add(*span)
        owners.write(number, use)


def _live_before(
    header: Header, calls: Sequence[Call], uses: Sequence[_BlockUse]
) -> list[tuple[Spans, dict[int, Spans]]]:
    """For each call, the bytes that it or later calls read: of data memory, of regions."""
    dm = Spans()
    hbm = {
        i: Spans([(0, region.bytes_for(slots=0))])
        for i, region in enumerate(header.regions)
        if region.output is not None
    }
    found = []
    for call in reversed(calls):
        use = uses[call.block]
        for span in use.dm.writes:
            dm.remove(*span)
        for span in use.dm.reads:
            dm.add(*span)
        for region, span in _bound(header, call, use, "fills"):
            if region in hbm:
                hbm[region].remove(*span)
        for region, span in _bound(header, call, use, "reads"):
            hbm.setdefault(region, Spans()).add(*span)
        found.append((dm.copy(), {region: spans.copy() for region, spans in hbm.items()}))
    return found[::-1]


def _bound(header: Header, call: Call, use: _BlockUse, kind: str) -> Iterator[tuple[int, Span]]:
    """(region, bytes) of what a call does to scratch and outputs."""
    for binding in call.bindings:
        region = header.regions[binding.region]
        if binding.register_number in use.hbm and (region.output or region.scratch_bytes):
            size = region.bytes_for(slots=0)
            for low, high in getattr(use.hbm[binding.register_number], kind):
                span = min(low + binding.offset, size), min(high + binding.offset, size)
                if (low, high) == WHOLE:
                    span = (0, size)
                yield binding.region, span


def _crossed_caches(header: Header, calls: Sequence[Call]) -> list[bool]:
    """For each call, whether calls on both sides of its beginning use one KV cache."""
    users: dict[int, list[int]] = {}
    for number, call in enumerate(calls):
        for binding in call.bindings:
            if header.regions[binding.region].cache is not None:
                users.setdefault(binding.region, []).append(number)
    return [
        any(own[0] < number <= own[-1] for own in users.values()) for number in range(len(calls))
    ]


def _sends(header: Header, live: dict[int, Spans], written: dict[int, Spans]) -> Iterator[Piece]:
    for region in sorted(live.keys() & written.keys()):
        parts = [part for span in live[region] for part in written[region].common(*span)]
        if parts:
            low, high = min(parts)[0], max(high for _, high in parts)
            yield Piece(region=region, offset=low, size=high - low)


class _Owners:
    """Who wrote each byte of data memory last."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._spans: dict[tuple[int, int | None], Spans] = {}

    def write(self, number: int, use: _BlockUse) -> None:
        for spans in self._spans.values():
            for span in use.dm.writes:
                spans.remove(*span)
        self._spans |= {(number, entry): spans.copy() for entry, spans in use.owned.items()}
        self._spans = {owner: spans for owner, spans in self._spans.items() if list(spans)}

    def of(self, live: Spans) -> tuple[Reload, ...] | None:
        """The transfers that bring these bytes; None if something else made some of them."""
        left, found = live.copy(), []
        for (number, entry), spans in self._spans.items():
            common = [part for span in live for part in spans.common(*span)]
            if not common:
                continue
            if entry is None or not self._constant(number, entry):
                return None
            found.append(Reload(call=number, entry=entry))
            for part in common:
                left.remove(*part)
        if list(left):
            return None
        return tuple(sorted(found, key=lambda reload: (reload.call, reload.entry)))

    def _constant(self, number: int, entry: int) -> bool:
        """Whether a command loads what is the same on every stage."""
        call = self._program.calls[number]
        command = self._program.block_commands(self._program.blocks[call.block])[entry]
        assert isinstance(command, Exec | Dma)
        if not isinstance(command, Dma) or command.source.space != Space.HBM:
            return False
        if command.source.peer or command.destination.peer:
            return False
        bound = {b.register_number: self._program.regions[b.region] for b in call.bindings}
        registers = [command.source.register]
        if command.index is not None:
            registers.append(command.index.register)
        regions = [bound[register] for register in registers if register in bound]
        return len(regions) == len(registers) and all(
            region.parameter or region.derived or region.input for region in regions
        )
