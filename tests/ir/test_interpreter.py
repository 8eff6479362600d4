"""Each op of `nn` means what PyTorch and transformers compute, bit for bit."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from xdsl.dialects.builtin import ModuleOp
from xdsl.dialects.func import FuncOp, ReturnOp
from xdsl.ir import Block, Operation, Region, SSAValue

from furiosa_llm import errors
from furiosa_llm.ir import interpreter, nn
from furiosa_llm.ir.text import parse_module
from furiosa_llm.ir.types import ANY_TENSOR, Dims, bf16, f32, tensor
from furiosa_llm.ir.verification import verify_module

TORCH_TO_IR = {torch_dtype: dtype for dtype, torch_dtype in interpreter.TORCH_DTYPES.items()}
Build = Callable[..., Operation]


def no_parameters(name: str) -> Tensor:
    raise AssertionError(f"no op reads {name}")


def make_module(build: Build, inputs: Sequence[Tensor], dims: Sequence[Dims]) -> ModuleOp:
    """A function of one op over arguments with these dims and the inputs' dtypes."""
    types = [tensor(d, TORCH_TO_IR[x.dtype]) for x, d in zip(inputs, dims, strict=True)]
    block = Block(arg_types=types)
    op = build(*block.args)
    block.add_ops([op, ReturnOp(*op.results)])
    module = ModuleOp([FuncOp("forward", (types, op.result_types), Region(block))])
    verify_module(module)
    return module


def run_op(build: Build, inputs: Sequence[Tensor], dims: Sequence[Dims] | None = None) -> Tensor:
    dims = [tuple(x.shape) for x in inputs] if dims is None else dims
    module = make_module(build, inputs, dims)
    (result,) = interpreter.run(module, "forward", inputs, no_parameters)
    return result


def random(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


FLOATS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
SIZES = [(1, 1), (2, 5)]
UNARY: dict[str, tuple[Build, Callable[[Tensor], Tensor]]] = {
    "neg": (nn.NegOp, torch.neg),
    "rsqrt": (nn.RsqrtOp, torch.rsqrt),
    "sqrt": (nn.SqrtOp, torch.sqrt),
    "exp": (nn.ExpOp, torch.exp),
    "sigmoid": (nn.SigmoidOp, torch.sigmoid),
    "silu": (nn.SiluOp, F.silu),
    "tanh": (nn.TanhOp, torch.tanh),
    "cos": (nn.CosOp, torch.cos),
    "sin": (nn.SinOp, torch.sin),
    "gelu": (lambda x: nn.GeluOp(x, approximate="none"), F.gelu),
    "gelu_tanh": (
        lambda x: nn.GeluOp(x, approximate="tanh"),
        lambda x: F.gelu(x, approximate="tanh"),
    ),
    "scale": (lambda x: nn.ScaleOp(x, factor=0.1), lambda x: x * 0.1),
    "offset": (lambda x: nn.OffsetOp(x, value=1e-5), lambda x: x + 1e-5),
    "pow": (lambda x: nn.PowOp(x, exponent=2.0), lambda x: x.pow(2)),
    "pow_root": (lambda x: nn.PowOp(x, exponent=-0.5), lambda x: x**-0.5),
    "mean": (lambda x: nn.MeanOp(x, dims=[-1], keepdim=True), lambda x: x.mean(-1, keepdim=True)),
    "mean_of_two": (lambda x: nn.MeanOp(x, dims=[0, 2], keepdim=False), lambda x: x.mean((0, 2))),
    "transpose": (lambda x: nn.TransposeOp(x, dim0=1, dim1=2), lambda x: x.transpose(1, 2)),
    "slice": (lambda x: nn.SliceOp(x, dim=-1, start=3, end=5), lambda x: x[..., 3:5]),
    "concat": (lambda x: nn.ConcatOp([x, x], dim=-1), lambda x: torch.cat((x, x), -1)),
    "reshape": (
        lambda x: nn.ReshapeOp(x, ("batch", "seq", 2, 4)),
        lambda x: x.reshape(*x.shape[:2], 2, 4),
    ),
    "expand": (
        lambda x: nn.ExpandOp(x, (3, "batch", "seq", 8)),
        lambda x: x.expand(3, *x.shape),
    ),
}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("batch", "seq"), SIZES)
@pytest.mark.parametrize("name", UNARY)
def test_ops_of_one_tensor(name: str, batch: int, seq: int, dtype: torch.dtype) -> None:
    build, expected = UNARY[name]
    x = random(batch, seq, 8, dtype=dtype)
    assert_same_bits(run_op(build, [x], [("batch", "seq", 8)]), expected(x))


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int32], ids=str)
@pytest.mark.parametrize(
    ("op", "expected"),
    [(nn.AddOp, torch.add), (nn.SubOp, torch.sub), (nn.MulOp, torch.mul), (nn.DivOp, torch.div)],
)
def test_arithmetic_broadcasts_as_torch_does(
    op: Build, expected: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype
) -> None:
    if op is nn.DivOp and dtype == torch.int32:
        return  # the verifier refuses it: torch would give floats
    a, b = (random(2, 1, 8, seed=1) * 9).to(dtype), (random(5, 1, seed=2) * 9).to(dtype)
    assert_same_bits(run_op(op, [a, b], [("batch", 1, 8), ("seq", 1)]), expected(a, b))


@pytest.mark.parametrize("to", [*FLOATS, torch.int32], ids=str)
@pytest.mark.parametrize("source", [*FLOATS, torch.int32], ids=str)
def test_casts_are_torch_casts(source: torch.dtype, to: torch.dtype) -> None:
    x = (random(64, dtype=torch.float64) * 100).to(source)
    result = run_op(lambda x: nn.CastOp(x, dtype=TORCH_TO_IR[to]), [x], [("batch",)])
    assert_same_bits(result, x.to(to))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_products_are_torch_products(dtype: torch.dtype) -> None:
    x, w, bias = random(2, 3, 8, dtype=dtype), random(5, 8, dtype=dtype), random(5, dtype=dtype)
    dims: list[Dims] = [("batch", "seq", 8), (5, 8), (5,)]
    assert_same_bits(run_op(nn.LinearOp, [x, w], dims[:2]), F.linear(x, w))
    assert_same_bits(run_op(nn.LinearOp, [x, w, bias], dims), F.linear(x, w, bias))
    b = random(4, 1, 8, 6, dtype=dtype)
    result = run_op(nn.MatmulOp, [x, b], [("batch", "seq", 8), (4, 1, 8, 6)])
    assert_same_bits(result, torch.matmul(x, b))


def test_embedding_looks_rows_up() -> None:
    ids, table = torch.tensor([[3, 0], [1, 3]], dtype=torch.int32), random(4, 8)
    result = run_op(nn.EmbeddingOp, [ids, table], [("batch", "seq"), (4, 8)])
    assert_same_bits(result, table[ids.long()])


@pytest.mark.parametrize(
    "dtype", [ml_dtypes.bfloat16, np.float16, np.float32, np.float64, np.int32]
)
def test_constants_keep_their_bits(dtype: type) -> None:
    array: np.ndarray[Any, Any] = np.array([[0, 1, -2], [3, 4, 5]]).astype(dtype)
    if dtype != np.int32:
        array[0, 0] = np.nan
        array[0, 1] = -0.0
    result = run_op(lambda: nn.ConstantOp(array), [], [])
    assert result.contiguous().view(torch.uint8).numpy().tobytes() == array.tobytes()
    assert tuple(result.shape) == (2, 3)


@pytest.mark.parametrize("dtype", FLOATS[:3], ids=str)
@pytest.mark.parametrize(("batch", "seq"), SIZES)
def test_rms_norm_rounds_as_llama_does(batch: int, seq: int, dtype: torch.dtype) -> None:
    norm = LlamaRMSNorm(32, eps=1e-5).to(dtype)
    norm.weight.data = random(32, dtype=dtype, seed=7)
    x = random(batch, seq, 32, dtype=dtype)
    result = run_op(
        lambda x, w: nn.RmsNormOp(x, w, eps=1e-5),
        [x, norm.weight.detach()],
        [("batch", "seq", 32), (32,)],
    )
    assert_same_bits(result, norm(x).detach())


@pytest.mark.parametrize("scaling", [1.0, 1.3])
@pytest.mark.parametrize("dtype", FLOATS[:3], ids=str)
@pytest.mark.parametrize(("batch", "seq"), SIZES)
def test_rope_rounds_as_llama_does(
    batch: int, seq: int, dtype: torch.dtype, scaling: float
) -> None:
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, max_position_embeddings=64)
    rotary = LlamaRotaryEmbedding(config)
    rotary.attention_scaling = scaling
    x = random(batch, 4, seq, 16, dtype=dtype)
    positions = torch.randint(0, 9000, (batch, seq), dtype=torch.int32)
    cos, sin = rotary(x, positions)
    expected, _ = apply_rotary_pos_emb(x, x, cos, sin)

    result = run_op(
        lambda x, p: nn.RopeOp(x, p, inv_freq=rotary.inv_freq.tolist(), attention_scaling=scaling),
        [x, positions],
        [("batch", 4, "seq", 16), ("batch", "seq")],
    )
    # The scaling is f32 in the IR, as it is when torch multiplies an f32 tensor by it.
    assert_same_bits(result, expected)


def test_partial_rope_leaves_the_tail_alone() -> None:
    x = random(1, 2, 3, 10)
    positions = torch.arange(3, dtype=torch.int32)[None]

    def rope(x: SSAValue, p: SSAValue) -> nn.RopeOp:
        return nn.RopeOp(x, p, inv_freq=[1.0, 0.25, 0.0625])

    result = run_op(rope, [x, positions])
    assert_same_bits(result[..., 6:], x[..., 6:])
    assert_same_bits(result[..., :6], run_op(rope, [x[..., :6].contiguous(), positions]))


class Layer(torch.nn.Module):
    """What transformers' eager attention asks of a module."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = groups
        self.eval()


@pytest.mark.parametrize("dtype", FLOATS[:3], ids=str)
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("batch", "seq"), SIZES)
def test_attention_is_eager_attention(
    batch: int, seq: int, causal: bool, window: int | None, dtype: torch.dtype
) -> None:
    q = random(batch, 4, seq, 16, dtype=dtype, seed=1)
    k, v = (random(batch, 2, seq, 16, dtype=dtype, seed=seed) for seed in (2, 3))
    rows, columns = torch.arange(seq)[:, None], torch.arange(seq)[None]
    hidden = torch.zeros(seq, seq, dtype=torch.bool)
    if causal:
        hidden |= columns > rows
    if window is not None:
        hidden |= columns <= rows - window
    mask = torch.zeros(seq, seq, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)
    expected, _ = eager_attention_forward(Layer(2), q, k, v, mask[None, None], scaling=0.25)

    result = run_op(
        lambda q, k, v: nn.AttentionOp(q, k, v, scale=0.25, causal=causal, window=window),
        [q, k, v],
        [("batch", 4, "seq", 16), ("batch", 2, "seq", 16), ("batch", 2, "seq", 16)],
    )
    assert_same_bits(result, expected)


PROGRAM = """
nn.parameter @w : tensor<3x4xbf16>
func.func @forward(%x: tensor<?x4xbf16, #nn.dims<"batch", _>>) -> (tensor<?x3xbf16, #nn.dims<"batch", _>>, tensor<?x4xbf16, #nn.dims<"batch", _>>) {
  %w = nn.get_parameter @w : tensor<3x4xbf16>
  %y = func.call @block(%x, %w) : (tensor<?x4xbf16, #nn.dims<"batch", _>>, tensor<3x4xbf16>) -> tensor<?x3xbf16, #nn.dims<"batch", _>>
  func.return %y, %x : tensor<?x3xbf16, #nn.dims<"batch", _>>, tensor<?x4xbf16, #nn.dims<"batch", _>>
}
func.func private @block(%x: tensor<?x4xbf16, #nn.dims<"batch", _>>, %w: tensor<3x4xbf16>) -> tensor<?x3xbf16, #nn.dims<"batch", _>> {
  %y = nn.linear %x, %w : tensor<?x4xbf16, #nn.dims<"batch", _>>, tensor<3x4xbf16> -> tensor<?x3xbf16, #nn.dims<"batch", _>>
  func.return %y : tensor<?x3xbf16, #nn.dims<"batch", _>>
}
"""  # noqa: E501
W = random(3, 4, seed=5)


def test_calls_parameters_and_several_results() -> None:
    module = parse_module(PROGRAM)
    verify_module(module)
    x = random(2, 4)
    y, same = interpreter.run(module, "forward", [x], {"w": W}.__getitem__)
    assert_same_bits(y, F.linear(x, W))
    assert_same_bits(same, x)


def test_float32_precision_computes_everything_in_f32() -> None:
    x = random(2, 4)
    y, _ = interpreter.run(
        parse_module(PROGRAM), "forward", [x], {"w": W}.__getitem__, precision="float32"
    )
    assert_same_bits(y, F.linear(x.float(), W.float()))


def test_float32_precision_makes_casts_to_floats_exact() -> None:
    x = random(8, dtype=torch.float32)
    module = make_module(lambda x: nn.CastOp(x, dtype=bf16), [x], [(8,)])
    (y,) = interpreter.run(module, "forward", [x], no_parameters, precision="float32")
    assert_same_bits(y, x)


@pytest.mark.parametrize(
    ("inputs", "code", "cause"),
    [
        ([], "IRV010", "1 arguments"),
        ([random(2, 5)], "IRV010", "[batch, 4] bf16 but the tensor is [2, 5]"),
        ([random(2, 4, 1)], "IRV010", "[2, 4, 1]"),
        ([random(2, 4, dtype=torch.float32)], "IRV010", "torch.float32"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(inputs: list[Tensor], code: str, cause: str) -> None:
    with pytest.raises(errors.CompileError) as error:
        interpreter.run(parse_module(PROGRAM), "forward", inputs, {"w": W}.__getitem__)
    assert error.value.code == code
    assert cause in error.value.cause


def test_a_parameter_that_does_not_fit_is_refused() -> None:
    with pytest.raises(errors.CompileError) as error:
        interpreter.run(parse_module(PROGRAM), "forward", [random(2, 4)], lambda _: W.T)
    assert (error.value.code, error.value.at) == ("IRV010", "parameter w")


def test_one_dimension_name_has_one_size() -> None:
    with pytest.raises(errors.CompileError) as error:
        run_op(nn.AddOp, [random(2), random(3)], [("batch",), ("batch",)])
    assert error.value.code == "IRV011"
    assert '"batch" is both 2 and 3' in error.value.message


def test_an_unknown_function_is_refused() -> None:
    with pytest.raises(errors.CompileError) as error:
        interpreter.run(parse_module(PROGRAM), "main", [], no_parameters)
    assert error.value.code == "IRV009"
    assert "@forward" in error.value.cause


def test_an_op_of_another_dialect_is_refused() -> None:
    from xdsl.dialects import test as test_dialect

    def foreign(x: SSAValue) -> Operation:
        return test_dialect.TestOp([x], [x.type])

    with pytest.raises(errors.CompileError) as error:
        run_op(foreign, [random(2)])
    assert error.value.code == "IRV012"
    assert "test.op" in error.value.message


def test_every_op_has_an_implementation() -> None:
    from furiosa_llm.ir import paged, quant

    without = {nn.ParameterOp}
    ops = {op for dialect in (nn.NN, paged.PAGED, quant.QUANT) for op in dialect.operations}
    assert set(interpreter.IMPLEMENTATIONS) == ops - without


def test_values_are_freed_after_their_last_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chain of 40 ops never holds more than its input and two intermediates."""
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def count_and_negate(_op: nn.NegOp, operands: Sequence[Tensor], _: object) -> Tensor:
        nonlocal most
        result = -operands[0]
        alive.append(weakref.ref(result))
        most = max(most, sum(ref() is not None for ref in alive))
        return result

    implementations: dict[Any, Any] = interpreter.IMPLEMENTATIONS
    monkeypatch.setitem(implementations, nn.NegOp, count_and_negate)
    type = tensor((4,), f32)
    block = Block(arg_types=[type])
    value: SSAValue = block.args[0]
    for _ in range(40):
        op = nn.NegOp(value)
        block.add_op(op)
        value = op.y
    block.add_op(ReturnOp(value))
    module = ModuleOp([FuncOp("f", ([type], [type]), Region(block))])

    x = random(4, dtype=torch.float32)
    (result,) = interpreter.run(module, "f", [x], no_parameters)
    assert_same_bits(result, x)
    assert most <= 2


def test_every_element_type_has_a_torch_dtype() -> None:
    assert set(interpreter.TORCH_DTYPES) == set(ANY_TENSOR.dtypes)
