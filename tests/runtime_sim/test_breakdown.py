"""What a run waits for: the parts add up, and each piece of the critical path has its part."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from timed_programs import BOOK, SLICE, add, bodies, cycles, load, program

from furiosa_llm.backend_rngd.isa.instructions import (
    Context,
    Dma,
    Head,
    Instruction,
    Side,
    Space,
    Wait,
)
from furiosa_llm.runtime_sim.breakdown import breakdown
from furiosa_llm.runtime_sim.timing import time_program

LAUNCH = BOOK.control.launch_cycles + BOOK.control.finish_cycles


def move(peer: int = 0, **head: object) -> Dma:
    """Bring 64 rows of 256 B from the data memory of the rank itself, or of a peer."""
    head_of = Head(Context.DMA, **head)  # type: ignore[arg-type]
    source = Side(Space.DM, 4096, (SLICE,), peer=peer)
    return Dma(head_of, (64,), 256, source, Side(Space.DM, 0, (SLICE,)))


@given(bodies())
@settings(max_examples=60)
def test_parts_add_up_to_the_run(commands: tuple[Instruction, ...]) -> None:
    tested = program(*commands, paths=("a", "b", "c"), prefixes=("first", "second"))
    parts = breakdown(tested, BOOK)
    assert sum(parts.values()) == time_program(tested, BOOK).cycles
    assert min(parts.values()) >= 0


def test_only_what_others_wait_for_counts() -> None:
    long_add = add(4096)
    assert cycles(long_add) > cycles(load())
    hidden = breakdown(program(load(), long_add), BOOK)
    assert {part: n for part, n in hidden.items() if n} == {
        "compute": cycles(long_add),
        "launch": LAUNCH,
    }
    after = program(load(signals=(3,)), add(4096, waits=(Wait(3, 1),)), prefixes=("a", "b"))
    parts = breakdown(after, BOOK)
    assert (parts["compute"], parts["HBM"]) == (2 * cycles(long_add), 2 * cycles(load()))


def test_transfers_are_told_apart_by_what_they_reach() -> None:
    parts = breakdown(program(load(), move(), move(peer=1), move(peer=1)), BOOK)
    assert parts["HBM"] == cycles(load())
    assert parts["transfers"] == cycles(move())
    assert parts["exchanges"] == 2 * cycles(move(peer=1))


def test_a_pass_of_several_ranks_is_an_exchange() -> None:
    together = replace(add(), group=1)
    parts = breakdown(program(add(), together), BOOK)
    assert (parts["compute"], parts["exchanges"]) == (cycles(add()), cycles(together))


def test_a_signal_on_its_way_is_a_part() -> None:
    slow = replace(BOOK, control=replace(BOOK.control, signal_cycles=70))
    tested = program(load(signals=(3,)), add(waits=(Wait(3, 1),)))
    assert breakdown(tested, slow)["signals"] == 70
