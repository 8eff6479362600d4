"""Attention in binaries of one-layer decoders: every way to divide it gives the same values.

Slots that nobody owns are NaN in all of these, and so is everything that padding tokens compute.
"""

from __future__ import annotations

import pytest
from decoder_cases import Case, check, simulated
from hypothesis import given, settings
from hypothesis import strategies as st
from small_decoder import Decoder

from furiosa_llm.backend_rngd.kernels import attention, attention_rows, attention_tiling
from furiosa_llm.models.config_types import Bucket


def decoder(bucket: Bucket, heads: int, kv_heads: int, head_dim: int) -> Decoder:
    return Decoder(
        bucket,
        hidden=40,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        feed_forward=24,
        vocabulary=50,
        layers=1,
    )


CASES = {
    # A group's slices are those that hold its query heads: the switch carries rows both ways.
    "heads where they are": Case(decoder(Bucket.decode(1, 256), 8, 2, 128), (201,)),
    "heads of many tokens where they are": Case(decoder(Bucket.prefill(1, 256), 8, 2, 128), (250,)),
    "one kv head, heads in its first slices": Case(
        decoder(Bucket.decode(1, 256), 2, 1, 128), (77,)
    ),
    "one kv head and many tokens": Case(decoder(Bucket.prefill(1, 256), 2, 1, 128), (199,)),
    "a head a slice": Case(decoder(Bucket.decode(1, 8), 64, 64, 16), (8,)),
    # Parts of a prompt, of which the second sees keys before it without any mask.
    "second part, short": Case(decoder(Bucket.prefill(1, 256), 3, 1, 16), (130,)),
    "second part, not begun": Case(decoder(Bucket.prefill(1, 256), 3, 1, 16), (64,)),
    "more rounds than are written out": Case(
        decoder(Bucket.decode(13, 30), 64, 64, 4), tuple(range(3, 16))
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_values(name: str) -> None:
    check(CASES[name])


FIT_APART = [name for name in CASES if name != "heads of many tokens where they are"]


@pytest.mark.parametrize("name", FIT_APART)
def test_every_buffer_is_written_before_it_is_read(name: str) -> None:
    assert simulated(CASES[name], apart=True).tobytes() == simulated(CASES[name]).tobytes()


# Small limits make small decoders walk what only long contexts need.
LIMITS = {
    "keys in tiles": {"KEY_TILE_BYTES": 1024},
    "segments": {"SCORE_BYTES": 512},
    "segments, merged two at a time": {"SCORE_BYTES": 512, "PART_BYTES": 1024},
    "segments that are loaded again": {"SCORE_BYTES": 512, "KEY_TILE_BYTES": 1024},
    "masks in pieces": {"MASK_KEYS": 8, "MASK_BYTES": 512},
    "rows in small tiles": {"MAX_ROWS": 16},
}


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize(
    "case",
    [
        Case(decoder(Bucket.decode(3, 120), 6, 2, 16), (120, 1, 57)),
        Case(decoder(Bucket.prefill(1, 192), 6, 2, 16), (171,)),
        Case(decoder(Bucket.prefill(30, 24), 4, 2, 16), (24, 3)),
    ],
    ids=["decode", "prefill", "many sequences"],
)
def test_small_limits(monkeypatch: pytest.MonkeyPatch, limits: str, case: Case) -> None:
    for name, value in LIMITS[limits].items():
        for module in (attention_tiling, attention, attention_rows):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
    check(case)


@settings(max_examples=30)
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
