"""How long the cycle model and the tiling search take.

    python benchmarks/simulator_speed.py [--machine silicon]

Three figures, each with its goal: timing one decode step of Llama-3.1-8B, timing the seven buckets
of the usual build, and the search for a tiling per distinct shape. Building and reading the
binaries and the machine's description come before the clock starts; nothing is kept from one
measurement to the next. Seconds are those of the process, which has one thread: what else the
computer does is not in them. A search's are the least of three.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from time import perf_counter, process_time
from typing import TYPE_CHECKING, Any

from build_cost import LLAMA_3_1_8B
from programs import Model

if TYPE_CHECKING:
    from furiosa_llm.backend_rngd.isa.machine import Machine
    from furiosa_llm.backend_rngd.isa.program import Program

PREFILL = ((1, 512), (1, 1024))
DECODE = ((1, 2048), (8, 2048), (16, 2048), (64, 2048), (128, 2048))
LAYER = ((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096))
"""K and N of a layer's products."""
SHARD = ((4096, 512), (4096, 128), (512, 4096), (4096, 1792), (1792, 4096))
"""The same for one of eight ranks."""
LOGITS = ((4096, 128256), (4096, 16032))
"""Of the model, and of one of eight ranks."""
TOKENS = (1, 8, 64, 128, 256)
GROUPS = 4
"""Of slices, among which the tokens of a long prompt are divided..."""
GROUP_TOKENS = (128, 256)
"""...so many for each."""
CACHING_MODULES = (
    "furiosa_llm.backend_rngd.isa",
    "furiosa_llm.backend_rngd.tiling_search",
    "furiosa_llm.runtime_sim",
)
ROUNDS = 3
STEP_SECONDS = 0.5
ARTIFACT_SECONDS = 5.0
SEARCH_SECONDS = 1.0


def main() -> None:
    from furiosa_llm.backend_rngd.isa.machine import DEFAULT_MACHINE, load_machine
    from furiosa_llm.models.config_types import Bucket

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--machine", default=DEFAULT_MACHINE)
    machine = load_machine(parser.parse_args().machine)
    model = Model(LLAMA_3_1_8B)
    buckets = [
        *(Bucket.prefill(*shape) for shape in PREFILL),
        *(Bucket.decode(*shape) for shape in DECODE),
    ]
    programs: dict[str, Program] = {}
    for bucket in buckets:
        began = perf_counter()
        programs[bucket.name] = model.program(bucket, level=2)
        print(f"compiled {bucket.name} in {perf_counter() - began:.1f} s", file=sys.stderr)
    step = programs[Bucket.decode(1, 2048).name]
    verdict("timing a decode step", time_all([step], machine), STEP_SECONDS)
    searches = sorted(search_seconds(machine))
    verdict("the slowest tiling search", searches[-1], SEARCH_SECONDS)
    verdict("the median tiling search", searches[len(searches) // 2], SEARCH_SECONDS)
    verdict("timing seven buckets", time_all(list(programs.values()), machine), ARTIFACT_SECONDS)


def search_seconds(machine: Machine) -> Iterator[float]:
    """For each distinct product of the model, or of a rank, and each number of tokens."""
    from furiosa_llm.backend_rngd.isa.layout import plain
    from furiosa_llm.backend_rngd.isa.machine import load_machine
    from furiosa_llm.backend_rngd.tiling_search import ProductKey, search

    whole = itertools.product((*LAYER, *SHARD, *LOGITS), TOKENS, (1,))
    divided = itertools.product((*LAYER, *SHARD), GROUP_TOKENS, (GROUPS,))
    for (k, n), tokens, groups in (*whole, *divided):
        key, seconds = ProductKey(plain(k), plain(n), tokens, groups=groups), []
        for _ in range(ROUNDS):
            forget()
            load_machine()
            seconds.append(timed(partial(search, key, machine)))
        yield min(seconds)


def time_all(programs: Sequence[Program], machine: Machine) -> float:
    """Seconds to time `programs` as a process does that has just read them."""
    from furiosa_llm.backend_rngd.isa.container import read_program, write_program
    from furiosa_llm.runtime_sim.timing import time_program

    fresh = [read_program(write_program(program)) for program in programs]
    forget()
    return timed(lambda: [time_program(program, machine) for program in fresh])


def forget() -> None:
    """Empty the caches of plans, costs and searches."""
    for name, module in list(sys.modules.items()):
        if name.startswith(CACHING_MODULES):
            for function in vars(module).values():
                if hasattr(function, "cache_clear"):
                    function.cache_clear()


def timed(work: Callable[[], Any]) -> float:
    began = process_time()
    work()
    return process_time() - began


def verdict(what: str, seconds: float, goal: float) -> None:
    reached = "reached" if seconds <= goal else "MISSED"
    print(f"{what}: {seconds:.2f} s (goal {goal:g} s: {reached})")


if __name__ == "__main__":
    main()
