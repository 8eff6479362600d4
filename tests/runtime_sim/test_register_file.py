"""Rows that lie across the halves of the register file: values, and what counts as written."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from run_commands import make_program, run_program

from furiosa_llm import errors
from furiosa_llm.backend_rngd.isa.dtypes import DType
from furiosa_llm.backend_rngd.isa.instructions import (
    Birth,
    Commit,
    Context,
    Contraction,
    Counter,
    Dma,
    Exec,
    Head,
    Port,
    Side,
    Sink,
    Space,
    Stream,
    Switch,
    Topology,
    Wait,
)

SLICE = 1 << 22
LANES = 4
BASE = 32768 // LANES - 32
"""Half of the 64 B that each lane gets lie in the file's first half."""
ROWS = np.arange(LANES * 32).reshape(LANES, 32).astype(ml_dtypes.bfloat16)
OUT = np.zeros((64, LANES), np.float32)

load = Dma(
    Head(Context.DMA, signals=(0,)),
    n=(LANES, 64),
    run=64,
    source=Side(Space.HBM, 0, (64, 0), 0),
    destination=Side(Space.DM, 0, (64, SLICE)),
)
fill = Exec(
    Head(Context.SUB, (Wait(0, 1),), (1,)),
    counters=(Counter(LANES, a=64, lanes=1),),
    a=Port(0),
    stream=Stream(32),
    commit_port=Port(BASE),
    commit=Commit(Sink.TRF, columns=32),
    trf_lanes=LANES,
)
multiply = Exec(
    Head(Context.MAIN, (Wait(1, 1),), (2,)),
    counters=(),
    a=Port(0),
    trf=Port(BASE),
    stream=Stream(32),
    contraction=Contraction(lanes=LANES),
    commit_port=Port(4096, DType.F32),
    commit=Commit(lanes=LANES, lane_stride=8),
)
put = Dma(
    Head(Context.DMA, (Wait(2, 1),)),
    n=(64, LANES),
    run=4,
    source=Side(Space.DM, 4096, (SLICE, 8)),
    destination=Side(Space.HBM, 0, (4 * LANES, 4), 1),
)


def run(*commands: Dma | Exec) -> np.ndarray:
    return run_program(make_program(commands, {"rows": ROWS}, {"y": OUT}), {"rows": ROWS})["y"]


def products() -> np.ndarray:
    exact = ROWS.astype(np.float32)
    return np.tile(exact[0] @ exact.T, (64, 1))


def test_slices_fill_their_own_rows() -> None:
    assert np.array_equal(run(load, fill, multiply, put), products())


def test_all_slices_share_rows_that_were_broadcast() -> None:
    broadcast = replace(
        fill,
        counters=(replace(fill.counters[0]), Counter(1, Birth.SLICE, slices=1)),
        switch=Switch(Topology.BROADCAST01, 64),
    )
    assert np.array_equal(run(load, broadcast, multiply, put), products())


half_of_each = replace(fill, stream=Stream(16), commit=replace(fill.commit, columns=16))
other_lanes = replace(fill, counters=(replace(fill.counters[0], n=2),), trf_lanes=2)


@pytest.mark.parametrize("wrong", [half_of_each, other_lanes])
def test_rows_of_which_a_part_is_not_written_are_a_fault(wrong: Exec) -> None:
    """32 B of every lane; or another division into lanes, which puts the rows elsewhere."""
    with pytest.raises(errors.SimulationFault) as fault:
        run(load, wrong, multiply, put)
    assert fault.value.code == "SIM012"
