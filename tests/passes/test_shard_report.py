"""What the phase `shard` tells people: every parameter, why it is cut so, and what is exchanged."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import RandomModel, random_models
from xdsl.dialects.builtin import ModuleOp

from furiosa_llm.backend_rngd.isa.cost_exchange import all_reduce_cycles
from furiosa_llm.backend_rngd.isa.machine import load_machine
from furiosa_llm.ir.types import dims_of
from furiosa_llm.ir.verification import parameters
from furiosa_llm.models.config_types import Bucket
from furiosa_llm.passes.pipeline import (
    bucket_phase,
    import_phase,
    model_phase,
    run_passes,
    shard_phase,
)
from furiosa_llm.passes.shard_report import ShardReport, report_shards

ODD = RandomModel(kv_heads=3, group=3, width=9, inner=11, vocabulary=13, biases=True, tied=True)


def sharded(model: RandomModel, tp: int) -> ModuleOp:
    module = model.module()
    bucket = bucket_phase(Bucket.decode(2, 5))
    run_passes(module, [*import_phase(), *model_phase(), *bucket, *shard_phase(tp)])
    return module


@settings(max_examples=10)
@given(random_models(), st.sampled_from([2, 4, 8]))
def test_every_parameter_is_reported_with_a_reason(model: RandomModel, tp: int) -> None:
    module = sharded(model, tp)
    report = report_shards(module)
    whole = {name: tuple(dims_of(op.type)) for name, op in parameters(module).items()}
    assert {tensor.name for tensor in report.tensors} >= set(whole)
    for tensor in report.tensors:
        assert tensor.shape == whole.get(tensor.name, tensor.shape)
        assert tensor.why
        if tensor.dim is None:
            assert (tensor.part, tensor.zeros, tensor.copies) == (tensor.shape, 0, 1)
            continue
        size, local = tensor.shape[tensor.dim], tensor.part[tensor.dim]
        assert isinstance(size, int)
        assert isinstance(local, int)
        # What ranks hold and what is padding fill their parts.
        held = sum(stop - start for own in tensor.ranges for start, stop in own)
        assert tensor.copies * size == pytest.approx(held)
        assert tensor.zeros * tp * local == pytest.approx(tp * local - held)


def reported(tp: int) -> ShardReport:
    return report_shards(sharded(ODD, tp))


def test_parts_of_heads_that_do_not_divide() -> None:
    tensors = {tensor.name: tensor for tensor in reported(4).tensors}
    cache = tensors["kv_cache.1"]
    assert (cache.shape, cache.part) == (("slots", 3, 2, 4), ("slots", 1, 2, 4))
    assert cache.ranges == (((0, 1),), ((1, 2),), ((2, 3),), ())
    assert cache.zeros == 0.25
    assert tensors["logits"].part == (2, 1, 4)
    norm = tensors["model.layers.0.input_layernorm.weight"]
    assert norm.dim is None
    eight = {tensor.name: tensor for tensor in reported(8).tensors}
    assert eight["kv_cache.0"].copies > 1  # a KV head whose query heads are on several ranks


def test_exchanges_are_counted_over_the_layers() -> None:
    exchanges = {one.module: one for one in reported(4).exchanges}
    per_layer = [one for name, one in exchanges.items() if name.startswith("model.layers.*.")]
    assert len(per_layer) == 2  # attention's output, the feed-forward part's
    tokens = 2
    for one in per_layer:
        assert (one.kind, one.runs, one.ranks) == ("all_reduce", ODD.layers, 4)
        assert (one.dtype, one.bytes) == ("f32", tokens * ODD.width * 4)
        spread = tokens * 64 * 16 * 4  # a slice that has any features takes as long as 16
        assert one.cycles == all_reduce_cycles(load_machine(), 4, spread, str(one.algorithm))
    embedding = exchanges["model.embed_tokens"]
    for one in exchanges.values():
        assert one.cycles is not None
        assert one.formula_cycles is not None
        # What was fitted to published all-reduces comes on top of documented costs.
        assert 0 < one.formula_cycles <= one.cycles
    assert (embedding.runs, embedding.dtype) == (1, "bf16")


def test_one_rank_has_nothing_to_report() -> None:
    assert reported(1) == ShardReport((), ())
