"""Machine files that ask "what if" change what they should, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from timed_programs import add, load, program

from furiosa_llm.backend_rngd.isa.instructions import Wait
from furiosa_llm.backend_rngd.isa.machine import Machine, load_machine
from furiosa_llm.errors import BinaryError
from furiosa_llm.runtime_sim.timing import ProgramTiming, time_program

SILICON = load_machine("silicon")
STREAM = program(load(4096, signals=(1,)), add(waits=(Wait(1, 1),)), macs=1 << 20)


def asked(tmp_path: Path, change: str) -> Machine:
    path = tmp_path / "asked.yaml"
    path.write_text(f"schema: 1\nextends: silicon\n{change}\n")
    return load_machine(path)


def cycles(machine: Machine, sharers: int) -> int:
    return time_program(STREAM, machine, sharers=sharers).cycles


def test_twice_the_hbm_is_faster_where_hbm_is_the_bound(tmp_path: Path) -> None:
    twice = 2 * SILICON.hbm.bandwidth_bytes_per_second
    fast = asked(tmp_path, f"hbm: {{bandwidth_bytes_per_second: {{value: {twice}}}}}")
    assert cycles(fast, 8) < 0.9 * cycles(SILICON, 8)
    # Alone a PE waits for its own DMA engine.
    assert cycles(fast, 1) == cycles(SILICON, 1)
    shares = [time_program(STREAM, m, sharers=8).roofline_cycles for m in (fast, SILICON)]
    assert shares[1] > 1.3 * shares[0]


def test_sixteen_pes_multiply_more_and_share_the_same_hbm(tmp_path: Path) -> None:
    wide = asked(tmp_path, "chip: {pes: {value: 16}}")
    assert wide.chip.pes * wide.macs_per_cycle("bf16") == 2 * 8 * SILICON.macs_per_cycle("bf16")
    all_of: dict[str, ProgramTiming] = {
        m.name: time_program(STREAM, m, sharers=m.chip.pes) for m in (wide, SILICON)
    }
    assert all_of["asked"].cycles > 1.5 * all_of["silicon"].cycles
    assert all_of["asked"].roofline_cycles > 1.5 * all_of["silicon"].roofline_cycles
    assert all_of["asked"].hbm_capacity_utilization >= all_of["silicon"].hbm_capacity_utilization


def test_a_wider_engine_loads_faster_alone(tmp_path: Path) -> None:
    fast = asked(tmp_path, "dma: {bytes_per_cycle: {value: 512}, run_overhead_cycles: {value: 0}}")
    assert cycles(fast, 1) < cycles(SILICON, 1)


def test_a_slower_clock_waits_fewer_cycles_for_hbm(tmp_path: Path) -> None:
    slow = asked(tmp_path, "chip: {clock_hertz: {value: 5.0e+8}}")
    assert cycles(slow, 8) < cycles(SILICON, 8)
    assert time_program(STREAM, slow).time_us > time_program(STREAM, SILICON).time_us


@pytest.mark.parametrize(
    "change",
    [
        "chip: {slices_per_pe: {value: 128}}",
        "dm: {bytes_per_slice: {value: 1048576}}",
        "trf: {logical_bytes: {value: 131072}}",
        "dma: {max_loops: {value: 9}}",
    ],
)
def test_capacities_of_the_record_format_stay(tmp_path: Path, change: str) -> None:
    with pytest.raises(BinaryError) as caught:
        asked(tmp_path, change)
    assert caught.value.code == "VED022"


def test_channels_split_the_same_bandwidth(tmp_path: Path) -> None:
    """Requests that spread over all channels take as long, however many there are."""
    for channels in (16, 64):
        other = asked(tmp_path, f"hbm: {{channels: {{value: {channels}}}}}")
        assert cycles(other, 8) == pytest.approx(cycles(SILICON, 8), rel=0.01)
