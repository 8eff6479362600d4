"""Models of any sizes, cut over 2, 4 and 8 ranks, compute what they did."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Literal

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from random_models import BUCKETS, DECODE, RandomModel, ShardPhase, lowered, random_models
from xdsl.dialects.builtin import ModuleOp

from furiosa_llm.errors import FuriosaLLMError
from furiosa_llm.ir import dist, nn
from furiosa_llm.ir.dist_interpreter import assemble, take
from furiosa_llm.ir.text import parse_module
from furiosa_llm.ir.types import bf16, dtype_of, shape_of
from furiosa_llm.ir.verification import functions, parameters
from furiosa_llm.models.config_types import Bucket
from furiosa_llm.passes.contract_check import check_contract
from furiosa_llm.passes.pipeline import run_passes
from furiosa_llm.passes.shard_tensor_parallel import ShardTensorParallelPass


def sharded(model: RandomModel, tp: int, bucket: Bucket = DECODE) -> ModuleOp:
    module = lowered(model, bucket)
    run_passes(module, [ShardTensorParallelPass(tp)])
    return module


def shards(module: ModuleOp) -> dict[str, dist.CutAttr]:
    return {op.parameter_name: op.cut for op in module.walk() if isinstance(op, dist.GetShardOp)}


def counted(module: ModuleOp) -> dict[str, int]:
    names = Counter(op.name for op in module.walk() if op.name.startswith("dist."))
    return {name: count for name, count in names.items() if name != "dist.get_shard"}


ODD = RandomModel(kv_heads=3, group=3, width=9, inner=11, vocabulary=13, biases=True, tied=True)


@settings(max_examples=15)
@example(model=ODD, tp=8, stages=2, bucket=DECODE, partial_sum="bf16", seed=0)
@given(
    model=random_models(),
    tp=st.sampled_from([1, 2, 4, 8]),
    stages=st.integers(1, 4),
    bucket=st.sampled_from(BUCKETS),
    partial_sum=st.sampled_from(["f32", "bf16"]),
    seed=st.integers(0, 99),
)
def test_models_of_any_sizes_compute_what_they_did(
    model: RandomModel,
    tp: int,
    stages: int,
    bucket: Bucket,
    partial_sum: Literal["f32", "bf16"],
    seed: int,
) -> None:
    """On any ranks and stages; and parts of parameters put together are the parameters."""
    module = lowered(model, bucket)
    phase = ShardPhase(tp, partial_sum, min(stages, model.layers))
    after = check_contract(phase, module, seed)
    mesh = dist.mesh_of(after)
    assert mesh is not None or tp == phase.stages == 1
    for name, cut in shards(after).items():
        shape = shape_of(parameters(module)[name].type)
        whole = torch.randint(-(2**15), 2**15, shape, dtype=torch.int16)
        parts = [take(cut, whole, rank) for rank in range(tp)]
        assert torch.equal(assemble(cut, parts), whole)


@pytest.mark.parametrize("codes", [False, True])
def test_a_decoder_sums_twice_per_block(codes: bool) -> None:
    """Heads and the feed-forward part are cut; each ends in one sum. Logits stay cut.

    Quantised keys and values are cut as the others; their scales are whole.
    """
    module = sharded(replace(ODD, codes=codes), 4)
    assert counted(module) == {"dist.local_rows": 1, "dist.all_reduce": 3}
    cuts = shards(module)
    assert str(cuts["model.layers.0.gate_up_0.weight"]) == (
        "#dist.cut<0, 3, [[0:3], [3:6], [6:9], [9:11]]>"
    )
    assert cuts["model.layers.0.down_proj.weight"] == cuts["model.layers.0.gate_up_1.weight"].at(1)
    _, (logits, *caches) = dist.cuts_of(functions(module)["forward"])
    assert str(logits) == "#dist.cut<2, 4, [[0:4], [4:8], [8:12], [12:13]]>"
    assert {str(cache) for cache in caches} == {"#dist.cut<1, 1, [[0:1], [1:2], [2:3], [-]]>"}
    assert not any("scale" in name for name in cuts)


@pytest.mark.parametrize(
    ("tp", "queries", "keys"),
    [
        (2, "2, 24, [[0:24], [24:36]]", "1, 2, [[0:2], [2:3]]"),
        (4, "2, 12, [[0:12], [12:24], [24:36], [-]]", "1, 1, [[0:1], [1:2], [2:3], [-]]"),
        (
            8,
            "2, 8, [[0:8], [8:12], [12:20], [20:24], [24:32], [32:36], [-], [-]]",
            "1, 1, [[0:1], [0:1], [1:2], [1:2], [2:3], [2:3], [-], [-]]",
        ),
    ],
)
def test_heads_that_do_not_divide(tp: int, queries: str, keys: str) -> None:
    """SmolLM2 has 9 heads and 3 KV heads: these are repeated where that leaves fewer bytes."""
    module = sharded(RandomModel(kv_heads=3, group=3), tp)
    assert str(shards(module)["model.layers.0.qkv_0.weight"].at(2)) == f"#dist.cut<{queries}>"
    arguments, _ = dist.cuts_of(functions(module)["forward"])
    assert str(arguments[-1]) == f"#dist.cut<{keys}>"


def test_slices_of_one_weight_are_cut_each() -> None:
    """Gate and up in one tensor: a rank has its rows of both, and finds them in its own part."""
    module = sharded(RandomModel(inner=5, fused=True), 2)
    cut = shards(module)["model.layers.0.gate_up.weight"]
    assert str(cut) == "#dist.cut<0, 3, [[0:3, 5:8], [3:5, 8:10]]>"
    rows = [
        (op.start.value.data, op.end.value.data)
        for op in functions(module)["block_0"].walk()
        if isinstance(op, nn.SliceOp)
    ]
    assert rows[-2:] == [(0, 3), (3, 6)]


def test_a_tied_table_is_cut_for_each_use() -> None:
    """Only lookups need a row of zeros; the two have different layouts on a card anyway."""
    module = sharded(RandomModel(tied=True), 8)
    tables = [
        op.cut.length.data
        for op in module.walk()
        if isinstance(op, dist.GetShardOp) and "embed" in op.parameter_name
    ]
    assert tables == [3, 2]


def test_biases_of_sums_are_on_one_rank() -> None:
    cuts = shards(sharded(RandomModel(biases=True), 2))
    assert str(cuts["model.layers.0.o_proj.bias.weight"]) == "#dist.cut<0, 10, [[0:10], [-]]>"
    assert str(cuts["model.layers.0.qkv_0.bias.weight"]) == "#dist.cut<0, 8, [[0:8], [8:16]]>"


def test_norms_of_heads_are_whole_and_norms_over_heads_gather() -> None:
    module = sharded(RandomModel(head_norms=True), 2)
    assert not any("norm" in name for name in shards(module))
    assert "dist.all_gather" not in counted(module)
    gathering = sharded(RandomModel(whole_norms=True), 2)
    assert counted(gathering)["dist.all_gather"] == 2  # queries and keys
    assert counted(gathering)["dist.shard"] == 2


def test_partial_sums_are_f32_unless_the_option_says_otherwise() -> None:
    for option, dtype in (("f32", "f32"), ("bf16", "bf16")):
        module = lowered(RandomModel(layers=1))
        run_passes(module, [ShardTensorParallelPass(2, option)])  # type: ignore[arg-type]
        sums = [op for op in module.walk() if isinstance(op, dist.AllReduceOp)]
        assert [str(dtype_of(op.x)) for op in sums[1:]] == [dtype] * 2
        assert all(dtype_of(op.y) == bf16 for op in sums)


def test_padding_never_wins() -> None:
    """All logits are below zero, which is what rows of padding have."""
    module = sharded(RandomModel(dtype=bf16, vocabulary=3, layers=1), 8)
    _, (cut, *_) = dist.cuts_of(functions(module)["forward"])
    assert cut is not None
    parts = [take(cut, torch.tensor([[[-3.0, -1.0, -2.0]]]), rank) for rank in range(8)]
    assert all(float(part.max()) == 0 for part in parts[3:])
    assert int(assemble(cut, parts).argmax()) == 1


def test_functions_that_others_call_work_on_whole_tensors() -> None:
    module = parse_module("""
    nn.parameter @w : tensor<6x6xf32>
    func.func @forward(%x: tensor<2x6xf32>) -> tensor<2x6xf32> {
      %w = nn.get_parameter @w : tensor<6x6xf32>
      %y = func.call @outer(%x, %w) : (tensor<2x6xf32>, tensor<6x6xf32>) -> tensor<2x6xf32>
      func.return %y : tensor<2x6xf32>
    }
    func.func private @outer(%x: tensor<2x6xf32>, %w: tensor<6x6xf32>) -> tensor<2x6xf32> {
      %y = func.call @inner(%x, %w) : (tensor<2x6xf32>, tensor<6x6xf32>) -> tensor<2x6xf32>
      %z = nn.linear %y, %w : tensor<2x6xf32>, tensor<6x6xf32> -> tensor<2x6xf32>
      func.return %z : tensor<2x6xf32>
    }
    func.func private @inner(%x: tensor<2x6xf32>, %w: tensor<6x6xf32>) -> tensor<2x6xf32> {
      %y = nn.linear %x, %w : tensor<2x6xf32>, tensor<6x6xf32> -> tensor<2x6xf32>
      func.return %y : tensor<2x6xf32>
    }""")
    after = check_contract(ShardTensorParallelPass(4), module)
    inner = [str(functions(one)["inner"]) for one in (module, after)]
    assert inner[0] == inner[1]
    assert counted(after) == {"dist.shard": 1}  # of the weight, in @outer


def test_one_rank_changes_nothing() -> None:
    module = lowered(RandomModel())
    before = str(module)
    run_passes(module, [ShardTensorParallelPass(1)])
    assert str(module) == before


@pytest.mark.parametrize(
    ("tp", "code", "shown"), [(3, "PAR007", "size to `2` or `4`"), (16, "PAR008", "size to 8,")]
)
def test_impossible_numbers_of_ranks_are_refused(tp: int, code: str, shown: str) -> None:
    with pytest.raises(FuriosaLLMError) as caught:
        sharded(RandomModel(), tp)
    assert caught.value.code == code
    assert shown in str(caught.value)


def test_a_module_is_cut_once() -> None:
    module = sharded(RandomModel(), 2)
    with pytest.raises(FuriosaLLMError, match="SHD006"):
        run_passes(module, [ShardTensorParallelPass(4)])
