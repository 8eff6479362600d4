"""The order check: what conflicts, what orders it, and what the fault says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from furiosa_llm import errors
from furiosa_llm.backend_rngd.isa.dtypes import DType
from furiosa_llm.backend_rngd.isa.expand import expand_commands
from furiosa_llm.backend_rngd.isa.instructions import (
    Commit,
    Context,
    Contraction,
    Control,
    Counter,
    Dma,
    Exec,
    Head,
    IndexList,
    Indirect,
    Instruction,
    Port,
    Side,
    Sink,
    Space,
    Step,
    Stream,
    Wait,
)
from furiosa_llm.backend_rngd.isa.ordering import (
    NEVER,
    accesses,
    check_order,
    completed_before,
    conflicts,
    dependencies,
)
from furiosa_llm.backend_rngd.isa.program import (
    Binding,
    Block,
    Call,
    Header,
    Program,
    Provenance,
    Region,
)

MAIN, SUB, DMA = Context.MAIN, Context.SUB, Context.DMA
SLICE = 1 << 22


def head(
    context: Context, waits: Sequence[tuple[int, int]] = (), signals: Sequence[int] = ()
) -> Head:
    return Head(context, tuple(Wait(*wait) for wait in waits), tuple(signals))


def load(base: int, h: Head | None = None, *, slices: int = 64, first: int = 0) -> Dma:
    """1 KiB to data memory at `base` of some slices."""
    return Dma(
        head=h or head(DMA),
        n=(slices,),
        run=1024,
        source=Side(Space.HBM, 0, (1024,), 1),
        destination=Side(Space.DM, first * SLICE + base, (SLICE,)),
    )


def move(source: int, target: int, h: Head) -> Exec:
    """1 KiB from one place in data memory to another."""
    return Exec(
        head=h,
        counters=(Counter(16, a=64, commit=64),),
        a=Port(source),
        stream=Stream(32),
        commit_port=Port(target),
        commit=Commit(columns=32, column_stride=2),
    )


def fill(target: int, h: Head, *, lanes: int = 8) -> Exec:
    """64 B from data memory 0 to the register file's lane 0."""
    return Exec(
        head=h,
        counters=(),
        a=Port(0),
        stream=Stream(32),
        commit_port=Port(target),
        commit=Commit(sink=Sink.TRF, columns=32),
        trf_lanes=lanes,
    )


def multiply(rows: int, lanes: int, committed: int) -> Exec:
    """A contraction with the register file's first `committed` lanes."""
    return Exec(
        head=head(MAIN),
        counters=(),
        a=Port(0),
        trf=Port(rows),
        stream=Stream(32),
        contraction=Contraction(lanes=lanes),
        trf_lanes=lanes,
        commit_port=Port(8192, DType.F32),
        commit=Commit(lanes=committed, lane_stride=8),
    )


def program(*commands: Instruction) -> Program:
    """One block, called for layers 0 and 1."""
    header = Header(
        model_name="model",
        bucket="decode:1,16",
        regions=tuple(Region(name=f"r{i}", scratch_bytes=1 << 20) for i in range(4)),
        blocks=(
            Block(
                name="block_0",
                first=0,
                count=len(commands),
                provenance=(Provenance(path="mlp.up_proj"), Provenance(path="mlp.down_proj")),
            ),
        ),
        calls=tuple(
            Call(
                block=0,
                prefix=f"model.layers.{i}",
                bindings=(Binding(register_number=1, region=i),),
            )
            for i in range(2)
        ),
    )
    return Program(header, commands)


def conflicting(first: Instruction, second: Instruction) -> bool:
    a, b = expand_commands([first, second], "b")
    return conflicts(accesses(a), accesses(b))


# --- what conflicts ---


def test_two_reads_do_not_conflict_and_a_write_does() -> None:
    assert not conflicting(move(0, 4096, head(MAIN)), move(0, 8192, head(SUB)))
    assert conflicting(move(0, 4096, head(MAIN)), move(4096, 8192, head(SUB)))
    assert conflicting(move(0, 4096, head(MAIN)), move(8192, 512, head(SUB)))
    assert not conflicting(move(0, 4096, head(MAIN)), move(8192, 1024, head(SUB)))


def test_transfers_to_other_slices_do_not_conflict() -> None:
    low, high = load(0, slices=32), load(0, slices=32, first=32)
    assert not conflicting(low, replace(high, head=head(DMA)))
    assert conflicting(low, load(512, slices=1, first=31))


def test_register_rows_conflict_by_where_they_lie_however_lanes_are_cut() -> None:
    """With 8 lanes, lane 1 starts at 4 KiB of each half; with one lane, that is offset 4 KiB."""
    assert conflicting(multiply(0, 8, 8), fill(4096, head(SUB), lanes=1))
    assert not conflicting(multiply(0, 8, 1), fill(4096, head(SUB), lanes=1))
    assert not conflicting(multiply(0, 8, 8), fill(2048, head(SUB)))


HALF = 32768
lane_counts = st.sampled_from([1, 2, 4, 8])


@given(lane_counts, lane_counts, st.data())
def test_the_halves_of_the_register_file_never_meet(
    first: int, second: int, data: st.DataObject
) -> None:
    """Rows in a lane's first half and rows in a lane's second half, however many lanes."""
    low = data.draw(st.integers(0, HALF // first // 64 - 1)) * 64
    high = HALF // second + data.draw(st.integers(0, HALF // second // 64 - 1)) * 64
    assert not conflicting(multiply(low, first, first), fill(high, head(SUB), lanes=second))
    assert not conflicting(multiply(high, second, second), fill(low, head(SUB), lanes=first))


@given(lane_counts, lane_counts, st.integers(0, 1), st.data())
def test_in_one_half_rows_conflict_where_bytes_overlap(
    first: int, second: int, half: int, data: st.DataObject
) -> None:
    """Lane 0 of `second` lanes against all of `first`, compared byte by byte."""
    parts = HALF // first, HALF // second
    mine, other = (data.draw(st.integers(0, part // 64 - 1)) * 64 for part in parts)
    bytes_read = {lane * parts[0] + mine + b for lane in range(first) for b in range(64)}
    overlap = any(other + b in bytes_read for b in range(64))
    read = multiply(half * parts[0] + mine, first, first)
    write = fill(half * parts[1] + other, head(SUB), lanes=second)
    assert conflicting(read, write) == overlap


def test_rows_across_the_halves_conflict_with_both_and_with_nothing_between() -> None:
    """64 B at 4,064 of 8 lanes: the ends of the first half's parts, the starts of the second's."""
    across = multiply(4096 - 32, 8, 2)
    assert conflicting(across, fill(4096 - 64, head(SUB)))
    assert conflicting(across, fill(4096, head(SUB)))
    assert not conflicting(across, fill(4096 - 96, head(SUB)))
    assert not conflicting(across, fill(4096 + 64, head(SUB)))
    # One lane sees lane 1's pieces at 8,160 of each half.
    assert conflicting(across, fill(2 * 4096 - 64, head(SUB), lanes=1))
    assert conflicting(across, fill(HALF + 4096, head(SUB), lanes=1))
    assert not conflicting(across, fill(HALF + 4096 - 64, head(SUB), lanes=1))


def test_regions_of_hbm_are_apart_and_an_index_list_reaches_all_of_one() -> None:
    scatter = Dma(
        head=head(DMA),
        n=(4,),
        run=64,
        source=Side(Space.DM, 0, (SLICE,)),
        destination=Side(Space.HBM, 1 << 40, (0,)),
        indirect=Indirect.DESTINATION,
        index=IndexList(2 << 40, (8,), 64),
    )
    far = Side(Space.HBM, (1 << 40) + 50_000, (1024,))
    assert conflicting(scatter, replace(load(4096), source=far))
    other = Side(Space.HBM, (3 << 40) + 50_000, (1024,))
    assert not conflicting(scatter, replace(load(4096), source=other))


# --- what must be waited for ---


def test_dependencies_name_the_latest_conflict_in_each_context() -> None:
    commands: list[Instruction] = [
        load(0),
        load(0),
        move(0, 4096, head(MAIN)),
        move(4096, 8192, head(SUB)),
        load(8192),
    ]
    found = dependencies(expand_commands(commands, "b"))
    assert found == [
        (NEVER, NEVER, NEVER),
        (NEVER, NEVER, NEVER),
        (NEVER, NEVER, 1),
        (2, NEVER, NEVER),
        (NEVER, 3, NEVER),
    ]


contexts = st.sampled_from([MAIN, SUB])
places = st.integers(0, 7).map(lambda i: i * 512)


@st.composite
def any_command(draw: st.DrawFn) -> Instruction:
    kind = draw(st.integers(0, 2))
    if kind == 0:
        slices = draw(st.integers(1, 4))
        return load(draw(places), slices=slices, first=draw(st.integers(0, 4)))
    if kind == 1:
        return fill(draw(places), head(draw(contexts)), lanes=draw(st.sampled_from([1, 8])))
    return move(draw(places), draw(places), head(draw(contexts)))


@settings(max_examples=100)
@given(st.lists(any_command(), min_size=1, max_size=25))
def test_dependencies_are_those_of_comparing_every_pair(commands: list[Instruction]) -> None:
    issued = expand_commands(commands, "b")
    touched = [accesses(command) for command in issued]
    for i, found in enumerate(dependencies(issued)):
        for context in Context:
            earlier = [
                j
                for j in range(i)
                if issued[j].context == context != issued[i].context
                and conflicts(touched[j], touched[i])
            ]
            assert found[context] == max(earlier, default=NEVER)


# --- the check ---


def test_a_signal_orders_a_load_and_its_use() -> None:
    check_order(program(load(0, head(DMA, signals=[0])), move(0, 4096, head(MAIN, [(0, 1)]))))


def test_a_deleted_wait_is_a_fault_that_names_commands_and_modules() -> None:
    use = move(0, 4096, replace(head(MAIN), provenance=1))
    with pytest.raises(errors.SimulationFault) as fault:
        check_order(program(load(0), use))
    assert fault.value.code == "SIM007"
    text = str(fault.value)
    assert "block_0[0] dma hbm to dm (model.layers.0.mlp.up_proj)" in text
    assert "block_0[1] main move to dm (model.layers.0.mlp.down_proj)" in text
    assert "DM bytes 0x0 to 0x400 of slices 0 to 63" in text


def test_order_goes_through_a_third_context() -> None:
    """DMA signals sub, sub signals main: main comes after the load."""
    load_first = load(0, head(DMA, signals=[0]))
    between = move(8192, 16384, head(SUB, [(0, 1)], [1]))
    check_order(program(load_first, between, move(0, 4096, head(MAIN, [(1, 1)]))))
    without = move(8192, 16384, head(SUB, (), [1]))
    with pytest.raises(errors.SimulationFault):
        check_order(
            program(
                load(0, head(DMA, signals=[0])),
                without,
                move(0, 4096, head(MAIN, [(1, 1)])),
                move(32768, 65536, head(MAIN, [(0, 1)])),
            )
        )


def test_waiting_for_an_earlier_load_does_not_cover_a_later_one() -> None:
    commands: list[Instruction] = [
        load(0, head(DMA, signals=[0])),
        load(4096),
        move(0, 8192, head(MAIN, [(0, 1)])),
        move(4096, 16384, head(MAIN)),
    ]
    with pytest.raises(errors.SimulationFault) as fault:
        check_order(program(*commands))
    assert "block_0[1]" in fault.value.message
    assert "block_0[3]" in fault.value.message


def test_a_buffer_must_not_be_loaded_again_before_it_is_used() -> None:
    """Write after read, with a signal only in the other direction."""
    commands: list[Instruction] = [
        load(0, head(DMA, signals=[0])),
        move(0, 8192, head(MAIN, [(0, 1)])),
        load(0),
    ]
    with pytest.raises(errors.SimulationFault) as fault:
        check_order(program(*commands))
    assert fault.value.code == "SIM007"
    commands[1] = move(0, 8192, head(MAIN, [(0, 1)], [1]))
    commands[2] = load(0, head(DMA, [(1, 1)]))
    check_order(program(*commands))


def test_iterations_of_a_repeat_do_not_overlap() -> None:
    """The load of one iteration overwrites what the iteration before has read: that is over."""
    body: list[Instruction] = [
        load(0, head(DMA, signals=[0])),
        move(0, 65536, head(MAIN, [(0, 1)])),
    ]
    check_order(program(Control(4, 2, (Step(5, 512),)), *body, load(0)))


def test_commands_of_one_iteration_need_an_order() -> None:
    body: list[Instruction] = [load(0), move(0, 65536, head(MAIN))]
    with pytest.raises(errors.SimulationFault) as fault:
        check_order(program(Control(4, 2), *body))
    assert fault.value.code == "SIM007"


def test_no_signal_crosses_into_the_next_iteration() -> None:
    with pytest.raises(errors.SimulationFault) as fault:
        check_order(
            program(
                Control(2, 1), load(0, head(DMA, signals=[0])), move(0, 4096, head(MAIN, [(0, 2)]))
            )
        )
    assert fault.value.code == "SIM005"


def test_a_wait_that_nothing_ends_is_a_deadlock() -> None:
    with pytest.raises(errors.SimulationFault) as fault:
        check_order(program(load(0, head(DMA, [(3, 1)]))))
    assert fault.value.code == "SIM006"
    assert "semaphore 3" in fault.value.message


def test_a_signal_that_comes_later_in_program_order_ends_no_wait() -> None:
    """Values are computed in program order, so it would be a deadlock there."""
    with pytest.raises(errors.SimulationFault) as fault:
        check_order(program(load(0, head(DMA, [(0, 1)])), move(0, 4096, head(MAIN, (), [0]))))
    assert fault.value.code == "SIM006"


def test_a_wait_takes_its_count() -> None:
    two: list[Instruction] = [load(0, head(DMA, signals=[0])), load(1024, head(DMA, signals=[0]))]
    check_order(program(*two, move(0, 4096, head(MAIN, [(0, 2)]))))
    with pytest.raises(errors.SimulationFault) as fault:
        check_order(program(*two, move(0, 4096, head(MAIN, [(0, 3)]))))
    assert fault.value.code == "SIM006"


def test_a_signal_that_nobody_takes_is_a_fault() -> None:
    with pytest.raises(errors.SimulationFault) as fault:
        check_order(program(load(0, head(DMA, signals=[2]))))
    assert fault.value.code == "SIM005"


def test_a_semaphore_belongs_to_one_pair_of_contexts() -> None:
    both: list[Instruction] = [
        load(0, head(DMA, signals=[0])),
        move(4096, 8192, head(MAIN, (), [0])),
    ]
    with pytest.raises(errors.SimulationFault) as fault:
        check_order(program(*both, move(16384, 32768, head(SUB, [(0, 2)]))))
    assert fault.value.code == "SIM004"
    assert "dma and main" in fault.value.message


def test_completed_before_counts_commands_of_each_context() -> None:
    commands: list[Instruction] = [
        load(0, head(DMA, signals=[0])),
        load(4096),
        move(0, 8192, head(MAIN, [(0, 1)])),
        move(0, 8192, head(MAIN)),
    ]
    clocks = completed_before(expand_commands(commands, "b"), "b")
    assert clocks == [(0, 0, 0), (0, 0, 1), (0, 0, 1), (1, 0, 1)]
