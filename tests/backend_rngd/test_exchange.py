"""Sums over ranks, as all ranks' simulated devices compute them and as the clock sees them."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from exchange_program import exchange_program, random_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from furiosa_llm.backend_rngd.isa.container import read_program, write_program
from furiosa_llm.backend_rngd.isa.dtypes import DType
from furiosa_llm.backend_rngd.isa.instructions import Dma
from furiosa_llm.backend_rngd.isa.ordering import check_order
from furiosa_llm.backend_rngd.kernels.exchange import AllReduce, peers
from furiosa_llm.backend_rngd.kernels.largest import Comparison
from furiosa_llm.backend_rngd.token_groups import GROUPS
from furiosa_llm.ir import quant_semantics
from furiosa_llm.runtime_sim.device import Device

BF16_ROUNDING = 2.0**-8
"""Half of the distance between neighbouring bf16 numbers, relative to them."""
F32_ROUNDING = 2.0**-24

RANKS = st.sampled_from([2, 4, 8])


@st.composite
def cases(draw: st.DrawFn) -> tuple[int, int, int, AllReduce, int]:
    """(ranks, tokens, features, how, groups of slices that have a part of the tokens each)."""
    ranks = draw(RANKS)
    algorithm = draw(st.sampled_from(["rotate", "scatter_gather", "switch"]))
    masks = {
        "rotate": [ranks - 1, *([4] if ranks == 8 else [])],
        "scatter_gather": [ranks - 1],
        "switch": [mask for mask in (1, 3) if mask < ranks],
    }[algorithm]
    tokens = draw(st.integers(1, 9))
    if algorithm == "scatter_gather":
        tokens *= ranks
    dtype = draw(st.sampled_from([DType.BF16, DType.F32]))
    reduce = AllReduce(algorithm, draw(st.sampled_from(masks)), dtype, draw(st.booleans()))
    groups = draw(st.sampled_from([1, GROUPS]))
    # All slices hold features where groups of them divide the tokens.
    features = draw(st.integers(1, 700)) if groups == 1 else 1024 * draw(st.integers(1, 2))
    return ranks, groups * tokens, features, reduce, groups


@settings(max_examples=25)
@given(cases(), st.integers(0, 2**32 - 1))
def test_every_rank_gets_the_sum_of_its_group(
    case: tuple[int, int, int, AllReduce, int], seed: int
) -> None:
    ranks, tokens, features, reduce, groups = case
    rng = np.random.default_rng(seed)
    x, residual = random_rows(rng, ranks * tokens, features), random_rows(rng, tokens, features)
    made = exchange_program(ranks, tokens, features, reduce, groups=groups)
    program = read_program(write_program(made))
    device = Device()
    device.load(program, {"x": x, "residual": residual}.__getitem__)
    found = device.execute(program, {})["y"].astype(np.float64).reshape(ranks, tokens, features)

    parts = x.astype(np.float64).reshape(ranks, tokens, features)
    for rank in range(ranks):
        summands = [parts[rank ^ peer] for peer in (0, *peers(reduce.mask))]
        if reduce.residual:
            summands.append(residual.astype(np.float64))
        exact, size = sum(summands), sum(map(np.abs, summands))
        accumulated = len(summands) * F32_ROUNDING * size
        bound = accumulated + BF16_ROUNDING * (np.abs(exact) + accumulated)
        assert np.all(np.abs(found[rank] - exact) <= bound)


@st.composite
def comparisons(draw: st.DrawFn) -> tuple[int, Comparison, int]:
    """(ranks, how, groups of slices that have a part of the tokens each)."""
    ranks = draw(RANKS)
    algorithm = draw(st.sampled_from(["rotate", "switch"]))
    masks = [1, 3] if algorithm == "switch" else [1, 2, 4, 3, 6, 7]
    mask = draw(st.sampled_from([mask for mask in masks if mask < ranks]))
    return ranks, Comparison(algorithm, mask), draw(st.sampled_from([1, GROUPS]))


@settings(max_examples=15)
@given(comparisons(), st.integers(1, 9), st.integers(1, 700), st.integers(0, 2**32 - 1))
def test_every_rank_gets_the_largest_of_its_group(
    case: tuple[int, Comparison, int], tokens: int, features: int, seed: int
) -> None:
    """Bit for bit the codes of the whole token, of which ranks have magnitudes far apart."""
    ranks, comparison, groups = case
    if groups > 1:
        tokens, features = groups * tokens, 1024
    rng = np.random.default_rng(seed)
    x = random_rows(rng, ranks * tokens, features).astype(np.float32)
    x = (x * np.exp2(rng.integers(-9, 9, (ranks * tokens, 1)))).astype(ml_dtypes.bfloat16)
    program = exchange_program(ranks, tokens, features, comparison, groups=groups)
    device = Device()
    device.load(program, {"x": x, "residual": x[:tokens]}.__getitem__)
    found = device.execute(program, {})["y"].astype(np.float32).reshape(ranks, tokens, features)

    parts = torch.from_numpy(x.astype(np.float32).reshape(ranks, tokens, features))
    for rank in range(ranks):
        members = parts[[rank ^ peer for peer in (0, *peers(comparison.mask))]]
        scale = quant_semantics.dynamic_scale(members, features).amax(dim=0)
        codes = quant_semantics.quantize(parts[rank], scale)
        assert np.array_equal(found[rank], codes.float().numpy())


@pytest.mark.parametrize("level", [0, 1, 2])
def test_exchanges_are_ordered_at_every_level(level: int) -> None:
    for comparison in (Comparison("rotate", 7), Comparison("switch", 3)):
        check_order(exchange_program(8, 16, 576, comparison, level))
    reduce = AllReduce("scatter_gather", 7, DType.F32, residual=True)
    check_order(exchange_program(8, 16, 576, reduce, level))
    check_order(exchange_program(8, 32, 1024, reduce, level, groups=GROUPS))


def test_each_rank_sends_each_other_one_message() -> None:
    program = exchange_program(8, 1, 4096, AllReduce("rotate", 7, DType.F32))
    pushes = [c.destination.peer for c in program.commands if isinstance(c, Dma)]
    assert sorted(peer for peer in pushes if peer) == [1, 2, 3, 4, 5, 6, 7]


def test_sums_spread_by_doubling() -> None:
    program = exchange_program(8, 8, 4096, AllReduce("scatter_gather", 7, DType.F32))
    pushes = [c for c in program.commands if isinstance(c, Dma) if c.destination.peer]
    assert [push.destination.peer for push in pushes[-3:]] == [1, 2, 4]
    runs = [push.run for push in pushes[-3:]]
    assert runs == [runs[0], 2 * runs[0], 4 * runs[0]]
    assert len(pushes) == 7 + 3
