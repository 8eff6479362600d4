"""Single ATen operators: what torch computes, the interpreter computes after translation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from xdsl.dialects.builtin import ModuleOp

from furiosa_llm.errors import CompileError
from furiosa_llm.frontend.torch_export import trace
from furiosa_llm.frontend.torch_import import translate
from furiosa_llm.ir.interpreter import run
from furiosa_llm.ir.verification import verify_module

Function = Callable[[Tensor, Tensor], Tensor]


class Traced(torch.nn.Module):
    """A function of floats made from the ids [B, T, 1] and the positions [B, T]."""

    def __init__(self, function: Function, dtype: torch.dtype) -> None:
        super().__init__()
        self.function = function
        self.dtype = dtype

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        x = input_ids.unsqueeze(-1).to(self.dtype).expand(-1, -1, 8)
        return self.function(x * 0.37 - 1.0, position_ids.to(self.dtype) * 0.11)


def module_of(function: Function, dtype: torch.dtype = torch.float32) -> ModuleOp:
    return translate(trace(Traced(function, dtype), {}, {}), "test")


def _heads(x: Tensor) -> Tensor:
    return x.reshape(*x.shape[:-1], 4, 2)


CASES: dict[str, Function] = {
    "unary": lambda x, p: x.neg().sigmoid().tanh().exp().sqrt().rsqrt() + x.cos() * x.sin(),
    "silu": lambda x, p: torch.nn.functional.silu(x),
    "gelu": lambda x, p: torch.nn.functional.gelu(x),
    "gelu tanh": lambda x, p: torch.nn.functional.gelu(x, approximate="tanh"),
    "scalars": lambda x, p: (x + 2.5 - 0.1) * 3.0 / 7.0,
    "pow": lambda x, p: x**2,
    "tensors": lambda x, p: (x + p[..., None] - x * p[..., None]) / (x * x + 1.0),
    "promotion": lambda x, p: x.to(torch.float32) + x,
    "mean": lambda x, p: x.mean(-1, keepdim=True) + x.mean(-1)[..., None],
    "casts": lambda x, p: x.float().type_as(p).contiguous().clone().detach(),
    "transpose": lambda x, p: _heads(x).transpose(1, 2).flatten(-1),
    "squeeze": lambda x, p: x[..., :1].squeeze(-1) + x[..., None, :1].squeeze((2, 3)),
    "permute": lambda x, p: _heads(x).permute(3, 0, 2, 1),
    "t": lambda x, p: p.t(),
    "slices": lambda x, p: x[..., 2:-1] + x[..., :5] + x[:, :, -5:],
    "whole slices": lambda x, p: x[:, :, 0:] + x[0:, 0:],
    "chunk": lambda x, p: torch.cat(x.chunk(3, -1)[::-1], -1),
    "split": lambda x, p: torch.cat([torch.split(x, 3, -1)[2], torch.split(x, [1, 7], -1)[1]], -1),
    "empty slice": lambda x, p: torch.cat([x[..., :8], x[..., 8:]], -1),
    "expand": lambda x, p: p[..., None].expand(-1, -1, 4) + p[..., None].broadcast_to(*p.shape, 4),
    "matmul": lambda x, p: x @ x.transpose(1, 2),
    "dropout": lambda x, p: torch.nn.functional.dropout(x, 0.5, training=False),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_the_translation_computes_the_same(name: str, dtype: torch.dtype) -> None:
    """Bit for bit: each operator rounds where torch rounds."""
    module = module_of(CASES[name], dtype)
    verify_module(module)
    for batch, seq in [(2, 3), (1, 5), (4, 1), (1, 1)]:
        ids = torch.arange(batch * seq).reshape(batch, seq)
        positions = ids.flip(1) + 1
        expected = Traced(CASES[name], dtype)(ids, positions)
        (found,) = run(module, "forward", [ids.int(), positions.int()], _no_parameters)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def _no_parameters(name: str) -> Tensor:
    raise AssertionError(f"there is no parameter {name}")


REFUSED: dict[str, tuple[Function, str]] = {
    "unknown operators, both": (
        lambda x, p: x.cumsum(-1) + torch.erf(x),
        "operator aten.cumsum.default in the model",
    ),
    "and those behind them": (
        lambda x, p: torch.erf(x.cumsum(-1)),
        "operator aten.erf.default in the model",
    ),
    "alpha": (lambda x, p: torch.add(x, x, alpha=2), "operator aten.add.Tensor with alpha=2"),
    "step": (lambda x, p: x[..., ::2], "operator aten.slice.Tensor with a slice with step 2"),
    "a cut of the tokens": (lambda x, p: x[:, 1:], "a tensor of shape [batch, "),
    "booleans": (lambda x, p: (x > 0).to(x.dtype), "operator aten.gt.Scalar"),
    "a product of dims": (lambda x, p: x.reshape(-1, 8), "a tensor of shape [batch*seq, 8]"),
    "a dynamic dim of size 1": (
        lambda x, p: x.squeeze(0),
        "operator aten.squeeze.dim with the dynamic dimension batch",
    ),
    "an argument": (
        lambda x, p: torch.nn.functional.dropout(x, 0.5, training=True),
        "operator aten.dropout.default with p=0.5 in training",
    ),
    "nothing left": (lambda x, p: x[..., 8:] * 2.0, "operator aten.mul.Tensor"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_translation_is_refused(name: str) -> None:
    function, reason = REFUSED[name]
    with pytest.raises(CompileError) as caught:
        module_of(function)
    assert caught.value.code == "FRO007"
    assert reason in caught.value.cause
