"""The list scheduler alone: its plans break no limit, whatever the problem."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from random_stretches import check_plan, random_stretch

from furiosa_llm.backend_rngd.list_schedule import (
    Policy,
    Storage,
    Stretch,
    Task,
    in_order,
    list_schedule,
    serial_plan,
)
from furiosa_llm.backend_rngd.schedule import improved, planned

POLICY = st.builds(
    Policy,
    by_path=st.booleans(),
    patience_cycles=st.sampled_from([0, 150]),
    ahead=st.sampled_from([0.0, 0.3, 0.75, 1.0]),
)


@given(seed=st.integers(0, 1 << 30), commands=st.integers(1, 80), policy=POLICY)
def test_plans_keep_to_the_limits(seed: int, commands: int, policy: Policy) -> None:
    stretch = random_stretch(seed, commands)
    check_plan(stretch, serial_plan(stretch))
    plan = planned(stretch, policy)
    check_plan(stretch, plan)
    assert plan == planned(stretch, policy)
    better = improved(stretch, plan)
    check_plan(stretch, better)
    assert better.makespan <= plan.makespan


@given(seed=st.integers(0, 1 << 30), commands=st.integers(1, 40))
def test_a_plan_is_a_program_order_that_fits(seed: int, commands: int) -> None:
    stretch = random_stretch(seed, commands)
    other = in_order(stretch, planned(stretch, Policy()).order)
    check_plan(other, serial_plan(other))
    check_plan(other, planned(other, Policy()))


def test_a_daring_plan_can_come_to_a_dead_end() -> None:
    # Both small buffers at once leave no room for either large one.
    tasks = []
    for i in (0, 1):
        tasks += [Task(2, 10, (), (2 * i,)), Task(0, 10, (2 * i,), (2 * i, 2 * i + 1))]
    stretch = Stretch(tuple(tasks), (Storage(0, 2), Storage(0, 8)) * 2, (10,))
    assert list_schedule(stretch, Policy(daring=True)) is None
    check_plan(stretch, planned(stretch, Policy()))


def chain(count: int, tile_bytes: int) -> Stretch:
    """Loads of 100 cycles, each for a product of 90."""
    tasks, buffers = [], []
    for i in range(count):
        buffers.append(Storage(0, tile_bytes))
        tasks.append(Task(2, 100, (), (i,)))
        tasks.append(Task(0, 90, (2 * i,), (i,)))
    return Stretch(tuple(tasks), tuple(buffers), (1000,))


def test_loads_run_ahead_as_far_as_memory_allows() -> None:
    assert planned(chain(10, 100), Policy()).makespan == 10 * 100 + 90
    assert planned(chain(10, 500), Policy()).makespan == 10 * 100 + 90
    assert planned(chain(10, 600), Policy()).makespan == 10 * 190


def test_a_short_urgent_transfer_is_waited_for() -> None:
    tasks = (
        Task(0, 50),
        Task(2, 10, (0,)),
        Task(0, 900, (1,)),
        Task(2, 500),
    )
    hurried, patient = (
        planned(Stretch(tasks, (), ()), Policy(patience_cycles=patience)) for patience in (0, 100)
    )
    assert hurried.makespan == 500 + 10 + 900
    assert patient.makespan == 50 + 10 + 900


def test_a_bitmap_is_loaded_when_nothing_runs_and_holds_up_the_others() -> None:
    tasks = (Task(2, 100), Task(0, 80, blocking_cycles=30), Task(1, 10), Task(2, 10))
    plan = planned(Stretch(tasks, (), ()), Policy(by_path=False))
    check_plan(Stretch(tasks, (), ()), plan)
    assert plan.starts == (0, 100, 0, 130)
