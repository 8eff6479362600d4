"""Binaries of small decoders give the values of the reference interpreter (`decoder_cases`)."""

from __future__ import annotations

import pytest
from decoder_cases import Case, check, simulated
from hypothesis import given, settings
from hypothesis import strategies as st
from small_decoder import Decoder

from furiosa_llm.models.config_types import Bucket

CASES = {
    "one token": Case(Decoder(Bucket.decode(1, 40)), (7,)),
    "first token": Case(Decoder(Bucket.decode(1, 8)), (1,)),
    "ragged decode": Case(Decoder(Bucket.decode(4, 100)), (100, 1, 37, 64)),
    "padding rows": Case(Decoder(Bucket.decode(4, 70)), (9, 70)),
    "more tokens than lanes": Case(Decoder(Bucket.decode(13, 30)), tuple(range(3, 16))),
    "prefill": Case(Decoder(Bucket.prefill(1, 24)), (24,)),
    "prefill, padded": Case(Decoder(Bucket.prefill(1, 24)), (5,)),
    "prefill, odd length": Case(Decoder(Bucket.prefill(2, 13)), (13, 4)),
    "prefill in parts": Case(Decoder(Bucket.prefill(1, 380), layers=2), (371,)),
    "prompts in parts": Case(
        Decoder(Bucket.prefill(4, 90), layers=1, head_norms=True, bias=True), (90, 3, 81, 61)
    ),
    "all logits": Case(Decoder(Bucket.prefill(2, 24), last_token_only=False), (20, 11)),
    "biases": Case(Decoder(Bucket.decode(2, 40), bias=True), (12, 30)),
    "head norms": Case(Decoder(Bucket.prefill(1, 16), head_norms=True), (16,)),
    "one query head per kv head": Case(Decoder(Bucket.decode(2, 40), heads=2), (12, 30)),
    "nine heads": Case(Decoder(Bucket.prefill(1, 24), heads=9, kv_heads=3, head_dim=64), (24,)),
    "twelve query heads per kv head": Case(
        Decoder(Bucket.decode(1, 40), heads=12, kv_heads=1), (33,)
    ),
    "more kv heads than slices": Case(
        Decoder(Bucket.decode(1, 16), heads=66, kv_heads=66, head_dim=4, layers=1), (13,)
    ),
    "long context in tiles": Case(
        Decoder(Bucket.decode(1, 300), heads=64, kv_heads=64, head_dim=128, layers=1), (290,)
    ),
    "sixteen query heads on one kv head": Case(
        Decoder(Bucket.prefill(1, 64), heads=16, kv_heads=1, head_dim=24, layers=1), (45,)
    ),
    "heads between those of other slices": Case(
        Decoder(Bucket.decode(3, 106), heads=70, kv_heads=10, head_dim=40, layers=1), (59, 22, 53)
    ),
    "heads that share a slice": Case(
        Decoder(Bucket.decode(2, 24), heads=72, kv_heads=36, head_dim=16, layers=1), (5, 24)
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_logits_agree_with_the_interpreter(name: str) -> None:
    check(CASES[name])


@pytest.mark.parametrize("name", ["padding rows", "prefill, padded", "prefill in parts"])
def test_garbage_in_padding_changes_no_bit(name: str) -> None:
    case = CASES[name]
    clean = simulated(case, garbage=0.0)
    for garbage in (float("nan"), float("inf"), -3e38, 7.0):
        assert simulated(case, garbage).tobytes() == clean.tobytes()


FIT_APART = [name for name in CASES if name not in ("prefill in parts", "long context in tiles")]


@pytest.mark.parametrize("name", FIT_APART)
def test_every_buffer_is_written_before_it_is_read(name: str) -> None:
    case = CASES[name]
    assert simulated(case, apart=True).tobytes() == simulated(case).tobytes()


@settings(max_examples=15)
@given(
    groups=st.integers(1, 4),
    kv_heads=st.integers(1, 5),
    half=st.integers(1, 20),
    hidden=st.integers(1, 150),
    feed_forward=st.integers(1, 200),
    vocabulary=st.integers(2, 150),
    data=st.data(),
)
def test_shapes_that_divide_nothing(
    groups: int,
    kv_heads: int,
    half: int,
    hidden: int,
    feed_forward: int,
    vocabulary: int,
    data: st.DataObject,
) -> None:
    batch = data.draw(st.integers(1, 5))
    width = data.draw(st.integers(1, 70))
    prefill = data.draw(st.booleans())
    lengths = data.draw(st.lists(st.integers(1, width), min_size=1, max_size=batch))
    decoder = Decoder(
        Bucket.prefill(batch, width) if prefill else Bucket.decode(batch, width),
        hidden=hidden,
        heads=groups * kv_heads,
        kv_heads=kv_heads,
        head_dim=2 * half,
        feed_forward=feed_forward,
        vocabulary=vocabulary,
        layers=1,
    )
    check(Case(decoder, tuple(lengths)))
