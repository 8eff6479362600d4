"""What OR-Tools' CP-SAT solver proves about the shortest schedule of a stretch."""

from __future__ import annotations

from dataclasses import dataclass

from ortools.sat.python import cp_model

from furiosa_llm.backend_rngd.list_schedule import Plan, Stretch


@dataclass(frozen=True)
class Optimum:
    """What the solver knows of the shortest schedule."""

    bound: int
    """Cycles that no schedule undercuts; those of the shortest one if `proven`."""
    proven: bool


def optimum(stretch: Stretch, hint: Plan, effort: float) -> Optimum:
    """The same commands, precedences, contexts and memories; the search starts from `hint`.

    Memories are capacities, as in the plan; that buffers stay where they are is not modelled.
    `effort` limits the work, about in seconds, and does not depend on the machine's load.
    """
    tasks = stretch.tasks
    assert not any(task.blocking_cycles for task in tasks), "blocking is not modelled"
    model = cp_model.CpModel()
    horizon = hint.makespan
    starts = [model.new_int_var(0, horizon, "") for _ in tasks]
    intervals = [
        model.new_fixed_size_interval_var(start, task.cycles, "")
        for start, task in zip(starts, tasks, strict=True)
    ]
    end = model.new_int_var(0, horizon, "")
    for i, task in enumerate(tasks):
        model.add(end >= starts[i] + task.cycles)
        model.add_hint(starts[i], hint.starts[i])
        for j in task.after:
            model.add(starts[i] >= starts[j] + tasks[j].cycles)
    for context in {task.context for task in tasks}:
        model.add_no_overlap(
            [interval for interval, t in zip(intervals, tasks, strict=True) if t.context == context]
        )
    model.add_no_overlap([i for i, t in zip(intervals, tasks, strict=True) if t.vector_unit])
    _add_memories(model, stretch, starts, end)
    model.minimize(end)
    solver = cp_model.CpSolver()
    solver.parameters.max_deterministic_time = effort
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = 0
    status = solver.solve(model)
    name = solver.status_name(status)
    assert name in ("OPTIMAL", "FEASIBLE"), name
    return Optimum(round(solver.best_objective_bound), name == "OPTIMAL")


def _add_memories(
    model: cp_model.CpModel,
    stretch: Stretch,
    starts: list[cp_model.IntVar],
    makespan: cp_model.IntVar,
) -> None:
    """A buffer's bytes are taken from the start of its first user to the end of its last."""
    horizon = sum(task.cycles for task in stretch.tasks)
    lives: dict[int, list[tuple[cp_model.IntervalVar, int]]] = {}
    for b, buffer in enumerate(stretch.buffers):
        users = [i for i, task in enumerate(stretch.tasks) if b in task.buffers]
        first, last = model.new_int_var(0, horizon, ""), model.new_int_var(0, horizon, "")
        if buffer.entering:
            model.add(first == 0)
        if buffer.leaving:
            model.add(last >= makespan)
        for i in users:
            model.add(first <= starts[i])
            model.add(last >= starts[i] + stretch.tasks[i].cycles)
        size = model.new_int_var(0, horizon, "")
        life = model.new_interval_var(first, size, last, "")
        lives.setdefault(buffer.memory, []).append((life, buffer.size_bytes))
    for memory, found in lives.items():
        intervals, sizes = zip(*found, strict=True)
        model.add_cumulative(intervals, sizes, stretch.capacities[memory])
