"""From a block's issue list to the commands as they run: repeats unrolled, plans decoded once.

What comes out knows no call. An address is a register and the bytes added to it, so every call
of a block shares one list, and `resolve` with a call's registers gives the addresses. The value
executor, the cycle model and the order check all read these lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakKeyDictionary

from ... import errors
from .instructions import REGISTERS, Context, Control, Dma, Exec, Instruction
from .plan import REGION_SHIFT, ExecPlan, Plan, plan_dma, plan_exec
from .program import Block, Call, Program, Provenance

MAX_ISSUED = 1 << 18
"""Commands that one block may issue, a hundred times what blocks of real models do: a damaged file
must neither hang nor fill the memory."""
MAX_NESTING = 8
"""Repeats inside each other."""


class Address(NamedTuple):
    """`offset` bytes past the value of `register` (0 without one), and what a rank adds.

    `step` is the part of `offset` that the repeats around the command have added.
    """

    register: int | None
    offset: int
    step: int = 0
    rank_stride: int = 0
    rank_mask: int = 0

    def resolve(self, registers: Sequence[int], rank: int = 0) -> int:
        """The address for a call's register values when `rank` executes the command."""
        at = self.offset_of(rank)
        return at if self.register is None else at + registers[self.register]

    def offset_of(self, rank: int) -> int:
        """Bytes past the register's value."""
        return self.offset + (rank ^ self.rank_mask) * self.rank_stride


@dataclass(frozen=True, slots=True)
class Issued:
    """One command at one time."""

    plan: Plan
    command: Exec | Dma
    """With its head: context, waits, signals, provenance."""
    entry: int
    """Its place in the block's issue list; repeats issue an entry more than once."""
    addresses: tuple[Address, ...]
    """Parallel to `plan.footprints`: the ports of an `ExecPlan`, or source, destination, index."""
    stretch: int = 0
    """Number of the fences before it: commands of different stretches never overlap."""

    @property
    def context(self) -> Context:
        return self.command.head.context


@dataclass(frozen=True, slots=True)
class ExpandedCall:
    """A call's commands and the register values that they start from."""

    issued: tuple[Issued, ...]
    registers: tuple[int, ...]


def expand_call(program: Program, call: Call) -> ExpandedCall:
    """The commands of `call`. Raises: VED011, SIM001, SIM002, SIM003."""
    return ExpandedCall(expand_block(program, program.blocks[call.block]), call_registers(call))


_EXPANDED: WeakKeyDictionary[Program, dict[tuple[int, int], tuple[Issued, ...]]]
_EXPANDED = WeakKeyDictionary()


def expand_block(program: Program, block: Block) -> tuple[Issued, ...]:
    """The commands that `block` issues; computed once per program and block.

    Raises: VED011, SIM001, SIM002, SIM003.
    """
    known = _EXPANDED.setdefault(program, {})
    key = (block.first, block.count)
    if key not in known:
        known[key] = expand_commands(program.block_commands(block), block.name)
    return known[key]


def expand_commands(commands: Sequence[Instruction], name: str) -> tuple[Issued, ...]:
    """The commands that an issue list issues; `name` says in errors whose list it is.

    Raises: VED011, SIM001, SIM002, SIM003.
    """
    count = _count(commands, 0, len(commands), name, 0)
    if count > MAX_ISSUED:
        raise errors.too_many_commands(name, count, MAX_ISSUED)
    expansion = _Expansion(commands, name)
    expansion.run(0, len(commands), {})
    return tuple(expansion.issued)


def call_registers(call: Call) -> tuple[int, ...]:
    """The registers' values at the start of `call`: region and offset, 0 where unbound."""
    registers = [0] * REGISTERS
    for binding in call.bindings:
        registers[binding.register_number] = binding.region << REGION_SHIFT | binding.offset
    return tuple(registers)


def module_path(program: Program, call: Call, command: Exec | Dma) -> str:
    """The model's module that `command` works for in `call`."""
    return entry_path(program, call, program.blocks[call.block].provenance[command.head.provenance])


def entry_path(program: Program, call: Call, entry: Provenance) -> str:
    """The model's module that an entry of the called block's table stands for."""
    owner = call
    if entry.successor:
        assert call.successor is not None, "the reader checks it"
        owner = program.calls[call.successor]
    return ".".join(part for part in (owner.prefix, entry.path) if part)


def _count(commands: Sequence[Instruction], first: int, end: int, name: str, depth: int) -> int:
    """How many commands the entries [first, end) issue, without issuing them."""
    if depth > MAX_NESTING:
        raise errors.repeats_too_deep(f"{name}[{first}]", MAX_NESTING)
    total, i = 0, first
    while i < end:
        command = commands[i]
        i += 1
        if not isinstance(command, Control):
            total += 1
            continue
        if i + command.length > end:
            raise errors.repeat_leaves_block(f"{name}[{i - 1}]", command.length, end - i)
        total += command.count * _count(commands, i, i + command.length, name, depth + 1)
        i += command.length
    return total


class _Expansion:
    """Walks an issue list; each entry is planned when it is first met."""

    def __init__(self, commands: Sequence[Instruction], name: str) -> None:
        self.commands = commands
        self.name = name
        self.issued: list[Issued] = []
        self._stretch = 0
        self._plans: dict[int, Plan] = {}
        self._unmoved: dict[int, Issued] = {}

    def run(self, first: int, end: int, steps: dict[int, int]) -> None:
        """Issue the entries [first, end) with `steps` bytes added to registers."""
        i = first
        while i < end:
            command = self.commands[i]
            i += 1
            if not isinstance(command, Control):
                self.issued.append(self._issue(command, i - 1, steps))
                continue
            for iteration in range(command.count):
                self._stretch += 1
                moved = dict(steps)
                for step in command.steps:
                    moved[step.register] = moved.get(step.register, 0) + iteration * step.bytes
                self.run(i, i + command.length, moved)
            self._stretch += 1
            i += command.length

    def _issue(self, command: Exec | Dma, entry: int, steps: dict[int, int]) -> Issued:
        if entry not in self._unmoved:
            plan = self._plan(command, entry)
            self._unmoved[entry] = Issued(plan, command, entry, _addresses(plan))
        plain = self._unmoved[entry]
        if not any(a.register in steps for a in plain.addresses):
            moved = plain.addresses
        else:
            moved = tuple(_moved(address, steps) for address in plain.addresses)
        return Issued(plain.plan, command, entry, moved, self._stretch)

    def _plan(self, command: Exec | Dma, entry: int) -> Plan:
        # Entries of one record share one object, which is quicker to find than an equal one.
        if id(command) not in self._plans:
            where = f"{self.name}[{entry}]"
            self._plans[id(command)] = (
                plan_exec(command, where) if isinstance(command, Exec) else plan_dma(command, where)
            )
        return self._plans[id(command)]


def _addresses(plan: Plan) -> tuple[Address, ...]:
    if isinstance(plan, ExecPlan):
        return tuple(Address(port.register, port.base) for port in plan.ports)
    command = plan.command
    sides = [
        Address(side.register, side.base, 0, side.rank_stride, side.rank_mask)
        for side in (command.source, command.destination)
    ]
    if command.index is not None:
        sides.append(Address(command.index.register, command.index.base))
    return tuple(sides)


def _moved(address: Address, steps: dict[int, int]) -> Address:
    if address.register is None or address.register not in steps:
        return address
    by = steps[address.register]
    return address._replace(offset=address.offset + by, step=by)
