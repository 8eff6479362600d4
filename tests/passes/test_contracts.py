"""Every pass keeps its contract on random programs, changes nothing the second time, and gives
the same text whether its input came from memory or from a file."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from nn_programs import EVERYTHING, HEAD_SIZE, LLAMA, LayerKind, Program, programs
from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp

from furiosa_llm.errors import CompileError
from furiosa_llm.ir import paged
from furiosa_llm.ir.digest import digest
from furiosa_llm.ir.text import make_context, parse_module, print_module
from furiosa_llm.ir.types import f32
from furiosa_llm.models.config_types import Bucket
from furiosa_llm.passes.contract import Bitwise, Budget, ContractPass, Ulps
from furiosa_llm.passes.contract_check import check_contract, difference
from furiosa_llm.passes.paged_attention import PagedAttentionPass
from furiosa_llm.passes.pipeline import bucket_phase, import_phase, model_phase, run_passes
from furiosa_llm.passes.pipeline_text import parse_passes
from furiosa_llm.passes.registry import PASSES

IMPORT = [one.name for one in import_phase()]
PAGED = [*IMPORT, "paged-attention"]
MODEL = [*PAGED, "prune-logits"]
BUCKET = [*MODEL, "specialize-bucket{kind=decode batch=2 length=5}"]
SHARD = [*BUCKET, "shard-tensor-parallel{tp=4}"]

BEFORE: dict[str, list[str]] = {
    **{name: IMPORT[:index] for index, name in enumerate(IMPORT)},
    "paged-attention": IMPORT,
    "prune-logits": PAGED,
    "specialize-bucket": MODEL,
    "shard-tensor-parallel": BUCKET,
    "split-pipeline-stages": SHARD,
    "lower-collectives": SHARD,
}
"""Pass -> the passes that run before it in a build."""

OPTIONS: dict[str, list[dict[str, object]]] = {
    "prune-logits": [{"rows": 0}, {"rows": 1}, {"rows": "all"}],
    "specialize-bucket": [
        {"kind": "decode", "batch": 2, "length": 5},
        {"kind": "prefill", "batch": 3, "length": 4},
    ],
    "shard-tensor-parallel": [{"tp": 2}, {"tp": 8, "partial_sum": "bf16"}],
    "split-pipeline-stages": [{"stages": 1}],  # test_split_pipeline_stages.py has more
}


STRAIGHT: dict[str, list[str]] = {
    **{name: [] for name in [*IMPORT, "paged-attention"]},
    "split-pipeline-stages": ["outline-blocks"],
    "lower-collectives": ["paged-attention", *SHARD[-2:]],
}
"""Pass -> what its precondition asks for, if not caches alone."""


def content(module: ModuleOp) -> str:
    return digest(module, locations=True)


def apply(one: ContractPass, module: ModuleOp) -> ModuleOp:
    one.apply(make_context(), module)
    return module


def make_pass(name: str, options: dict[str, object]) -> ContractPass:
    one = PASSES[name]()(**options)
    assert isinstance(one, ContractPass)
    return one


@pytest.mark.parametrize("name", BEFORE)
@settings(max_examples=5)
@example(program=EVERYTHING, seed=0, straight=False)
@given(program=programs(codes=True), seed=st.integers(0, 99), straight=st.booleans())
def test_pass_keeps_its_contract(name: str, program: Program, seed: int, straight: bool) -> None:
    """`straight` runs the pass on what was imported, as far as its precondition allows that."""
    module = program.module()
    before = STRAIGHT.get(name, ["paged-attention"]) if straight else BEFORE[name]
    run_passes(module, parse_passes(",".join(before)))
    original = content(module)
    for options in OPTIONS.get(name, [{}]):
        one = make_pass(name, options)
        after = check_contract(one, module, seed)
        assert content(apply(one, after.clone())) == content(after)
    assert content(module) == original


@pytest.mark.parametrize("name", BEFORE)
def test_pass_gives_the_same_text_from_memory_and_from_a_file(name: str) -> None:
    module = EVERYTHING.module()
    run_passes(module, parse_passes(",".join(BEFORE[name])))
    reread = parse_module(print_module(module))
    one = make_pass(name, OPTIONS.get(name, [{}])[0])
    assert print_module(apply(one, reread)) == print_module(apply(one, module))


def test_every_pass_is_checked() -> None:
    assert BEFORE.keys() == PASSES.keys()


class WrongPass(ContractPass):
    """Doubles what it should leave alone."""

    name = "wrong"
    contract = PASSES["cse"]().contract  # type: ignore[attr-defined]

    def apply(self, ctx: object, op: ModuleOp) -> None:
        from furiosa_llm.ir import nn
        from furiosa_llm.passes.rewriting import forward_function, return_op

        returned = return_op(forward_function(op, self.name))
        twice = nn.ScaleOp(returned.operands[0], factor=2.0)
        returned.parent.insert_op_before(twice, returned)  # type: ignore[union-attr]
        returned.operands = [twice.y]


def test_a_broken_contract_is_an_error() -> None:
    with pytest.raises(CompileError) as caught:
        check_contract(WrongPass(), LLAMA.module())
    assert caught.value.code == "PAS012"
    assert "wrong" in str(caught.value)
    assert "the largest difference" in str(caught.value)


class ExchangedScales(PagedAttentionPass):
    """Gives attention the scale of values for keys."""

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        super().apply(ctx, op)
        for attention in op.walk():
            if isinstance(attention, paged.AttentionOp) and attention.k_scale is not None:
                *others, k_scale, v_scale = attention.operands
                attention.operands = [*others, v_scale, k_scale]


def test_the_scale_of_another_cache_breaks_the_contract() -> None:
    kind = LayerKind((), HEAD_SIZE, None, codes=True)
    module = Program(f32, (kind, kind), ()).module()
    check_contract(PagedAttentionPass(), module)
    with pytest.raises(CompileError) as caught:
        check_contract(ExchangedScales(), module)
    assert caught.value.code == "PAS012"


def test_tolerances() -> None:
    one = torch.tensor([1.0, -0.0, torch.nan], dtype=torch.bfloat16)
    near = torch.tensor([1.0 + 2**-7, -0.0, torch.nan], dtype=torch.bfloat16)
    assert difference(one, one.clone(), Bitwise()) is None
    assert difference(one, one.abs(), Bitwise()) is not None  # the sign of zero
    assert difference(one, near, Bitwise()) is not None
    assert difference(one, near, Ulps(1)) is None
    assert difference(one, near, Ulps(0)) is not None
    assert difference(one, near, Budget("", relative=2**-7, relative_float32=0.0)) is None
    assert difference(one, near, Budget("", 2**-7, 0.0), "unrounded") is not None
    assert difference(one, one.nan_to_num(), Bitwise()) == "NaN in other places"
    assert difference(one, one.float(), Ulps(9)) is not None


def test_whole_pipeline_on_one_bucket_of_each_kind() -> None:
    for bucket in (Bucket.prefill(1, 4), Bucket.decode(2, 6)):
        module = LLAMA.module()
        run_passes(module, [*import_phase(), *model_phase(), *bucket_phase(bucket)])
        assert '"seq"' not in print_module(module)


def test_fusing_leaves_no_chain_behind() -> None:
    """Also where canonicalisation came between: slices of slices in partial RoPE."""
    module = EVERYTHING.module()
    run_passes(module, import_phase())
    names = [op.name for op in module.walk()]
    assert not {"nn.rsqrt", "nn.mean", "nn.cos", "nn.sin"}.intersection(names)
    assert names.count("nn.rope") == 4  # q and k of the two distinct blocks that have it
