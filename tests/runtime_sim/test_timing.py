"""Timing of whole programs: queues, waits, attribution, and speed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from timed_programs import BOOK, add, block_cycles, bodies, cycles, load, program

from furiosa_llm.backend_rngd.isa.container import read_program, write_program
from furiosa_llm.backend_rngd.isa.cost import dma_cost, exec_cost, uses_vector_engine
from furiosa_llm.backend_rngd.isa.dtypes import DType
from furiosa_llm.backend_rngd.isa.expand import expand_commands
from furiosa_llm.backend_rngd.isa.instructions import (
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
    Port,
    Stream,
    Switch,
    Topology,
    Vector,
    Wait,
)
from furiosa_llm.backend_rngd.isa.plan import ExecPlan, plan_exec
from furiosa_llm.backend_rngd.isa.program import Program, Region
from furiosa_llm.errors import SimulationFault
from furiosa_llm.runtime_sim.timing import FINISH_ROW, LAUNCH_ROW, time_program

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


def test_a_module_is_bound_by_what_is_busy_most() -> None:
    product = Exec(
        head=Head(Context.MAIN),
        counters=(Counter(640, a=64, commit=8), Counter(16, fate=Fate.MSUM, trf=64)),
        a=Port(),
        stream=Stream(run=32),
        contraction=Contraction(lanes=1),
        commit_port=Port(base=65536, dtype=DType.F32),
        commit=Commit(),
    )
    commands: dict[str, Exec | Dma] = {
        "bytes": load(8192),
        "words": add(4096),
        "products": product,
        "pieces": replace(load(640), run=32),
        "little": add(1),
    }
    rows = {
        path: next(r for r in time_program(program(c), BOOK).modules if r.path == "layer")
        for path, c in commands.items()
    }
    assert {path: row.bound for path, row in rows.items()} == {
        "bytes": "HBM",
        "words": "vector",
        "products": "MAC",
        "pieces": "DMA issue",
        "little": "latency",
    }
    assert rows["bytes"].roofline_cycles == 8192
    assert rows["words"].engines["vector"] == 2 * 4096


def test_hidden_commands_keep_their_engines_busy() -> None:
    timing = time_program(program(load(4096), add(64, provenance=1), paths=("load", "add")), BOOK)
    (hidden,) = (row for row in timing.modules if row.path == "layer.add")
    assert (hidden.cycles, hidden.engines["vector"]) == (0, 128)
    assert timing.engines["vector"] == 128


def test_a_pe_has_its_part_of_hbm() -> None:
    region = Region(name="scratch", scratch_bytes=1 << 30)
    small = program(add())
    large = Program(small.header.model_copy(update={"regions": (region,)}), small.commands)
    for sharers, share in ((1, 1 / 48), (8, 8 / 48)):
        timing = time_program(large, BOOK, sharers=sharers)
        assert timing.hbm_capacity_utilization == pytest.approx(share)


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


def test_a_program_has_a_limit_of_cycles() -> None:
    slow = program(Control(1000, 1), load())
    cycles_taken = time_program(slow, BOOK).cycles
    assert time_program(slow, BOOK, max_cycles=cycles_taken).cycles == cycles_taken
    with pytest.raises(SimulationFault) as fault:
        time_program(slow, BOOK, max_cycles=cycles_taken - 1)
    assert fault.value.code == "SIM027"


# --- speed ---


def test_a_large_program_is_timed_in_well_under_a_second() -> None:
    # 32 calls of a block of 60 distinct commands that issues 36,000: more than a million.
    body: list[Instruction] = []
    for i in range(30):
        body.append(replace(load(16 + i, signals=(1,)), run=256 + 8 * i))
        body.append(add(16 + i, waits=(Wait(1, 1),)))
    commands = [Control(600, len(body)), *body]
    large = program(*commands, prefixes=[f"layers.{i}" for i in range(32)])
    start = time.process_time()
    timing = time_program(large, BOOK)
    assert time.process_time() - start < 0.5
    one_body = sum(cycles(c) for c in body if isinstance(c, Exec | Dma))
    assert timing.cycles < 32 * 600 * one_body
