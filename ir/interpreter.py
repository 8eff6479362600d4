"""The reference interpreter: what every op means, said in PyTorch.

One small function per op, registered by op class. A function body runs as a loop that drops each
value after its last use, so a model needs its weights and a few activations, not every
intermediate. It is the only part of `ir` that imports torch.

Shape letters: B sequences, T tokens, A keys that a sequence may see, Q query heads, G KV heads,
H head size, D model, S slots.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from xdsl.dialects.builtin import ModuleOp
from xdsl.dialects.func import CallOp, FuncOp, ReturnOp
from xdsl.ir import Attribute, Operation, SSAValue

from .. import errors
from . import nn, paged, quant, quant_semantics
from .provenance import describe
from .types import (
    bf16,
    dims_of,
    dtype_of,
    f8e4m3,
    f8e5m2,
    f8e8m0,
    f16,
    f32,
    f64,
    i32,
    show_dims,
)
from .verification import callee_name, functions

Parameters = Callable[[str], Tensor]
Precision = Literal["model", "float32", "unrounded"]

TORCH_DTYPES: dict[Attribute, torch.dtype] = {
    bf16: torch.bfloat16,
    f8e4m3: torch.float8_e4m3fn,
    f8e5m2: torch.float8_e5m2,
    f8e8m0: torch.float8_e8m0fnu,
    f16: torch.float16,
    f32: torch.float32,
    f64: torch.float64,
    i32: torch.int32,
}


def run(
    module: ModuleOp,
    function_name: str,
    inputs: Sequence[Tensor],
    parameters: Parameters,
    *,
    precision: Precision = "model",
) -> list[Tensor]:
    """Run a function of a verified module and return what it returns.

    `parameters` gives a parameter by its name whenever an op reads it. With
    `precision="float32"` every float value is f32 whatever its type says: a reference for
    rounding errors. With "unrounded", what is quantized is not rounded to codes either, so that
    a small difference never becomes the step between two codes. Inputs are never changed.
    Raises: IRV009 for the function, IRV010 and IRV011 for tensors that do not fit, IRV012 for an
    op of another dialect.
    """
    function = runnable_function(module, function_name)
    machine = _OneRank(functions(module), parameter_source=parameters, precision=precision)
    with torch.no_grad():
        return machine.call(function, list(inputs))


def runnable_function(module: ModuleOp, name: str) -> FuncOp:
    """The function of that name, which has a body. Raises: IRV009 if there is none."""
    callees = functions(module)
    if name not in callees or callees[name].is_declaration:
        runnable = [f"@{name}" for name, op in callees.items() if not op.is_declaration]
        raise errors.function_not_runnable(function=name, declared=runnable)
    return callees[name]


@dataclass
class Frame:
    """What an op's implementation may ask about the running call."""

    precision: Precision
    sizes: dict[str, int]
    parameter_source: Parameters

    def dtype(self, dtype: Attribute) -> torch.dtype:
        torch_dtype = TORCH_DTYPES[dtype]
        wide = self.precision != "model" and torch_dtype.is_floating_point
        return torch.float32 if wide else torch_dtype

    def shape(self, x: SSAValue | Attribute) -> list[int]:
        return [self.sizes[dim] if isinstance(dim, str) else dim for dim in dims_of(x)]

    def parameter(self, name: str, expected: SSAValue | Attribute) -> Tensor:
        return self.accept(self.parameter_source(name), expected, at=f"parameter {name}")

    def accept(self, value: Tensor, expected: SSAValue | Attribute, *, at: str) -> Tensor:
        """The tensor in the dtype of this run, if it fits the type; binds dimension names."""
        dims, dtype = dims_of(expected), dtype_of(expected)
        wanted = f"{show_dims(dims)} {dtype}"
        got = f"{show_dims(value.shape)} {value.dtype}"
        accepted = {TORCH_DTYPES[dtype], self.dtype(dtype)}
        if len(dims) != value.dim() or value.dtype not in accepted:
            raise errors.input_not_accepted(at=at, expected=wanted, got=got)
        for dim, size in zip(dims, value.shape, strict=True):
            if isinstance(dim, int) and dim != size:
                raise errors.input_not_accepted(at=at, expected=wanted, got=got)
            if isinstance(dim, str) and self.sizes.setdefault(dim, size) != size:
                raise errors.dimension_sizes_differ(at=at, dim=dim, bound=self.sizes[dim], got=size)
        return value.to(self.dtype(dtype))


Implementation = Callable[[Any, Sequence[Tensor], Frame], Tensor]
ImplementationT = TypeVar("ImplementationT", bound=Callable[..., Tensor])
IMPLEMENTATIONS: dict[type[Operation], Implementation] = {}


def implements(op: type[Operation]) -> Callable[[ImplementationT], ImplementationT]:
    """Register a function `(op, operands, frame) -> result` as what `op` means."""

    def register(implementation: ImplementationT) -> ImplementationT:
        assert op not in IMPLEMENTATIONS
        IMPLEMENTATIONS[op] = implementation
        return implementation

    return register


ValueT = TypeVar("ValueT")
FrameT = TypeVar("FrameT")


@dataclass
class Machine(ABC, Generic[ValueT, FrameT]):
    """Runs functions op by op; subclasses say what a value is, and what an op makes of values."""

    callees: dict[str, FuncOp]
    last_uses: dict[str, dict[Operation, list[SSAValue]]] = field(default_factory=dict)

    @abstractmethod
    def enter(self, function: FuncOp, inputs: Sequence[ValueT]) -> tuple[FrameT, list[ValueT]]:
        """What belongs to this call, and its arguments as the function sees them."""

    @abstractmethod
    def results(self, op: Operation, operands: Sequence[ValueT], frame: FrameT) -> Sequence[ValueT]:
        """What an op other than a call gives."""

    def call(self, function: FuncOp, inputs: list[ValueT]) -> list[ValueT]:
        frame, accepted = self.enter(function, inputs)
        inputs.clear()  # the caller's references go, so that a last use here frees the tensor
        values: dict[SSAValue, ValueT] = {
            argument: value
            for argument, value in zip(function.args, accepted, strict=True)
            if argument.first_use is not None
        }
        accepted.clear()
        ends = self._last_uses(function)
        for op in function.body.block.ops:
            operands = [values[operand] for operand in op.operands]
            if isinstance(op, ReturnOp):
                return operands
            for ended in ends[op]:
                del values[ended]
            if isinstance(op, CallOp):
                results: Sequence[ValueT] = self.call(self.callees[callee_name(op)], operands)
            else:
                results = self.results(op, operands, frame)
            for result, value in zip(op.results, results, strict=True):
                if result.first_use is not None:
                    values[result] = value
        raise AssertionError(f"{function.sym_name.data} has no func.return")

    def _last_uses(self, function: FuncOp) -> dict[Operation, list[SSAValue]]:
        """For each op of the body, the values that no later op uses."""
        name = function.sym_name.data
        if name not in self.last_uses:
            ends: dict[Operation, list[SSAValue]] = {}
            seen: set[SSAValue] = set()
            for op in reversed(list(function.body.block.ops)):
                last = dict.fromkeys(value for value in op.operands if value not in seen)
                ends[op] = list(last)
                seen.update(last)
            self.last_uses[name] = ends
        return self.last_uses[name]


def accept_inputs(function: FuncOp, inputs: Sequence[Tensor], frame: Frame) -> list[Tensor]:
    """The inputs in the dtypes of this run. Raises: IRV010, IRV011 if they do not fit."""
    name = function.sym_name.data
    if len(inputs) != len(function.args):
        raise errors.input_not_accepted(
            at=f"@{name}", expected=f"{len(function.args)} arguments", got=f"one of {len(inputs)}"
        )
    return [
        frame.accept(value, argument, at=f"@{name}, argument {argument.name_hint or index}")
        for index, (argument, value) in enumerate(zip(function.args, inputs, strict=True))
    ]


def apply_op(op: Operation, operands: Sequence[Tensor], frame: Frame) -> Tensor:
    """What the op gives on one rank. Raises: IRV012 for an op of another dialect."""
    implementation = IMPLEMENTATIONS.get(type(op))
    if implementation is None:
        raise errors.op_not_interpreted(at=describe(op), op=op.name)
    return check_result(op, implementation(op, operands, frame), frame)


def check_result(op: Operation, result: Tensor, frame: Frame) -> Tensor:
    """The result, of which the op's type holds."""
    assert list(result.shape) == frame.shape(op.results[0]), f"{op.name}: {result.shape}"
    assert result.dtype == frame.dtype(dtype_of(op.results[0])), f"{op.name}: {result.dtype}"
    return result


@dataclass
class _OneRank(Machine[Tensor, Frame]):
    parameter_source: Parameters = field(kw_only=True)
    precision: Precision = field(kw_only=True)

    def enter(self, function: FuncOp, inputs: Sequence[Tensor]) -> tuple[Frame, list[Tensor]]:
        frame = Frame(self.precision, {}, self.parameter_source)
        return frame, accept_inputs(function, inputs, frame)

    def results(self, op: Operation, operands: Sequence[Tensor], frame: Frame) -> list[Tensor]:
        return [apply_op(op, operands, frame)]


def _register_elementwise() -> None:
    """Ops that are one PyTorch function of their operands."""
    elementwise: dict[type[Operation], Callable[..., Tensor]] = {
        nn.AddOp: torch.add,
        nn.SubOp: torch.sub,
        nn.MulOp: torch.mul,
        nn.DivOp: torch.div,
        nn.NegOp: torch.neg,
        nn.RsqrtOp: torch.rsqrt,
        nn.SqrtOp: torch.sqrt,
        nn.ExpOp: torch.exp,
        nn.SigmoidOp: torch.sigmoid,
        nn.SiluOp: F.silu,
        nn.TanhOp: torch.tanh,
        nn.CosOp: torch.cos,
        nn.SinOp: torch.sin,
        nn.MatmulOp: torch.matmul,
        nn.EmbeddingOp: F.embedding,
    }
    for op, function in elementwise.items():
        implements(op)(lambda _op, operands, _frame, function=function: function(*operands))


_register_elementwise()


@implements(nn.GetParameterOp)
def _get_parameter(op: nn.GetParameterOp, _: Sequence[Tensor], frame: Frame) -> Tensor:
    return frame.parameter(op.parameter_name, op.y)


@implements(nn.ConstantOp)
def _constant(op: nn.ConstantOp, _: Sequence[Tensor], frame: Frame) -> Tensor:
    dtype = dtype_of(op.y)
    data = torch.frombuffer(bytearray(op.value.data.data), dtype=TORCH_DTYPES[dtype])
    return data.reshape(frame.shape(op.y)).to(frame.dtype(dtype))


@implements(nn.GeluOp)
def _gelu(op: nn.GeluOp, operands: Sequence[Tensor], _: Frame) -> Tensor:
    return F.gelu(operands[0], approximate=op.approximate.data)


@implements(nn.LinearOp)
def _linear(op: nn.LinearOp, operands: Sequence[Tensor], frame: Frame) -> Tensor:
    dtype = frame.dtype(dtype_of(op.y))
    return F.linear(*(operand.to(dtype) for operand in operands))


@implements(nn.ScaleOp)
def _scale(op: nn.ScaleOp, operands: Sequence[Tensor], _: Frame) -> Tensor:
    return operands[0] * op.factor.value.data


@implements(nn.OffsetOp)
def _offset(op: nn.OffsetOp, operands: Sequence[Tensor], _: Frame) -> Tensor:
    return operands[0] + op.value.value.data


@implements(nn.PowOp)
def _pow(op: nn.PowOp, operands: Sequence[Tensor], _: Frame) -> Tensor:
    return torch.pow(operands[0], op.exponent.value.data)


@implements(nn.CastOp)
def _cast(op: nn.CastOp, operands: Sequence[Tensor], frame: Frame) -> Tensor:
    return operands[0].to(frame.dtype(dtype_of(op.y)))


@implements(nn.ReshapeOp)
def _reshape(op: nn.ReshapeOp, operands: Sequence[Tensor], frame: Frame) -> Tensor:
    return operands[0].reshape(frame.shape(op.y))


@implements(nn.TransposeOp)
def _transpose(op: nn.TransposeOp, operands: Sequence[Tensor], _: Frame) -> Tensor:
    return operands[0].transpose(op.dim0.value.data, op.dim1.value.data)


@implements(nn.SliceOp)
def _slice(op: nn.SliceOp, operands: Sequence[Tensor], _: Frame) -> Tensor:
    start, end = op.start.value.data, op.end.value.data
    return operands[0].narrow(op.dim.value.data, start, end - start)


@implements(nn.ConcatOp)
def _concat(op: nn.ConcatOp, operands: Sequence[Tensor], _: Frame) -> Tensor:
    return torch.cat(list(operands), dim=op.dim.value.data)


@implements(nn.ExpandOp)
def _expand(op: nn.ExpandOp, operands: Sequence[Tensor], frame: Frame) -> Tensor:
    return operands[0].expand(frame.shape(op.y))


@implements(nn.MeanOp)
def _mean(op: nn.MeanOp, operands: Sequence[Tensor], _: Frame) -> Tensor:
    return operands[0].mean(dim=op.dims.get_values(), keepdim=op.keepdim is not None)


@implements(nn.RmsNormOp)
def _rms_norm(op: nn.RmsNormOp, operands: Sequence[Tensor], _: Frame) -> Tensor:
    x, weight = operands
    wide = x.float()
    rows = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + op.eps.value.data)
    return rows.to(x.dtype) * weight


@implements(nn.RopeOp)
def _rope(op: nn.RopeOp, operands: Sequence[Tensor], _: Frame) -> Tensor:
    x, position_ids = operands
    inv_freq = torch.tensor(op.inv_freq.get_values(), dtype=torch.float32)
    scaling = op.attention_scaling.value.data
    angles = position_ids[:, None, :, None].float() * inv_freq
    cos = (torch.cat((angles, angles), dim=-1).cos() * scaling).to(x.dtype)
    sin = (torch.cat((angles, angles), dim=-1).sin() * scaling).to(x.dtype)
    rotary, tail = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = rotary.chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return torch.cat((rotary * cos + rotated * sin, tail), dim=-1)


@implements(nn.AttentionOp)
def _attention(op: nn.AttentionOp, operands: Sequence[Tensor], _: Frame) -> Tensor:
    q, k, v = operands
    heads_per_group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(heads_per_group, dim=1) for x in (k, v))
    tokens = torch.arange(q.shape[2])
    window = None if op.window is None else op.window.value.data
    visible = torch.ones(len(tokens), len(tokens), dtype=torch.bool)
    if op.causal is not None:
        visible &= tokens[None, :] <= tokens[:, None]
    if window is not None:
        visible &= tokens[None, :] > tokens[:, None] - window
    scores = torch.matmul(q, k.transpose(2, 3)) * op.scale.value.data
    scores = torch.where(visible, scores, -torch.inf)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(weights, v).transpose(1, 2)


@implements(paged.WriteOp)
def _paged_write(_op: paged.WriteOp, operands: Sequence[Tensor], _: Frame) -> Tensor:
    cache, k, v, slot_mapping = operands
    slots = slot_mapping.reshape(-1).long()
    real = (slots >= 0) & (slots < cache.shape[0])
    written = cache.clone()
    for index, x in enumerate((k, v)):
        written[slots[real], :, index] = x.transpose(1, 2).flatten(0, 1)[real]
    return written


@implements(paged.AttentionOp)
def _paged_attention(op: paged.AttentionOp, operands: Sequence[Tensor], _: Frame) -> Tensor:
    q, cache, block_table, lengths, position_ids, *scales = operands
    key_index = torch.arange(block_table.shape[1])
    positions = position_ids[:, :, None]
    visible = (key_index < lengths[:, None, None]) & (key_index <= positions)  # [B, T, A]
    if op.window is not None:
        visible &= key_index > positions - op.window.value.data
    used = visible.any(dim=1)  # [B, A]

    # Entries that no query sees may be no slots at all: slot 0 stands in, then zeros do.
    slots = torch.where(used, block_table, 0).long()
    keys_values = torch.where(used[:, :, None, None, None], cache[slots].float(), 0.0)
    heads_per_group = q.shape[1] // cache.shape[1]
    k, v = (
        x.transpose(1, 2).repeat_interleave(heads_per_group, dim=1)  # [B, Q, A, H]
        for x in keys_values.unbind(dim=3)
    )
    if scales:
        k, v = (quant_semantics.dequantize(x, s) for x, s in zip((k, v), scales, strict=True))
    scores = torch.matmul(q.float(), k.transpose(2, 3)) * op.scale.value.data
    seen = visible[:, None]
    scores = torch.where(seen, scores, -torch.inf)
    # A query that sees nothing has 0 / 0 here; selecting zeros gives it zeros.
    weights = torch.where(seen, torch.softmax(scores, dim=-1), 0.0)
    return _select_and_sum(weights, v, seen).transpose(1, 2).to(q.dtype)


def _select_and_sum(weights: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """`weights @ v`, where a value that one query sees does not reach another that does not.

    Only values that are not finite could (0 * NaN is NaN), so these are added apart.
    """
    finite = v.isfinite()
    y = torch.matmul(weights, torch.where(finite, v, 0.0))
    if finite.all():
        return y
    terms = weights[..., None] * torch.where(finite, 0.0, v)[:, :, None]
    return y + torch.where(seen[..., None], terms, 0.0).sum(dim=3)


@implements(paged.LastTokenOp)
def _last_token(_op: paged.LastTokenOp, operands: Sequence[Tensor], _: Frame) -> Tensor:
    x, lengths = operands
    rows = (lengths.long() - 1).clamp(0, x.shape[1] - 1)
    return x[torch.arange(x.shape[0]), rows][:, None]


@implements(quant.DynamicScaleOp)
def _dynamic_scale(op: quant.DynamicScaleOp, operands: Sequence[Tensor], _: Frame) -> Tensor:
    return quant_semantics.dynamic_scale(operands[0], op.group.value.data)


@implements(quant.QuantizeOp)
def _quantize(op: quant.QuantizeOp, operands: Sequence[Tensor], frame: Frame) -> Tensor:
    if frame.precision == "unrounded":
        return quant_semantics.clamped_quotient(*operands)
    return quant_semantics.quantize(*operands).to(frame.dtype(dtype_of(op.y)))


@implements(quant.DequantizeOp)
def _dequantize(op: quant.DequantizeOp, operands: Sequence[Tensor], frame: Frame) -> Tensor:
    return quant_semantics.dequantize(*operands).to(frame.dtype(dtype_of(op.y)))


@implements(quant.LinearOp)
def _quantized_linear(op: quant.LinearOp, operands: Sequence[Tensor], frame: Frame) -> Tensor:
    x, w, w_scale, *rest = operands
    if op.x_scale is not None:
        x = quant_semantics.dequantize(x, rest.pop(0))
    y = quant_semantics.linear(x, w, w_scale, rest[0] if rest else None, op.block)
    return y.to(frame.dtype(dtype_of(op.y)))
