"""Which registers commands use, and whether a call and its repeats give them a value.

A register stands for a piece of HBM, which a call binds, or for an address on chip, which starts
at zero and is moved by repeats. A register without a value, or a step of a register that nothing
in the repeat uses, would be a field without effect: both are refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .instructions import Control, Dma, Exec, Instruction, Space


@dataclass(frozen=True)
class Registers:
    """The registers of commands by what they stand for."""

    hbm: frozenset[int | None]
    """None: a place in HBM without a register."""
    chip: frozenset[int]

    @staticmethod
    def of(command: Exec | Dma) -> Registers:
        if isinstance(command, Exec):
            ports = (command.a, command.b, command.trf, command.vrf, command.commit_port)
            return Registers(frozenset(), _present(port.register for port in ports))
        sides = (command.source, command.destination)
        hbm = [side.register for side in sides if side.space == Space.HBM]
        hbm += [command.index.register] if command.index else []
        chip = _present(side.register for side in sides if side.space == Space.DM)
        return Registers(frozenset(hbm), chip)


def _present(registers: Iterable[int | None]) -> frozenset[int]:
    return frozenset(register for register in registers if register is not None)


@dataclass(frozen=True)
class BlockRegisters:
    """What a block's commands need of their calls; `problem` says what no call can mend."""

    used: Registers
    problem: str | None

    @staticmethod
    def of(commands: Sequence[Instruction]) -> BlockRegisters:
        known = {
            id(c): Registers.of(c) for c in commands if not isinstance(c, Control)
        }  # entries of one record share one object

        def union(some: Sequence[Instruction]) -> Registers:
            found = [known[i] for i in dict.fromkeys(map(id, some)) if i in known]
            return Registers(
                frozenset[int | None]().union(*(r.hbm for r in found)),
                frozenset[int]().union(*(r.chip for r in found)),
            )

        used = union(commands)
        moved: set[int] = set()
        for i, command in enumerate(commands):
            if isinstance(command, Control) and command.steps:
                body = union(commands[i + 1 : i + 1 + command.length])
                steps = {step.register for step in command.steps}
                moved |= steps
                for register in sorted(steps - body.hbm - body.chip):
                    problem = f"entry {i} moves register {register}, which nothing inside uses"
                    return BlockRegisters(used, problem)
        return BlockRegisters(used, _problem(used, moved))

    def problem_of(self, bound: Sequence[int]) -> str | None:
        """What is wrong with the registers that a call binds."""
        if len(set(bound)) < len(bound):
            return "a register is bound twice"
        missing = self.used.hbm - set(bound)
        if missing:
            return f"register {min(r for r in missing if r is not None)} stands for no region"
        both = self.used.chip & set(bound)
        return f"register {min(both)} stands for a place on chip" if both else None


def _problem(used: Registers, moved: set[int]) -> str | None:
    if None in used.hbm:
        return "a place in HBM has no register"
    if still := used.chip - moved:
        return f"register {min(still)} stands for a place on chip, and nothing moves it"
    return None
