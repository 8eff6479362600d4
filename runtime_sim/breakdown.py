"""What a run's time is made of: the kinds of commands on its critical path.

A module's rows (`timing.py`) say who is the oldest; this says what everyone was waiting for. The
lengths of the pieces add up to the run's cycles.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

from ..backend_rngd.isa.instructions import Space
from ..backend_rngd.isa.machine import Machine
from ..backend_rngd.isa.plan import DmaPlan
from ..backend_rngd.isa.program import Program
from ..backend_rngd.isa.rank_rules import is_exchange
from .blocks import Costs, run_clock
from .clock import MESSAGE, PEER_SIGNAL, SIGNAL

Part = Literal["compute", "HBM", "exchanges", "transfers", "signals", "launch"]
PARTS: Mapping[Part, str] = MappingProxyType(
    {
        "compute": "passes of the tensor units",
        "HBM": "transfers to and from HBM",
        "exchanges": "what ranks send each other and its way, and passes of several ranks",
        "transfers": "transfers on the chip",
        "signals": "signals between contexts on their way",
        "launch": "before the first command and after the last",
    }
)


def breakdown(program: Program, machine: Machine, *, sharers: int = 1) -> Mapping[Part, int]:
    """Cycles of one run by part, as `time_program` counts them.

    Raises: VED011, SIM001 to SIM003, SIM005, SIM006.
    """
    costs = Costs(program, machine, sharers)
    blocks = [_of_block(program, number, costs) for number in range(len(program.blocks))]
    control = machine.control
    total = Counter[Part]({"launch": control.launch_cycles + control.finish_cycles})
    for call in program.calls:
        total.update(blocks[call.block])
    return MappingProxyType({part: total[part] for part in PARTS})


def _of_block(program: Program, number: int, costs: Costs) -> Counter[Part]:
    clock = run_clock(program, program.blocks[number], costs)
    parts = Counter[Part]()
    for (_, cost), count in clock.path.items():
        parts[_part(cost, costs)] += count * costs.cycles(cost)
    # A command can begin when a pass has let go of memory, before the pass has finished.
    parts["compute"] += clock.end - parts.total()
    return parts


def _part(number: int, costs: Costs) -> Part:
    if number == SIGNAL:
        return "signals"
    if number in (MESSAGE, PEER_SIGNAL):
        return "exchanges"
    plan = costs.plan(number)
    if is_exchange(plan.command):
        return "exchanges"
    if not isinstance(plan, DmaPlan):
        return "compute"
    spaces = {plan.command.source.space, plan.command.destination.space}
    return "HBM" if Space.HBM in spaces else "transfers"
