"""Prompts whose tokens are divided over groups of slices (`token_groups`)."""

from __future__ import annotations

import itertools

import pytest
from decoder_cases import BOUND, SLOTS, Case, check, reference, relative_rms, valid
from small_decoder import Decoder
from xdsl.context import Context
from xdsl.dialects.builtin import StringAttr

from furiosa_llm.backend_rngd import lower_function, tile
from furiosa_llm.backend_rngd.encode import encode_program
from furiosa_llm.backend_rngd.pipeline import DIALECTS, backend_phase
from furiosa_llm.backend_rngd.rngd import TilingOp
from furiosa_llm.ir import dist
from furiosa_llm.ir.text import make_context
from furiosa_llm.models.config_types import Bucket
from furiosa_llm.passes.lower_collectives import LowerCollectivesPass
from furiosa_llm.passes.pipeline import run_passes, shard_phase
from furiosa_llm.runtime_sim.device import Device

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
    # Queries in chunks of what one of 64 slices would hold: nothing turns them, so all slices do.
    "heads in chunks": Case(
        Decoder(Bucket.prefill(1, 384), hidden=256, heads=10, kv_heads=1, head_dim=128, layers=1),
        (371,),
    ),
    # Attention leaves them whole, and the product after it would take chunks.
    "heads that attention leaves": Case(
        Decoder(Bucket.prefill(1, 384), hidden=1024, heads=20, kv_heads=5, head_dim=64, layers=1),
        (371,),
    ),
    # The slices of a group cannot hold the queries in equal parts: attention is not grouped.
    "heads that groups do not divide": Case(
        Decoder(Bucket.prefill(1, 256), hidden=256, heads=5, kv_heads=1, head_dim=64, layers=1),
        (250,),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_values_do_not_depend_on_the_grouping(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Of a segment's price alone and in groups, in this order, the second is the lower one.
    prices = itertools.cycle([1.0, 0.0])
    monkeypatch.setattr(lower_function, "_cycles", lambda blocks, ranks: next(prices))
    check(CASES[name])


@pytest.mark.parametrize("algorithm", ["scatter_gather", "rotate"])
def test_sums_over_ranks_work_in_groups(algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prices = itertools.cycle([1.0, 0.0])
    monkeypatch.setattr(lower_function, "_cycles", lambda blocks, ranks: next(prices))
    case = CASES["several kv heads"]
    module, context = case.decoder.module(), make_context(DIALECTS)
    shard = [step for step in shard_phase(2) if not isinstance(step, LowerCollectivesPass)]
    run_passes(module, shard, context=context)
    sums = [op for op in module.walk() if isinstance(op, dist.AllReduceOp)]
    assert len(sums) >= 2  # after attention, and after the feed-forward part
    for op in sums:
        op.algorithm = StringAttr(algorithm)
    run_passes(module, backend_phase(case.decoder.bucket), context=context)

    program, device = encode_program(module, "groups"), Device()
    device.load(program, case.decoder.weights().__getitem__)
    device.allocate_caches(program, SLOTS)
    found, expected = valid(case, device.execute(program, case.inputs())["logits"]), reference(case)
    assert relative_rms(found, expected) < BOUND
    records = [op.record.data for op in module.walk() if isinstance(op, TilingOp)]
    assert any("groups=4" in record for record in records)


def test_pinned_groups_are_taken_whatever_they_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = CASES["several kv heads"].decoder
    prices = itertools.cycle([1.0, 0.0])
    monkeypatch.setattr(lower_function, "_cycles", lambda blocks, ranks: next(prices))
    chosen = _tilings(decoder, ())
    assert any("groups=4" in record for record in chosen.values())
    # Alone, if there is a choice.
    monkeypatch.setattr(lower_function, "_cycles", lambda blocks, ranks: 1.0)
    assert not any("groups=4" in record for record in _tilings(decoder, ()).values())
    assert _tilings(decoder, tuple(f"{name}: {text}" for name, text in chosen.items())) == chosen


def _tilings(decoder: Decoder, pins: tuple[str, ...]) -> dict[str, str]:
    """The records of all products, by name."""
    module = decoder.module()
    tile.TilePass.for_bucket(decoder.bucket, pins=pins).apply(Context(), module)
    found = [op for op in module.walk() if isinstance(op, TilingOp)]
    return {op.product.data: op.record.data for op in found}
