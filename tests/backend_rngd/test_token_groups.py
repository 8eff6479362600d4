"""Prompts whose tokens are divided over groups of slices (`token_groups`)."""

from __future__ import annotations

import itertools

import pytest
from decoder_cases import Case, check
from small_decoder import Decoder
from xdsl.context import Context

from furiosa_llm.backend_rngd import tile
from furiosa_llm.backend_rngd.rngd import TilingOp
from furiosa_llm.models.config_types import Bucket

CASES = {
    # 64 slices hold the hidden state, 56 what the feed-forward makes: its units are chunks.
    "a shard's shapes": Case(
        Decoder(
            Bucket.prefill(1, 384),
            hidden=1024,
            heads=4,
            kv_heads=1,
            head_dim=128,
            feed_forward=1792,
            layers=2,
        ),
        (371,),
    ),
    "several kv heads": Case(
        Decoder(
            Bucket.prefill(1, 384),
            hidden=1024,
            heads=8,
            kv_heads=4,
            head_dim=64,
            feed_forward=512,
            bias=True,
            layers=1,
        ),
        (384,),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_values_do_not_depend_on_the_grouping(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Of a segment's price alone and in groups, in this order, the second is the lower one.
    prices = itertools.cycle([1.0, 0.0])
    monkeypatch.setattr(tile, "_cycles", lambda blocks, ranks: next(prices))
    check(CASES[name])


def test_pinned_groups_are_taken_whatever_they_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = CASES["several kv heads"].decoder
    prices = itertools.cycle([1.0, 0.0])
    monkeypatch.setattr(tile, "_cycles", lambda blocks, ranks: next(prices))
    chosen = _tilings(decoder, ())
    assert any("groups=4" in record for record in chosen.values())
    monkeypatch.setattr(tile, "_cycles", lambda blocks, ranks: 1.0)  # alone, if there is a choice
    assert not any("groups=4" in record for record in _tilings(decoder, ()).values())
    assert _tilings(decoder, tuple(f"{name}: {text}" for name, text in chosen.items())) == chosen


def _tilings(decoder: Decoder, pins: tuple[str, ...]) -> dict[str, str]:
    """The records of all products, by name."""
    module = decoder.module()
    tile.TilePass.for_bucket(decoder.bucket, pins=pins).apply(Context(), module)
    found = [op for op in module.walk() if isinstance(op, TilingOp)]
    return {op.product.data: op.record.data for op in found}
