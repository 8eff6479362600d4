"""Text -> module -> text gives the same bytes; text that is no IR gives a place and a cause."""

from __future__ import annotations

import math
import struct
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from xdsl.dialects import test as test_dialect
from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import Dialect, SSAValue

from furiosa_llm import errors
from furiosa_llm.ir import nn, paged, provenance
from furiosa_llm.ir.exact_floats import show_float
from furiosa_llm.ir.text import parse_module, print_module
from furiosa_llm.ir.types import Dim, bf16, f32, i32, tensor

TEST_DIALECT = {"test": lambda: test_dialect.Test}


def value(*dims: Dim, dtype: object = bf16) -> SSAValue:
    return test_dialect.TestOp(result_types=[tensor(dims, dtype)]).results[0]  # type: ignore[arg-type]


def every_op() -> ModuleOp:
    """A module with each op of both dialects at least once."""
    x, ids = value("batch", "seq", 64), value("batch", "seq", dtype=i32)
    q, k = value("batch", 4, "seq", 16), value("batch", 2, "seq", 16)
    weight, bias = value(64, 64), value(64)
    cache = value("slots", 2, 2, 16)
    table, lengths = value("batch", "attn", dtype=i32), value("batch", dtype=i32)
    parameter = nn.ParameterOp("model.w-0.weight", tensor((64, 64), bf16))
    ops = [
        parameter,
        nn.GetParameterOp(parameter),
        nn.ConstantOp(np.arange(6, dtype=np.float32).reshape(2, 3)),
        *(op(x, x) for op in (nn.AddOp, nn.SubOp, nn.MulOp, nn.DivOp)),
        *(op(x) for op in (nn.NegOp, nn.RsqrtOp, nn.SqrtOp, nn.ExpOp, nn.SigmoidOp)),
        *(op(x) for op in (nn.SiluOp, nn.TanhOp, nn.CosOp, nn.SinOp)),
        nn.GeluOp(x, approximate="tanh"),
        nn.ScaleOp(x, factor=1e-300),
        nn.OffsetOp(x, value=1234567.0),
        nn.PowOp(x, exponent=-0.0),
        nn.CastOp(x, dtype=f32),
        nn.ReshapeOp(x, ("batch", "seq", 4, 16)),
        nn.TransposeOp(x, dim0=0, dim1=-1),
        nn.SliceOp(x, dim=-1, start=3, end=7),
        nn.ConcatOp([x, x, x], dim=-1),
        nn.ExpandOp(x, (3, "batch", "seq", 64)),
        nn.MeanOp(x, dims=[-1], keepdim=True),
        nn.MeanOp(x, dims=[0, 2], keepdim=False),
        nn.MatmulOp(x, weight),
        nn.LinearOp(x, weight),
        nn.LinearOp(x, weight, bias),
        nn.EmbeddingOp(ids, weight),
        nn.RmsNormOp(x, bias, eps=1e-5),
        nn.RopeOp(q, ids, inv_freq=[1.0, 0.1, -0.0, 1e-38], attention_scaling=1.1),
        nn.AttentionOp(q, k, k, scale=0.25, window=4, layer=0),
        nn.AttentionOp(q, k, k, scale=0.25, causal=False),
        paged.WriteOp(cache, k, k, ids),
        paged.AttentionOp(q, cache, table, lengths, ids, scale=0.1),
        paged.AttentionOp(q, cache, table, lengths, ids, scale=0.1, window=3),
        paged.LastTokenOp(x, lengths),
    ]
    for index, op in enumerate(ops):
        provenance.located(op, provenance.make(f"model.layers.{index}", f"node_{index}"))
    sources = {operand.owner: None for op in ops for operand in op.operands}
    return ModuleOp([*sources, *ops])  # type: ignore[list-item]


def test_every_op_round_trips_byte_for_byte() -> None:
    module = every_op()
    module.verify()
    text = print_module(module)
    parsed = parse_module(text, extra_dialects=TEST_DIALECT)

    assert {op.name for dialect in (nn.NN, paged.PAGED) for op in dialect.operations} <= {
        op.name for op in module.ops
    }
    assert print_module(parsed) == text
    assert parsed.is_structurally_equivalent(module)
    locations = [op.location for op in module.ops]
    assert [op.location for op in parsed.ops] == locations


def test_the_custom_form_is_used_and_names_survive() -> None:
    text = (
        'func.func @f(%hidden: tensor<2x4xbf16> loc("model"("hidden"))) -> tensor<2x4xbf16> {\n'
        '  %act = nn.silu %hidden : tensor<2x4xbf16> loc("mlp.act_fn"("silu"))\n'
        "  func.return %act : tensor<2x4xbf16> loc(unknown)\n"
        "} loc(unknown)\n"
    )
    printed = print_module(parse_module(text))
    for line in text.splitlines()[:3]:
        assert line.strip() in printed


def f32_bits(value: float) -> bytes:
    return struct.pack("<f", value)


@settings(deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
def test_inv_freq_round_trips_every_finite_f32(frequencies: list[float]) -> None:
    x, ids = value(1, 1, 1, 2 * len(frequencies)), value(1, 1, dtype=i32)
    rope = nn.RopeOp(x, ids, inv_freq=frequencies, attention_scaling=frequencies[0])
    module = ModuleOp([x.owner, ids.owner, rope])  # type: ignore[list-item]

    parsed = parse_module(print_module(module), extra_dialects=TEST_DIALECT).body.block.last_op

    assert isinstance(parsed, nn.RopeOp)
    assert parsed.inv_freq.data == rope.inv_freq.data
    scaling = parsed.attention_scaling.value.data
    assert f32_bits(scaling) == f32_bits(frequencies[0])


@pytest.mark.parametrize("value", [0.0, -0.0, 16777216.0, 1234567.0, 3.4028234663852886e38, 1e-45])
def test_special_f32_values_print_exactly(value: float) -> None:
    text = show_float(struct.unpack("<f", f32_bits(value))[0], f32)
    assert "." in text
    assert f32_bits(float(text)) == f32_bits(value)


@settings(deadline=None)
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_scalars_round_trip_every_finite_f64(factor: float) -> None:
    x = value(2)
    module = ModuleOp([x.owner, nn.ScaleOp(x, factor=factor)])  # type: ignore[list-item]
    parsed = parse_module(print_module(module), extra_dialects=TEST_DIALECT).body.block.last_op
    assert isinstance(parsed, nn.ScaleOp)
    assert struct.pack("<d", parsed.factor.value.data) == struct.pack("<d", factor)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_verifiers_refuse_still_print_and_parse(bad: float) -> None:
    x = value(2)
    text = print_module(ModuleOp([x.owner, nn.ScaleOp(x, factor=bad)]))  # type: ignore[list-item]
    assert print_module(parse_module(text, extra_dialects=TEST_DIALECT)) == text


@settings(deadline=None)
@given(
    bits=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=8),
    dtype=st.sampled_from([np.float32, np.float16, np.float64, np.int32, ml_dtypes.bfloat16]),
)
def test_constants_round_trip_every_bit_pattern(bits: list[int], dtype: type) -> None:
    words = np.array(bits, np.uint32)
    array: np.ndarray[Any, Any] = np.frombuffer(words.tobytes() * 2, dtype)
    constant = nn.ConstantOp(array)
    parsed = parse_module(print_module(ModuleOp([constant]))).body.block.last_op
    assert isinstance(parsed, nn.ConstantOp)
    assert parsed.value.type == constant.value.type
    assert parsed.to_numpy().tobytes() == array.tobytes()


@pytest.mark.parametrize(
    "values", [[0.0, -0.0], [-0.0, 0.0], [-0.0, -0.0], [math.nan, 1.0], [-math.inf, 3e9 + 512]]
)
def test_constants_round_trip_where_xdsl_text_does_not(values: list[float]) -> None:
    array = np.array(values, np.float32)
    parsed = parse_module(print_module(ModuleOp([nn.ConstantOp(array)]))).body.block.last_op
    assert isinstance(parsed, nn.ConstantOp)
    assert parsed.to_numpy().tobytes() == array.tobytes()


def test_a_small_ordinary_constant_is_readable() -> None:
    text = print_module(ModuleOp([nn.ConstantOp(np.array([1, 0.5], np.float32))]))
    assert "nn.constant dense<[1.000000e+00, 5.000000e-01]> : tensor<2xf32>" in text


@pytest.mark.parametrize(
    ("text", "place", "cause"),
    [
        ("nn.silu", "a.mlir:1:8", "expected"),
        ("\n  nn.nosuch %x", "a.mlir:2", "nn.nosuch is not registered"),
        ("arith.constant 1 : i32", "a.mlir:1:1", "arith.constant is not registered"),
        ("func.func @f() {\n  func.return %x : i32\n}", "a.mlir:3", "x"),
        ("func.func @f(%x: tensor<2xf32>", "a.mlir:1", "')'"),
        ('nn.parameter @w : tensor<?xf32, #nn.dims<"a b">>', "a.mlir:1", "not an identifier"),
        ("nn.parameter @w : tensor<?xf32, #nn.dims<3>>", "a.mlir:1", "or `_`"),
        ("nn.constant 1 : i32", "a.mlir:1:13", "expected dense<...>"),
        ("nn.constant dense<[1.0, 2.0]> : tensor<3xf32>", "a.mlir:1", ""),
        ("\0", "a.mlir:1:1", ""),
    ],
)
def test_text_that_is_no_ir_is_refused_with_its_place(text: str, place: str, cause: str) -> None:
    with pytest.raises(errors.CompileError) as error:
        parse_module(text, "a.mlir")
    assert error.value.code == "IRV008"
    assert error.value.at is not None
    assert error.value.at.startswith(place)
    assert cause.lower() in error.value.cause.lower()


def test_extra_dialects_load_when_the_text_names_them() -> None:
    loaded: list[str] = []

    def load() -> Dialect:
        loaded.append("test")
        return test_dialect.Test

    parse_module("nn.parameter @w : tensor<2xf32>", extra_dialects={"test": load})
    assert not loaded
    parse_module('"test.op"() : () -> ()', extra_dialects={"test": load})
    assert loaded == ["test"]
