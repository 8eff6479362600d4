"""Intervals: what ranges of numbers do to times, and which number matters most."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from timed_programs import BOOK, add, bodies, load, program

from furiosa_llm.backend_rngd.isa.instructions import Control, Instruction, Wait
from furiosa_llm.backend_rngd.isa.machine import Machine, parse_machine
from furiosa_llm.runtime_sim.spread import Spread, ranged
from furiosa_llm.runtime_sim.timing import LAUNCH_ROW, time_program


def exact(machine: Machine, *doubtful: str) -> Machine:
    """The machine with nothing in doubt but the numbers named."""
    for path, _ in ranged(machine):
        value = machine.parameters[path].value
        assert isinstance(value, int | float)
        if path not in doubtful:
            machine = machine.replace(path, value)
    return machine


def test_exact_numbers_give_exact_times() -> None:
    timing = time_program(program(load(), add()), exact(BOOK))
    assert timing.low_cycles == timing.cycles == timing.high_cycles
    assert timing.low_us == timing.time_us == timing.high_us
    assert timing.dominant is None


def test_a_number_is_wrong_by_the_same_amount_everywhere() -> None:
    # Startup 450 to 500: ten loads are up to 500 cycles shorter, not 50 times the root of ten.
    machine = parse_machine(
        "schema: 1\nextends: book\ndma: {startup_cycles: {value: 500, range: [450, 510]}}", "test"
    )
    timing = time_program(program(Control(10, 1), load()), exact(machine, "dma.startup_cycles"))
    assert (timing.low_cycles, timing.high_cycles) == (timing.cycles - 500, timing.cycles + 100)
    assert timing.dominant == "dma.startup_cycles"


def test_only_the_critical_path_counts() -> None:
    # The pass hides behind the load: its base does not matter.
    timing = time_program(program(load(512), add()), BOOK)
    assert "control.exec_main_cycles" not in timing.spread.changes
    chained = program(load(512, signals=(1,)), add(waits=(Wait(1, 1),)))
    changes = time_program(chained, BOOK).spread.changes
    assert changes["control.exec_main_cycles"] == (-9, 9)
    assert changes["control.signal_cycles"] == (0, 64)


def test_independent_numbers_combine_as_squares() -> None:
    spread = Spread({"a": (-3, 3)}) + Spread({"b": (4, -4)}) + Spread({"a": (0, 0)})
    assert (spread.down, spread.up) == (5, 5)
    assert spread.dominant == "b"
    assert (spread * 2).up == 10
    assert Spread().dominant is None


def test_modules_have_intervals_of_their_own() -> None:
    commands = (load(signals=(1,)), add(waits=(Wait(1, 1),), provenance=1))
    timing = time_program(program(*commands, paths=("load", "add")), BOOK)
    rows = {row.path: row for row in timing.modules}
    assert (rows[LAUNCH_ROW].low_cycles, rows[LAUNCH_ROW].high_cycles) == (1991, 2011)
    assert rows["layer.load"].dominant == "dma.startup_cycles"
    assert rows["layer.add"].dominant == "control.signal_cycles"
    total = sum((row.spread for row in timing.modules), Spread())
    assert total.down == pytest.approx(timing.spread.down)
    assert total.up == pytest.approx(timing.spread.up)


def test_another_clock_changes_the_time() -> None:
    text = "schema: 1\nextends: book\nchip: {clock_hertz: {value: 1.0e+9, range: [5.0e+8, 2.0e+9]}}"
    timing = time_program(program(add(4000)), parse_machine(text, "test"))
    assert timing.high_us == pytest.approx(2 * timing.time_us, rel=0.01)
    assert timing.low_us == pytest.approx(timing.time_us / 2, rel=0.01)
    assert timing.high_cycles < 1.01 * timing.cycles


def test_the_model_itself_may_be_off() -> None:
    text = "schema: 1\nextends: book\nmodel: {time_factor: {value: 2, range: [1, 4]}}"
    timing = time_program(program(add(4000)), parse_machine(text, "test"))
    assert timing.time_us == BOOK.microseconds(2 * timing.cycles)
    assert timing.low_us == pytest.approx(timing.time_us / 2, rel=0.01)
    assert timing.high_us == pytest.approx(2 * timing.time_us, rel=0.01)
    assert timing.dominant_us == "model.time_factor"


@given(bodies())
@settings(max_examples=30, deadline=None)
def test_intervals_hold_the_times(
    commands: tuple[Instruction, ...],
) -> None:
    called = program(*commands, paths=("a", "b", "c"))
    timing = time_program(called, BOOK)
    assert 0 <= timing.low_cycles <= timing.cycles <= timing.high_cycles
    for row in timing.modules:
        assert row.low_cycles <= row.cycles <= row.high_cycles


def test_first_order_is_exact_on_one_queue() -> None:
    chain = program(load(), load(7), load(900))
    timing = time_program(chain, BOOK)
    for path, ends in ranged(BOOK):
        expected = tuple(time_program(chain, end).cycles - timing.cycles for end in ends)
        assert timing.spread.changes.get(path, (0, 0)) == pytest.approx(expected, abs=0.5)
