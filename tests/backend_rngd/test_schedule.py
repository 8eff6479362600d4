"""The schedule: the same values at every level, within the machine's limits, and no slower."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_programs import RandomProgram
from small_decoder import Decoder
from xdsl.context import Context

from furiosa_llm import errors
from furiosa_llm.backend_rngd.isa.container import write_program
from furiosa_llm.backend_rngd.isa.machine import load_machine
from furiosa_llm.backend_rngd.isa.ordering import check_order
from furiosa_llm.backend_rngd.isa.program import Program
from furiosa_llm.backend_rngd.rngd import AllocOp, BlockOp, DmaOp, ExecOp
from furiosa_llm.backend_rngd.schedule import LEVELS, SchedulePass
from furiosa_llm.models.config_types import Bucket
from furiosa_llm.runtime_sim.device import Device
from furiosa_llm.runtime_sim.timing import time_program

MACHINE = load_machine()
SMALL = {
    "decode": Decoder(Bucket.decode(2, 40)),
    "prefill": Decoder(Bucket.prefill(1, 80)),
    "wide": Decoder(
        Bucket.decode(1, 256),
        hidden=2048,
        heads=16,
        kv_heads=4,
        head_dim=128,
        feed_forward=4096,
        vocabulary=512,
    ),
    "batch": Decoder(Bucket.decode(16, 128), hidden=256, heads=8, kv_heads=4, head_dim=32),
}


def cycles(program: Program) -> int:
    control = MACHINE.control
    return time_program(program, MACHINE).cycles - control.launch_cycles - control.finish_cycles


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 1 << 30), commands=st.integers(1, 60))
def test_values_do_not_depend_on_the_level(seed: int, commands: int) -> None:
    source = RandomProgram(seed, commands)
    results, times = [], []
    for level in LEVELS:
        program = source.program(level)
        check_order(program)
        times.append(cycles(program))
        results.append(Device().execute(program, source.values()))
    for result in results[1:]:
        for name, value in results[0].items():
            assert np.array_equal(value.view(np.int32), result[name].view(np.int32)), name
    assert times == sorted(times, reverse=True)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1 << 30), commands=st.integers(1, 60), level=st.sampled_from(LEVELS))
def test_the_program_takes_as_long_as_was_planned(seed: int, commands: int, level: int) -> None:
    source = RandomProgram(seed, commands)
    module = source.module()
    SchedulePass(level).apply(Context(), module)
    block = next(op for op in module.ops if isinstance(op, BlockOp))
    lifetimes = [op.lifetime for op in block.walk() if isinstance(op, AllocOp)]
    planned = max(int(life.get_values()[1]) for life in lifetimes if life is not None)
    taken = cycles(source.program(level))
    assert planned * 0.98 <= taken <= planned * 1.02


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("decoder", SMALL.values(), ids=SMALL)
def test_every_binary_is_ordered(decoder: Decoder, level: int) -> None:
    check_order(decoder.program(level=level))


@pytest.mark.parametrize("decoder", SMALL.values(), ids=SMALL)
def test_a_higher_level_is_never_slower(decoder: Decoder) -> None:
    taken = [cycles(decoder.program(level=level)) for level in LEVELS]
    assert taken == sorted(taken, reverse=True)
    assert taken[0] > taken[2]


def test_the_order_is_the_same_every_time() -> None:
    program = RandomProgram(1, 60)
    assert write_program(program.program(2)) == write_program(program.program(2))


def test_program_order_is_kept_at_level_0() -> None:
    source = RandomProgram(2, 40)
    plain, scheduled = source.module(), source.module()
    SchedulePass(0).apply(Context(), scheduled)
    orders = [
        [op.command for op in module.walk() if isinstance(op, ExecOp | DmaOp)]
        for module in (plain, scheduled)
    ]
    assert orders[0] == orders[1]


@pytest.mark.parametrize("level", [-1, 3])
def test_there_are_three_levels(level: int) -> None:
    with pytest.raises(errors.CompileError, match="BLD014"):
        SchedulePass(level)
