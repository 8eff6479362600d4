"""The `quant` ops: their text, their rules, and what they compute, against written-out loops."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from xdsl.dialects import test
from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import Attribute, Operation, SSAValue
from xdsl.utils.exceptions import VerifyException

from furiosa_llm.ir import interpreter, nn, quant, quant_semantics
from furiosa_llm.ir.interpreter import Frame, Precision
from furiosa_llm.ir.text import parse_module, print_module
from furiosa_llm.ir.types import (
    Dims,
    bf16,
    dtype_of,
    f8e4m3,
    f8e5m2,
    f8e8m0,
    f32,
    i32,
    shape_of,
    tensor,
)

E4M3 = torch.float8_e4m3fn


def value(dims: Dims, dtype: Attribute = bf16) -> SSAValue:
    return test.TestOp([], [tensor(dims, dtype)]).results[0]


def run(op: Operation, *operands: Tensor, precision: Precision = "model") -> Tensor:
    op.verify()
    frame = Frame(precision, {}, lambda name: pytest.fail(name))
    return interpreter.apply_op(op, operands, frame)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def codes(*shape: int, seed: int = 0) -> Tensor:
    return (random(*shape, seed=seed).float() * 60).clamp(-448, 448).to(E4M3)


# --- text and rules ---


def every_op() -> list[Operation]:
    x, w = value(("batch", 3, 48)), value((40, 48), f8e4m3)
    one, bias = value((1,)), value((40,))
    token = quant.DynamicScaleOp(x, group=48)
    group = quant.DynamicScaleOp(x, group=16)
    by_token, by_one = quant.QuantizeOp(x, token.y), quant.QuantizeOp(x, one)
    column = value((48,), f32)
    by_column = quant.QuantizeOp(x, column)
    return [
        by_column,
        quant.DequantizeOp(by_column.y, column),
        token,
        group,
        by_token,
        by_one,
        quant.DequantizeOp(by_one.y, one),
        quant.DequantizeOp(by_token.y, token.y, dtype=f32),
        quant.LinearOp(x, w, value((40, 1), f32), rows=1, columns=48),
        quant.LinearOp(x, w, value((), f32), None, bias, rows=40, columns=48),
        quant.LinearOp(by_one.y, w, value((3, 3)), one, rows=16, columns=16),
        quant.LinearOp(by_token.y, w, value((2, 1, 2, 1)), token.y, bias, rows=32, columns=32),
        quant.LinearOp(
            x, value((40, 48), f8e5m2), value((1,), f8e8m0), rows=40, columns=48, dtype=f32
        ),
    ]


def test_every_op_round_trips_byte_for_byte() -> None:
    ops = every_op()
    assert {op.name for op in ops} == {op.name for op in quant.QUANT.operations}
    listed: dict[Operation, None] = {}
    for op in ops:
        for operand in op.operands:
            assert isinstance(operand.owner, Operation)
            listed[operand.owner] = None
        listed[op] = None
    module = ModuleOp(list(listed))
    module.verify()
    text = print_module(module)
    parsed = parse_module(text, extra_dialects={"test": lambda: test.Test})
    parsed.verify()
    assert print_module(parsed) == text


X, W = ("batch", 48), (40, 48)


def test_scales_of_columns() -> None:
    x = random(2, 3, 48)
    scale = torch.rand(48) + 0.1
    op = quant.QuantizeOp(value((2, 3, 48)), value((48,), f32))
    found = run(op, x, scale)
    for column in range(48):
        alone = quant_semantics.quantize(x[..., column], scale[column])
        assert torch.equal(found[..., column].float(), alone.float())


REJECTED: dict[str, tuple[Callable[[], object], str]] = {
    "groups that do not divide": (
        lambda: quant.DynamicScaleOp(value(X), group=32),
        "groups of 32 do not divide K = 48",
    ),
    "groups of nothing": (lambda: quant.DynamicScaleOp(value(X), group=0), "groups of 0"),
    "a scale for other tokens": (
        lambda: quant.QuantizeOp(value((4, 48)), value((5, 3), f32)),
        "fits [4, 48]",
    ),
    "scales that do not divide a token": (
        lambda: quant.QuantizeOp(value((4, 48)), value((4, 5), f32)),
        "neither one number",
    ),
    "codes that are scaled by the wrong token": (
        lambda: quant.DequantizeOp(value(X, f8e4m3), value(("seq", 1), f32)),
        "fits [batch, 48]",
    ),
    "another K": (
        lambda: quant.LinearOp(value((4, 32)), value(W, f8e4m3), value(()), rows=40, columns=48),
        "w has K = 48",
    ),
    "codes without a scale": (
        lambda: quant.LinearOp(value(X, f8e4m3), value(W, f8e4m3), value(()), rows=40, columns=48),
        "exactly if it is codes",
    ),
    "a scale without codes": (
        lambda: quant.LinearOp(
            value(X), value(W, f8e4m3), value(()), value(()), rows=40, columns=48
        ),
        "exactly if it is codes",
    ),
    "inputs of a linear by columns": (
        lambda: quant.LinearOp(
            value((4, 48), f8e4m3),
            value(W, f8e4m3),
            value(()),
            value((48,), f32),
            rows=40,
            columns=48,
        ),
        "neither one number",
    ),
    "a grid of other blocks": (
        lambda: quant.LinearOp(value(X), value(W, f8e4m3), value((2, 3)), rows=32, columns=32),
        "w_scale is [2, 3], blocks of 32 by 32 need [2, 2]",
    ),
    "a vector for blocks in two directions": (
        lambda: quant.LinearOp(value(X), value(W, f8e4m3), value((4,)), rows=20, columns=24),
        "need [2, 2]",
    ),
    "empty blocks": (
        lambda: quant.LinearOp(value(X), value(W, f8e4m3), value(()), rows=0, columns=48),
        "is empty",
    ),
    "a bias of another size": (
        lambda: quant.LinearOp(
            value(X), value(W, f8e4m3), value(()), None, value((48,)), rows=40, columns=48
        ),
        "bias must be [40]",
    ),
    "weights in floats": (
        lambda: quant.LinearOp(value(X), value(W), value(()), rows=40, columns=48).verify(),
        "not one of f8E4M3FN, f8E5M2",
    ),
    "a scale in integers": (
        lambda: quant.QuantizeOp(value(X), value((), i32)).verify(),
        "not one of bf16",
    ),
}


@pytest.mark.parametrize("name", REJECTED)
def test_the_verifier_rejects(name: str) -> None:
    build, message = REJECTED[name]
    with pytest.raises(VerifyException, match=message.replace("[", r"\[")):
        build()


# --- values ---


def test_codes_are_the_nearest_and_saturate() -> None:
    x = torch.tensor([0.0, -0.0, 17.0, 19.0, -448.0, 464.0, 465.0, 1e30, -1e30, torch.inf])
    found = quant_semantics.quantize(x, torch.tensor(1.0)).float()
    assert found.tolist() == [0, -0.0, 16, 20, -448, 448, 448, 448, -448, 448]
    assert quant_semantics.quantize(torch.tensor([torch.nan]), torch.tensor(2.0)).float().isnan()


def test_every_code_survives_its_own_scale() -> None:
    every = torch.arange(256).to(torch.uint8).view(E4M3)
    op = quant.DequantizeOp(value((256,), f8e4m3), value((), f32), dtype=f32)
    values = run(op, every, torch.tensor(0.37))
    again = run(quant.QuantizeOp(value((256,), f32), value((), f32)), values, torch.tensor(0.37))
    nan = every.float().isnan()
    assert torch.equal(again.view(torch.uint8)[~nan], every.view(torch.uint8)[~nan])
    assert again.float()[nan].isnan().all()


@pytest.mark.parametrize("group", [48, 16, 1])
def test_dynamic_scales_bring_each_group_to_the_largest_code(group: int) -> None:
    x = random(2, 3, 48)
    x[0, 1] = 0.0
    op = quant.DynamicScaleOp(value((2, 3, 48)), group=group)
    scale = run(op, x)
    found = run(quant.QuantizeOp(value((2, 3, 48)), op.y), x, scale).float()
    groups = found.reshape(2, 3, -1, group)
    expected = np.abs(x.double().numpy()).reshape(2, 3, -1, group).max(-1) / 448
    np.testing.assert_array_equal(scale.numpy(), expected.astype(np.float32))
    assert (groups.abs().amax(-1)[scale > 0] == 448).all()
    assert not found[0, 1].any()


@given(
    n=st.integers(1, 9),
    k=st.integers(1, 9),
    rows=st.integers(1, 10),
    columns=st.integers(1, 10),
    biased=st.booleans(),
)
def test_each_weight_has_the_scale_of_its_block(
    n: int, k: int, rows: int, columns: int, biased: bool
) -> None:
    grid = quant.grid_of((n, k), rows, columns)
    x, w, scale = random(3, k), codes(n, k, seed=1), random(*grid, seed=2).abs() + 0.1
    bias = random(n, seed=3) if biased else None
    op = quant.LinearOp(
        value((3, k)),
        value((n, k), f8e4m3),
        value(grid),
        bias=value((n,)) if biased else None,
        rows=rows,
        columns=columns,
        dtype=f32,
    )
    found = run(op, x, w, scale, *([] if bias is None else [bias]))
    for row in range(3):
        for feature in range(n):
            terms = [
                float(x[row, i])
                * float(w[feature, i])
                * float(scale[feature // rows, i // columns])
                for i in range(k)
            ]
            exact = sum(terms) + (0.0 if bias is None else float(bias[feature]))
            allowed = 2.0**-22 * (k + 2) * (sum(map(abs, terms)) + abs(exact) + 1)
            assert abs(float(found[row, feature]) - exact) <= allowed


@pytest.mark.parametrize("precision", ["model", "float32"])
def test_codes_as_inputs_are_what_they_stand_for(precision: Precision) -> None:
    x, w = random(4, 48), codes(40, 48, seed=1)
    scale = torch.rand(40, 1) + 0.1
    token = quant.DynamicScaleOp(value((4, 48)), group=48)
    quantize = quant.QuantizeOp(value((4, 48)), token.y)
    op = quant.LinearOp(
        quantize.y, value((40, 48), f8e4m3), value((40, 1), f32), token.y, rows=1, columns=48
    )
    if precision == "float32":
        x, w = x.float(), w.float()
    x_scale = run(token, x, precision=precision)
    x_codes = run(quantize, x, x_scale, precision=precision)
    found = run(op, x_codes, w, scale, x_scale, precision=precision)
    dense = (x_codes.double() * x_scale.double()) @ (w.double() * scale.double()).T
    assert found.dtype == (torch.float32 if precision == "float32" else torch.bfloat16)
    torch.testing.assert_close(found.double(), dense, rtol=2**-8, atol=1e-3)


def test_constants_can_be_codes() -> None:
    array = np.array([1.5, -448.0], ml_dtypes.float8_e4m3fn)
    op = nn.ConstantOp(array)
    assert dtype_of(op.y) == f8e4m3
    assert shape_of(op.y) == (2,)
    assert op.to_numpy().tobytes() == array.tobytes()
