"""Random scheduling problems, and a check that a plan is one."""

from __future__ import annotations

import random
from itertools import pairwise

from furiosa_llm.backend_rngd.list_schedule import Plan, Storage, Stretch, Task

CAPACITIES = (1000, 2, 100)
"""Of three memories; the second has two halves, like the register file."""


def random_stretch(seed: int, commands: int, *, links: float = 1.5) -> Stretch:
    """Commands that read buffers of earlier ones and write new ones, as compiled code does.

    In program order, with each buffer dying after its last reader, everything fits.
    """
    rng = random.Random(seed)
    tasks: list[Task] = []
    buffers: list[Storage] = []
    writers: list[int] = []
    alive: list[int] = []
    for i in range(commands):
        context = rng.choice((0, 1, 2, 2))
        reads = sorted(rng.sample(alive, min(len(alive), rng.choice((0, 1, 1, 2)))))
        rng.shuffle(alive)
        after = {writers[b] for b in reads}
        if i and rng.random() < links - 1:
            after.add(rng.randrange(i))
        new = _buffer(rng)
        while _used(buffers, alive, new.memory) + new.size_bytes > CAPACITIES[new.memory]:
            alive.pop()
        buffers.append(new)
        alive.append(len(buffers) - 1)
        writers.append(i)
        tasks.append(
            Task(
                context=context,
                cycles=rng.choice((30, 100, 200, 1000)),
                after=tuple(sorted(after)),
                buffers=(*(b for b in reads if b in alive), len(buffers) - 1),
                vector_unit=context < 2 and rng.random() < 0.4,
            )
        )
    return Stretch(tuple(tasks), tuple(buffers), CAPACITIES)


def _buffer(rng: random.Random) -> Storage:
    memory = rng.choice((0, 0, 0, 0, 0, 1, 2))
    size = rng.randint(1, CAPACITIES[memory] // (1 if memory == 1 else 3))
    return Storage(memory, size, leaving=False)


def _used(buffers: list[Storage], alive: list[int], memory: int) -> int:
    return sum(buffers[b].size_bytes for b in alive if buffers[b].memory == memory)


def check_plan(stretch: Stretch, plan: Plan) -> None:
    """Precedences, one command at a time in each context and in the vector unit, capacities."""
    ends = [start + task.cycles for start, task in zip(plan.starts, stretch.tasks, strict=True)]
    assert sorted(plan.order) == list(range(len(ends)))
    assert [plan.starts[i] for i in plan.order] == sorted(plan.starts)
    assert plan.makespan == max(ends)
    for i, task in enumerate(stretch.tasks):
        assert all(ends[j] <= plan.starts[i] for j in task.after)
    units = [[i for i, t in enumerate(stretch.tasks) if t.context == c] for c in range(3)]
    units.append([i for i, task in enumerate(stretch.tasks) if task.vector_unit])
    for unit in units:
        taken = sorted((plan.starts[i], ends[i]) for i in unit)
        assert all(end <= start for (_, end), (start, _) in pairwise(taken))
    for memory, capacity in enumerate(stretch.capacities):
        changes: list[tuple[int, int]] = []
        for b, buffer in enumerate(stretch.buffers):
            users = [i for i, task in enumerate(stretch.tasks) if b in task.buffers]
            if buffer.memory == memory and users:
                changes.append((min(plan.starts[i] for i in users), buffer.size_bytes))
                changes.append((max(ends[i] for i in users), -buffer.size_bytes))
        used = 0
        for _, change in sorted(changes):
            used += change
            assert used <= capacity
