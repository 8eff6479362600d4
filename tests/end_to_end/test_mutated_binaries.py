"""A damaged binary whose checksum was mended is refused with a code, faults with one, or runs.

Nothing else may happen: no other exception, no hang, no memory that grows without bound.
"""

from __future__ import annotations

import hashlib
import random
import resource
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import numpy as np
import pytest
from small_decoder import Decoder

from furiosa_llm.backend_rngd.isa.container import PREAMBLE, read_program, write_program
from furiosa_llm.backend_rngd.isa.machine import load_machine
from furiosa_llm.errors import FuriosaLLMError
from furiosa_llm.models.config_types import Bucket
from furiosa_llm.runtime_sim.device import Device
from furiosa_llm.runtime_sim.timing import time_program

SECONDS_EACH = 60
MEMORY_BYTES = 8 << 30
DECODER = Decoder(Bucket.prefill(1, 80), layers=1)


def inputs() -> dict[str, np.ndarray[Any, Any]]:
    count, width = 70, 80
    own = np.zeros((1, width), np.int32)
    own[0, :count] = np.arange(1, count + 1)
    return {
        "input_ids": own % DECODER.vocabulary,
        "position_ids": np.maximum(own - 1, 0),
        "slot_mapping": own,
        "block_table": own,
        "lengths": np.array([count], np.int32),
    }


def run(binary: bytes) -> bytes:
    """Read, time and execute a binary; the bytes of its logits."""
    program = read_program(binary)
    time_program(program, load_machine())
    device = Device()
    weights = DECODER.weights()
    device.load(program, weights.__getitem__)
    device.allocate_caches(program, 81)
    return device.execute(program, inputs())["logits"].tobytes()


def mutated(binary: bytes, rng: random.Random) -> bytes:
    """One to three bytes of header or records changed, and the checksum mended."""
    data = bytearray(binary)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        at = rng.randrange(PREAMBLE.size, len(data))
        data[at] = rng.choice([data[at] ^ 1 << rng.randrange(8), rng.randrange(256), 255, 0])
    data[24:56] = hashlib.sha256(data[PREAMBLE.size :]).digest()
    return bytes(data)


@contextmanager
def limits() -> Iterator[None]:
    """At most so much time and address space."""

    def too_long(signum: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"no end after {SECONDS_EACH} s")

    before = resource.getrlimit(resource.RLIMIT_AS)
    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS_EACH)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, before[1]))
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize(
    "count",
    [pytest.param(150, id="some"), pytest.param(10_000, id="many", marks=pytest.mark.long)],
)
def test_a_damaged_binary_ends_with_a_code_or_runs(count: int) -> None:
    binary = write_program(DECODER.program())
    expected = run(binary)
    rng = random.Random(count)
    outcomes: Counter[str] = Counter()
    for _ in range(count):
        damaged = mutated(binary, rng)
        with limits():
            try:
                outcomes["same" if run(damaged) == expected else "different"] += 1
            except FuriosaLLMError as error:
                outcomes[error.code] += 1
    print(dict(outcomes.most_common()))
    assert outcomes.total() == count
    assert len(outcomes) >= 4
