"""The timeline is the clock of the timing, command by command."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st
from timed_programs import BOOK, add, block_cycles, bodies, cycles, load, program

from furiosa_llm.backend_rngd.isa.expand import expand_commands
from furiosa_llm.backend_rngd.isa.instructions import Context, Control, Instruction, Wait
from furiosa_llm.runtime_sim.timeline import timeline
from furiosa_llm.runtime_sim.timing import time_program


def test_commands_come_with_their_times_and_what_they_waited_for() -> None:
    commands = (load(signals=(1,)), add(waits=(Wait(1, 1),), provenance=1))
    first, second, *others = timeline(
        program(*commands, paths=("load", "add"), prefixes=("a", "b")), BOOK
    )
    assert (first.start, first.end) == (2000, 2000 + cycles(load()))
    assert (second.start, second.end) == (first.end, first.end + cycles(add()))
    assert (first.context, second.context) == (Context.DMA, Context.MAIN)
    assert (first.kind, second.kind) == ("dma", "vector")
    assert (first.module, second.module) == ("a.load", "a.add")
    assert second.waits_for == (0,)
    assert [(c.call, c.entry, c.waits_for) for c in others] == [(1, 0, ()), (1, 1, (2,))]
    assert others[0].start == second.end


def test_iterations_of_a_repeat_follow_each_other() -> None:
    body = (load(signals=(1,)), add(waits=(Wait(1, 1),)))
    runs = list(timeline(program(Control(3, 2), *body), BOOK))
    period = cycles(load()) + cycles(add())
    assert [run.start - 2000 for run in runs if run.kind == "dma"] == [0, period, 2 * period]
    assert [run.waits_for for run in runs if run.kind != "dma"] == [(0,), (2,), (4,)]


@given(bodies())
@settings(max_examples=40, deadline=None)
def test_the_timeline_is_the_timing_unrolled(commands: tuple[Instruction, ...]) -> None:
    called = program(*commands, paths=("a", "b", "c"), prefixes=("x", "y"))
    runs = list(timeline(called, BOOK))
    issued = [i.entry for i in expand_commands(commands, "test")]
    assert [run.entry for run in runs] == issued * 2
    timing = time_program(called, BOOK)
    assert max(run.end for run in runs) == 2000 + block_cycles(timing)
    for place, run in enumerate(runs):
        assert all(runs[i].end <= run.start and i < place for i in run.waits_for)
    for context in Context:
        queue = [run for run in runs if run.context == context]
        assert all(a.end <= b.start for a, b in pairwise(queue))
        assert timing.contexts.get(context.name.lower(), 0) == sum(
            run.end - run.start for run in queue
        )
    vector = [r for r in runs if r.kind == "vector"]
    assert all(a.end <= b.start for a, b in pairwise(vector))


def test_the_timeline_has_every_command_where_the_clock_has_it() -> None:
    repeat = Control(count=3, length=2)
    commands = (load(), repeat, load(signals=(3,)), add(waits=(Wait(3, 1),)), add())
    timed = list(timeline(program(*commands, prefixes=("a", "b")), BOOK))
    assert [(c.call, c.entry) for c in timed[:8]] == [
        (0, 0),
        *[(0, 2), (0, 3)] * 3,
        (0, 4),
    ]
    assert [c.module for c in timed] == ["a"] * 8 + ["b"] * 8
    assert [c.kind for c in timed[:4]] == ["dma", "dma", "vector", "dma"]
    assert timed[0].start == BOOK.control.launch_cycles
    assert all(c.end - c.start == cycles(commands[c.entry]) for c in timed)  # type: ignore[arg-type]
    assert [c.waits_for for c in timed[:3]] == [(), (), (1,)]
    assert timed[10].waits_for == (9,)


@given(st.data())
@settings(max_examples=40)
def test_the_timeline_ends_when_the_program_does(data: st.DataObject) -> None:
    """Also with repeats, which the clock runs once and the timeline as often as they say."""
    body: list[Instruction] = data.draw(
        st.lists(
            st.sampled_from([load(), add(), add(context=Context.SUB), load(512), add(1024)]),
            min_size=1,
            max_size=6,
        )
    )
    length = data.draw(st.integers(1, len(body)))
    count = data.draw(st.integers(1, 4))
    found = program(load(), Control(count=count, length=length), *body, prefixes=("a", "b"))
    ends = [command.end for command in timeline(found, BOOK)]
    assert max(ends) + BOOK.control.finish_cycles == time_program(found, BOOK).cycles
