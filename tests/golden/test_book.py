"""The cycle examples of the vendor's book, as encoded commands timed with `book.yaml`.

Each test builds commands, encodes them, decodes the bytes, and reads the named engine's cycles.
Test numbers are those of the golden table in the hardware notes. Where values say something, the
same bytes are executed and compared with numpy, on smaller groups of slices. Tests 5 to 7 stand in
`test_memory.py`, 18 in `test_router.py`, 19 in `test_capacities.py`, 20 in `test_schedule.py`.
"""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from golden_commands import BOOK, SLICE, dma, time_dma, time_exec
from run_commands import make_program, run_program

from furiosa_llm.backend_rngd.isa.dtypes import DType
from furiosa_llm.backend_rngd.isa.instructions import (
    Alu,
    Birth,
    Commit,
    Context,
    Contraction,
    Counter,
    Digit,
    Dma,
    Exec,
    Fate,
    Head,
    Op,
    Port,
    Reduce,
    Side,
    Sink,
    Space,
    Stream,
    Switch,
    Topology,
    Vector,
    VectorOp,
    Wait,
)

OUT = 262144
"""Where results go: away from what is read."""
I8_OUT = Port(base=OUT, dtype=DType.I8)
"""f8 bytes are moved as i8, which no conversion touches."""
DMN = 32 * SLICE


def copy(
    dtype: DType,
    run: int,
    *counters: Counter,
    pad: int = 0,
    context: Context = Context.MAIN,
    **changes: object,
) -> Exec:
    """A pass that commits packets of `run` elements (zeros up to `pad`) as they come."""
    elements = max(run, pad)
    command = Exec(
        head=Head(context),
        counters=counters,
        a=Port(dtype=dtype),
        stream=Stream(run=run, pad=pad),
        commit_port=Port(base=OUT, dtype=dtype),
        commit=Commit(columns=elements, column_stride=dtype.bytes_for(1)),
    )
    return replace(command, **changes)  # type: ignore[arg-type]


def execute(command: Exec, memory: np.ndarray, out_bytes: int, *before: Exec) -> np.ndarray:
    """Run `command` on slices that hold `memory`, u8[slices, n]; its results, u8[slices, out].

    `before` are commands that run first.
    """
    slices, n = memory.shape
    ranks, own = max(1, slices // 64), min(slices, 64)
    source = Side(Space.HBM, 0, (n,), 0, rank_stride=own * n if ranks > 1 else 0)
    fill = dma((own,), source, Side(Space.DM, 0, (SLICE,)), run=n)
    drain = dma(
        (own,),
        Side(Space.DM, OUT, (SLICE,)),
        Side(Space.HBM, 0, (out_bytes,), 1),
        run=out_bytes,
    )
    chain: list[Exec | Dma] = [fill, *before, command, drain]
    commands = [  # each waits for the one before it
        replace(
            c,
            head=Head(
                c.head.context,
                waits=(Wait(i - 1, 1),) if i else (),
                signals=(i,) if c is not drain else (),
            ),
        )
        for i, c in enumerate(chain)
    ]
    inputs = {"memory": np.ascontiguousarray(memory).view(np.int32)}
    outputs = {"out": np.zeros((slices, out_bytes // 4), np.int32)}
    program = make_program(commands, inputs, outputs, ranks=ranks)
    return run_program(program, inputs)["out"].view(np.uint8)


def numbered(slices: int, n: int) -> np.ndarray:
    """u8[slices, n]: bytes that name their slice and place, for moves."""
    return np.random.default_rng(slices * n).integers(0, 256, (slices, n), np.uint8)


# --- DMA ---


def test_1_axis_permutation_is_one_request_per_cycle() -> None:
    # [A, B, C] -> [B, A, C] of 256 cubed bytes (into data memory, so that reads and writes
    # overlap); DMNs alternate.
    n = (256, 4, 32, 2)  # A, B % 4, B / 4 % 32, B / 128
    source = Side(Space.HBM, 0, (65536, 256, 1024, 32768))
    destination = Side(Space.DM, 0, (256, 65536, SLICE, DMN))
    cost = time_dma(dma(n, source, destination))
    assert cost.requests == 256 * 256
    assert cost.total_cycles == 500 + 65_536


def test_2_inside_hbm_reads_and_writes_add() -> None:
    cost = time_dma(
        dma((8, 8), Side(Space.HBM, 0, (2048, 256)), Side(Space.HBM, 16384, (256, 2048)))
    )
    assert (cost.read_cycles, cost.write_cycles, cost.total_cycles) == (64, 64, 628)
    assert (cost.hbm_bytes_read, cost.hbm_bytes_written) == (16384, 16384)


def test_3_hbm_to_dm_overlaps() -> None:
    # [B, A, C] -> slices A / 4, [A % 4, B, C].
    n = (256, 4, 32, 2)
    source = Side(Space.HBM, 0, (65536, 256, 1024, 32768))
    destination = Side(Space.DM, 0, (256, 65536, SLICE, DMN))
    assert time_dma(dma(n, source, destination)).total_cycles == 66_036


def test_4_dm_to_dm_adds() -> None:
    # Element [A % 4, B, C] -> [B, A % 4, C] in the same slices.
    n = (256, 4, 32, 2)
    source = Side(Space.DM, 0, (256, 65536, SLICE, DMN))
    destination = Side(Space.DM, OUT, (1024, 256, SLICE, DMN))
    cost = time_dma(dma(n, source, destination))
    assert (cost.read_cycles, cost.write_cycles) == (65_536, 65_536)
    assert cost.total_cycles == 131_572


def test_8_requests_of_a_packet() -> None:
    into_dm = Side(Space.DM, 0)
    assert time_dma(dma((), Side(Space.HBM, 0), into_dm, run=4095)).requests == 16
    cost = time_dma(dma((), into_dm, Side(Space.HBM, 0), run=2800))
    # Ten full requests and one of 240 B, which reads, changes and writes its unit.
    assert cost.requests == 11
    assert cost.write_cycles == 10 + 50


# --- fetch and commit ---


@pytest.mark.parametrize(
    ("run", "counts", "cycles"),
    [(16, (4, 3, 4), 48), (32, (4, 3, 2), 24), (64, (4, 3), 12), (192, (4,), 12)],
    ids=["W", "H%2 W", "H W", "C H W"],
)
def test_9_fetch_of_i4(run: int, counts: tuple[int, ...], cycles: int) -> None:
    # [N=4, C=3, H=4, W=16] i4; stored to the TRF, since half bytes are not committed.
    stride = run // 2
    counters: list[Counter] = []
    for n in reversed(counts):
        counters.insert(0, Counter(n, a=stride, trf=stride))
        stride *= n
    command = copy(DType.I4, run, *counters, commit=Commit(sink=Sink.TRF, columns=run))
    command = replace(command, commit_port=Port(dtype=DType.I4))
    assert time_exec(command).engines["fetch"] == cycles


def packets_of(run: int, pad: int, *strides: tuple[int, int]) -> Exec:
    """f8 packets: counters (n, fetch stride) with results one after the other."""
    counters: list[Counter] = []
    commit = pad
    for n, stride in reversed(strides):
        counters.insert(0, Counter(n, a=stride, commit=commit))
        commit *= n
    return copy(DType.F8E4M3, run, *counters, pad=pad)


@pytest.mark.parametrize(
    ("command", "cycles"),
    [
        (packets_of(2, 8, (3, 10), (5, 2)), 15),
        (packets_of(10, 16, (3, 10)), 3),
        (packets_of(30, 32), 1),
    ],
    ids=["8 B", "16 B", "32 B"],
)
def test_10_fetch_grows_with_the_packet(command: Exec, cycles: int) -> None:
    # [A=3, B=5, C=2] f8: reads may run over into the next elements.
    assert time_exec(command).engines["fetch"] == cycles


def test_11_a_packet_of_24_bytes_takes_three_reads() -> None:
    command = copy(DType.BF16, 12, Counter(7, a=24, commit=24))
    assert time_exec(command).engines["fetch"] == 7 * 3


def test_12_commit_by_8_bytes_and_by_flits() -> None:
    # [A, B, C] -> [B, A, C # 8] writes 8 B at a time; [A, [B, C] # 32] whole flits.
    permuted = copy(DType.F8E4M3, 2, Counter(3, a=10, commit=8), Counter(5, a=2, commit=24), pad=8)
    flits = packets_of(10, 32, (3, 10))
    assert time_exec(permuted).engines["commit"] == 15
    assert time_exec(flits).engines["commit"] == 3

    memory = numbered(64, 32)
    elements = memory[:, :30].reshape(64, 3, 5, 2)
    got = execute(replace(permuted, a=Port(dtype=DType.I8), commit_port=I8_OUT), memory, 120)
    expected = np.zeros((64, 5, 3, 8), np.uint8)
    expected[..., :2] = elements.transpose(0, 2, 1, 3)
    np.testing.assert_array_equal(got, expected.reshape(64, -1))
    got = execute(replace(flits, a=Port(dtype=DType.I8), commit_port=I8_OUT), memory, 96)
    padded = np.zeros((64, 3, 32), np.uint8)
    padded[..., :10] = elements.reshape(64, 3, 10)
    np.testing.assert_array_equal(got, padded.reshape(64, -1))


@pytest.mark.parametrize(
    ("padded", "unit", "cycles"), [(80, 16, 10), (88, 8, 22), (96, 32, 6)], ids=["15", "23", "31"]
)
def test_13_tail_padding(padded: int, unit: int, cycles: int) -> None:
    # [B=2, A=65] f8 with rows of `padded` bytes, in packets of the largest unit that divides them.
    rows = (Counter(2, a=padded, commit=padded), Counter(padded // unit, a=unit, commit=unit))
    engines = time_exec(copy(DType.F8E4M3, unit, *rows)).engines
    assert (engines["fetch"], engines["commit"]) == (cycles, cycles)
    # One packet per row says the same to the fetch engine.
    whole = copy(DType.F8E4M3, padded, Counter(2, a=padded, commit=padded))
    assert time_exec(whole).engines["fetch"] == cycles


# --- switch ---


def switched(dtype: DType, run: int, switch: Switch, *counters: Counter, group: int = 2) -> Exec:
    """Packets through the switch; outputs are laid out densely in the order they come."""
    stride = dtype.bytes_for(run)
    dense: list[Counter] = []
    for counter in reversed(counters):
        dense.insert(0, replace(counter, commit=stride))
        stride *= counter.n
    return copy(dtype, run, *dense, switch=switch, group=group)


FETCH = Birth.FETCH
SLICE_BORN = Birth.SLICE


def test_14_broadcast01() -> None:
    # slice1 = slice0 = 2, time1 = 16, time0 = 4, packets of 64 f32.
    command = switched(
        DType.F32,
        64,
        Switch(Topology.BROADCAST01, ring=4),
        Counter(16, a=1024),
        Counter(2, SLICE_BORN, slices=2),
        Counter(4, a=256),
        Counter(2, SLICE_BORN, slices=1),
    )
    assert time_exec(command).engines["switch"] == 4 * 64 * 8 == 2048


def test_14_broadcast1() -> None:
    command = switched(
        DType.I8,
        64,
        Switch(Topology.BROADCAST1, ring=32, digits=(Digit(shift=0, bits=3, slices=1),)),
        Counter(64, a=64),
        Counter(4, SLICE_BORN, slices=8),
    )
    assert time_exec(command).engines["switch"] == 32 * 64 * 2 == 4096


def test_14_transpose() -> None:
    # slice1 = 32, slice0 = 2: output slice [slice0, slice1].
    digits = (Digit(shift=0, bits=5, slices=2), Digit(shift=5, bits=1, slices=1))
    command = switched(
        DType.I8, 64, Switch(Topology.TRANSPOSE, ring=64, digits=digits), Counter(64, a=64)
    )
    assert time_exec(command).engines["switch"] == 64 * 64 * 2 == 8192


def test_15_inter_transpose() -> None:
    # slice1 = time1 = 2, slice0 = 16, time2 = time0 = 2: eight packets leave each slice.
    digits = (Digit(shift=0, bits=4, slices=1), Digit(shift=4, bits=1, bytes=64))
    command = switched(
        DType.I8,
        32,
        Switch(Topology.INTER_TRANSPOSE, ring=32, digits=digits),
        Counter(2, a=128),
        Counter(2, a=32),
        Counter(2, SLICE_BORN, slices=16),
    )
    assert time_exec(command).engines["switch"] == 32 * 8 * 1 == 256


def test_15_transposed_broadcast1() -> None:
    command = switched(
        DType.I8,
        32,
        Switch(Topology.TRANSPOSED_BROADCAST1, ring=64, digits=(Digit(shift=0, bits=3, slices=8),)),
        Counter(16, a=32),
        Counter(8, SLICE_BORN, slices=1),
    )
    assert time_exec(command).engines["switch"] == 64 * 16 * 1 == 1024


@pytest.mark.parametrize(
    ("ring", "packets", "flits", "cycles"),
    [(256, 8, 8, 16_384), (32, 8, 8, 2_048), (4, 24, 1, 96)],
)
def test_15_custom_broadcast(ring: int, packets: int, flits: int, cycles: int) -> None:
    command = switched(
        DType.I8,
        32 * flits,
        Switch(Topology.CUSTOM, ring=ring),
        Counter(packets, a=32 * flits),
        Counter(2, SLICE_BORN, slices=1),
    )
    cost = time_exec(command)
    assert cost.engines["switch"] == cycles
    # Loading the bitmap is extra.
    assert cost.latency_cycles >= BOOK.switch.bitmap_load_cycles


Packets = list[tuple[int, int]]
"""(source slice, packet there) in the order in which an output slice gets them."""


def packets_for(topology: Topology, s2: int, s1: int, s0: int) -> Packets:
    """What slice [slice2, slice1 = 4, slice0 = 2] gets when slices fetch four packets."""

    def at(i: int, j: int) -> int:
        return 8 * s2 + 2 * i + j

    fours, twos = range(4), range(2)
    match topology:
        case Topology.BROADCAST01:  # [time1, slice1, time0, slice0]
            return [
                (at(i, j), 2 * t1 + t0) for t1 in twos for i in fours for t0 in twos for j in twos
            ]
        case Topology.BROADCAST1:  # [time, slice1]
            return [(at(i, s0), t) for t in fours for i in fours]
        case Topology.TRANSPOSE:  # output slices are [slice2, slice0, slice1]
            s = 2 * s1 + s0
            return [(at(s % 4, s // 4), t) for t in fours]
        case Topology.INTER_TRANSPOSE:  # output slices are [slice2, time, slice0]
            return [(at(i, s0), s1) for i in fours]
        case _:  # output slices are [slice2, any, slice1], [time, slice0]
            return [(at((2 * s1 + s0) % 4, j), t) for t in fours for j in twos]


SMALL_ROUTES = {
    Topology.BROADCAST01: (
        (),
        (
            Counter(2, a=64),
            Counter(4, SLICE_BORN, slices=2),
            Counter(2, a=32),
            Counter(2, SLICE_BORN, slices=1),
        ),
    ),
    Topology.BROADCAST1: (
        (Digit(shift=0, bits=1, slices=1),),
        (Counter(4, a=32), Counter(4, SLICE_BORN, slices=2)),
    ),
    Topology.TRANSPOSE: (
        (Digit(shift=0, bits=2, slices=2), Digit(shift=2, bits=1, slices=1)),
        (Counter(4, a=32),),
    ),
    Topology.INTER_TRANSPOSE: (
        (Digit(shift=0, bits=1, slices=1), Digit(shift=1, bits=2, bytes=32)),
        (Counter(4, SLICE_BORN, slices=2),),
    ),
    Topology.TRANSPOSED_BROADCAST1: (
        (Digit(shift=0, bits=2, slices=2),),
        (Counter(4, a=32), Counter(2, SLICE_BORN, slices=1)),
    ),
}


@pytest.mark.parametrize("topology", SMALL_ROUTES)
def test_14_and_15_move_the_right_packets(topology: Topology) -> None:
    digits, counters = SMALL_ROUTES[topology]
    command = switched(DType.I8, 32, Switch(topology, 8, digits), *counters, group=0)
    assert time_exec(command).engines["switch"] == 8 * 4
    memory = numbered(64, 128)
    packets = memory.reshape(64, 4, 32)
    expected = np.array(
        [
            [packets[source] for source in packets_for(topology, s // 8, s // 2 % 4, s % 2)]
            for s in range(64)
        ]
    ).reshape(64, -1)
    np.testing.assert_array_equal(execute(command, memory, expected.shape[1]), expected)


# --- transpose ---


@pytest.mark.parametrize(
    ("dtype", "rows", "columns", "blocks", "cycles"),
    [
        (DType.I8, 8, 16, 2, 48),
        (DType.I8, 4, 2, 1, 6),
        (DType.BF16, 4, 8, 8, 68),
        (DType.I4, 16, 16, 4, 80),
        (DType.F32, 2, 8, 4, 34),
        (DType.I8, 8, 32, 2, 128),
    ],
    ids=["16,16,2", "4,2,1", "4,8,8", "16,16,4", "2,8,4", "32,32,2 single"],
)
def test_16_transpose(dtype: DType, rows: int, columns: int, blocks: int, cycles: int) -> None:
    # `rows` steps bring a row each; what was a column is contiguous in memory afterwards.
    size = dtype.bytes_for(1)
    unit = 8 * 8 // dtype.bits
    command = copy(
        dtype,
        columns,
        Counter(blocks, a=256, commit=rows * columns * size),
        Counter(rows, a=32, commit=size),
        pad=-columns % unit + columns,
        commit=Commit(
            columns=columns,
            column_stride=rows * size,
            transpose_rows=rows,
            transpose_columns=columns,
        ),
    )
    assert time_exec(command).engines["transpose"] == cycles
    if dtype == DType.I4:
        return  # half bytes have no values yet
    memory = numbered(64, 256 * blocks)
    matrices = memory.reshape(64, blocks, 256)[:, :, : 32 * rows].reshape(64, blocks, rows, 32)
    elements = matrices[..., : columns * size].reshape(64, blocks, rows, columns, size)
    expected = elements.swapaxes(2, 3).reshape(64, -1)
    moved = {2: DType.I16, 4: DType.I32}.get(size, dtype)
    bits = replace(command, a=Port(dtype=moved), commit_port=Port(base=OUT, dtype=moved))
    np.testing.assert_array_equal(execute(bits, memory, expected.shape[1]), expected)


# --- reduction ---


def sum_over_slices(group: int) -> Exec:
    """256 bf16 in each slice, as [time 8][packet 32]: products with ones, then across slices."""
    return Exec(
        head=Head(Context.MAIN),
        counters=(Counter(8, fate=Fate.MSUM, a=64),),
        a=Port(),
        stream=Stream(run=32),
        contraction=Contraction(lanes=1, trf_read=32),
        trf_lanes=1,
        vector=Vector(slice_reduce=Reduce.ADD, slice_group=64 << group),
        commit_port=Port(base=OUT, dtype=DType.F32),
        commit=Commit(columns=1),
        group=group,
    )


def test_17_reduce_65536_elements_to_one() -> None:
    # The book says about 40 cycles for the tree and the accumulator, and 256 across slices.
    cost = time_exec(sum_over_slices(2))
    assert cost.engines["inter_slice"] == cost.engines["collect"] + 256
    assert cost.total_cycles - cost.base_cycles == pytest.approx(296, abs=10)


def test_17_sums_all_elements() -> None:
    rng = np.random.default_rng(17)
    values = rng.integers(-8, 9, (64, 256)).astype(ml_dtypes.bfloat16)
    ones = np.ones((64, 16), ml_dtypes.bfloat16)
    memory = np.concatenate([values, ones], axis=1).view(np.uint8)
    load_ones = Exec(
        head=Head(Context.SUB),
        counters=(),
        a=Port(base=512),
        stream=Stream(run=16),
        commit_port=Port(),
        commit=Commit(sink=Sink.TRF, columns=16),
        trf_lanes=1,
    )
    got = execute(sum_over_slices(0), memory, 4, load_ones).view(np.float32)
    np.testing.assert_array_equal(got, np.full((64, 1), values.astype(np.float32).sum()))


def test_two_float_units_add_two_cycles() -> None:
    # exp(sqrt(x)) against one unit less each; a single flit hides the narrower path.
    identity = copy(DType.F32, 4, commit_port=Port(base=OUT, dtype=DType.F32))
    ops = (VectorOp(Alu.FPU, Op.SQRT), VectorOp(Alu.EXP, Op.EXP))
    both = replace(identity, vector=Vector(ops=ops))
    assert time_exec(both).latency_cycles - time_exec(identity).latency_cycles == 2
