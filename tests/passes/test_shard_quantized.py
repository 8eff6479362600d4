"""Quantised models, cut over 2, 4 and 8 ranks: codes, their scales, and what is measured of inputs.

Shape letters: N rows and K columns of a weight.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from quantized_descriptions import activations, all_alike, described
from random_models import BUCKETS, RandomModel, ShardPhase, lowered, random_models
from torch import Tensor
from xdsl.dialects.builtin import ModuleOp
from xdsl.dialects.func import CallOp
from xdsl.ir import BlockArgument, SSAValue

from furiosa_llm.ir import dist, nn, quant, quant_semantics
from furiosa_llm.ir.dist import CutAttr
from furiosa_llm.ir.dist_interpreter import assemble, take
from furiosa_llm.ir.interpreter import TORCH_DTYPES
from furiosa_llm.ir.types import dtype_of, f32, shape_of
from furiosa_llm.ir.verification import callee_name, functions, parameters
from furiosa_llm.models.config_types import Bucket
from furiosa_llm.models.quantization import (
    DYNAMIC_TOKEN,
    NO_ACTIVATION,
    PER_CHANNEL,
    ActivationScheme,
    WeightScheme,
    per_block,
)
from furiosa_llm.passes.contract_check import check_contract
from furiosa_llm.passes.head_cuts import split_heads
from furiosa_llm.passes.rewriting import calls
from furiosa_llm.passes.scale_cuts import local_block, scale_cut
from furiosa_llm.passes.shard_report import report_shards

RANKS = st.sampled_from([2, 4, 8])

# --- scales of blocks ---


@st.composite
def even_cuts(draw: st.DrawFn) -> CutAttr:
    """Runs of units that divide nothing."""
    size, unit = draw(st.integers(1, 90)), draw(st.integers(1, 20))
    return CutAttr.even(0, size, draw(RANKS), unit=unit)


@st.composite
def head_cuts(draw: st.DrawFn) -> CutAttr:
    """Rows of queries, keys or values: several slots, some of them padded or repeated."""
    heads = draw(st.integers(1, 20))
    kv_heads = draw(st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0]))
    size, full = draw(st.integers(1, 12)), draw(st.booleans())
    split = split_heads(heads, kv_heads, size, draw(RANKS), full_slots=full)
    return draw(st.sampled_from([split.query_cut(), split.kv_cut()])).scaled(size).at(0)


@settings(max_examples=300)
@example(cut=CutAttr.even(0, 22, 4), block=128, dim=0, seed=0)
@given(
    cut=st.one_of(even_cuts(), head_cuts()),
    block=st.integers(1, 40),
    dim=st.sampled_from([0, 1]),
    seed=st.integers(0, 99),
)
def test_parts_of_codes_and_scales_mean_what_the_whole_means(
    cut: CutAttr, block: int, dim: Literal[0, 1], seed: int
) -> None:
    """Bit for bit, and padding is zero: its scale is no NaN."""
    generator = torch.Generator().manual_seed(seed)
    cut = cut.at(dim)
    shape = (cut.whole_size, 3) if dim == 0 else (3, cut.whole_size)
    blocks = (block, 2) if dim == 0 else (2, block)
    codes = (100 * torch.randn(shape, generator=generator)).to(torch.float8_e4m3fn)
    grid = tuple(-(-size // one) for size, one in zip(shape, blocks, strict=True))
    scale = torch.rand(grid, generator=generator) + 0.1

    local = local_block(cut, block)
    local_blocks = (local, 2) if dim == 0 else (2, local)
    parts = []
    for rank in range(cut.ranks):
        own_codes = take(cut, codes, rank)
        own_scale = scale if grid[dim] == 1 else take(scale_cut(cut, block, dim), scale, rank)
        parts.append(dequantised(own_codes, own_scale, local_blocks))
    whole = dequantised(codes, scale, blocks)
    assert_same_bits(assemble(cut, parts), whole)
    for rank, part in enumerate(parts):
        assert_same_bits(part, take(cut, whole, rank))


def dequantised(codes: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    rows, columns = codes.shape
    return codes.float() * quant_semantics.spread_over_blocks(scale, (rows, columns), block)


def assert_same_bits(one: Tensor, other: Tensor) -> None:
    assert torch.equal(one.view(torch.int32), other.view(torch.int32))


# --- whole models ---


@settings(max_examples=25)
@given(
    model=random_models(),
    tp=RANKS,
    stages=st.integers(1, 4),
    bucket=st.sampled_from(BUCKETS),
    partial_sum=st.sampled_from(["f32", "bf16"]),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_quantised_models_of_any_sizes_compute_what_they_did(
    model: RandomModel,
    tp: int,
    stages: int,
    bucket: Bucket,
    partial_sum: Literal["f32", "bf16"],
    seed: int,
    data: st.DataObject,
) -> None:
    """On any ranks; and what their parts of codes and scales mean, put together, is the whole."""
    module = lowered(model, bucket, lambda plain: described(plain, data, activations()))
    phase = ShardPhase(tp, partial_sum, min(stages, model.layers))
    after = check_contract(phase, module, seed)
    blocks = {weight.name: weight.block for weight in weights(module)}
    generator = torch.Generator().manual_seed(seed)
    for weight in weights(after):
        declared = (parameters(module)[name].type for name in (weight.name, weight.scale_name))
        codes, scale = (
            (100 * torch.rand(shape_of(type), generator=generator)).to(TORCH_DTYPES[dtype_of(type)])
            for type in declared
        )
        whole = dequantised(codes, scale, blocks[weight.name])
        if weight.cut is None:
            assert weight.block == blocks[weight.name]
            assert weight.scale_cut is None
            continue
        parts = [
            dequantised(
                take(weight.cut, codes, rank),
                scale if weight.scale_cut is None else take(weight.scale_cut, scale, rank),
                weight.block,
            )
            for rank in range(tp)
        ]
        assert_same_bits(assemble(weight.cut, parts), whole)


@dataclass(frozen=True)
class Weight:
    """Of a quantised layer: its tensors as ranks read them."""

    name: str
    cut: CutAttr | None
    scale_name: str
    scale_cut: CutAttr | None
    block: tuple[int, int]


def weights(module: ModuleOp) -> Iterator[Weight]:
    """Of layers with a weight of their own; slices of one are held to the contract alone."""
    for call in calls(functions(module)["forward"]):
        for op in functions(module)[callee_name(call)].walk():
            if isinstance(op, quant.LinearOp) and isinstance(op.w, BlockArgument):
                yield Weight(*read(op.w, call), *read(op.w_scale, call), op.block)


def read(value: SSAValue, call: CallOp) -> tuple[str, CutAttr | None]:
    assert isinstance(value, BlockArgument)
    source = call.arguments[value.index].owner
    assert isinstance(source, nn.GetParameterOp | dist.GetShardOp)
    return source.parameter_name, source.cut if isinstance(source, dist.GetShardOp) else None


# --- what is chosen ---


BLOCK = 32


def quantised(
    model: RandomModel,
    tp: int,
    scheme: WeightScheme = PER_CHANNEL,
    inputs: ActivationScheme = NO_ACTIVATION,
) -> ModuleOp:
    """Cut; all layers that can be are quantised alike."""

    module = lowered(model, describe=lambda plain: all_alike(plain, scheme, inputs))
    return check_contract(ShardPhase(tp, "f32", 1), module)


def named(module: ModuleOp, name: str) -> Weight:
    return next(weight for weight in weights(module) if weight.name.endswith(f"{name}.weight"))


def exchanges(module: ModuleOp) -> Counter[str]:
    """Of all ranks: sums, comparisons and others."""
    ops = [op for op in module.walk() if op.name.startswith("dist.")]
    names = Counter(op.name.removeprefix("dist.") for op in ops)
    largest = sum(isinstance(op, dist.AllReduceOp) and not op.is_sum for op in ops)
    names["all_reduce"] -= largest
    names["max"] = largest
    del names["get_shard"], names["local_rows"]
    return +names


@pytest.mark.parametrize(
    ("inner", "tp", "rows", "block"),
    [
        (8 * BLOCK, 8, BLOCK, BLOCK),
        # 22 blocks: 3 for each rank are 9 % more than 88 rows
        (22 * BLOCK, 8, 3 * BLOCK, BLOCK),
        # 9 blocks: 2 for each rank are 78 % more than 36 rows, halves of blocks 33 %
        (9 * BLOCK, 8, 48, BLOCK // 2),
        (BLOCK + 1, 2, 32, BLOCK),
    ],
)
def test_features_are_cut_where_blocks_end(inner: int, tp: int, rows: int, block: int) -> None:
    """Unless a rank gets much more to do; then it gets multiples of 16."""
    module = quantised(RandomModel(inner=inner), tp, per_block(BLOCK, BLOCK))
    up, down = named(module, "gate_up_1"), named(module, "down_proj")
    assert up.cut is not None
    assert down.cut == up.cut.at(1)
    assert up.cut.local_size == rows
    assert (up.block[0], down.block[1]) == (block, block)


def test_codes_and_scales_are_reported_with_a_reason() -> None:
    model = RandomModel(layers=1, inner=9 * BLOCK, codes=True)
    report = report_shards(quantised(model, 8, per_block(BLOCK, BLOCK)))
    why = {tensor.name.removeprefix("model.layers.0."): tensor.why for tensor in report.tensors}
    assert why["gate_up_0.weight"].startswith("rows, because")
    assert why["gate_up_0.weight_scale"] == (
        "scales of the weight's rows: in blocks of 16, as ranks begin inside its 32"
    )
    assert why["down_proj.weight_scale"].startswith("scales of the weight's columns: in blocks")
    assert why["o_proj.weight_scale"] == why["scale_1.weight"] == "one number, for every rank"


def test_comparisons_are_reported() -> None:
    report = report_shards(quantised(RandomModel(layers=1), 4, PER_CHANNEL, DYNAMIC_TOKEN))
    kinds = Counter(exchange.kind for exchange in report.exchanges)
    assert set(kinds) == {"all_reduce", "all_reduce max"}


def test_the_largest_of_a_token_is_found_on_all_ranks() -> None:
    """Before `o_proj` and `down_proj`, which take their inputs in parts. What several layers take
    whole is measured by each rank alone."""
    module = quantised(RandomModel(layers=1), 4, PER_CHANNEL, DYNAMIC_TOKEN)
    assert exchanges(module) == {"all_reduce": 3, "max": 2}
    largest = [op for op in module.walk() if isinstance(op, dist.AllReduceOp) and not op.is_sum]
    assert all(shape_of(op.x)[-1] == 1 and dtype_of(op.x) == f32 for op in largest)


@pytest.mark.parametrize(("group", "gathered"), [(4, 0), (8, 2)])
def test_groups_of_inputs_stay_on_their_ranks(group: int, gathered: int) -> None:
    """If heads allow it. Where a rank has one head of 4 elements, groups of 8 are gathered; so is
    the result of `o_proj`, which then has its input whole."""
    model = RandomModel(layers=1, kv_heads=2, group=2, width=16, inner=40)
    inputs = ActivationScheme("dynamic", "group", group)
    module = quantised(model, 4, PER_CHANNEL, inputs)
    found = exchanges(module)
    assert (found["max"], found["all_gather"]) == (0, gathered)
    down = named(module, "down_proj")
    assert down.cut is not None
    assert down.cut.length.data % group == 0


def test_no_padded_head_is_measured() -> None:
    """3 query heads for each of 3 KV heads: on 8 ranks some have two and a padded one, whose
    attention is no zero. Tokens are measured, so whole KV slots are padded instead."""
    model = RandomModel(layers=1, kv_heads=3, group=3)
    plain, measured = (
        named(quantised(model, 8, PER_CHANNEL, inputs), "o_proj").cut
        for inputs in (NO_ACTIVATION, DYNAMIC_TOKEN)
    )
    assert str(plain) == (
        "#dist.cut<1, 8, [[0:8], [8:12], [12:20], [20:24], [24:32], [32:36], [-], [-]]>"
    )
    assert measured is not None
    assert all(
        (stop - start) % measured.length.data == 0
        for rank in range(8)
        for _, (start, stop) in measured.pieces(rank)
    )
