"""Timing of whole programs: queues, waits, attribution, and speed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from furiosa_llm.backend_rngd.isa.container import (
    Block,
    Call,
    Header,
    Program,
    Provenance,
    read_program,
    write_program,
)
from furiosa_llm.backend_rngd.isa.cost import dma_cost, exec_cost, uses_vector_engine
from furiosa_llm.backend_rngd.isa.dtypes import DType
from furiosa_llm.backend_rngd.isa.expand import expand_commands
from furiosa_llm.backend_rngd.isa.instructions import (
    Alu,
    Birth,
    Commit,
    Context,
    Contraction,
    Control,
    Counter,
    Dma,
    Exec,
    Fate,
    Head,
    Instruction,
    Op,
    Port,
    Side,
    Source,
    Space,
    Step,
    Stream,
    Switch,
    Topology,
    Vector,
    VectorOp,
    Wait,
)
from furiosa_llm.backend_rngd.isa.machine import load_machine
from furiosa_llm.backend_rngd.isa.plan import ExecPlan, plan_dma, plan_exec
from furiosa_llm.errors import SimulationFault
from furiosa_llm.runtime_sim.timing import (
    FINISH_ROW,
    LAUNCH_ROW,
    ProgramTiming,
    time_program,
    timeline,
)

BOOK = load_machine("book")
SLICE = 1 << 22


def load(n: int = 64, **head: object) -> Dma:
    """Bring n rows of 256 B from HBM."""
    head_of = Head(Context.DMA, **head)  # type: ignore[arg-type]
    return Dma(head_of, (n,), 256, Side(Space.HBM, 0, (256,)), Side(Space.DM, 0, (SLICE,)))


def add(steps: int = 64, context: Context = Context.MAIN, **head: object) -> Exec:
    return Exec(
        head=Head(context, **head),  # type: ignore[arg-type]
        counters=(Counter(steps, a=32, commit=32),),
        a=Port(dtype=DType.F32),
        stream=Stream(run=8),
        vector=Vector(ops=(VectorOp(Alu.FMA, Op.ADD, y=Source.IMM0),)),
        commit_port=Port(base=65536, dtype=DType.F32),
        commit=Commit(columns=8, column_stride=4),
    )


def cycles(command: Exec | Dma) -> int:
    if isinstance(command, Exec):
        return exec_cost(plan_exec(command, "test"), BOOK).total_cycles
    return dma_cost(plan_dma(command, "test"), BOOK).total_cycles


def program(
    *commands: Instruction,
    paths: Sequence[str] = ("",),
    prefixes: Sequence[str] = ("layer",),
    macs: int = 0,
) -> Program:
    """One block with the given commands, called once for each prefix."""
    provenance = tuple(Provenance(path=path, macs=macs) for path in paths)
    header = Header(
        model_name="test",
        bucket="decode:1,16",
        regions=(),
        blocks=(Block(name="block", first=0, count=len(commands), provenance=provenance),),
        calls=tuple(Call(block=0, prefix=prefix, bindings=()) for prefix in prefixes),
    )
    return Program(header, commands)


def block_cycles(timing: ProgramTiming) -> int:
    return timing.cycles - BOOK.control.launch_cycles - BOOK.control.finish_cycles


# --- queues ---


def test_launch_and_finish_have_their_own_rows() -> None:
    timing = time_program(program(add()), BOOK)
    assert [row.path for row in timing.modules] == [LAUNCH_ROW, "layer", FINISH_ROW]
    assert [row.cycles for row in timing.modules] == [2000, cycles(add()), 600]
    assert timing.cycles == 2600 + cycles(add())
    assert timing.time_us == pytest.approx(timing.cycles / 1000)


def test_queues_run_side_by_side() -> None:
    commands = (load(), add(), add(context=Context.SUB), add())
    timing = time_program(program(*commands), BOOK)
    assert block_cycles(timing) == max(
        cycles(load()), 2 * cycles(add()) + cycles(add(context=Context.SUB))
    )
    assert timing.contexts == {
        "dma": cycles(load()),
        "main": 2 * cycles(add()),
        "sub": cycles(add(context=Context.SUB)),
    }
    assert timing.engines["vector"] == 3 * 128
    assert timing.engines["dma"] == cycles(load())


def copy(context: Context) -> Exec:
    """A pass that leaves the vector engine alone."""
    return replace(add(context=context), vector=Vector())


def test_main_and_sub_take_turns_at_the_vector_engine() -> None:
    main, sub = add(), add(context=Context.SUB)
    assert block_cycles(time_program(program(main, sub), BOOK)) == cycles(main) + cycles(sub)
    for pair in ((main, copy(Context.SUB)), (copy(Context.MAIN), sub)):
        assert block_cycles(time_program(program(*pair), BOOK)) == max(map(cycles, pair))


def test_a_cast_takes_the_vector_engine_but_rounding_in_the_commit_does_not() -> None:
    def to(dtype: DType) -> Exec:
        return replace(
            copy(Context.MAIN),
            counters=(Counter(64, a=32, commit=8 * dtype.bits // 8),),
            commit_port=Port(base=65536, dtype=dtype),
            commit=Commit(columns=8, column_stride=dtype.bits // 8),
        )

    expected = {DType.F32: False, DType.BF16: False, DType.F8E4M3: True}
    uses = {dtype: uses_vector_engine(plan_exec(to(dtype), "test")) for dtype in expected}
    assert uses == expected


def test_a_custom_bitmap_loads_while_sub_and_dma_stand_still() -> None:
    everywhere = replace(
        copy(Context.MAIN),
        counters=(Counter(2, Birth.SLICE, commit=32, slices=1),),
        switch=Switch(Topology.CUSTOM, ring=64),
    )
    load_cycles = BOOK.switch.bitmap_load_cycles
    together = time_program(program(load(), everywhere, load(512)), BOOK)
    assert block_cycles(together) == cycles(load()) + load_cycles + cycles(load(512))


def test_a_wait_starts_when_its_signal_comes() -> None:
    free = program(load(), add())
    waiting = program(load(signals=(3,)), add(waits=(Wait(3, 1),)))
    assert block_cycles(time_program(free, BOOK)) == max(cycles(load()), cycles(add()))
    assert block_cycles(time_program(waiting, BOOK)) == cycles(load()) + cycles(add())


def test_a_wait_takes_as_many_signals_as_it_says() -> None:
    timing = time_program(
        program(load(signals=(3,)), load(signals=(3,)), add(waits=(Wait(3, 2),))), BOOK
    )
    assert block_cycles(timing) == 2 * cycles(load()) + cycles(add())


def test_calls_follow_each_other() -> None:
    commands = (load(signals=(0,)), add(waits=(Wait(0, 1),)))
    one = time_program(program(*commands), BOOK)
    many = time_program(program(*commands, prefixes=[f"layers.{i}" for i in range(32)]), BOOK)
    assert block_cycles(many) == 32 * block_cycles(one)
    assert many.hbm_bytes == 32 * one.hbm_bytes == 32 * 64 * 256


def test_a_wait_without_a_signal_is_a_fault() -> None:
    with pytest.raises(SimulationFault) as caught:
        time_program(program(load(signals=(3,)), add(waits=(Wait(3, 2),))), BOOK)
    assert caught.value.code == "SIM006"


@pytest.mark.parametrize("context", [Context.MAIN, Context.SUB])
def test_a_signal_that_nobody_takes_is_a_fault_at_the_next_fence(context: Context) -> None:
    left_over = add(signals=(1,), context=context)
    for commands in ((left_over,), (Control(2, 1), left_over), (left_over, Control(1, 1), add())):
        with pytest.raises(SimulationFault) as caught:
            time_program(program(*commands), BOOK)
        assert caught.value.code == "SIM005"


@pytest.mark.parametrize(
    ("commands", "code"),
    [
        ([Control(2, 2), add()], "SIM001"),
        ([*(Control(2, 9 - i) for i in range(9)), add()], "SIM002"),
        ([Control(1 << 20, 1), add()], "SIM003"),
    ],
)
def test_repeats_that_a_block_cannot_hold_are_faults(
    commands: list[Instruction], code: str
) -> None:
    with pytest.raises(SimulationFault) as caught:
        time_program(program(*commands), BOOK)
    assert caught.value.code == code


def test_iterations_of_a_repeat_do_not_overlap() -> None:
    timing = time_program(program(load(), Control(3, 2), load(), add(), load()), BOOK)
    together = max(cycles(load()), cycles(add()))
    assert block_cycles(timing) == 2 * cycles(load()) + 3 * together


# --- attribution ---


def test_a_cycle_belongs_to_the_oldest_unfinished_command() -> None:
    # The load is older than the addition, so what both do at once is the load's.
    timing = time_program(
        program(load(512), add(provenance=1), add(provenance=1), paths=("load", "add")), BOOK
    )
    rows = {row.path: row for row in timing.modules}
    assert rows["layer.load"].cycles == cycles(load(512))
    assert rows["layer.add"].cycles == max(0, 2 * cycles(add()) - cycles(load(512)))
    assert rows["layer.load"].hbm_bytes == 512 * 256
    assert rows["layer.add"].hbm_bytes == 0


def test_layers_that_share_a_block_have_their_own_rows() -> None:
    timing = time_program(
        program(add(), paths=("mlp",), prefixes=("model.layers.0", "model.layers.1"), macs=7), BOOK
    )
    rows = {row.path: row for row in timing.modules}
    assert rows["model.layers.0.mlp"].macs == rows["model.layers.1.mlp"].macs == 7
    assert timing.macs == 14


def test_utilisation_is_a_share_of_what_one_pe_can_do() -> None:
    product = Exec(
        head=Head(Context.MAIN),
        counters=(Counter(64, a=64, commit=8), Counter(16, fate=Fate.MSUM, trf=64)),
        a=Port(),
        stream=Stream(run=32),
        contraction=Contraction(lanes=1),
        commit_port=Port(base=65536, dtype=DType.F32),
        commit=Commit(),
    )
    timing = time_program(program(load(), product, macs=1_000_000), BOOK)
    assert timing.hbm_utilization == timing.hbm_bytes / (timing.cycles * 256)
    assert timing.mac_utilization == 1_000_000 / (timing.cycles * 64 * 8 * 32)


# --- against a plain simulation ---


def attributed_cycles(commands: Sequence[Instruction], rows: int) -> list[int]:
    """Cycles per provenance entry, one command after the other and without shortcuts."""
    free = dict.fromkeys(Context, 0)
    signals: dict[int, list[int]] = {}
    finishes: list[tuple[int, int]] = []
    stretch = vector_free = 0
    for issued in expand_commands(commands, "test"):
        if issued.stretch != stretch:
            stretch = issued.stretch
            free = dict.fromkeys(Context, max(free.values()))
        plan = issued.plan
        cost = exec_cost(plan, BOOK) if isinstance(plan, ExecPlan) else dma_cost(plan, BOOK)
        head = issued.command.head
        taken = [signals[w.semaphore].pop(0) for w in head.waits for _ in range(w.count)]
        start = max([free[head.context], *taken])
        if isinstance(plan, ExecPlan) and uses_vector_engine(plan):
            start = max(start, vector_free)
            vector_free = start + cost.total_cycles
        free[head.context] = start + cost.total_cycles
        for semaphore in head.signals:
            signals.setdefault(semaphore, []).append(free[head.context])
        finishes.append((free[head.context], head.provenance))
    out, end = [0] * rows, 0
    for finish, provenance in finishes:
        out[provenance] += max(0, finish - end)
        end = max(end, finish)
    return out


@st.composite
def bodies(draw: st.DrawFn, depth: int = 0) -> tuple[Instruction, ...]:
    """Straight code and repeats, with signals that balance where fences demand it."""
    out: list[Instruction] = []
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(["load", "add", "sub", "pair", "double", "repeat"]))
        size = draw(st.sampled_from([1, 16, 200, 900]))
        row = draw(st.integers(0, 2))
        if kind == "load":
            out.append(load(size, provenance=row))
        elif kind in ("add", "sub"):
            context = Context.MAIN if kind == "add" else Context.SUB
            out.append(add(size, context, provenance=row))
        elif kind == "pair":  # the addition waits for the load
            out.append(load(size, signals=(1,), provenance=row))
            out.append(add(16, waits=(Wait(1, 1),), provenance=(row + 1) % 3))
        elif kind == "double":  # two buffers: a load waits for the addition before the last
            out += [add(1, signals=(3,)), add(1, signals=(3,))]
            for _ in range(draw(st.integers(1, 5))):
                out.append(load(size, waits=(Wait(3, 1),), signals=(2,), provenance=row))
                out.append(add(64, waits=(Wait(2, 1),), signals=(3,), provenance=(row + 1) % 3))
            out.append(load(1, waits=(Wait(3, 2),)))
        elif depth < 2:
            inner = draw(bodies(depth + 1))
            out += [Control(draw(st.integers(1, 12)), len(inner), (Step(1, 64),)), *inner]
    return tuple(out) or (load(),)


@given(bodies())
@settings(max_examples=60)
def test_shortcuts_change_nothing(commands: tuple[Instruction, ...]) -> None:
    timing = time_program(program(*commands, paths=("a", "b", "c")), BOOK)
    rows = {row.path: row.cycles for row in timing.modules}
    assert [rows[f"layer.{path}"] for path in "abc"] == attributed_cycles(commands, 3)
    assert sum(rows.values()) == timing.cycles


def test_the_bytes_give_the_same_times() -> None:
    original = program(
        Control(5, 2), load(signals=(1,)), add(waits=(Wait(1, 1),)), prefixes=("a", "b")
    )
    assert time_program(read_program(write_program(original)), BOOK) == time_program(original, BOOK)


# --- speed ---


def test_a_large_program_is_timed_in_well_under_a_second() -> None:
    # 32 calls of a block of 60 distinct commands that issues 36,000: more than a million.
    body: list[Instruction] = []
    for i in range(30):
        body.append(replace(load(16 + i, signals=(1,)), run=256 + 8 * i))
        body.append(add(16 + i, waits=(Wait(1, 1),)))
    commands = [Control(600, len(body)), *body]
    large = program(*commands, prefixes=[f"layers.{i}" for i in range(32)])
    start = time.perf_counter()
    timing = time_program(large, BOOK)
    assert time.perf_counter() - start < 0.5
    one_body = sum(cycles(c) for c in body if isinstance(c, Exec | Dma))
    assert timing.cycles < 32 * 600 * one_body


# --- the timeline ---


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
