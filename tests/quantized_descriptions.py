"""Descriptions of checkpoints in which some linear layers of a program are quantised."""

from __future__ import annotations

from math import prod
from typing import get_args

from hypothesis import strategies as st
from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import Operation, SSAValue

from furiosa_llm.ir import nn
from furiosa_llm.ir.types import shape_of
from furiosa_llm.models.quantization import (
    DYNAMIC_TOKEN,
    NO_ACTIVATION,
    PER_CHANNEL,
    PER_TENSOR,
    STATIC_TENSOR,
    ActivationScheme,
    Quantization,
    QuantizedLinear,
    ScaleDtype,
    ScaleTensor,
    WeightScheme,
    per_block,
)


def schemes() -> st.SearchStrategy[WeightScheme]:
    blocks = st.builds(per_block, st.integers(1, 20), st.integers(1, 20))
    return st.one_of(st.just(PER_TENSOR), st.just(PER_CHANNEL), blocks)


def activations() -> st.SearchStrategy[ActivationScheme]:
    groups = [ActivationScheme("dynamic", "group", size) for size in (4, 8)]
    channel = ActivationScheme("static", "channel")
    return st.sampled_from([NO_ACTIVATION, STATIC_TENSOR, DYNAMIC_TOKEN, channel, *groups])


def stored_shapes(grid: tuple[int, int]) -> st.SearchStrategy[tuple[int, ...]]:
    """How formats store a grid of scales."""
    shapes: list[tuple[int, ...]] = [grid, (grid[0], 1, grid[1], 1)]
    if grid[1] == 1:
        shapes.append((grid[0],))
    if prod(grid) == 1:
        shapes.append(())
    return st.sampled_from(shapes)


def described(
    module: ModuleOp, draw: st.DataObject, activation: st.SearchStrategy[ActivationScheme]
) -> Quantization:
    """Some of the program's linears, each quantised in its own way."""
    users: dict[str, list[int | None]] = {}
    shapes = {}
    for op in module.walk():
        for operand in op.operands:
            if isinstance(operand.owner, nn.GetParameterOp):
                name = operand.owner.parameter_name
                users.setdefault(name, []).append(_first_row(op, operand))
                shapes[name] = shape_of(operand)
    linears = []
    for weight, begins in users.items():
        rows = [begin for begin in begins if begin is not None]
        if len(rows) == len(begins) and draw.draw(st.booleans(), label=weight):
            height, width = shapes[weight]
            linears.append(_linear(weight, (height, width), rows, draw, activation))
    return Quantization("compressed-tensors", tuple(linears))


def _first_row(op: Operation, parameter: SSAValue) -> int | None:
    """Where the layer begins in the weight that it takes, or takes a slice of; None if that is not
    all the op is."""
    match op:
        case nn.LinearOp(w=w) if w is parameter:
            return 0
        case nn.SliceOp() if op.dim.value.data == 0:
            products = [_first_row(use.operation, op.y) for use in op.y.uses]
            return op.start.value.data if products and None not in products else None
        case _:
            return None


def all_alike(module: ModuleOp, scheme: WeightScheme, inputs: ActivationScheme) -> Quantization:
    """All of a program's linears, whose inputs need no stored scale."""
    linears = (op for op in module.walk() if isinstance(op, nn.LinearOp))
    return Quantization("compressed-tensors", tuple(_alike(op, scheme, inputs) for op in linears))


def _alike(op: nn.LinearOp, scheme: WeightScheme, inputs: ActivationScheme) -> QuantizedLinear:
    assert isinstance(op.w.owner, nn.GetParameterOp)
    name, (rows, columns) = op.w.owner.parameter_name, shape_of(op.w)
    grid = scheme.grid_of((rows, columns))
    return QuantizedLinear(
        module=name.removesuffix(".weight"),
        weight=name,
        shape=(rows, columns),
        storage="e4m3",
        scheme=scheme,
        scale=ScaleTensor(f"{name}_scale", "bf16", grid, grid),
        activation=inputs,
        input_scale=None,
    )


def _linear(
    weight: str,
    shape: tuple[int, int],
    begins: list[int],
    draw: st.DataObject,
    activation: st.SearchStrategy[ActivationScheme],
) -> QuantizedLinear:
    columns = shape[1]
    scheme, inputs = draw.draw(schemes()), draw.draw(activation)
    if any(begin % scheme.block_of(shape)[0] for begin in begins):
        scheme = PER_CHANNEL
    if columns % (inputs.group_size or 1):
        inputs = NO_ACTIVATION
    grid = scheme.grid_of(shape)
    of_columns = inputs.granularity == "channel"
    static = ScaleTensor(f"{weight}_input", "f32", (columns,) if of_columns else (), (1, columns))
    dtype: ScaleDtype = draw.draw(st.sampled_from(get_args(ScaleDtype)))
    return QuantizedLinear(
        module=weight.removesuffix(".weight"),
        weight=weight,
        shape=shape,
        storage=draw.draw(st.sampled_from(["e4m3", "e5m2"])),
        scheme=scheme,
        scale=ScaleTensor(f"{weight}_scale", dtype, draw.draw(stored_shapes(grid)), grid),
        activation=inputs,
        input_scale=static if inputs.mode == "static" else None,
    )
