"""A damaged binary whose checksum was mended is refused with a code, faults with one, or runs.

Nothing else may happen: no other exception, no hang, no memory that grows without bound. And a
single field that is changed is noticed: the program is refused, faults, gives other values or
takes another time. What survives is listed in docs/measurements.md.
"""

from __future__ import annotations

import random
import resource
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import FrameType

import pytest
from mutations import another_value, fields, mutated
from small_programs import SmallProgram, small_programs

from furiosa_llm.backend_rngd.isa.container import read_program, write_program
from furiosa_llm.backend_rngd.isa.machine import load_machine
from furiosa_llm.errors import FuriosaLLMError
from furiosa_llm.runtime_sim.timing import ProgramTiming, time_program

SECONDS_EACH = 60
MEMORY_BYTES = 4 << 30
"""Address space beyond what the process has when a binary is read."""
PROGRAMS = small_programs()
DECODERS = ("prefill", "decode")


@cache
def binary(name: str) -> bytes:
    return write_program(PROGRAMS[name].program)


@cache
def correct(name: str) -> tuple[bytes, ProgramTiming]:
    """Values and time of the undamaged binary."""
    return run(PROGRAMS[name], binary(name), 1 << 40)


def run(of: SmallProgram, data: bytes, max_cycles: int) -> tuple[bytes, ProgramTiming]:
    """Read, time and execute a binary."""
    program = read_program(data)
    timing = time_program(program, load_machine(), max_cycles=max_cycles)
    return of.run(program), timing


def outcome(name: str, data: bytes) -> str:
    """A code, or what differs: `values`, `time`, `modules` (what the parts took), `nothing`."""
    values, timing = correct(name)
    try:
        with limits():
            got, took = run(PROGRAMS[name], data, 64 * timing.cycles)
    except FuriosaLLMError as error:
        return error.code
    if got != values:
        return "values"
    if (took.cycles, took.low_us, took.high_us) != (timing.cycles, timing.low_us, timing.high_us):
        return "time"
    return "nothing" if took == timing else "modules"


@contextmanager
def limits() -> Iterator[None]:
    """At most so much time and address space."""

    def too_long(signum: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"no end after {SECONDS_EACH} s")

    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS_EACH)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, before[1]))
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, before)


def checked(name: str, seed: str, data: bytes, folder: Path) -> str:
    """The outcome; a file that ends in another way is kept, and its place said."""
    try:
        return outcome(name, data)
    except Exception as error:
        kept = folder / "mutated.vedf"
        kept.write_bytes(data)
        raise AssertionError(f"{seed}: {error!r}, see {kept}") from error


def counts(total: int) -> dict[str, int]:
    """How many mutations of each program: decoders take ten times as long as the others."""
    weights = {name: 1 if name in DECODERS else 6 for name in PROGRAMS}
    return {name: total * w // sum(weights.values()) for name, w in weights.items()}


@pytest.mark.parametrize(
    "total",
    [pytest.param(2_010, id="some"), pytest.param(100_000, id="many", marks=pytest.mark.long)],
)
def test_a_damaged_binary_ends_with_a_code_or_runs(total: int, tmp_path: Path) -> None:
    outcomes: Counter[str] = Counter()
    for name, count in counts(total).items():
        for number in range(count):
            seed = f"{name} {number}"
            data = mutated(binary(name), seed)
            outcomes[checked(name, seed, data, tmp_path)] += 1
    print(dict(outcomes.most_common()))
    assert {"VED001", "VED004", "VED010", "VED011", "SIM010", "SIM012", "values"} <= set(outcomes)


@pytest.mark.parametrize(
    "total",
    [pytest.param(2_010, id="some"), pytest.param(40_000, id="many", marks=pytest.mark.long)],
)
def test_a_changed_field_of_a_record_is_noticed(total: int, tmp_path: Path) -> None:
    survivors: Counter[str] = Counter()
    outcomes: Counter[str] = Counter()
    for name, count in counts(total).items():
        every = fields(binary(name))
        for number in range(count):
            seed = f"{name} field {number}"
            rng = random.Random(seed)
            field = rng.choice(every)
            data = field.put(binary(name), another_value(field, binary(name), every, rng))
            found = checked(name, seed, data, tmp_path)
            outcomes[found] += 1
            survivors[field.name] += found == "nothing"
    print(dict(outcomes.most_common()), dict((+survivors).most_common()))
    assert outcomes["nothing"] + outcomes["modules"] <= outcomes.total() / 100
