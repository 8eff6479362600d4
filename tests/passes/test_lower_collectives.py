"""Exchanges are the cheapest of those that give the sum, by the machine's formulas."""

from __future__ import annotations

from itertools import pairwise

import pytest
from xdsl.dialects.builtin import ModuleOp

from furiosa_llm.backend_rngd.isa.cost_exchange import all_reduce_cycles
from furiosa_llm.backend_rngd.isa.dtypes import DType
from furiosa_llm.backend_rngd.isa.machine import load_machine
from furiosa_llm.errors import FuriosaLLMError
from furiosa_llm.ir import dist
from furiosa_llm.ir.text import parse_module
from furiosa_llm.passes.exchange_cost import collective_cycles, sum_cycles, sum_stages
from furiosa_llm.passes.lower_collectives import LowerCollectivesPass
from furiosa_llm.passes.pipeline import run_passes

SILICON, BOOK = load_machine("silicon"), load_machine("book")
ALL_REDUCE_US = {2: 5.65, 4: 23.99, 8: 115.08}
"""Of a layer: two sums of 8 KB of bf16 (heteropilot's measurements)."""


def lowered(tp: int, tokens: int, machine: str = "silicon") -> list[dist.AllReduceOp]:
    type = f"tensor<{tokens}x4096xf32>"
    text = f"""builtin.module attributes {{"dist.mesh" = #dist.mesh<{tp}, 1>}} {{
    func.func @forward(%x: {type}) -> {type} {{
      %y = dist.all_reduce %x mask {tp - 1} : {type} -> {type}
      func.return %y : {type}
    }}
    }}"""
    module = parse_module(text)
    run_passes(module, [LowerCollectivesPass(machine)])
    return sums(module)


def sums(module: ModuleOp) -> list[dist.AllReduceOp]:
    return [op for op in module.walk() if isinstance(op, dist.AllReduceOp)]


def shown(ops: list[dist.AllReduceOp]) -> list[str]:
    return [f"{op.mask.value.data} {op.algorithm and op.algorithm.data}" for op in ops]


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_rotation_takes_what_was_measured(ranks: int) -> None:
    layer = 2 * all_reduce_cycles(SILICON, ranks, 8192, "rotate", dtype=DType.BF16)
    assert SILICON.microseconds(layer) == pytest.approx(ALL_REDUCE_US[ranks], rel=0.2)


@pytest.mark.parametrize(
    ("tp", "tokens", "expected"),
    [
        (2, 1, ["1 switch"]),
        (4, 1, ["3 switch"]),
        (8, 1, ["3 switch", "4 rotate"]),
        (2, 128, ["1 rotate"]),
        (4, 256, ["3 scatter_gather"]),
        (4, 129, ["1 rotate", "2 rotate"]),
        (8, 255, ["1 rotate", "2 rotate", "4 rotate"]),
    ],
)
def test_small_sums_take_the_switch_and_large_ones_the_dma(
    tp: int, tokens: int, expected: list[str]
) -> None:
    """The ring of fused PEs passes one packet a cycle, and sends no messages."""
    assert shown(lowered(tp, tokens)) == expected


@pytest.mark.parametrize("tokens", [1, 3, 64])
@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("machine", [SILICON, BOOK], ids=["silicon", "book"])
def test_no_other_way_costs_less(machine: object, ranks: int, tokens: int) -> None:
    chosen = SILICON if machine is SILICON else BOOK
    ops = lowered(ranks, tokens, "silicon" if machine is SILICON else "book")
    total = sum(collective_cycles(op, ranks, chosen) for op in ops)
    size = tokens * 4096 * 4
    fits = size // 64 * ranks <= chosen.dm.bytes_per_slice // 2
    names = ["rotate"] * fits + [
        *["scatter_gather"] * (tokens % ranks == 0),
        *["switch"] * (ranks < 8),
    ]
    assert total <= min(all_reduce_cycles(chosen, ranks, size, name) for name in names)
    stages = sum_stages(ops[0].x, ranks - 1, ranks, chosen)
    assert total == sum_cycles(ops[0].x, stages, ranks, chosen)


@pytest.mark.parametrize("algorithm", ["rotate", "scatter_gather", "switch"])
def test_more_bytes_and_more_ranks_take_longer(algorithm: str) -> None:
    sizes = [4096 * factor for factor in (1, 2, 8, 64)]
    for ranks in (2, 4):
        cycles = [all_reduce_cycles(SILICON, ranks, size, algorithm) for size in sizes]
        assert all(less <= more for less, more in pairwise(cycles))
    two, four = (all_reduce_cycles(SILICON, ranks, 4096, algorithm) for ranks in (2, 4))
    assert two < four


def test_an_unknown_machine_is_refused() -> None:
    with pytest.raises(FuriosaLLMError) as caught:
        lowered(2, 1, "gold")
    assert "gold" in str(caught.value)
