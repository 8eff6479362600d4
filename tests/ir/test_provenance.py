"""Provenance: stored in locations, kept through rewrites, readable in messages."""

from __future__ import annotations

from xdsl.dialects.builtin import UNKNOWN_LOC, ModuleOp
from xdsl.pattern_rewriter import (
    PatternRewriter,
    PatternRewriteWalker,
    RewritePattern,
    op_type_rewrite_pattern,
)

from furiosa_llm.ir import nn, provenance
from furiosa_llm.ir.text import parse_module

SILU = """
func.func @block_0(%x: tensor<2x4xbf16>) -> tensor<2x4xbf16> {
  %y = nn.silu %x : tensor<2x4xbf16> loc("mlp.act_fn"("silu_3"))
  func.return %y : tensor<2x4xbf16>
}
"""


def find_silu(module: ModuleOp) -> nn.SiluOp:
    return next(op for op in module.walk() if isinstance(op, nn.SiluOp))


def test_make_and_read_are_inverse() -> None:
    for module, node in [("model.layers.0.mlp", "linear_3"), ("lm_head", None), ("", "add")]:
        location = provenance.make(module, node)
        assert provenance.read(location) == provenance.Provenance(module, node)
    assert provenance.read(UNKNOWN_LOC) is None


def test_provenance_survives_the_text() -> None:
    silu = find_silu(parse_module(SILU))
    assert provenance.read(silu.location) == provenance.Provenance("mlp.act_fn", "silu_3")
    assert provenance.module_path(silu) == "mlp.act_fn"


def test_strip_prefix_and_join_are_inverse_inside_the_module() -> None:
    location = provenance.make("model.layers.3.mlp.up_proj", "linear_9")
    relative = provenance.strip_prefix(location, "model.layers.3")

    assert relative == provenance.make("mlp.up_proj", "linear_9")
    assert provenance.join("model.layers.3", "mlp.up_proj") == "model.layers.3.mlp.up_proj"
    assert provenance.join("", "lm_head") == "lm_head"
    assert provenance.join("model.layers.3", "") == "model.layers.3"


def test_strip_prefix_cuts_whole_module_names_only() -> None:
    location = provenance.make("model.layers.30.mlp")
    assert provenance.strip_prefix(location, "model.layers.3") == location
    assert provenance.strip_prefix(UNKNOWN_LOC, "model") == UNKNOWN_LOC
    whole = provenance.strip_prefix(provenance.make("model.layers.3", "add"), "model.layers.3")
    assert whole == provenance.make("", "add")


class SplitSilu(RewritePattern):
    @op_type_rewrite_pattern
    def match_and_rewrite(self, op: nn.SiluOp, rewriter: PatternRewriter) -> None:
        sigmoid = nn.SigmoidOp(op.x)
        rewriter.insert(sigmoid)
        rewriter.replace(op, nn.MulOp(op.x, sigmoid.y))


def test_a_carrier_gives_every_new_op_the_location_of_the_replaced_one() -> None:
    module = parse_module(SILU)
    expected = find_silu(module).location

    listener = provenance.LocationCarrier().listener()
    PatternRewriteWalker(SplitSilu(), listener=listener).rewrite_module(module)

    new = [op for op in module.walk() if isinstance(op, nn.SigmoidOp | nn.MulOp)]
    assert [op.location for op in new] == [expected, expected]


def test_carry_keeps_a_location_that_is_already_there() -> None:
    silu = find_silu(parse_module(SILU))
    named = provenance.located(nn.NegOp(silu.x), provenance.make("other"))
    fresh = nn.NegOp(silu.x)
    provenance.carry(silu, [named, fresh])
    assert provenance.module_path(named) == "other"
    assert fresh.location == silu.location


def test_describe_says_op_function_and_module() -> None:
    module = parse_module(SILU)
    assert provenance.describe(find_silu(module)) == "nn.silu in @block_0, mlp.act_fn (silu_3)"
    assert provenance.describe(module) == "builtin.module"
    function = next(iter(module.ops))
    assert provenance.describe(function) == "func.func @block_0"
