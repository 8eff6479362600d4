"""Every number of a machine file matters: another value changes a report, or is refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import yaml
from golden_commands import SLICE, dma
from run_commands import make_program
from timed_programs import add, load

from furiosa_llm.backend_rngd.isa.cost import dma_cost, exec_cost
from furiosa_llm.backend_rngd.isa.dtypes import DType
from furiosa_llm.backend_rngd.isa.hbm_channels import channel_cycles
from furiosa_llm.backend_rngd.isa.instructions import (
    Birth,
    Commit,
    Context,
    Contraction,
    Counter,
    Dma,
    Exec,
    Fate,
    Fold,
    Head,
    IndexList,
    Indirect,
    Instruction,
    PeerSignal,
    Port,
    Reduce,
    Side,
    Sink,
    Space,
    Stream,
    Switch,
    Topology,
    Vector,
    Wait,
)
from furiosa_llm.backend_rngd.isa.machine import Machine, load_machine, parse_machine
from furiosa_llm.backend_rngd.isa.plan import plan_dma, plan_exec
from furiosa_llm.backend_rngd.isa.router import broadcast_trace
from furiosa_llm.errors import BinaryError
from furiosa_llm.runtime_sim.pipeline_timing import send_cycles
from furiosa_llm.runtime_sim.timing import time_program

BOOK = load_machine("book")


def product(dtype: DType, fold: Fold = Fold.INTERLEAVED) -> Exec:
    """A product bound by its multipliers: 64 B packets that meet four rows each."""
    elements = 512 // dtype.bits
    depth = elements.bit_length() - 1
    return Exec(
        head=Head(Context.MAIN),
        counters=(
            Counter(4, a=512, commit=1024),
            Counter(8, fate=Fate.MSUM, a=64, trf=64),
            Counter(4, birth=Birth.REUSE, trf=512, commit=128),
        ),
        a=Port(dtype=dtype),
        stream=Stream(run=elements),
        trf=Port(dtype=dtype),
        contraction=Contraction(depth=depth, lanes=4, fold=fold),
        trf_lanes=4,
        commit_port=Port(base=65536, dtype=DType.F32 if dtype.is_float else DType.I32),
        commit=Commit(lanes=4, lane_stride=8),
    )


def folded() -> Exec:
    """A product bound by the lane folder: 16 columns of each lane."""
    command = product(DType.BF16, Fold.SEQUENTIAL)
    contraction = Contraction(depth=1, lanes=8, fold=Fold.SEQUENTIAL)
    counters = (Counter(2, fate=Fate.MSUM, trf=64), Counter(2, a=64, commit=4096))
    return replace(
        command,
        counters=counters,
        contraction=contraction,
        trf_lanes=8,
        commit=Commit(lanes=8, lane_stride=128, columns=16, column_stride=8),
    )


def transposed(dtype: DType, rows: int, columns: int = 16) -> Exec:
    size = dtype.bytes_for(1)
    return Exec(
        head=Head(Context.MAIN),
        counters=(
            Counter(64, a=columns * 8, commit=rows * columns * size),
            Counter(rows, a=64, commit=size),
        ),
        a=Port(dtype=dtype),
        stream=Stream(run=columns),
        commit_port=Port(base=65536, dtype=dtype),
        commit=Commit(
            columns=columns,
            column_stride=rows * size,
            transpose_rows=rows,
            transpose_columns=columns,
        ),
    )


def reads(n: int, stride: int) -> Exec:
    return Exec(
        head=Head(Context.MAIN),
        counters=(Counter(n, a=stride, commit=32),),
        a=Port(dtype=DType.F32),
        stream=Stream(run=8),
        commit_port=Port(base=65536, dtype=DType.F32),
        commit=Commit(columns=8, column_stride=4),
    )


def passes() -> Iterator[Exec]:
    add_main = add(64)
    yield add_main
    yield add(64, Context.SUB)
    yield from (product(dtype) for dtype in (DType.BF16, DType.I8, DType.F8E4M3, DType.I4))
    yield folded()
    yield transposed(DType.I4, 16, columns=32)
    yield transposed(DType.I8, 8)
    yield transposed(DType.BF16, 4)
    yield transposed(DType.F32, 2)
    integer = replace(add_main.vector, ops=(), reduce=Reduce.IADD_SAT, reduce_columns=True)
    words = Port(base=65536, dtype=DType.I32)
    yield replace(add_main, vector=integer, commit=Commit(), a=words, commit_port=words)
    counters = (Counter(2, Birth.SLICE, commit=32, slices=1),)
    yield replace(add_main, counters=counters, switch=Switch(Topology.CUSTOM, ring=64))
    to_f8 = replace(
        add_main,
        vector=Vector(),
        counters=(Counter(64, a=32, commit=8),),
        commit_port=Port(base=65536, dtype=DType.F8E4M3),
        commit=Commit(columns=8, column_stride=1),
    )
    yield to_f8
    cast = Stream(run=16, cast=DType.F32)
    wide = Commit(columns=16, column_stride=4)
    yield replace(
        reads(64, 64),
        a=Port(),
        stream=cast,
        commit=wide,
        counters=(Counter(64, a=32, commit=64),),
    )
    for run in (4, 8, 12):  # packets of 8, 16 and 24 B
        yield replace(
            reads(64, 32),
            a=Port(),
            stream=Stream(run=run),
            commit_port=Port(base=65536),
            commit=Commit(columns=run, column_stride=2),
        )
    for run in (1, 2, 4):  # reads of so many bytes from scattered places, padded to 8 B
        stream = Stream(run=1, runs=8 // run, run_stride=64, pad=0)
        dtype = {1: DType.I8, 2: DType.BF16, 4: DType.F32}[run]
        yield replace(
            reads(64, 32),
            a=Port(dtype=dtype),
            stream=stream,
            counters=(Counter(64, a=1024, commit=8),),
            commit_port=Port(base=65536, dtype=dtype),
            commit=Commit(columns=8 // run, column_stride=run),
        )
    yield reads(64, 128)
    yield Exec(
        head=Head(Context.SUB),
        counters=(Counter(64, a=32, trf=32),),
        a=Port(),
        stream=Stream(run=16),
        commit_port=Port(),
        commit=Commit(sink=Sink.TRF, columns=16),
        trf_lanes=1,
    )


def hbm(*strides: int) -> Side:
    return Side(Space.HBM, 0, strides)


def dm(*strides: int) -> Side:
    return Side(Space.DM, 0, strides)


def transfers() -> Iterator[Dma]:
    row = 1 << 21
    yield load(64)
    yield load(4096)
    yield dma((64, 4), hbm(65536, 512), dm(SLICE, 256))
    yield dma((64,), hbm(4096), dm(32), run=32)
    yield dma((64,), Side(Space.HBM, 64, (512,)), dm(SLICE))
    yield dma((64,), dm(SLICE), Side(Space.HBM, 64, (512,)))
    yield dma((512,), hbm(row), dm(SLICE))
    yield dma((512,), hbm(1 << 14), dm(SLICE))
    yield dma((256,), hbm(512), Side(Space.DM, 4, (SLICE,)))
    yield dma((256,), hbm(512), Side(Space.DM, 8, (SLICE,)))
    yield dma((256,), hbm(4096), dm(SLICE))
    numbers = IndexList(base=0, strides=(4,), scale=1536)
    gather = dma((128,), hbm(0), dm(1536), run=1536)
    yield replace(gather, indirect=Indirect.SOURCE, index=numbers)
    for slices in (1, 64, 128, 256):  # to the same PE, others, the other cluster
        there = Side(Space.DM, slices * SLICE + 65536, (SLICE,))
        yield dma((64,), dm(SLICE), there, run=4096)


def patterns() -> Iterator[tuple[tuple[int, int], ...]]:
    """Loops of requests that an engine never waits for, but a channel may."""
    row = 1 << 29  # beyond the bits that choose a channel
    yield ((4, 0), (16, 1 << 15))  # one bank group
    yield ((8, 1 << 14 | 1 << 10), (64, row))  # a window holds each of its rows once
    for nibble in (9, 13, 17, 21, 25):
        yield ((16, 1 << nibble),)
    for bit in (13, 17, 18, 19, 20):  # rows of two banks in one channel, in turns
        yield ((64, 2 * row), (2, row | 1 << bit | 1 << 9 + (bit - 9) % 4))


def reports(machine: Machine) -> list[object]:
    """Whatever a machine's numbers show in."""
    out: list[object] = [exec_cost(plan_exec(c, "test"), machine) for c in passes()]
    for sharers in (1, 8):
        out += [dma_cost(plan_dma(c, "test"), machine, sharers) for c in transfers()]
    out += [channel_cycles(loops, 256, machine, 1) for loops in patterns()]
    out.append(broadcast_trace(4, 3, machine))
    values = {"x": np.zeros((1024, 64), np.int32)}
    for dtype in (DType.BF16, DType.I8, DType.F8E4M3, DType.I4):
        commands: list[Instruction] = [
            load(64, signals=(1,)),
            add(64, waits=(Wait(1, 1),)),
            product(dtype),
        ]
        timing = time_program(make_program(commands, values, {}, macs=7), machine, sharers=8)
        out.append(replace(timing, modules=()))
    exchange = make_program(exchanging(), values, {}, ranks=8)
    out.append(replace(time_program(exchange, machine), modules=()))
    out.append(send_cycles([1 << 20], 1, machine, across_cards=True))
    return out


def exchanging() -> list[Instruction]:
    """A handshake and a transfer to a PE of the other cluster."""
    free = add(64, peer_signals=(PeerSignal(2, (4,)),))
    source, there = Side(Space.DM, 0, (SLICE,)), Side(Space.DM, 65536, (SLICE,), peer=4)
    head = Head(Context.DMA, (Wait(2, 1, (4,)),), peer_signals=(PeerSignal(3, (4,)),))
    return [free, Dma(head, (64,), 256, source, there), add(64, waits=(Wait(3, 1, (4,)),))]


def other_values(value: object) -> Iterator[object]:
    """Values that differ in one place."""
    if isinstance(value, Mapping):
        for key in value:
            yield {**value, key: value[key] * 2}
    elif isinstance(value, tuple):
        for i in range(len(value)):
            yield [v for j, v in enumerate(value) if j != i]
    else:
        assert isinstance(value, int | float)
        yield value * 2 if value else 16


def reports_of(path: str, value: object) -> list[object]:
    """With that number instead of the book's, which stands alone: the book's range is gone."""
    section, field = path.split(".")
    text = {"schema": 1, "extends": "book", section: {field: {"value": value}}}
    return reports(parse_machine(yaml.safe_dump(text), "what if"))


@cache
def nominal(path: str) -> list[object]:
    """With the book's own number, without its range too: only the value can make a difference."""
    value: object = BOOK.parameters[path].value
    if isinstance(value, Mapping):
        value = dict(value)
    elif isinstance(value, tuple):
        value = list(value)
    return reports_of(path, value)


CASES = [
    (path, value)
    for path, parameter in BOOK.parameters.items()
    for value in other_values(parameter.value)
]


@pytest.mark.parametrize(("path", "value"), CASES, ids=[f"{p}={v}" for p, v in CASES])
def test_another_value_changes_something_or_is_refused(path: str, value: object) -> None:
    same = nominal(path)
    with suppress(BinaryError):
        assert reports_of(path, value) != same
