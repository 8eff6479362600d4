"""The `chain` pass: calls load the first weights of the calls that follow them.

Before: every call begins with data memory empty.
After:  a block finds some of its constants (parameters, tables, inputs) in data memory, at fixed
        addresses in `resident` buffers; each block that is called before it loads them at its end,
        while its last results are computed and stored. A block called before different ones exists
        once for each of them, however many calls there are.
Contract: bitwise. Nothing changes where that is not faster, nor in a program that DMA does not
bound: it would gain little, and the search takes time.

What the next call of the same block would load from the same place, a table of rotary angles for
one, stays where it is. The block of the first call finds nothing, for nobody could have loaded it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from xdsl.context import Context as XdslContext
from xdsl.dialects.builtin import IntegerAttr, ModuleOp, StringAttr, UnitAttr, i64
from xdsl.ir import SSAValue
from xdsl.passes import ModulePass

from .. import errors
from .chain_choice import Choice, Forecast, Load, Pair, choose
from .encode import Registers
from .isa.instructions import REGISTERS, Context, Dma, Head
from .isa.machine import Machine, load_machine
from .isa.plan import Memory
from .isa.rules import DM_BYTES
from .place import ALIGNMENT_BYTES, assign_addresses, forget_lifetimes
from .rngd import (
    AllocOp,
    ArriveOp,
    BlockOp,
    BufferType,
    CallOp,
    DmaOp,
    ExecOp,
    RegionOp,
    RepeatOp,
    TilingOp,
    buffer_memory,
    ranks_of,
)
from .schedule import BlockProblem

MOST_BYTES = (DM_BYTES // 2, DM_BYTES // 64)
"""Per slice, for what calls load for one block; less is tried where more does not pay."""
CONSTANT = frozenset({"parameter", "derived", "input"})
"""Kinds of regions that no command writes."""


# --- what could be loaded earlier ---


def _early_loads(block: BlockOp, constant: frozenset[int]) -> list[DmaOp]:
    """Loads of constants to buffers that nothing has touched before."""
    body = block.body.block
    found: list[DmaOp] = []
    touched: set[SSAValue] = set()
    for op in body.ops:
        if isinstance(op, RepeatOp):
            break
        if not isinstance(op, ExecOp | DmaOp | ArriveOp):
            continue
        if isinstance(op, DmaOp) and _concerns_no_rank(op.dma) and op.destination not in touched:
            sources = [op.source] if op.index is None else [op.source, op.index]
            known = all(v in body.args and body.args.index(v) in constant for v in sources)
            if known and buffer_memory(op.destination) == "dm":
                found.append(op)
        touched.update(op.ports().values())
    return found


def _concerns_no_rank(command: Dma) -> bool:
    """Whether it neither reaches another rank nor waits for one."""
    return command.head == Head(Context.DMA) and not (
        command.source.peer or command.destination.peer
    )


def _is_written_once(buffer: SSAValue) -> bool:
    writes = 0
    for use in buffer.uses:
        op = use.operation
        match op:
            case ExecOp():
                writes += op.out is buffer
            case DmaOp():
                writes += op.destination is buffer
            case _:
                assert isinstance(op, ArriveOp), op
                writes += 1
    return writes == 1


@dataclass(frozen=True)
class _Program:
    """Blocks, and the calls in order."""

    blocks: Mapping[str, BlockOp]
    calls: Sequence[CallOp]

    @staticmethod
    def of(module: ModuleOp) -> _Program:
        blocks = {op.sym_name.data: op for op in module.ops if isinstance(op, BlockOp)}
        return _Program(blocks, [op for op in module.ops if isinstance(op, CallOp)])

    @property
    def pairs(self) -> Counter[Pair]:
        """How often a block is called before another one; the last call has nothing behind it."""
        names = [callee(call) for call in self.calls]
        return Counter([*pairwise(names), (names[-1], None)])

    @property
    def is_chained(self) -> bool:
        """Whether calls load for each other already."""
        allocs = (op for block in self.blocks.values() for op in block.walk())
        return any(isinstance(op, AllocOp) and op.resident is not None for op in allocs)

    def _bindings(self, name: str, number: int) -> list[tuple[SSAValue, int]]:
        """What each call of a block binds an argument to."""
        calls = (call for call in self.calls if callee(call) == name)
        return [(call.buffers[number], call.start_of(number)) for call in calls]

    def constant(self, name: str) -> frozenset[int]:
        """Arguments of a block that are constants in all calls."""
        count = len(self.blocks[name].body.block.args)
        return frozenset(
            n for n in range(count) if all(_is_constant(v) for v, _ in self._bindings(name, n))
        )

    def unchanged(self, name: str) -> frozenset[int]:
        """Arguments that are bound alike in calls of a block that follow each other."""
        runs = [
            (first, second)
            for first, second in pairwise(self.calls)
            if callee(first) == callee(second) == name
        ]
        count = len(self.blocks[name].body.block.args) if runs else 0
        return frozenset(
            n
            for n in range(count)
            if all(a.buffers[n] is b.buffers[n] and a.start_of(n) == b.start_of(n) for a, b in runs)
        )

    def loads(self, name: str, problem: BlockProblem) -> list[Load]:
        """What calls before those of a block could load for it, in program order."""
        block = self.blocks[name]
        arguments, unchanged = block.body.block.args, self.unchanged(name)
        tasks = dict(zip(problem.commands[0], problem.stretches[0].tasks, strict=True))
        found = []
        for op in _early_loads(block, self.constant(name)):
            sources = [op.source] if op.index is None else [op.source, op.index]
            assert isinstance(op.destination.owner, AllocOp)
            stays = all(arguments.index(v) in unchanged for v in sources)
            found.append(
                Load(
                    op,
                    tasks[op].cycles,
                    op.destination.owner.size_bytes,
                    stays and _is_written_once(op.destination),
                )
            )
        return found


def callee(call: CallOp) -> str:
    """The name of the block that is called."""
    return call.callee.root_reference.data


def _is_constant(value: SSAValue) -> bool:
    assert isinstance(value.owner, RegionOp)
    return not CONSTANT.isdisjoint(value.owner.content.data)


# --- blocks that hand loads over ---


@dataclass(frozen=True)
class _Variant:
    """A block as it is before calls of another one."""

    op: BlockOp
    arguments: tuple[int, ...]
    """Arguments of the next call's block that it needs behind its own."""


@dataclass(frozen=True)
class _Rewriter:
    """Makes variants; `addresses` are those of the buffers that stay, by the loads into them."""

    program: _Program
    choice: Choice
    addresses: Mapping[DmaOp, int]

    def variant(self, pair: Pair, name: str) -> _Variant:
        """The block that is called before `pair[1]`, under a name of its own."""
        old = self.program.blocks[pair[0]]
        if not self.choice.entry(pair[0]) and not self.choice.exits(pair) and name == pair[0]:
            return _Variant(old, ())
        new = old.clone()
        new.sym_name = StringAttr(name)
        twins = dict(zip(old.walk(), new.walk(), strict=True))
        if name != pair[0]:
            for tiling in [op for op in new.walk() if isinstance(op, TilingOp)]:
                new.body.block.erase_op(tiling)  # the first variant says how products are cut
        for load in self.choice.entry(pair[0]):
            alloc, twin = twins[_alloc(load.op)], twins[load.op]
            assert isinstance(alloc, AllocOp)
            self._pin(alloc, load.op)
            new.body.block.erase_op(twin)
        arguments: dict[int, SSAValue] = {}
        for load in self.choice.exits(pair):
            if pair[0] == pair[1]:
                alloc = twins[_alloc(load.op)]
                assert isinstance(alloc, AllocOp)
            else:
                alloc = AllocOp(Memory.DM, load.size_bytes, _alloc(load.op).label.data)
                alloc.location = load.op.location
                self._pin(alloc, load.op)
                new.body.block.add_op(alloc)
            self._append(new, load.op, alloc, arguments)
        return _Variant(new, tuple(arguments))

    def _pin(self, alloc: AllocOp, load: DmaOp) -> None:
        alloc.resident = UnitAttr()
        alloc.address = IntegerAttr(self.addresses[load], i64)

    def _append(
        self, block: BlockOp, load: DmaOp, alloc: AllocOp, arguments: dict[int, SSAValue]
    ) -> None:
        """The load, from new arguments of `block`; `arguments` has those that there are."""
        body, old = block.body.block, load.parent_block()
        assert old is not None

        def argument(value: SSAValue) -> SSAValue:
            number = old.args.index(value)
            if number not in arguments:
                arguments[number] = body.insert_arg(BufferType(Memory.HBM, 0), len(body.args))
            return arguments[number]

        index = None if load.index is None else argument(load.index)
        op = DmaOp(load.dma, source=argument(load.source), destination=alloc.buffer, index=index)
        op.for_successor = UnitAttr()
        op.location = load.location
        body.add_op(op)


def _alloc(load: DmaOp) -> AllocOp:
    assert isinstance(load.destination.owner, AllocOp)
    return load.destination.owner


def _addresses(loads: Iterable[Load]) -> dict[DmaOp, int]:
    """From the end of data memory, each block's apart from those of the others."""
    found: dict[DmaOp, int] = {}
    end = DM_BYTES
    for load in loads:
        end = (end - load.size_bytes) // ALIGNMENT_BYTES * ALIGNMENT_BYTES
        found[load.op] = end
    return found


def _names(pairs: Iterable[Pair], choice: Choice) -> dict[Pair, str]:
    """A name for each pair's block; those that hand nothing over are one block."""
    names: dict[Pair, str] = {}
    variants: dict[str, dict[str | None, str]] = {}
    for pair in pairs:
        target = pair[1] if choice.exits(pair) else None
        known = variants.setdefault(pair[0], {})
        if target not in known:
            suffix = "" if not known else f"_before_{target}" if target else "_alone"
            known[target] = pair[0] + suffix
        names[pair] = known[target]
    return names


def _fits(block: BlockOp) -> bool:
    """Whether buffers find room, done in program order, and arguments find registers."""
    if len(Registers.keys(block)) > REGISTERS:
        return False
    try:
        assign_addresses(block.body.block)
    except errors.MemoryFull:
        return False
    return True


# --- the pass ---


@dataclass(frozen=True)
class ChainPass(ModulePass):
    """Let calls load what the calls behind them begin with."""

    name = "chain"

    def apply(self, ctx: XdslContext, op: ModuleOp) -> None:
        program = _Program.of(op)
        if len(program.calls) < 2 or program.is_chained:
            return  # a second run changes nothing
        machine = load_machine()
        problems = {name: BlockProblem(b, machine) for name, b in program.blocks.items()}
        if not _waits_for_dma(program, problems):
            return
        loads = {name: program.loads(name, problem) for name, problem in problems.items()}
        loads[callee(program.calls[0])] = []
        forecasts = {name: Forecast(problem) for name, problem in problems.items()}
        cycles = _Cycles(machine, ranks_of(op))
        for most_bytes in MOST_BYTES:
            choice = choose(program.pairs, forecasts, loads, most_bytes)
            if not any(choice.entries.values()):
                return
            names = _names(program.pairs, choice)
            variants = _variants(program, choice, names)
            fits = all(_fits(variant.op) for variant in variants.values())
            if fits and _gain(program, names, variants, cycles) > 0:
                _replace(op, program, names, variants)
                return


def _waits_for_dma(program: _Program, problems: Mapping[str, BlockProblem]) -> bool:
    """Whether DMA is what a program is busy with most."""
    busy = Counter[int]()
    for pair, count in program.pairs.items():
        problem = problems[pair[0]]
        for stretch, runs in zip(problem.stretches, problem.runs, strict=True):
            for task in stretch.tasks:
                busy[task.context] += count * runs * task.cycles
    return busy[Context.DMA] == max(busy.values(), default=0)


@dataclass(frozen=True)
class _Cycles:
    """Cycles of blocks, by plans that the scheduler is sure to find or to better."""

    machine: Machine
    ranks: int
    known: dict[BlockOp, int] = field(default_factory=dict)

    def of(self, block: BlockOp) -> int:
        if block not in self.known:
            search = BlockProblem(block, self.machine, self.ranks).search()
            self.known[block] = search.cycles(search.quick())
            forget_lifetimes(block.body.block)
        return self.known[block]


def _gain(
    program: _Program,
    names: Mapping[Pair, str],
    variants: Mapping[str, _Variant],
    cycles: _Cycles,
) -> int:
    """Cycles that the program saves."""
    gain = 0
    for pair, count in program.pairs.items():
        before, after = program.blocks[pair[0]], variants[names[pair]].op
        if after is not before:
            gain += count * (cycles.of(before) - cycles.of(after))
    return gain


def _variants(program: _Program, choice: Choice, names: Mapping[Pair, str]) -> dict[str, _Variant]:
    chosen = (load for name in program.blocks for load in choice.entry(name))
    rewriter = _Rewriter(program, choice, _addresses(chosen))
    pairs: dict[str, Pair] = {}
    for pair, name in names.items():
        pairs.setdefault(name, pair)
    return {name: rewriter.variant(pair, name) for name, pair in pairs.items()}


def _replace(
    module: ModuleOp,
    program: _Program,
    names: Mapping[Pair, str],
    variants: Mapping[str, _Variant],
) -> None:
    """Put the variants in the place of the blocks, and calls of them in that of the calls."""
    body = module.body.block
    for name, block in program.blocks.items():
        own = dict.fromkeys(names[pair] for pair in names if pair[0] == name)
        ops = [variants[variant].op for variant in own]
        body.insert_ops_before([op for op in ops if op is not block], block)
        if block not in ops:
            body.erase_op(block)
    for i, call in enumerate(program.calls):
        following = program.calls[i + 1] if i + 1 < len(program.calls) else None
        name = names[callee(call), None if following is None else callee(following)]
        buffers = list(call.buffers)
        starts = [call.start_of(number) for number in range(len(buffers))]
        for number in variants[name].arguments:
            assert following is not None, "nothing is loaded for nobody"
            buffers.append(following.buffers[number])
            starts.append(following.start_of(number))
        new = CallOp(name, buffers, starts)
        new.location = call.location
        body.insert_op_before(new, call)
    for call in program.calls:
        body.erase_op(call)
