"""Every rule of the `nn` ops rejects what it should; the message names the cause."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
from xdsl.dialects import test as test_dialect
from xdsl.dialects.builtin import DenseIntOrFPElementsAttr, ModuleOp
from xdsl.ir import SSAValue
from xdsl.utils.exceptions import VerifyException

from furiosa_llm import errors
from furiosa_llm.ir import nn
from furiosa_llm.ir.types import Dim, bf16, f32, i32, tensor
from furiosa_llm.ir.verification import verify_module

Snippet = Callable[[str, list[str]], ModuleOp]

B = 'tensor<?xi32, #nn.dims<"batch">>'
BT = 'tensor<?x?xi32, #nn.dims<"batch", "seq">>'
HEADS = 'tensor<?x4x?x16xbf16, #nn.dims<"batch", _, "seq", _>>'
GROUPS = 'tensor<?x2x?x16xbf16, #nn.dims<"batch", _, "seq", _>>'
ATTENDED = 'tensor<?x?x4x16xbf16, #nn.dims<"batch", "seq", _, _>>'

REJECTED = {
    "an unnamed dynamic dim": (
        "nn.silu %0 : tensor<?xf32>",
        ["tensor<?xf32>"],
        "has no name",
    ),
    "unary on integers": ("nn.silu %0 : tensor<2xi32>", ["tensor<2xi32>"], "not one of bf16"),
    "unary changes the type": (
        '%1 = "nn.neg"(%0) : (tensor<2xf32>) -> tensor<3xf32>',
        ["tensor<2xf32>"],
        "tensor<3xf32>",
    ),
    "add of two dtypes": (
        "nn.add %0, %1 : tensor<2xf32>, tensor<2xbf16> -> tensor<2xf32>",
        ["tensor<2xf32>", "tensor<2xbf16>"],
        "a is f32 but b is bf16",
    ),
    "add that does not broadcast": (
        "nn.add %0, %1 : tensor<2xf32>, tensor<3xf32> -> tensor<3xf32>",
        ["tensor<2xf32>", "tensor<3xf32>"],
        "do not broadcast",
    ),
    "mul of two names": (
        'nn.mul %0, %1 : tensor<?xi32, #nn.dims<"batch">>, tensor<?xi32, #nn.dims<"seq">>'
        ' -> tensor<?xi32, #nn.dims<"seq">>',
        [B, 'tensor<?xi32, #nn.dims<"seq">>'],
        "[batch] and [seq] do not broadcast",
    ),
    "sub with a wrong result": (
        "nn.sub %0, %1 : tensor<2x1xf32>, tensor<3xf32> -> tensor<2x1xf32>",
        ["tensor<2x1xf32>", "tensor<3xf32>"],
        "the operands give tensor<2x3xf32>",
    ),
    "div of integers": (
        "nn.div %0, %1 : tensor<2xi32>, tensor<2xi32> -> tensor<2xi32>",
        ["tensor<2xi32>", "tensor<2xi32>"],
        "not one of bf16",
    ),
    "gelu of an unknown kind": (
        'nn.gelu %0 approximate "erf" : tensor<2xf32>',
        ["tensor<2xf32>"],
        'approximate is "none" or "tanh"',
    ),
    "scale by infinity": (
        "nn.scale %0 by inf : tensor<2xf32>",
        ["tensor<2xf32>"],
        "factor is finite",
    ),
    "offset by NaN": (
        "nn.offset %0 by nan : tensor<2xf32>",
        ["tensor<2xf32>"],
        "value is finite",
    ),
    "pow to infinity": (
        "nn.pow %0 to inf : tensor<2xf32>",
        ["tensor<2xf32>"],
        "exponent is finite",
    ),
    "cast that reshapes": (
        "nn.cast %0 : tensor<2xf32> -> tensor<1x2xbf16>",
        ["tensor<2xf32>"],
        "the operands give tensor<2xbf16>",
    ),
    "cast to bool": (
        "nn.cast %0 : tensor<2xf32> -> tensor<2xi1>",
        ["tensor<2xf32>"],
        "not one of bf16, f16, f32, f64, i32",
    ),
    "reshape of the dtype": (
        "nn.reshape %0 : tensor<4xf32> -> tensor<2x2xbf16>",
        ["tensor<4xf32>"],
        "the operands give tensor<2x2xf32>",
    ),
    "reshape to another volume": (
        "nn.reshape %0 : tensor<4xf32> -> tensor<2x3xf32>",
        ["tensor<4xf32>"],
        "do not hold the same number",
    ),
    "reshape that loses a name": (
        f"nn.reshape %0 : {BT} -> {B}",
        [BT],
        "[batch, seq] and [batch] do not hold the same number",
    ),
    "transpose of a dim that is not there": (
        "nn.transpose %0 dims 0, 2 : tensor<2x3xf32> -> tensor<3x2xf32>",
        ["tensor<2x3xf32>"],
        "dim1 = 2 is not a dimension",
    ),
    "transpose of dims in the wrong order": (
        "nn.transpose %0 dims 1, 0 : tensor<2x3xf32> -> tensor<3x2xf32>",
        ["tensor<2x3xf32>"],
        "dim0 comes before dim1",
    ),
    "transpose with a wrong result": (
        "nn.transpose %0 dims 0, 1 : tensor<2x3xf32> -> tensor<2x3xf32>",
        ["tensor<2x3xf32>"],
        "the operands give tensor<3x2xf32>",
    ),
    "slice of a negative dim": (
        "nn.slice %0 dim -1 from 0 to 1 : tensor<2xf32> -> tensor<1xf32>",
        ["tensor<2xf32>"],
        "dim = -1 is not a dimension",
    ),
    "slice beyond the end": (
        "nn.slice %0 dim 0 from 1 to 3 : tensor<2xf32> -> tensor<2xf32>",
        ["tensor<2xf32>"],
        "1 to 3 is not a range inside 0 to 2",
    ),
    "empty slice": (
        "nn.slice %0 dim 0 from 1 to 1 : tensor<2xf32> -> tensor<1xf32>",
        ["tensor<2xf32>"],
        "1 to 1 is not a range",
    ),
    "slice of a dynamic dim": (
        f"nn.slice %0 dim 0 from 0 to 1 : {B} -> tensor<1xi32>",
        [B],
        "batch, is dynamic: it cannot be cut",
    ),
    "slice with a wrong result": (
        "nn.slice %0 dim 0 from 0 to 1 : tensor<2xf32> -> tensor<2xf32>",
        ["tensor<2xf32>"],
        "the operands give tensor<1xf32>",
    ),
    "concat of nothing": ("nn.concat dim 0 :  -> tensor<1xf32>", [], "nothing to join"),
    "concat of two dtypes": (
        "nn.concat %0, %1 dim 0 : tensor<2xf32>, tensor<2xbf16> -> tensor<4xf32>",
        ["tensor<2xf32>", "tensor<2xbf16>"],
        "must have one element type",
    ),
    "concat of a dim that is not there": (
        "nn.concat %0 dim 1 : tensor<2xf32> -> tensor<2xf32>",
        ["tensor<2xf32>"],
        "dim = 1 is not a dimension",
    ),
    "concat of unequal tensors": (
        "nn.concat %0, %1 dim 0 : tensor<1x2xf32>, tensor<1x3xf32> -> tensor<2x2xf32>",
        ["tensor<1x2xf32>", "tensor<1x3xf32>"],
        "differ outside dimension 0",
    ),
    "concat along a dynamic dim": (f"nn.concat %0 dim 0 : {B} -> {B}", [B], "cannot be joined"),
    "concat with a wrong result": (
        "nn.concat %0, %0 dim 0 : tensor<2xf32>, tensor<2xf32> -> tensor<2xf32>",
        ["tensor<2xf32>"],
        "the operands give tensor<4xf32>",
    ),
    "expand that shrinks": (
        "nn.expand %0 : tensor<2x3xf32> -> tensor<1x3xf32>",
        ["tensor<2x3xf32>"],
        "cannot expand [2, 3] to [1, 3]",
    ),
    "expand of the dtype": (
        "nn.expand %0 : tensor<3xf32> -> tensor<2x3xbf16>",
        ["tensor<3xf32>"],
        "the operands give tensor<2x3xf32>",
    ),
    "mean over no dim": (
        "nn.mean %0 dims [] : tensor<2xf32> -> tensor<2xf32>",
        ["tensor<2xf32>"],
        "dims must be ascending",
    ),
    "mean over a dim twice": (
        "nn.mean %0 dims [0, 0] : tensor<2xf32> -> tensor<f32>",
        ["tensor<2xf32>"],
        "dims must be ascending and without repeats",
    ),
    "mean over a dim that is not there": (
        "nn.mean %0 dims [1] : tensor<2xf32> -> tensor<f32>",
        ["tensor<2xf32>"],
        "dims = 1 is not a dimension",
    ),
    "mean that forgets keepdim": (
        "nn.mean %0 dims [1] : tensor<2x3xf32> -> tensor<2x1xf32>",
        ["tensor<2x3xf32>"],
        "the operands give tensor<2xf32>",
    ),
    "mean of integers": (
        "nn.mean %0 dims [0] : tensor<2xi32> -> tensor<i32>",
        ["tensor<2xi32>"],
        "not one of bf16",
    ),
    "matmul of vectors": (
        "nn.matmul %0, %0 : tensor<2xf32>, tensor<2xf32> -> tensor<f32>",
        ["tensor<2xf32>"],
        "at least two dimensions",
    ),
    "matmul of unequal K": (
        "nn.matmul %0, %1 : tensor<2x3xf32>, tensor<4x5xf32> -> tensor<2x5xf32>",
        ["tensor<2x3xf32>", "tensor<4x5xf32>"],
        "a has K = 3 but b has K = 4",
    ),
    "matmul of two dtypes": (
        "nn.matmul %0, %1 : tensor<2x3xf32>, tensor<3x5xbf16> -> tensor<2x5xf32>",
        ["tensor<2x3xf32>", "tensor<3x5xbf16>"],
        "must have one element type",
    ),
    "matmul whose batches do not broadcast": (
        "nn.matmul %0, %1 : tensor<2x2x3xf32>, tensor<4x3x5xf32> -> tensor<4x2x5xf32>",
        ["tensor<2x2x3xf32>", "tensor<4x3x5xf32>"],
        "[2] and [4] do not broadcast",
    ),
    "matmul with a wrong result": (
        "nn.matmul %0, %1 : tensor<2x3xf32>, tensor<3x5xf32> -> tensor<5x2xf32>",
        ["tensor<2x3xf32>", "tensor<3x5xf32>"],
        "the operands give tensor<2x5xf32>",
    ),
    "linear of unequal K": (
        "nn.linear %0, %1 : tensor<2x3xf32>, tensor<5x4xf32> -> tensor<2x5xf32>",
        ["tensor<2x3xf32>", "tensor<5x4xf32>"],
        "x has K = 3 but w has K = 4",
    ),
    "linear of a scalar": (
        "nn.linear %0, %1 : tensor<f32>, tensor<5x4xf32> -> tensor<5xf32>",
        ["tensor<f32>", "tensor<5x4xf32>"],
        "x has at least one dimension",
    ),
    "linear with a weight of rank 3": (
        "nn.linear %0, %1 : tensor<2x3xf32>, tensor<1x5x3xf32> -> tensor<2x5xf32>",
        ["tensor<2x3xf32>", "tensor<1x5x3xf32>"],
        "w must have rank 2",
    ),
    "linear with a wrong bias": (
        "nn.linear %0, %1 bias %2 : tensor<2x3xf32>, tensor<5x3xf32> bias tensor<3xf32>"
        " -> tensor<2x5xf32>",
        ["tensor<2x3xf32>", "tensor<5x3xf32>", "tensor<3xf32>"],
        "bias must be [5], but it is [3]",
    ),
    "linear with a bias of another dtype": (
        "nn.linear %0, %1 bias %2 : tensor<2x3xf32>, tensor<5x3xf32> bias tensor<5xbf16>"
        " -> tensor<2x5xf32>",
        ["tensor<2x3xf32>", "tensor<5x3xf32>", "tensor<5xbf16>"],
        "x f32, w f32, bias bf16",
    ),
    "linear with a wrong result": (
        "nn.linear %0, %1 : tensor<2x3xf32>, tensor<5x3xf32> -> tensor<2x3xf32>",
        ["tensor<2x3xf32>", "tensor<5x3xf32>"],
        "the operands give tensor<2x5xf32>",
    ),
    "embedding of float ids": (
        "nn.embedding %0, %1 : tensor<2xf32>, tensor<5x3xf32> -> tensor<2x3xf32>",
        ["tensor<2xf32>", "tensor<5x3xf32>"],
        "not one of i32",
    ),
    "embedding in a vector": (
        "nn.embedding %0, %1 : tensor<2xi32>, tensor<5xf32> -> tensor<2xf32>",
        ["tensor<2xi32>", "tensor<5xf32>"],
        "table must have rank 2",
    ),
    "embedding with a wrong result": (
        "nn.embedding %0, %1 : tensor<2xi32>, tensor<5x3xf32> -> tensor<2x5xf32>",
        ["tensor<2xi32>", "tensor<5x3xf32>"],
        "the operands give tensor<2x3xf32>",
    ),
    "rms_norm with a wrong weight": (
        "nn.rms_norm %0, %1 eps 1.0e-5 : tensor<2x3xf32>, tensor<2xf32> -> tensor<2x3xf32>",
        ["tensor<2x3xf32>", "tensor<2xf32>"],
        "weight must be [3]",
    ),
    "rms_norm of two dtypes": (
        "nn.rms_norm %0, %1 eps 1.0e-5 : tensor<2x3xbf16>, tensor<3xf32> -> tensor<2x3xbf16>",
        ["tensor<2x3xbf16>", "tensor<3xf32>"],
        "x bf16, weight f32",
    ),
    "rms_norm of a scalar": (
        "nn.rms_norm %0, %0 eps 1.0e-5 : tensor<f32>, tensor<f32> -> tensor<f32>",
        ["tensor<f32>"],
        "x has at least one dimension",
    ),
    "rms_norm with a negative eps": (
        "nn.rms_norm %0, %1 eps -1.0 : tensor<2x3xf32>, tensor<3xf32> -> tensor<2x3xf32>",
        ["tensor<2x3xf32>", "tensor<3xf32>"],
        "eps is finite and not negative",
    ),
    "rms_norm with a wrong result": (
        "nn.rms_norm %0, %1 eps 0.0 : tensor<2x3xf32>, tensor<3xf32> -> tensor<3xf32>",
        ["tensor<2x3xf32>", "tensor<3xf32>"],
        "the operands give tensor<2x3xf32>",
    ),
    "rope of rank 3": (
        "nn.rope %0, %1 scaling 1.0 inv_freq [1.0]"
        " : tensor<1x2x4xf32>, tensor<1x2xi32> -> tensor<1x2x4xf32>",
        ["tensor<1x2x4xf32>", "tensor<1x2xi32>"],
        "x must have rank 4",
    ),
    "rope with positions of another shape": (
        f"nn.rope %0, %1 scaling 1.0 inv_freq [1.0] : {HEADS}, {B} -> {HEADS}",
        [HEADS, B],
        "position_ids must be [batch, seq]",
    ),
    "rope with too many frequencies": (
        "nn.rope %0, %1 scaling 1.0 inv_freq [1.0, 0.5, 0.25]"
        " : tensor<1x1x2x4xf32>, tensor<1x2xi32> -> tensor<1x1x2x4xf32>",
        ["tensor<1x1x2x4xf32>", "tensor<1x2xi32>"],
        "inv_freq has 3 values, more than half of H = 4",
    ),
    "rope without frequencies": (
        f"nn.rope %0, %1 scaling 1.0 inv_freq [] : {HEADS}, {BT} -> {HEADS}",
        [HEADS, BT],
        "inv_freq has at least one value",
    ),
    "rope with an infinite frequency": (
        f"nn.rope %0, %1 scaling 1.0 inv_freq [1.0, inf] : {HEADS}, {BT} -> {HEADS}",
        [HEADS, BT],
        "inv_freq has at least one value, and all are finite",
    ),
    "rope with infinite scaling": (
        f"nn.rope %0, %1 scaling inf inv_freq [1.0] : {HEADS}, {BT} -> {HEADS}",
        [HEADS, BT],
        "attention_scaling is finite",
    ),
    "rope with a wrong result": (
        f"nn.rope %0, %1 scaling 1.0 inv_freq [1.0] : {HEADS}, {BT} -> {GROUPS}",
        [HEADS, BT],
        "the operands give",
    ),
    "attention with k of other tokens": (
        "nn.attention %0, %1, %1 scale 1.0"
        " : tensor<1x4x2x8xf32>, tensor<1x2x3x8xf32>, tensor<1x2x3x8xf32> -> tensor<1x2x4x8xf32>",
        ["tensor<1x4x2x8xf32>", "tensor<1x2x3x8xf32>"],
        "k must be [1, 2, 2, 8]",
    ),
    "attention with v of other groups": (
        f"nn.attention %0, %1, %2 scale 1.0 : {HEADS}, {GROUPS}, {HEADS} -> {ATTENDED}",
        [HEADS, GROUPS, HEADS],
        "v must be [batch, 2, seq, 16]",
    ),
    "attention with Q that G does not divide": (
        "nn.attention %0, %1, %1 scale 1.0"
        " : tensor<1x4x2x8xf32>, tensor<1x3x2x8xf32>, tensor<1x3x2x8xf32> -> tensor<1x2x4x8xf32>",
        ["tensor<1x4x2x8xf32>", "tensor<1x3x2x8xf32>"],
        "Q = 4 is not a multiple of G = 3",
    ),
    "attention of two dtypes": (
        "nn.attention %0, %1, %1 scale 1.0"
        " : tensor<1x4x2x8xf32>, tensor<1x2x2x8xbf16>, tensor<1x2x2x8xbf16> -> tensor<1x2x4x8xf32>",
        ["tensor<1x4x2x8xf32>", "tensor<1x2x2x8xbf16>"],
        "q f32, k bf16, v bf16",
    ),
    "attention with an infinite scale": (
        f"nn.attention %0, %1, %1 scale nan : {HEADS}, {GROUPS}, {GROUPS} -> {ATTENDED}",
        [HEADS, GROUPS],
        "scale is finite",
    ),
    "attention with an empty window": (
        f"nn.attention %0, %1, %1 scale 1.0 window 0 : {HEADS}, {GROUPS}, {GROUPS} -> {ATTENDED}",
        [HEADS, GROUPS],
        "window is at least 1",
    ),
    "attention of a negative layer": (
        f"nn.attention %0, %1, %1 scale 1.0 layer -1 : {HEADS}, {GROUPS}, {GROUPS} -> {ATTENDED}",
        [HEADS, GROUPS],
        "layer is not negative",
    ),
    "attention with heads before tokens": (
        f"nn.attention %0, %1, %1 scale 1.0 : {HEADS}, {GROUPS}, {GROUPS} -> {HEADS}",
        [HEADS, GROUPS],
        "the operands give",
    ),
    "parameter with a dynamic shape": (
        f"nn.parameter @w : {B}",
        [],
        "a parameter has a static shape",
    ),
    "constant of another type than its value": (
        '%0 = "nn.constant"() <{value = dense<1.0> : tensor<2xf32>}> : () -> tensor<3xf32>',
        [],
        "value is tensor<2xf32> but y is tensor<3xf32>",
    ),
    "constant that should be a parameter": (
        "nn.constant dense<1.0> : tensor<16385xf32>",
        [],
        "65540 bytes, more than 65536: use nn.parameter",
    ),
}


@pytest.mark.parametrize("case", REJECTED.values(), ids=REJECTED.keys())
def test_the_verifier_rejects(case: tuple[str, list[str], str], snippet: Snippet) -> None:
    op, operand_types, cause = case
    with pytest.raises(errors.CompileError, match=re.escape(cause)) as error:
        verify_module(snippet(op, operand_types))
    # The parser refuses what the constraint on one operand forbids, the verifier the rest.
    assert error.value.code in ("IRV001", "IRV008")
    if error.value.code == "IRV001":
        assert str(error.value.at) in op


def test_a_constant_with_too_few_bytes_is_rejected() -> None:
    whole = nn.ConstantOp(np.zeros(4, np.float32)).value
    short: Any = DenseIntOrFPElementsAttr(cast(Any, tensor((5,), f32)), whole.data)
    with pytest.raises(VerifyException, match="value has 16 bytes, its type 20"):
        nn.ConstantOp(short).verify()


def value(*dims: Dim, dtype: object = bf16) -> SSAValue:
    return test_dialect.TestOp(result_types=[tensor(dims, dtype)]).results[0]  # type: ignore[arg-type]


def test_builders_infer_the_result() -> None:
    x = value("batch", "seq", 64)
    y = nn.LinearOp(x, value(96, 64), value(96)).y
    assert y.type == tensor(("batch", "seq", 96), bf16)
    heads = nn.TransposeOp(nn.ReshapeOp(y, ("batch", "seq", 6, 16)).y, dim0=-2, dim1=1)
    assert heads.y.type == tensor(("batch", 6, "seq", 16), bf16)
    assert (heads.dim0.value.data, heads.dim1.value.data) == (1, 2)
    assert nn.MeanOp(x, dims=[-1], keepdim=True).y.type == tensor(("batch", "seq", 1), bf16)
    ids = value("batch", "seq", dtype=i32)
    assert nn.EmbeddingOp(ids, value(100, 64)).y.type == x.type


def test_builders_reject_what_does_not_fit() -> None:
    x = value("batch", "seq", 64)
    for build in (
        lambda: nn.LinearOp(x, value(96, 65)),
        lambda: nn.AddOp(x, value("batch", 3, 64)),
        lambda: nn.ReshapeOp(x, ("batch", 64)),
        lambda: nn.ExpandOp(x, ("batch", "seq", 65)),
        lambda: nn.TransposeOp(x, dim0=0, dim1=3),
        lambda: nn.SliceOp(x, dim=-1, start=0, end=65),
    ):
        with pytest.raises(VerifyException):
            build()
