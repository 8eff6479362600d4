"""All ranks of a mesh, run in step: what each op of `dist` gives on each rank."""

from __future__ import annotations

import torch
from torch import Tensor
from xdsl.dialects.builtin import ModuleOp

from furiosa_llm.ir.dist_interpreter import run_ranks
from furiosa_llm.ir.text import parse_module
from furiosa_llm.ir.verification import verify_module


def module_of(text: str, mesh: str = "4, 1") -> ModuleOp:
    head = f'builtin.module attributes {{"dist.mesh" = #dist.mesh<{mesh}>}} {{\n'
    module = parse_module(head + text + "\n}")
    verify_module(module)
    return module


def run(
    text: str, *inputs: tuple[Tensor, ...], mesh: str = "4, 1", **parameters: Tensor
) -> list[tuple[Tensor, ...]]:
    return run_ranks(module_of(text, mesh), "forward", inputs, lambda name: parameters[name])


def per_rank(*rows: list[float]) -> tuple[Tensor, ...]:
    return tuple(torch.tensor(row, dtype=torch.float32) for row in rows)


def values(ranks: tuple[Tensor, ...]) -> list[object]:
    return [rank.tolist() for rank in ranks]


def one_op(op: str, x: str, y: str) -> str:
    return f"""
    func.func @forward(%x: {x}) -> {y} {{
      %y = {op} : {x} -> {y}
      func.return %y : {y}
    }}"""


def test_all_reduce_sums_the_ranks_of_the_mask() -> None:
    x = per_rank([1.0], [2.0], [4.0], [8.0])
    f32 = "tensor<1xf32>"
    for mask, sums in ((3, [15, 15, 15, 15]), (1, [3, 3, 12, 12]), (2, [5, 10, 5, 10])):
        (y,) = run(one_op(f"dist.all_reduce %x mask {mask}", f32, f32), x)
        assert values(y) == [[one] for one in sums]


def test_the_largest_of_the_ranks_of_the_mask() -> None:
    x = per_rank([1.0, -3.0], [2.0, -1.0], [0.5, -2.0], [0.0, -4.0])
    f32 = "tensor<2xf32>"
    (y,) = run(one_op('dist.all_reduce %x mask 3 kind "max"', f32, f32), x)
    assert values(y) == [[2.0, -1.0]] * 4
    (y,) = run(one_op('dist.all_reduce %x mask 1 kind "max"', f32, f32), x)
    assert values(y) == [[2.0, -1.0]] * 2 + [[0.5, -2.0]] * 2


def test_sums_are_rounded_once() -> None:
    """256 + 1 + 1 is 258 in bf16, but 256 if rounded in between."""
    x = tuple(torch.tensor([v], dtype=torch.bfloat16) for v in (256.0, 1.0, 1.0, 0.0))
    (y,) = run(one_op("dist.all_reduce %x mask 3", "tensor<1xbf16>", "tensor<1xbf16>"), x)
    assert values(y) == [[258.0]] * 4
    assert y[0].dtype == torch.bfloat16


def test_partial_products_are_not_rounded() -> None:
    text = """
    func.func @forward(%x: tensor<1x2xbf16>, %w: tensor<1x2xbf16>) -> tensor<1x1xf32> {
      %y = nn.linear %x, %w : tensor<1x2xbf16>, tensor<1x2xbf16> -> tensor<1x1xf32>
      func.return %y : tensor<1x1xf32>
    }"""
    x, w = (torch.tensor([row], dtype=torch.bfloat16) for row in ([256.0, 1.0], [1.0, 1.0]))
    (y,) = run(text, (x, x), (w, w), mesh="2, 1")
    assert values(y) == [[[257.0]]] * 2


CUT = "<0, 2, [[0:2], [2:3], [3:5], [-]]>"


def test_gather_drops_padding_and_shard_fills_with_zeros() -> None:
    parts = per_rank([1, 2], [3, 99], [4, 5], [99, 99])
    whole = [1.0, 2.0, 3.0, 4.0, 5.0]
    gather = one_op(f"dist.all_gather %x cut {CUT}", "tensor<2xf32>", "tensor<5xf32>")
    (y,) = run(gather, parts)
    assert values(y) == [whole] * 4
    shard = one_op(f"dist.shard %x cut {CUT}", "tensor<5xf32>", "tensor<2xf32>")
    (y,) = run(shard, y)
    assert values(y) == [[1, 2], [3, 0], [4, 5], [0, 0]]
    scatter = one_op(f"dist.reduce_scatter %x cut {CUT}", "tensor<5xf32>", "tensor<2xf32>")
    (y,) = run(scatter, per_rank(whole, [10.0] * 5, [100.0] * 5, [1000.0] * 5))
    assert values(y) == [[1111, 1112], [1113, 0], [1114, 1115], [0, 0]]


def test_a_table_cut_by_rows_gives_each_row_once() -> None:
    text = """
    nn.parameter @table : tensor<5x1xf32>
    func.func @forward(%ids: tensor<7xi32>) -> tensor<7x1xf32> {
      %t = dist.get_shard @table cut <0, 3, [[0:2], [2:3], [3:5], [-]]> : tensor<3x1xf32>
      %r = dist.local_rows %ids cut <0, 3, [[0:2], [2:3], [3:5], [-]]> : tensor<7xi32> -> tensor<7xi32>
      %p = nn.embedding %r, %t : tensor<7xi32>, tensor<3x1xf32> -> tensor<7x1xf32>
      %y = dist.all_reduce %p mask 3 : tensor<7x1xf32> -> tensor<7x1xf32>
      func.return %y : tensor<7x1xf32>
    }"""  # noqa: E501
    ids = torch.tensor([4, 0, 3, 1, 2, 2, 4], dtype=torch.int32)
    table = torch.tensor([[10.0], [11.0], [12.0], [13.0], [14.0]])
    (y,) = run(text, (ids,) * 4, table=table)
    assert all(torch.equal(rank, table[ids.long()]) for rank in y)


def test_stages_pass_values_on_in_order() -> None:
    text = """
    func.func @forward(%x: tensor<1xf32>) -> (tensor<1xf32>, tensor<1xf32>) {
      %n = nn.neg %x : tensor<1xf32>
      dist.send %n to 1 : tensor<1xf32>
      dist.send %x to 1 : tensor<1xf32>
      %a = dist.recv from 0 : tensor<1xf32>
      %b = dist.recv from 0 : tensor<1xf32>
      %c = func.call @twice(%a) : (tensor<1xf32>) -> tensor<1xf32>
      dist.send %c to 2 : tensor<1xf32>
      %d = dist.recv from 1 : tensor<1xf32>
      func.return %b, %d : tensor<1xf32>, tensor<1xf32>
    }
    func.func private @twice(%x: tensor<1xf32>) -> tensor<1xf32> {
      %y = nn.add %x, %x : tensor<1xf32>, tensor<1xf32> -> tensor<1xf32>
      func.return %y : tensor<1xf32>
    }"""
    b, d = run(text, per_rank([1.0], [3.0]), mesh="2, 3")
    assert (values(b), values(d)) == ([[1.0], [3.0]], [[-2.0], [-6.0]])


def test_without_a_mesh_there_is_one_rank() -> None:
    text = one_op("nn.cast %x", "tensor<1xf32>", "tensor<1xbf16>")
    (y,) = run_ranks(parse_module(text), "forward", [per_rank([1.0])], lambda _: torch.empty(0))
    assert values(y) == [[1.0]]
