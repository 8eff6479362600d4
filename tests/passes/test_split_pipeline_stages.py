"""Blocks divided into stages: the same bits, and each stage has what it uses."""

from __future__ import annotations

import pytest
from random_models import RandomModel, lowered
from xdsl.dialects.builtin import ModuleOp
from xdsl.dialects.func import CallOp

from furiosa_llm.errors import FuriosaLLMError
from furiosa_llm.ir import dist
from furiosa_llm.ir.text import parse_module, print_module
from furiosa_llm.ir.verification import callee_name, functions
from furiosa_llm.passes.contract_check import check_contract
from furiosa_llm.passes.pipeline import run_passes
from furiosa_llm.passes.pipeline_text import parse_passes
from furiosa_llm.passes.shard_tensor_parallel import ShardTensorParallelPass
from furiosa_llm.passes.split_pipeline_stages import SplitPipelineStagesPass

FIVE = RandomModel(layers=5, width=3, inner=2, vocabulary=4)


def stages(module: ModuleOp) -> list[list[str]]:
    """What each stage calls, sends and receives."""
    forward = functions(module)["forward"]
    return [
        [
            callee_name(op) if isinstance(op, CallOp) else op.name.removeprefix("dist.")
            for op in stage
            if isinstance(op, CallOp | dist.SendOp | dist.RecvOp)
        ]
        for stage in dist.stages_of(forward)
    ]


@pytest.mark.parametrize("tp", [1, 2])
def test_stages_compute_the_same_bits(tp: int) -> None:
    module = lowered(FIVE)
    run_passes(module, [ShardTensorParallelPass(tp)])
    for one in (SplitPipelineStagesPass(stages=3), SplitPipelineStagesPass(blocks=(1, 1, 3))):
        after = check_contract(one, module)
        assert dist.mesh_of(after) == dist.MeshAttr(tp, 3)
        text = print_module(after)
        one.apply(None, after)  # type: ignore[arg-type]
        assert print_module(after) == text
        reread = parse_module(print_module(module))
        run_passes(reread, [one])
        assert print_module(reread) == text


def test_blocks_are_as_even_as_can_be() -> None:
    module = lowered(FIVE)
    run_passes(module, [SplitPipelineStagesPass(stages=3)])
    assert stages(module) == [
        ["prologue", "block_0", "block_0", "send"],
        ["recv", "block_0", "block_0", "send"],
        ["recv", "block_0", "epilogue"],
    ]


def test_stages_may_be_cut_before_ranks_share_tensors() -> None:
    module = lowered(FIVE)
    run_passes(module, [SplitPipelineStagesPass(stages=2), ShardTensorParallelPass(4)])
    assert dist.mesh_of(module) == dist.MeshAttr(4, 2)
    assert stages(module)[1][0] == "recv"


def test_a_value_that_a_later_stage_uses_passes_through_those_between() -> None:
    blocks = "\n".join(
        f"  %{n + 1} = func.call @block(%{n}, %a) : (tensor<1x1x2x4xf32>, tensor<1x1x2x4xf32>)"
        " -> tensor<1x1x2x4xf32>"
        for n in range(3)
    )
    text = f"""
    func.func @forward(%0: tensor<1x1x2x4xf32>) -> tensor<1x1x2x4xf32> {{
      %a = nn.neg %0 : tensor<1x1x2x4xf32>
      {blocks}
      func.return %a : tensor<1x1x2x4xf32>
    }}
    func.func private @block(%x: tensor<1x1x2x4xf32>, %a: tensor<1x1x2x4xf32>) -> tensor<1x1x2x4xf32> {{
      %y = nn.attention %x, %a, %x scale 1.0 causal : tensor<1x1x2x4xf32>, tensor<1x1x2x4xf32>, tensor<1x1x2x4xf32> -> tensor<1x2x1x4xf32>
      %z = nn.transpose %y dims 1, 2 : tensor<1x2x1x4xf32> -> tensor<1x1x2x4xf32>
      func.return %z : tensor<1x1x2x4xf32>
    }}"""  # noqa: E501
    module = parse_module(text)
    run_passes(module, [SplitPipelineStagesPass(stages=3)])
    assert stages(module) == [
        ["block", "send", "send"],
        ["recv", "recv", "block", "send", "send"],
        ["recv", "recv", "block"],
    ]


@pytest.mark.parametrize(
    ("options", "code", "shown"),
    [
        ("stages=6", "PAR010", "`5` or less"),
        ("blocks=2,2", "PAR011", "`2,3` or `3,2`"),
        ("stages=3 blocks=2,3", "PAR012", "to `2`"),
        ("stages=0", "PAR014", "pipeline"),
    ],
)
def test_impossible_stages_are_refused(options: str, code: str, shown: str) -> None:
    with pytest.raises(FuriosaLLMError) as caught:
        run_passes(lowered(FIVE), parse_passes(f"split-pipeline-stages{{{options}}}"))
    assert caught.value.code == code
    assert shown in str(caught.value)


def test_a_module_is_divided_once() -> None:
    module = lowered(FIVE)
    run_passes(module, [SplitPipelineStagesPass(stages=2)])
    with pytest.raises(FuriosaLLMError, match="SHD008") as caught:
        run_passes(module, [SplitPipelineStagesPass(stages=3)])
    assert "3,2" in caught.value.next_step


def test_without_blocks_there_is_nothing_to_divide() -> None:
    with pytest.raises(FuriosaLLMError, match="SHD007"):
        run_passes(FIVE.module(), [SplitPipelineStagesPass(stages=2)])
