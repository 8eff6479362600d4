"""The `encode` stage: a scheduled `rngd` module as the program of a binary.

Buffers become addresses, HBM buffers become registers that calls bind, locations become the
blocks' provenance tables. It is the last step, so it returns a `Program` and not a module.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from pydantic import TypeAdapter
from xdsl.dialects.builtin import (
    ArrayAttr,
    DictionaryAttr,
    FloatAttr,
    IntegerAttr,
    ModuleOp,
    StringAttr,
    f64,
    i64,
)
from xdsl.ir import Attribute, Block, OpResult, SSAValue

from ..ir import provenance as locations
from .isa.expand import Address, Issued
from .isa.instructions import (
    MAX_STEPS,
    REGISTERS,
    Control,
    Dma,
    Exec,
    IndexList,
    Instruction,
    Port,
    Side,
    Step,
)
from .isa.plan import REGION_SHIFT, DmaPlan, ExecPlan, plan_dma, plan_exec
from .isa.program import Binding, Call, Header, Program, Provenance, Region
from .isa.program import Block as ProgramBlock
from .rngd import (
    AllocOp,
    BlockOp,
    CallOp,
    DmaOp,
    ExecOp,
    ProgramOp,
    RegionOp,
    RepeatOp,
    TilingOp,
    WorkOp,
    buffer_memory,
    steps_of,
)
from .stage_cuts import with_stage_cuts

Key = tuple[SSAValue | None, tuple[int, ...]]
"""What a register stands for: an HBM buffer (None on chip), and its steps."""


class Registers:
    """The registers of a block: one for each HBM buffer and for each way that it moves."""

    def __init__(self, block: BlockOp) -> None:
        self.number = {key: number for number, key in enumerate(self.keys(block))}
        assert len(self.number) <= REGISTERS, f"{len(self.number)} registers in {block.sym_name}"

    @staticmethod
    def keys(block: BlockOp) -> list[Key]:
        """What needs a register, in the order of its first use."""
        found: dict[Key, None] = {}
        for op in block.walk():
            if isinstance(op, ExecOp | DmaOp):
                for name, buffer in op.ports().items():
                    key = _key(buffer, steps_of(op, name))
                    if key is not None:
                        found[key] = None
        return list(found)

    def of(self, op: ExecOp | DmaOp, port: str) -> int | None:
        """The register of a port; None for a place on chip that stands still."""
        key = _key(op.ports()[port], steps_of(op, port))
        return None if key is None else self.number[key]


def _key(buffer: SSAValue, steps: tuple[int, ...]) -> Key | None:
    if isinstance(buffer, OpResult):
        return (None, steps) if steps else None
    return (buffer, steps)


# --- commands ---


def encode_command(op: ExecOp | DmaOp, registers: Registers) -> Exec | Dma:
    """The command with addresses and registers in its ports."""
    return _encode_exec(op, registers) if isinstance(op, ExecOp) else _encode_dma(op, registers)


def _encode_exec(op: ExecOp, registers: Registers) -> Exec:
    c, ports = op.exec, op.ports()

    def port(name: str, old: Port) -> Port:
        if name not in ports:
            return old
        start, end = _extent(ports[name])
        if buffer_memory(ports[name]) == "trf":
            # A port addresses one lane, a buffer stands in all of them.
            start, end = start // c.trf_lanes, end // c.trf_lanes
        return Port(start + old.base, old.dtype, registers.of(op, name), end)

    return replace(
        c,
        a=port("a", c.a),
        b=port("b", c.b),
        trf=port("trf", c.trf),
        vrf=port("vrf", c.vrf),
        commit_port=port("out", c.commit_port),
    )


def _encode_dma(op: DmaOp, registers: Registers) -> Dma:
    c = op.dma

    def side(name: str, old: Side) -> Side:
        start, _ = _extent(op.ports()[name])
        return replace(old, base=start + old.base, register=registers.of(op, name))

    index: IndexList | None = c.index
    if index is not None:
        index = replace(index, register=registers.of(op, "index"))
    source, destination = side("source", c.source), side("destination", c.destination)
    return replace(c, source=source, destination=destination, index=index)


def _extent(buffer: SSAValue) -> tuple[int, int]:
    """First address of a buffer and the one past its end; an HBM buffer starts at its register."""
    if not isinstance(buffer, OpResult):
        return 0, 0
    alloc = buffer.op
    assert isinstance(alloc, AllocOp)
    assert alloc.address is not None, f"{alloc.label.data} has no address: run place first"
    start = alloc.address.value.data
    return start, start + alloc.size_bytes


def resolve(op: ExecOp | DmaOp, registers: Registers) -> Issued:
    """The command as it runs in the first turn of its loops, each HBM buffer in its own region."""
    command = encode_command(op, registers)
    where = locations.describe(op)
    plan = plan_exec(command, where) if isinstance(command, Exec) else plan_dma(command, where)
    return Issued(plan, command, 0, tuple(_addresses(op, plan)))


def _addresses(op: ExecOp | DmaOp, plan: ExecPlan | DmaPlan) -> Iterable[Address]:
    if isinstance(plan, ExecPlan):
        yield from (Address(None, port.base) for port in plan.ports)
        return
    command = plan.command
    parts = {
        "source": command.source,
        "destination": command.destination,
        "index": command.index,
    }
    for name, buffer in op.ports().items():
        part = parts[name]
        assert part is not None
        region = 0 if isinstance(buffer, OpResult) else _argument_number(buffer) << REGION_SHIFT
        by_rank = (part.rank_stride, part.rank_mask) if isinstance(part, Side) else (0, 0)
        yield Address(None, region + part.base, 0, *by_rank)


def _argument_number(buffer: SSAValue) -> int:
    block = buffer.owner
    assert isinstance(block, Block)
    return block.args.index(buffer)


# --- blocks ---


@dataclass
class _EncodedBlock:
    """A block's issue list, its modules, and which register stands for which argument."""

    name: str
    registers: Registers
    commands: list[Instruction] = field(default_factory=list)
    modules: dict[tuple[str, str, bool], int] = field(default_factory=dict)
    macs: dict[int, int] = field(default_factory=dict)

    def provenance(self, op: ExecOp | DmaOp | WorkOp) -> int:
        """The op's entry in the block's table of modules."""
        found = locations.read(op.location)
        successor = isinstance(op, DmaOp) and op.for_successor is not None
        key = (found.module, found.node or "", successor) if found else ("", "", successor)
        return self.modules.setdefault(key, len(self.modules))

    def add(self, block: Block, depth: int) -> None:
        for op in block.ops:
            match op:
                case ExecOp() | DmaOp():
                    command = encode_command(op, self.registers)
                    head = replace(command.head, provenance=self.provenance(op))
                    self.commands.append(replace(command, head=head))
                case WorkOp():
                    entry = self.provenance(op)
                    self.macs[entry] = self.macs.get(entry, 0) + op.macs.value.data
                case RepeatOp():
                    start = len(self.commands)
                    self.add(op.body.block, depth + 1)
                    length = len(self.commands) - start
                    steps = self._steps(op, depth)
                    self.commands.insert(start, Control(op.count.value.data, length, steps))
                case _:
                    assert isinstance(op, AllocOp | TilingOp), op.name

    def _steps(self, repeat: RepeatOp, depth: int) -> tuple[Step, ...]:
        """What the repeat at nesting `depth` adds to each register that its body uses."""
        found: dict[int, int] = {}
        for op in repeat.walk():
            if isinstance(op, ExecOp | DmaOp):
                for name in op.ports():
                    steps = steps_of(op, name)
                    register = self.registers.of(op, name)
                    if register is not None and depth < len(steps) and steps[depth]:
                        found[register] = steps[depth]
        assert len(found) <= MAX_STEPS, f"{len(found)} registers move in one repeat"
        return tuple(Step(register, step) for register, step in found.items())

    def table(self) -> tuple[Provenance, ...]:
        return tuple(
            Provenance(path=path, node=node, macs=self.macs.get(i, 0), successor=successor)
            for (path, node, successor), i in self.modules.items()
        )


def encode_program(module: ModuleOp, model_name: str) -> Program:
    """The program of a scheduled module. Raises: VED011 if a command breaks a rule."""
    regions: dict[SSAValue, int] = {}
    contents: list[Region] = []
    blocks: dict[str, _EncodedBlock] = {}
    calls: list[CallOp] = []
    bucket, ranks = "", 1
    for op in module.ops:
        match op:
            case ProgramOp():
                bucket = op.bucket.data
                ranks = op.ranks.value.data
            case RegionOp():
                regions[op.buffer] = len(contents)
                contents.append(region_content(op))
            case BlockOp():
                encoded = _EncodedBlock(op.sym_name.data, Registers(op))
                encoded.add(op.body.block, 0)
                blocks[encoded.name] = encoded
            case CallOp():
                calls.append(op)
            case _:
                raise AssertionError(f"{op.name} at the level of a program")
    commands: list[Instruction] = []
    tables: list[ProgramBlock] = []
    for encoded in blocks.values():
        count = len(encoded.commands)
        table = encoded.table()
        tables.append(
            ProgramBlock(name=encoded.name, first=len(commands), count=count, provenance=table)
        )
        commands += encoded.commands
    header = Header(
        model_name=model_name,
        bucket=bucket,
        tensor_parallel_size=ranks,
        regions=tuple(contents),
        blocks=tuple(tables),
        calls=tuple(_calls(calls, blocks, regions)),
    )
    return with_stage_cuts(Program(header, tuple(commands)))


def _calls(
    calls: Sequence[CallOp], blocks: dict[str, _EncodedBlock], regions: dict[SSAValue, int]
) -> Iterable[Call]:
    numbers = {name: i for i, name in enumerate(blocks)}
    for i, call in enumerate(calls):
        callee = call.callee.root_reference.data
        found = locations.read(call.location)
        yield Call(
            block=numbers[callee],
            prefix=found.module if found else "",
            bindings=tuple(_bindings(call, blocks[callee].registers, regions)),
            successor=i + 1 if i + 1 < len(calls) else None,
        )


def _bindings(
    call: CallOp, registers: Registers, regions: dict[SSAValue, int]
) -> Iterable[Binding]:
    for (buffer, _), register in registers.number.items():
        if buffer is not None:
            number = _argument_number(buffer)
            yield Binding(
                register_number=register,
                region=regions[call.buffers[number]],
                offset=call.start_of(number),
            )


# --- region contents ---


def content_attribute(region: Region) -> DictionaryAttr:
    """A region's entry in the header as an attribute."""
    attribute = _to_attribute(region.model_dump(mode="json", exclude_none=True, exclude={"name"}))
    assert isinstance(attribute, DictionaryAttr)
    return attribute


def region_content(op: RegionOp) -> Region:
    """The inverse of `content_attribute`."""
    content = _from_attribute(op.content)
    assert isinstance(content, dict)
    return TypeAdapter(Region).validate_json(json.dumps({"name": op.region_name.data, **content}))


def _to_attribute(value: object) -> Attribute:
    match value:
        case dict():
            return DictionaryAttr({str(k): _to_attribute(v) for k, v in value.items()})
        case list() | tuple():
            return ArrayAttr([_to_attribute(v) for v in value])
        case bool():
            return IntegerAttr.from_bool(value)
        case int():
            return IntegerAttr(value, i64)
        case float():
            return FloatAttr(value, f64)
        case _:
            assert isinstance(value, str), value
            return StringAttr(value)


def _from_attribute(attribute: Attribute) -> object:
    match attribute:
        case DictionaryAttr():
            return {k: _from_attribute(v) for k, v in attribute.data.items()}
        case ArrayAttr():
            return [_from_attribute(v) for v in attribute.data]
        case IntegerAttr() if attribute.type != i64:
            return bool(attribute.value.data)
        case IntegerAttr():
            return attribute.value.data
        case FloatAttr():
            return attribute.value.data
        case _:
            assert isinstance(attribute, StringAttr), attribute
            return attribute.data
