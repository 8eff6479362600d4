"""KV caches of codes in binaries: the values of the interpreter, and half of the traffic.

Slots that nobody owns are NaN, and so is everything that padding tokens compute.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from decoder_cases import CODES_BOUND, SLOTS, Case, check, parameters_of, relative_rms, simulated
from hypothesis import given, settings
from hypothesis import strategies as st
from sequences import sequence_inputs
from small_decoder import Decoder
from xdsl.context import Context

from furiosa_llm.backend_rngd import lower_function
from furiosa_llm.backend_rngd.encode import encode_program
from furiosa_llm.backend_rngd.isa.instructions import Dma
from furiosa_llm.backend_rngd.isa.program import Program
from furiosa_llm.backend_rngd.kernels import attention_rows, attention_tiling
from furiosa_llm.backend_rngd.pipeline import backend_phase
from furiosa_llm.ir.interpreter import run
from furiosa_llm.models.config_types import Bucket
from furiosa_llm.passes.pipeline import run_passes, shard_phase
from furiosa_llm.runtime_sim.device import Device

Array = np.ndarray[Any, Any]
SCALES = (0.013, 0.021)
"""Of keys and values: the largest of a few thousand normal numbers are about 200 codes."""


def decoder(bucket: Bucket, heads: int, kv_heads: int, head_dim: int, **more: Any) -> Decoder:
    sizes = {"hidden": 40, "feed_forward": 24, "vocabulary": 50, "layers": 1} | more
    return Decoder(
        bucket, heads=heads, kv_heads=kv_heads, head_dim=head_dim, cache_scales=SCALES, **sizes
    )


CASES = {
    # The switch carries rows, and brings tokens' codes to the cache's rows.
    "heads where they are": Case(decoder(Bucket.decode(1, 256), 8, 2, 128), (201,)),
    "heads of many tokens where they are": Case(decoder(Bucket.prefill(1, 256), 8, 2, 128), (250,)),
    # DMA brings them: tokens are no power of two.
    "three sequences": Case(decoder(Bucket.decode(3, 40), 6, 2, 12, layers=2), (40, 1, 17)),
    "a head a slice": Case(decoder(Bucket.decode(1, 8), 64, 64, 16), (8,)),
    "second part of a prompt": Case(decoder(Bucket.prefill(1, 256), 3, 1, 16), (130,)),
    "sequences in a loop": Case(decoder(Bucket.decode(13, 30), 64, 64, 4), tuple(range(3, 16))),
}


@pytest.mark.parametrize("name", CASES)
def test_values(name: str) -> None:
    check(CASES[name])


@pytest.mark.parametrize("name", ["heads where they are", "three sequences"])
def test_what_nobody_wrote_changes_no_bit(name: str) -> None:
    dirty, clean = (simulated(CASES[name], garbage) for garbage in (math.nan, 3.0))
    assert dirty.tobytes() == clean.tobytes()
    assert simulated(CASES[name], apart=True).tobytes() == dirty.tobytes()


@pytest.mark.parametrize(
    "limits",
    [{"SCORE_BYTES": 512, "PART_BYTES": 1024}, {"SCORE_BYTES": 512, "KEY_TILE_BYTES": 1024}],
    ids=["segments", "keys in tiles"],
)
@pytest.mark.parametrize(
    "case",
    [
        Case(decoder(Bucket.decode(3, 120), 6, 2, 16), (120, 1, 57)),
        Case(decoder(Bucket.prefill(1, 192), 6, 2, 16), (171,)),
    ],
    ids=["decode", "prefill"],
)
def test_segments_are_merged(
    monkeypatch: pytest.MonkeyPatch, limits: dict[str, int], case: Case
) -> None:
    for name, value in limits.items():
        for module in (attention_tiling, attention_rows):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
    check(case)


@settings(max_examples=4)
@given(
    group=st.integers(1, 8),
    kv_heads=st.integers(1, 5),
    half=st.integers(1, 64),
    batch=st.integers(1, 17),
    data=st.data(),
)
def test_ragged_lengths(
    group: int, kv_heads: int, half: int, batch: int, data: st.DataObject
) -> None:
    width = data.draw(st.integers(1, 300 // batch))
    lengths = data.draw(st.lists(st.integers(1, width), min_size=1, max_size=batch))
    bucket = data.draw(st.sampled_from([Bucket.decode, Bucket.prefill]))(batch, width)
    check(Case(decoder(bucket, group * kv_heads, kv_heads, 2 * half), tuple(lengths)))


GROUPED = {
    "keys and values in one product": Case(
        decoder(
            Bucket.prefill(1, 384),
            4,
            1,
            128,
            hidden=1024,
            feed_forward=1792,
        ),
        (371,),
    ),
    "several kv heads": Case(
        decoder(Bucket.prefill(1, 384), 8, 4, 64, hidden=1024, feed_forward=512), (384,)
    ),
}


@pytest.mark.parametrize("name", GROUPED)
def test_groups_of_slices(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Of a segment's price alone and in groups, in this order, the second is the lower one.
    prices = itertools.cycle([1.0, 0.0])
    monkeypatch.setattr(lower_function, "_cycles", lambda blocks, ranks: next(prices))
    check(GROUPED[name])


# --- traffic ---


def cache_bytes(program: Program) -> int:
    """Bytes that go to and from KV caches: rows of a slot's size, by slot numbers."""
    (slot_bytes,) = {io.slot_bytes for io in program.caches}
    transfers = [c for c in program.commands if isinstance(c, Dma) and c.index is not None]
    return sum(
        math.prod(c.n) * c.run
        for c in transfers
        if c.index is not None and c.index.scale == slot_bytes
    )


@pytest.mark.parametrize("bucket", [Bucket.decode(4, 128), Bucket.prefill(1, 128)])
def test_half_of_the_bytes_go_to_the_cache(bucket: Bucket) -> None:
    codes = decoder(bucket, 6, 3, 32)
    half = cache_bytes(codes.program())
    assert 0 < 2 * half == cache_bytes(replace(codes, cache_scales=None).program())


# --- ranks ---


def sharded(one: Decoder, ranks: int) -> Program:
    module = one.module()
    run_passes(module, shard_phase(ranks))
    for step in backend_phase(one.bucket):
        step.apply(Context(), module)
    return encode_program(module, "small")


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_prefill_and_decode(ranks: int) -> None:
    """Three KV heads: ranks have caches of their own heads, some twice, some padding."""
    lengths = (19, 24)
    first = decoder(Bucket.prefill(2, 24), 6, 3, 16, layers=2, hidden=72)
    then = replace(first, bucket=Bucket.decode(2, 32))
    rng = np.random.default_rng(0)
    later = sequence_inputs(then.bucket, [n + 1 for n in lengths], rng, SLOTS)
    later["input_ids"][:] = rng.integers(1, 50, later["input_ids"].shape)
    earlier = sequence_inputs(first.bucket, lengths, rng, SLOTS)
    for row, length in enumerate(lengths):
        earlier["input_ids"][row, :length] = rng.integers(1, 50, length)
        own = later["block_table"][row, :length]
        earlier["block_table"][row, :length] = earlier["slot_mapping"][row, :length] = own

    expected, found = reference(first, then, earlier, later), []
    device = Device()
    for one, inputs in ((first, earlier), (then, later)):
        program = sharded(one, ranks)
        assert len(program.caches) == 2
        assert {io.dtype for io in program.caches} == {"f8e4m3"}
        device.load(program, one.weights().__getitem__)
        device.allocate_caches(program, SLOTS)
        found.append(device.execute(program, inputs)["logits"][:, 0])
    for logits, wanted in zip(found, expected, strict=True):
        assert relative_rms(logits, wanted) < CODES_BOUND


def reference(
    first: Decoder, then: Decoder, earlier: dict[str, Array], later: dict[str, Array]
) -> list[Array]:
    """Logits of both steps in f32, on one rank."""
    shape = (SLOTS, first.kv_heads, 2, first.head_dim)
    caches = [torch.full(shape, torch.nan) for _ in range(first.layers)]
    found = []
    for one, inputs in ((first, earlier), (then, later)):
        values = [*(torch.from_numpy(value) for value in inputs.values()), *caches]
        logits, *caches = run(
            one.module(), "forward", values, parameters_of(one), precision="float32"
        )
        found.append(logits[:, 0].numpy())
    return found
