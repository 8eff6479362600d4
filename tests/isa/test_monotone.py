"""A machine that is slower in one number is never faster at anything."""

from __future__ import annotations

from hypothesis import assume, given, settings
from hypothesis import strategies as st
from random_commands import dense_passes, dmas
from timed_programs import BOOK, bodies, program

from furiosa_llm.backend_rngd.isa.cost import dma_cost, exec_cost
from furiosa_llm.backend_rngd.isa.instructions import Dma, Exec, Instruction
from furiosa_llm.backend_rngd.isa.machine import Machine
from furiosa_llm.backend_rngd.isa.plan import plan_dma, plan_exec
from furiosa_llm.errors import BinaryError
from furiosa_llm.runtime_sim.timing import time_program

SLOWER_WHEN_MORE = [
    *(path for path, p in BOOK.parameters.items() if p.unit == "cycles" and "timeout" not in path),
    "hbm.rmw_write_factor",
    "hbm.unaligned_read_factor",
    "dm.misaligned_write_factor",
]
FASTER_WHEN_MORE = [
    "hbm.bandwidth_bytes_per_second",
    "hbm.efficiency",
    "hbm.queue_entries_per_channel",
    "dma.bytes_per_cycle",
    "dma.cross_cluster_bytes_per_cycle",
    "dm.dmn_bytes_per_cycle",
    "fetch.sub_read_bytes",
    "contraction.out_bus_elements",
    "vector.float_elements_per_cycle",
]


@st.composite
def slower(draw: st.DrawFn) -> Machine:
    """The book's machine with one number worse."""
    path = draw(st.sampled_from(SLOWER_WHEN_MORE + FASTER_WHEN_MORE))
    value = BOOK.parameters[path].value
    assert isinstance(value, int | float)
    factor = draw(st.sampled_from([2, 4]))
    if path in FASTER_WHEN_MORE:
        return BOOK.replace(path, value // factor if isinstance(value, int) else value / factor)
    return BOOK.replace(path, value * factor + draw(st.integers(0, 100)))


@given(slower(), dense_passes())
def test_passes(machine: Machine, command: Exec) -> None:
    try:
        plan = plan_exec(command, "test")
    except BinaryError as error:
        assume(error.code != "VED011")  # the sub context takes only whole units of 8 B
        raise
    assert exec_cost(plan, machine).total_cycles >= exec_cost(plan, BOOK).total_cycles


@given(slower(), dmas(valid=True), st.sampled_from([1, 2, 8]))
@settings(max_examples=200, deadline=None)
def test_transfers(machine: Machine, command: Dma, sharers: int) -> None:
    plan = plan_dma(command, "test")
    nominal = dma_cost(plan, BOOK, sharers).total_cycles
    assert dma_cost(plan, machine, sharers).total_cycles >= nominal
    assert dma_cost(plan, BOOK, 2 * sharers).total_cycles >= nominal


@given(slower(), bodies())
@settings(max_examples=60, deadline=None)
def test_programs(machine: Machine, commands: tuple[Instruction, ...]) -> None:
    called = program(*commands, paths=("a", "b", "c"))
    assert time_program(called, machine).cycles >= time_program(called, BOOK).cycles
    shared = time_program(called, BOOK, sharers=8)
    assert shared.cycles >= time_program(called, BOOK).cycles
    assert shared.roofline_cycles >= time_program(called, BOOK).roofline_cycles
