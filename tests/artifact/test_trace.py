"""Traces of a small program: tracks, names, times, arrows, and arguments."""

from __future__ import annotations

import os
from collections import Counter as Tally
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from timed_programs import bodies
from timed_programs import program as timed_program
from trace_reader import TraceContent, read_trace

from furiosa_llm.artifact.trace import encode_trace, write_trace
from furiosa_llm.backend_rngd.isa.cost import dma_cost, exec_cost
from furiosa_llm.backend_rngd.isa.dtypes import DType
from furiosa_llm.backend_rngd.isa.instructions import (
    Alu,
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
    Stream,
    Vector,
    VectorOp,
    Wait,
)
from furiosa_llm.backend_rngd.isa.machine import load_machine
from furiosa_llm.backend_rngd.isa.plan import plan_dma, plan_exec
from furiosa_llm.backend_rngd.isa.program import Block, Call, Header, Program, Provenance
from furiosa_llm.errors import FuriosaLLMError
from furiosa_llm.runtime_sim.timing import time_program

BOOK = load_machine("book")
PROCESSOR = "PERFETTO_TRACE_PROCESSOR"
"""Environment variable with the path of perfetto's `trace_processor_shell`."""
SLICE = 1 << 22
LOAD = Dma(
    Head(Context.DMA, signals=(3,)),
    (64,),
    256,
    Side(Space.HBM, 0, (256,)),
    Side(Space.DM, 0, (SLICE,)),
)
PRODUCT = Exec(
    head=Head(Context.MAIN, waits=(Wait(3, 2),), signals=(5,), provenance=1),
    counters=(Counter(16, a=64, commit=8), Counter(4, fate=Fate.MSUM, a=64, trf=64)),
    a=Port(),
    stream=Stream(run=32),
    contraction=Contraction(lanes=2),
    trf=Port(),
    trf_lanes=2,
    commit_port=Port(base=65536, dtype=DType.F32),
    commit=Commit(lanes=2, columns=1, lane_stride=4),
)
ADD = Exec(
    head=Head(Context.SUB, waits=(Wait(5, 1),), provenance=1),
    counters=(Counter(64, a=32, commit=32),),
    a=Port(dtype=DType.F32),
    stream=Stream(run=8),
    vector=Vector(ops=(VectorOp(Alu.FMA, Op.ADD, y=Source.IMM0),)),
    commit_port=Port(base=131072, dtype=DType.F32),
    commit=Commit(columns=8, column_stride=4),
)


def program(*commands: Instruction, ranks: int = 1) -> Program:
    """One block, called for two layers."""
    paths = (Provenance(path="mlp.load"), Provenance(path="mlp.up"))
    header = Header(
        model_name="test",
        bucket="decode:1,16",
        tensor_parallel_size=ranks,
        regions=(),
        blocks=(Block(name="block", first=0, count=len(commands), provenance=paths),),
        calls=tuple(Call(block=0, prefix=f"layers.{i}", bindings=()) for i in range(2)),
    )
    return Program(header, commands)


def trace(*commands: Instruction, ranks: int = 1) -> TraceContent:
    return read_trace(b"".join(encode_trace(program(*commands, ranks=ranks), BOOK)))


def test_there_is_a_track_for_each_context_and_engine() -> None:
    content = trace(LOAD, LOAD, PRODUCT, ADD)
    main = ("fetch", "switch", "collect", "contraction", "commit")
    sub = ("fetch", "switch", "collect", "vector", "commit")
    assert content.tracks == [
        "PE 0/calls",
        "PE 0/main",
        *(f"PE 0/main {engine}" for engine in main),
        "PE 0/sub",
        *(f"PE 0/sub {engine}" for engine in sub),
        "PE 0/dma",
    ]


def test_slices_follow_each_other_as_the_queues_do() -> None:
    content = trace(LOAD, LOAD, PRODUCT, ADD)
    load = dma_cost(plan_dma(LOAD, "test"), BOOK).total_cycles
    product = exec_cost(plan_exec(PRODUCT, "test"), BOOK).total_cycles
    add = exec_cost(plan_exec(ADD, "test"), BOOK).total_cycles
    start = BOOK.control.launch_cycles
    call = 2 * load + product + add
    found = [(s.name, s.begin, s.end) for s in content.on("PE 0/dma")]
    assert found[:2] == [
        ("layers.0.mlp.load: dma", start, start + load),
        ("layers.0.mlp.load: dma", start + load, start + 2 * load),
    ]
    assert found[2][:2] == ("layers.1.mlp.load: dma", start + call)
    (first, _) = content.on("PE 0/main")
    assert (first.begin, first.end) == (start + 2 * load, start + 2 * load + product)
    assert first.name == "layers.0.mlp.up: contraction"
    assert [(s.name, s.begin, s.end) for s in content.on("PE 0/calls")] == [
        ("launch", 0, start),
        ("layers.0", start, start + call),
        ("layers.1", start + call, start + 2 * call),
        ("finish", start + 2 * call, start + 2 * call + BOOK.control.finish_cycles),
    ]


def test_engines_are_busy_after_the_base_cost() -> None:
    content = trace(LOAD, LOAD, PRODUCT, ADD)
    cost = exec_cost(plan_exec(PRODUCT, "test"), BOOK)
    command = content.on("PE 0/main")[0]
    for engine, cycles in cost.engines.items():
        busy = content.on(f"PE 0/main {engine}")[0]
        assert busy.begin == command.begin + cost.base_cycles
        assert busy.end - busy.begin == cycles


def test_arrows_go_from_signal_to_wait() -> None:
    content = trace(LOAD, LOAD, PRODUCT, ADD)
    arrows = [(sender.track, receiver.track) for sender, receiver in content.arrows()]
    assert sorted(arrows) == [*[("dma", "main")] * 4, *[("main", "sub")] * 2]
    assert all(sender.end <= receiver.begin for sender, receiver in content.arrows())


def test_arguments_say_what_a_command_is() -> None:
    content = trace(LOAD, LOAD, PRODUCT, ADD)
    load, product = content.on("PE 0/dma")[1], content.on("PE 0/main")[0]
    assert load.arguments == {
        "block": "block",
        "entry": 1,
        "plan": "HBM to DM, 64 runs of 256 B",
        "bytes": 64 * 256,
        "bound": "startup",
        "cycles": dma_cost(plan_dma(LOAD, "test"), BOOK).total_cycles,
    }
    assert product.arguments["plan"] == (
        "64 slices, loops 16 out x 4 sum, packets of 32, contraction on 2 lanes, to DM"
    )
    assert product.arguments["bytes"] == 64 * 16 * 4 * 64


def test_repeats_are_unrolled() -> None:
    content = trace(Control(count=3, length=4), LOAD, LOAD, PRODUCT, ADD)
    assert len(content.on("PE 0/main")) == 2 * 3
    assert all(a.end <= b.begin for a, b in pairwise(content.on("PE 0/main")))


def test_every_pe_has_its_own_tracks_and_arrows() -> None:
    content = trace(LOAD, LOAD, PRODUCT, ADD, ranks=2)
    ours, theirs = (
        [(s.track, s.name, s.begin, s.end) for s in content.slices if s.process == pe]
        for pe in ("PE 0", "PE 1")
    )
    assert ours == theirs
    assert all(sender.process == receiver.process for sender, receiver in content.arrows())


def test_a_file_that_cannot_be_written_has_a_code(tmp_path: Path) -> None:
    with pytest.raises(FuriosaLLMError, match="ART012"):
        write_trace(program(LOAD, LOAD, PRODUCT, ADD), BOOK, tmp_path / "missing" / "file")


@given(bodies())
@settings(max_examples=40, deadline=None)
def test_a_trace_holds_what_the_profile_counts(commands: tuple[Instruction, ...]) -> None:
    """Of any program: tracks do not overlap (`read_trace`), parts lie inside, busy times add up."""
    called = timed_program(*commands, paths=("a", "b", "c"))
    timing = time_program(called, BOOK)
    content = read_trace(b"".join(encode_trace(called, BOOK)))
    busy: Tally[str] = Tally()
    for found in content.slices:
        busy[found.track] += found.end - found.begin
    assert {name: busy[name] for name in timing.contexts} == dict(timing.contexts)
    for engine, cycles in timing.engines.items():
        assert (
            busy["dma" if engine == "dma" else f"main {engine}"] + busy[f"sub {engine}"] == cycles
        )
    assert max(found.end for found in content.slices) == busy["calls"] == timing.cycles
    calls = content.on("PE 0/calls")
    for track in content.tracks[1:]:
        context, _, engine = track.removeprefix("PE 0/").partition(" ")
        around = content.on(f"PE 0/{context}") if engine else calls
        for found in content.on(track):
            assert any(a.begin <= found.begin <= found.end <= a.end for a in around), track
    for sender, receiver in content.arrows():
        assert sender.end <= receiver.begin
        assert sender.track in ("main", "sub", "dma")


@pytest.mark.long
@pytest.mark.skipif(PROCESSOR not in os.environ, reason=f"{PROCESSOR} names no trace processor")
def test_the_trace_processor_reads_it(tmp_path: Path) -> None:
    """With perfetto's own program, `trace_processor_shell`, which no package index carries."""
    from perfetto.trace_processor import TraceProcessor, TraceProcessorConfig

    write_trace(program(LOAD, LOAD, PRODUCT, ADD), BOOK, tmp_path / "t")
    expected = read_trace((tmp_path / "t").read_bytes())
    config = TraceProcessorConfig(bin_path=os.environ[PROCESSOR])
    with TraceProcessor(trace=str(tmp_path / "t"), config=config) as processor:
        (slices,) = processor.query("select count(*) as n from slice where dur >= 0")
        (flows,) = processor.query("select count(*) as n from flow")
        (problems,) = processor.query(
            "select count(*) as n from stats where severity = 'error' and value > 0"
        )
    assert slices.n == len(expected.slices)
    assert flows.n == len(expected.arrows())
    assert problems.n == 0
