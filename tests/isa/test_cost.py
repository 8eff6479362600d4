"""Cost formulas beyond the golden numbers: what makes a command slower, and by how much."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from random_commands import dense_passes, dmas

from furiosa_llm.backend_rngd.isa.cost import dma_cost, exec_cost
from furiosa_llm.backend_rngd.isa.dtypes import DType
from furiosa_llm.backend_rngd.isa.instructions import (
    Alu,
    Birth,
    Commit,
    Comparator,
    Comparison,
    Context,
    Contraction,
    Counter,
    Dma,
    Exec,
    Fate,
    Generate,
    Head,
    IndexList,
    Indirect,
    Op,
    Port,
    Reduce,
    Side,
    Sink,
    Slot,
    Source,
    Space,
    Stream,
    Switch,
    Topology,
    Vector,
    VectorOp,
)
from furiosa_llm.backend_rngd.isa.machine import load_machine
from furiosa_llm.backend_rngd.isa.plan import SLICE_ADDRESS_BYTES, plan_dma, plan_exec
from furiosa_llm.backend_rngd.isa.record_decoding import decode_exec
from furiosa_llm.backend_rngd.isa.record_encoding import encode_exec
from furiosa_llm.errors import BinaryError

BOOK = load_machine("book")
SLICE = SLICE_ADDRESS_BYTES

# A weight stream against activations in registers: N = 4 rows of K = 256, eight token lanes.
LINEAR = Exec(
    head=Head(Context.MAIN),
    counters=(Counter(4, a=512, commit=2), Counter(8, fate=Fate.MSUM, a=64, trf=64)),
    a=Port(),
    stream=Stream(run=32),
    trf=Port(),
    contraction=Contraction(),
    commit_port=Port(base=65536),
    commit=Commit(lanes=8, lane_stride=8, transpose_rows=4, transpose_columns=8),
)
ADD_ONE = Exec(
    head=Head(Context.MAIN),
    counters=(Counter(16, a=32, commit=32),),
    a=Port(dtype=DType.F32),
    stream=Stream(run=8),
    vector=Vector(ops=(VectorOp(Alu.FMA, Op.ADD, y=Source.IMM0),)),
    commit_port=Port(base=65536, dtype=DType.F32),
    commit=Commit(columns=8, column_stride=4),
)


def engines(command: Exec) -> dict[str, int]:
    return dict(exec_cost(plan_exec(command, "test"), BOOK).engines)


def dma(n: tuple[int, ...], run: int, source: Side, destination: Side) -> Dma:
    return Dma(Head(Context.DMA), n, run, source, destination)


def cycles(command: Dma) -> tuple[int, int]:
    cost = dma_cost(plan_dma(command, "test"), BOOK)
    return cost.read_cycles, cost.write_cycles


# --- tensor unit ---


def test_a_weight_stream_runs_at_32_bytes_per_cycle() -> None:
    # 4 rows x 512 B of weights; the transposer takes 4 flits and gives 8 rows of 8 B.
    assert engines(LINEAR) == {
        "fetch": 64,
        "switch": 64,
        "collect": 64,
        "contraction": 64,
        "transpose": 4 + 8,
        "commit": 8,
    }
    cost = exec_cost(plan_exec(LINEAR, "test"), BOOK)
    assert cost.total_cycles == 265 + 64 + cost.latency_cycles


def test_constants_are_committed_without_a_fetch() -> None:
    head = Head(Context.SUB)
    words = Port(dtype=DType.F32)
    constants = replace(
        ADD_ONE,
        head=head,
        a=words,
        counters=(Counter(16, commit=32),),
        vector=Vector(),
        generate=Generate(0x3F800000),
    )
    assert engines(constants) == {"commit": 16 * 4}  # four writes of 8 B a packet
    cost = exec_cost(plan_exec(constants, "test"), BOOK)
    assert cost.total_cycles == 259 + 64 + BOOK.commit.fill_cycles


def latency(command: Exec) -> int:
    return exec_cost(plan_exec(command, "test"), BOOK).latency_cycles


def test_a_lookup_delays_the_first_result_as_a_cast_does() -> None:
    f8 = replace(
        ADD_ONE,
        counters=(Counter(16, a=8, commit=16),),
        a=Port(dtype=DType.F8E4M3),
        vector=Vector(),
        commit_port=Port(base=65536, dtype=DType.BF16),
        commit=Commit(columns=8, column_stride=2),
    )
    looked_up = replace(f8, stream=Stream(run=8, lookup=DType.BF16))
    plain = replace(f8, a=Port(), counters=(Counter(16, a=16, commit=16),), stream=Stream(run=8))
    assert latency(looked_up) - latency(plain) == BOOK.fetch.cast_latency_cycles


def test_tags_are_a_stage_of_their_own() -> None:
    tagged = replace(
        ADD_ONE.vector,
        ops=(VectorOp(Alu.FMA, Op.ADD, y=Source.SELECT),),
        comparators=(Comparator(Comparison.LESS, 0),),
        slots=(Slot(Source.IMM0, mask=1, value=1),),
    )
    assert latency(replace(ADD_ONE, vector=tagged)) - latency(ADD_ONE) == 1


def test_reuse_fetches_nothing_more_but_multiplies_again() -> None:
    reused = replace(
        LINEAR,
        counters=(*LINEAR.counters, Counter(4, birth=Birth.REUSE, trf=2048, commit=1024)),
        commit=replace(LINEAR.commit, transpose_rows=0, transpose_columns=0, lane_stride=16),
    )
    reused = replace(reused, commit_port=Port(base=65536, dtype=DType.F32))
    # The out counter inside the summed one keeps four results open in each lane.
    counters = (Counter(4, a=512, commit=8192), LINEAR.counters[1], reused.counters[2])
    cost = engines(replace(reused, counters=counters))
    assert cost["fetch"] == 64
    assert cost["contraction"] == 4 * 8 * 4  # one cycle per packet and row


def test_half_packets_idle_half_of_the_multipliers() -> None:
    half = replace(
        LINEAR,
        counters=(LINEAR.counters[0], Counter(16, fate=Fate.MSUM, a=32, trf=32)),
        stream=Stream(run=16),
        contraction=Contraction(pack=1, trf_read=32, depth=4),
    )
    assert engines(half)["contraction"] == 64  # the same products in as many cycles as flits
    assert plan_exec(half, "test").multiplications == plan_exec(LINEAR, "test").multiplications


def test_packets_of_one_flit_are_multiplied_in_pairs() -> None:
    """A broadcast brings 32 B of each slice: neighbours fill the multipliers if their rows do."""
    whole = replace(
        LINEAR,
        counters=(
            Counter(4, a=32, commit=16),
            Counter(64, Birth.SLICE, Fate.MSUM, slices=1, trf=32),
            Counter(2, birth=Birth.REUSE, trf=2048, commit=64),
        ),
        stream=Stream(run=16),
        switch=Switch(Topology.BROADCAST01, 64),
        contraction=Contraction(trf_read=32, depth=4),
        commit=Commit(lanes=8, lane_stride=2),
    )
    assert engines(whole)["contraction"] == 4 * 64
    alone = replace(whole, contraction=Contraction(pack=1, trf_read=32, depth=4))
    assert engines(alone)["contraction"] == 4 * 64 * 2


def test_contracting_in_time_uses_a_32nd_of_the_multipliers() -> None:
    # K in counters instead of the packet: one product per lane and cycle, not 32.
    in_time = replace(
        LINEAR,
        counters=(Counter(256, fate=Fate.MSUM, a=2, trf=2),),
        stream=Stream(run=1),
        contraction=Contraction(pack=1, depth=0, trf_read=2),
        commit=Commit(lanes=8, lane_stride=8),
    )
    plan = plan_exec(in_time, "test")
    peak = plan.slices * 8 * BOOK.contraction.macs_per_lane["bf16"]
    cycles = exec_cost(plan, BOOK).engines["contraction"]
    assert plan.multiplications / (cycles * peak) == 1 / 32


def test_float_units_halve_the_vector_engine() -> None:
    integer = replace(
        ADD_ONE,
        a=Port(dtype=DType.I32),
        commit_port=Port(base=65536, dtype=DType.I32),
        vector=Vector(ops=(VectorOp(Alu.FXP_ADD, Op.IADD, y=Source.IMM0),)),
    )
    assert engines(integer)["vector"] == 16
    assert engines(ADD_ONE)["vector"] == 32


def test_a_pair_of_streams_is_twice_the_work() -> None:
    pair = replace(
        ADD_ONE,
        b=Port(base=4096, dtype=DType.F32),
        counters=(Counter(16, a=32, b=32, commit=32),),
        stream=Stream(run=8, pair=True),
        vector=Vector(ops=(VectorOp(Alu.FMA, Op.ADD, y=Source.ZIP),)),
    )
    single, double = engines(ADD_ONE), engines(pair)
    for engine in ("fetch", "collect", "vector"):
        assert double[engine] == 2 * single[engine]
    assert double["commit"] == single["commit"]


def test_reduction_across_slices_adds_the_group_to_the_stream() -> None:
    reduced = replace(ADD_ONE, vector=Vector(slice_reduce=Reduce.ADD, slice_group=64))
    assert engines(reduced)["inter_slice"] == 16 + 64


def test_casting_fetch_reads_what_fits_a_flit() -> None:
    # 16 bf16 (32 B) become 64 B of f32: two reads, two flits.
    cast = replace(
        ADD_ONE,
        a=Port(),
        stream=Stream(run=16, cast=DType.F32),
        counters=(Counter(8, a=32, commit=64),),
        commit=Commit(columns=16, column_stride=4),
    )
    assert (engines(cast)["fetch"], engines(cast)["collect"]) == (16, 16)


def test_the_sub_context_moves_8_bytes_per_cycle() -> None:
    fill = Exec(
        head=Head(Context.SUB),
        counters=(Counter(64, a=32, trf=32),),
        a=Port(),
        stream=Stream(run=16),
        commit_port=Port(),
        commit=Commit(sink=Sink.TRF, columns=16),
    )
    cost = exec_cost(plan_exec(fill, "test"), BOOK)
    assert cost.engines["fetch"] == 64 * 4
    assert cost.base_cycles == 259
    assert "commit" not in cost.engines


def test_commit_of_scattered_elements_writes_each_alone() -> None:
    rounded = replace(ADD_ONE, commit_port=Port(base=65536))
    dense = replace(
        rounded,
        counters=(Counter(16, a=32, commit=16),),
        commit=Commit(columns=8, column_stride=2),
    )
    scattered = replace(
        rounded,
        counters=(Counter(16, a=32, commit=64),),
        commit=Commit(columns=8, column_stride=8),
    )
    assert engines(dense)["commit"] == 16
    assert engines(scattered)["commit"] == 128
    assert "cast" not in engines(dense)  # the commit adapter rounds to bf16


def test_a_ring_takes_its_size_times_the_packets() -> None:
    everywhere = replace(
        ADD_ONE,
        counters=(Counter(2, a=32, commit=2048), Counter(64, Birth.SLICE, commit=32, slices=1)),
        switch=Switch(Topology.BROADCAST01, ring=64),
    )
    cost = exec_cost(plan_exec(everywhere, "test"), BOOK)
    assert (cost.engines["fetch"], cost.engines["switch"]) == (2, 128)
    assert cost.latency_cycles > 2 * 63


@pytest.mark.parametrize(
    ("path", "value", "engine"),
    [
        (("counters", 0, "n"), 2, "fetch"),
        (("counters", 1, "n"), 4, "contraction"),
        (("stream", "run_stride"), 32, "fetch"),
        (("stream", "run_step"), 0, "fetch"),
        (("vector", "slice_group"), 16, "inter_slice"),
        (("out", "transpose_rows"), 2, "transpose"),
    ],
)
def test_one_field_of_the_bytes_changes_the_cycles(
    path: tuple[str | int, ...], value: int, engine: str
) -> None:
    summed = Vector(slice_reduce=Reduce.ADD, slice_group=64)
    stream = Stream(run=8, runs=4, run_stride=16, pad=32)
    record = encode_exec(replace(LINEAR, stream=stream, vector=summed))
    before = exec_cost(plan_exec(decode_exec(record, "test"), "test"), BOOK)
    place = record
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    after = exec_cost(plan_exec(decode_exec(record, "test"), "test"), BOOK)
    assert after.engines[engine] != before.engines[engine]


@given(dense_passes(), st.integers(1, 4))
def test_more_steps_never_take_less_time(command: Exec, more: int) -> None:
    try:
        plan = plan_exec(command, "test")
    except BinaryError as error:
        assume(error.code != "VED011")  # the sub context takes only whole units of 8 B
        raise
    cost = exec_cost(plan, BOOK)
    outer = replace(command.counters[0], n=command.counters[0].n + more)
    longer = replace(command, counters=(outer, command.counters[1]))
    after = exec_cost(plan_exec(longer, "test"), BOOK)
    assert cost.total_cycles == (
        cost.base_cycles + max(cost.engines.values()) + cost.latency_cycles
    )
    for engine, busy in cost.engines.items():
        assert 1 <= busy < after.engines[engine]


# --- DMA ---


def test_contiguous_loops_are_one_run() -> None:
    # 64 slices of 55,296 B each: runs of 1,152 B merge on both sides.
    loops = (64, 48)
    source = Side(Space.HBM, 0, (55296, 1152))
    destination = Side(Space.DM, 0, (SLICE, 1152))
    cost = dma_cost(plan_dma(dma(loops, 1152, source, destination), "test"), BOOK)
    assert cost.requests == 64 * 55296 // 256
    apart = Side(Space.DM, 0, (SLICE, 1280))
    cost = dma_cost(plan_dma(dma(loops, 1152, source, apart), "test"), BOOK)
    assert cost.requests == 64 * 48 * 5


def test_reads_that_cross_a_unit_count_twice() -> None:
    into = Side(Space.DM, 0, (256,))
    assert cycles(dma((8,), 256, Side(Space.HBM, 0, (512,)), into))[0] == 8
    assert cycles(dma((8,), 256, Side(Space.HBM, 64, (512,)), into))[0] == 16
    # Runs of 192 B, 320 B apart, start at 0, 64, 128, 192 in their units: half of them cross.
    assert cycles(dma((8,), 192, Side(Space.HBM, 0, (320,)), into))[0] == 8 + 4


def test_partial_writes_to_hbm_read_the_unit_first() -> None:
    out = Side(Space.DM, 0, (256,))
    assert cycles(dma((8,), 256, out, Side(Space.HBM, 0, (256,))))[1] == 8
    assert cycles(dma((8,), 32, out, Side(Space.HBM, 0, (32,))))[1] == 8 * 50
    assert cycles(dma((8,), 256, out, Side(Space.HBM, 128, (256,))))[1] == 8 * 50


def test_gather_reads_rows_and_their_numbers() -> None:
    rows = Side(Space.HBM, 0, (0,))
    numbers = IndexList(base=0, strides=(4,), scale=1536, register=3, bound=1000)
    command = dma((128,), 1536, rows, Side(Space.DM, 0, (1536,)))
    command = replace(command, indirect=Indirect.SOURCE, index=numbers)
    cost = dma_cost(plan_dma(command, "test"), BOOK)
    assert cost.requests == 128 * 6
    # 128 numbers of 4 B are two requests, which must arrive before the first row is asked for.
    assert cost.read_cycles == 120 + 2 + 128 * 6
    assert cost.hbm_bytes_read == 128 * 1536 + 128 * 4
    assert cost.write_cycles == 2 * 128 * 6  # one slice: one network, half the speed


def test_scatter_of_rows_that_share_units_pays_for_partial_writes() -> None:
    whole = IndexList(base=0, strides=(4,), scale=768)
    shared = IndexList(base=0, strides=(4,), scale=384)
    out = Side(Space.DM, 0, (SLICE,))
    for index, run, write in ((whole, 768, 4 * 3), (shared, 384, None)):
        command = dma((4,), run, out, Side(Space.HBM, 0, (0,)))
        command = replace(command, indirect=Indirect.DESTINATION, index=index)
        cost = dma_cost(plan_dma(command, "test"), BOOK)
        if write is not None:
            assert cost.write_cycles == write
        else:  # rows start at 0 or 128: one or two of their two requests are partial
            assert cost.write_cycles == 4 * 2 + 4 * 1.5 * 49


def test_misaligned_writes_to_dm_take_three_times_as_long() -> None:
    source = Side(Space.HBM, 0, (256,))
    assert cycles(dma((8,), 256, source, Side(Space.DM, 0, (SLICE,))))[1] == 16
    assert cycles(dma((8,), 256, source, Side(Space.DM, 4, (SLICE,))))[1] == 48


@given(dmas(valid=True))
def test_every_dma_command_has_a_cost(command: Dma) -> None:
    cost = dma_cost(plan_dma(command, "test"), BOOK)
    assert cost.total_cycles > 500
    assert cost.requests >= 1


@given(
    base=st.integers(0, 511),
    n=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    strides=st.tuples(st.integers(0, 600), st.integers(0, 600)),
    run=st.integers(1, 600),
    write=st.booleans(),
)
def test_hbm_cost_counts_each_request(
    base: int, n: tuple[int, int], strides: tuple[int, int], run: int, write: bool
) -> None:
    """Against counting every request of every run, when nothing merges and HBM keeps up."""
    hbm, dm = Side(Space.HBM, base, strides), Side(Space.DM, 0, (SLICE, 8 * SLICE))
    command = dma(n, run, dm, hbm) if write else dma(n, run, hbm, dm)
    expected = 0
    for i, j in np.ndindex(*n):
        start = base + i * strides[0] + j * strides[1]
        for at in range(start, start + run, 256):
            size = min(256, start + run - at)
            if write:
                expected += 1 if size == 256 and at % 256 == 0 else 50
            else:
                expected += 1 + (at % 256 + size > 256)
    endless = BOOK.replace("hbm.bandwidth_bytes_per_second", 1e18)
    cost = dma_cost(plan_dma(command, "test"), endless)
    assert (cost.write_cycles if write else cost.read_cycles) == expected
