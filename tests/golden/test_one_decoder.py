"""Values and cycles come from one decoder: a field of the bytes changes both."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from run_commands import make_program, run_program

from furiosa_llm.backend_rngd.isa.cost import exec_cost
from furiosa_llm.backend_rngd.isa.dtypes import DType
from furiosa_llm.backend_rngd.isa.instructions import (
    Commit,
    Context,
    Counter,
    Dma,
    Exec,
    Head,
    Port,
    Reduce,
    Side,
    Space,
    Stream,
    Vector,
    Wait,
)
from furiosa_llm.backend_rngd.isa.machine import load_machine
from furiosa_llm.backend_rngd.isa.plan import plan_exec
from furiosa_llm.backend_rngd.isa.record_decoding import decode_exec
from furiosa_llm.backend_rngd.isa.record_encoding import encode_exec
from furiosa_llm.runtime_sim.timing import time_program

BOOK = load_machine("book")
SLICE = 1 << 22
BYTES = 2048
"""Data memory in use: inputs in the first half, results in the second."""

# Packets of four runs of 16 B, summed over all 64 slices.
COMMAND = Exec(
    head=Head(Context.MAIN, (Wait(0, 1),), (1,)),
    counters=(Counter(8, a=64, commit=64),),
    a=Port(dtype=DType.F32),
    stream=Stream(run=4, runs=4, run_stride=16),
    vector=Vector(slice_reduce=Reduce.ADD, slice_group=64),
    commit_port=Port(base=BYTES // 2, dtype=DType.F32),
    commit=Commit(columns=16, column_stride=4),
)


def run(record: np.ndarray) -> tuple[np.ndarray, dict[str, int], int]:
    """All of the slices' memory afterwards, the engines' cycles, and those of the program."""
    command = decode_exec(record, "test")
    on_chip = Side(Space.DM, 0, (SLICE,))
    fill = Dma(Head(Context.DMA, (), (0,)), (64,), BYTES, Side(Space.HBM, 0, (BYTES,), 0), on_chip)
    drain = replace(
        fill,
        head=Head(Context.DMA, (Wait(1, 1),)),
        source=on_chip,
        destination=Side(Space.HBM, 0, (BYTES,), 1),
    )
    rng = np.random.default_rng(0)
    inputs = {"memory": rng.integers(0, 100, (64, BYTES // 4)).astype(np.float32)}
    program = make_program((fill, command, drain), inputs, {"out": inputs["memory"]})
    engines = exec_cost(plan_exec(command, "test"), BOOK).engines
    return run_program(program, inputs)["out"], dict(engines), time_program(program, BOOK).cycles


@pytest.mark.parametrize(
    ("path", "value", "engine"),
    [
        (("stream", "run_stride"), 32, "fetch"),  # runs no longer touch each other: small reads
        (("counters", 0, "n"), 4, "fetch"),  # half of the steps
        (("stream", "runs"), 2, "vector"),  # smaller packets
        (("vector", "slice_group"), 16, "inter_slice"),  # sums over fewer slices
    ],
    ids=["stride", "size", "packet", "group"],
)
def test_a_field_changes_values_and_cycles(
    path: tuple[str | int, ...], value: int, engine: str
) -> None:
    record = encode_exec(COMMAND)
    values, engines, cycles = run(record)
    place = record
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    new_values, new_engines, new_cycles = run(record)
    assert not np.array_equal(values, new_values)
    assert new_engines[engine] != engines[engine]
    assert new_cycles != cycles


def test_the_unchanged_command_sums() -> None:
    values, _, _ = run(encode_exec(COMMAND))
    rng = np.random.default_rng(0)
    memory = rng.integers(0, 100, (64, BYTES // 4)).astype(np.float32)
    expected = memory[:, :128].sum(axis=0)
    np.testing.assert_array_equal(values[:, 256:384], np.broadcast_to(expected, (64, 128)))
