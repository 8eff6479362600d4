"""Golden test 19: what does not fit is refused, when it is decoded or when it runs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from golden_commands import BOOK, SLICE, dma, time_exec
from run_commands import make_program, run_program

from furiosa_llm.backend_rngd.isa.cost_exec import same_bank_accesses, starving_accesses
from furiosa_llm.backend_rngd.isa.dtypes import DType
from furiosa_llm.backend_rngd.isa.instructions import (
    Commit,
    Context,
    Contraction,
    Counter,
    Dma,
    Exec,
    Fate,
    Fold,
    Head,
    Port,
    Side,
    Sink,
    Space,
    Stream,
    Wait,
)
from furiosa_llm.backend_rngd.isa.plan import plan_exec
from furiosa_llm.errors import BinaryError, FuriosaLLMError
from furiosa_llm.runtime_sim.timing import time_program


def product(slots: int, contraction: Contraction) -> Exec:
    """A product that keeps `slots` sums open while it adds up eight packets."""
    return Exec(
        head=Head(Context.MAIN),
        counters=(
            Counter(8, fate=Fate.MSUM, trf=64),
            Counter(slots, a=64, commit=4 * 32 * contraction.lanes),
        ),
        a=Port(),
        stream=Stream(run=32),
        trf=Port(),
        contraction=contraction,
        commit_port=Port(base=262144, dtype=DType.F32),
        commit=Commit(columns=32 >> contraction.depth, column_stride=8),
        trf_lanes=contraction.lanes,
    )


@pytest.mark.parametrize(
    ("slots", "contraction"),
    [
        (32, Contraction(lanes=1, fold=Fold.SEQUENTIAL)),
        (4, Contraction(lanes=8, fold=Fold.SEQUENTIAL)),
        (32, Contraction(lanes=8, depth=3)),  # packets of four columns
    ],
    ids=["sequential, 1 lane", "sequential, 8 lanes", "interleaved, 4 columns"],
)
def test_19_slots_of_the_accumulator(slots: int, contraction: Contraction) -> None:
    assert time_exec(product(slots, contraction)).engines["contraction"] >= 8 * slots
    with pytest.raises(BinaryError) as caught:
        time_exec(product(slots + 1, contraction))
    assert caught.value.code == "VED011"
    assert "accumulator-cells" in str(caught.value)


def fill(n_bytes: int) -> Exec:
    """Store so many bytes in one lane of the register file, 32 B at a time."""
    return Exec(
        head=Head(Context.SUB, waits=(Wait(0, 1),)),
        counters=(Counter(n_bytes // 32, a=32, trf=32),),
        a=Port(),
        stream=Stream(run=16),
        commit_port=Port(),
        commit=Commit(sink=Sink.TRF, columns=16),
        trf_lanes=1,
    )


def test_19_stores_beyond_the_register_file() -> None:
    values = {"x": np.zeros((64, 16416), np.int32)}
    load = dma((64,), Side(Space.HBM, 0, (65664,), 0), Side(Space.DM, 0, (SLICE,)), run=65664)
    load = replace(load, head=Head(Context.DMA, signals=(0,)))
    for n_bytes, fits in ((65536, True), (65568, False)):
        program = make_program([load, fill(n_bytes)], values, {})
        if fits:
            run_program(program, values)
        else:
            with pytest.raises(FuriosaLLMError) as caught:
                run_program(program, values)
            assert caught.value.code in ("VED011", "SIM010", "SIM011")


def reads(n: int, stride: int) -> Exec:
    """Fetch n packets of 32 B, `stride` bytes apart, and add them up in the register file."""
    return Exec(
        head=Head(Context.MAIN),
        counters=(Counter(4, a=32, trf=32 * n), Counter(n, a=stride, trf=32)),
        a=Port(),
        stream=Stream(run=16),
        commit_port=Port(),
        commit=Commit(sink=Sink.TRF, columns=16),
        trf_lanes=1,
    )


def test_19_64_accesses_to_one_bank_keep_the_dma_out() -> None:
    assert starving_accesses(BOOK) == 64
    for n, stride, starves in ((63, 128, False), (64, 128, True), (64, 0, True), (64, 160, False)):
        command = reads(n, stride)
        assert same_bank_accesses(plan_exec(command, "test"), BOOK) == (n if stride != 160 else 1)
        cost = time_exec(command)
        assert cost.starves_dma == starves
        # Rejected beside a transfer: they take turns.
        load = dma((64,), Side(Space.HBM, 0, (256,), 0), Side(Space.DM, 131072, (SLICE,)))
        alone = [cycles(command), cycles(load)]
        assert cycles(command, load) == (sum(alone) if starves else max(alone))


def cycles(*commands: Exec | Dma) -> int:
    """What a program takes beyond its launch and its end."""
    program = make_program(commands, {"x": np.zeros((64, 64), np.int32)}, {})
    return time_program(program, BOOK).cycles - 2600


def test_commits_wait_for_fetches_that_stay_in_their_bank() -> None:
    def copied(stride: int) -> Exec:
        command = reads(64, stride)
        counters = (Counter(4, a=32, commit=2048), Counter(64, a=stride, commit=32))
        return replace(
            command,
            counters=counters,
            commit_port=Port(base=262144),
            commit=Commit(columns=16, column_stride=2),
        )

    apart, together = time_exec(copied(160)), time_exec(copied(128))
    assert apart.engines["commit"] == 256
    assert together.engines["commit"] == 256 + 256
