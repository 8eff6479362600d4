"""A program that is one matrix product: tensors in HBM -> the whole backend -> the simulator."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import Block, Region

from furiosa_llm.backend_rngd.emitter import Activation, Emitter, Ref
from furiosa_llm.backend_rngd.encode import content_attribute, encode_program
from furiosa_llm.backend_rngd.isa.layout import (
    WEIGHT_TYPES,
    BlockScaleLayout,
    FeatureOrder,
    Layout,
    RowsLayout,
    ScaleLayout,
    VectorLayout,
    Zeros,
    features_per_slice,
    one_number,
)
from furiosa_llm.backend_rngd.isa.ordering import check_order
from furiosa_llm.backend_rngd.isa.plan import SLICE_ADDRESS_BYTES, Memory
from furiosa_llm.backend_rngd.isa.program import Region as HbmRegion
from furiosa_llm.backend_rngd.isa.program import Relocation, TensorIo
from furiosa_llm.backend_rngd.kernels.linear import Scales, linear
from furiosa_llm.backend_rngd.kernels.linear_groups import product_type
from furiosa_llm.backend_rngd.kernels.rescale import load_number
from furiosa_llm.backend_rngd.pipeline import backend_phase
from furiosa_llm.backend_rngd.rngd import BlockOp, BufferType, CallOp, ProgramOp, RegionOp
from furiosa_llm.backend_rngd.tile import TilePass
from furiosa_llm.backend_rngd.tiling import MatmulTiling
from furiosa_llm.backend_rngd.tiling_search import ProductKey
from furiosa_llm.models.config_types import Bucket
from furiosa_llm.runtime_sim.device import Device

Array = np.ndarray[Any, Any]
SLICES = 64


@dataclass(frozen=True)
class Multipliers:
    """Of features [N] or blocks, and of everything (), as stored; of tokens [M], f32."""

    weight: Array
    number: Array
    tokens: Array


def run_product(
    key: ProductKey,
    tiling: MatmulTiling,
    x: Array,
    w: Array,
    bias: Array,
    residual: Array,
    scales: Multipliers | None = None,
) -> Array:
    """y [M, N] as f32, M of all groups; x [M, K], bias [N], residual [M, N] are bf16.

    w [N, K] is of the key's type.
    """
    module = ModuleOp([])
    module.body.block.add_op(ProgramOp("decode:1,8"))
    per_slice = features_per_slice(key.out)
    rows = key.tokens * key.groups
    layouts: dict[str, Layout] = {
        "w": RowsLayout(
            out=key.out,
            into=key.x,
            per_slice=per_slice,
            k_padded=key.shape.k,
            parts=key.shape.parts,
            dtype=WEIGHT_TYPES[key.weight_dtype],
        ),
        "bias": VectorLayout(order=key.out, per_slice=per_slice),
    }
    tensors = {"w": w, "bias": bias}
    inputs = {"x": _spread(x, key.x), "residual": _spread(residual, key.out)}
    extra = []
    if scales is not None:
        shape = scales.weight.shape
        layouts["scale"] = _scale_layout(key, shape)
        layouts["number"] = one_number(scales.number.shape)
        tensors |= {"scale": scales.weight, "number": scales.number}
        inputs["tokens"] = np.repeat(scales.tokens[:, None], 2, axis=1)
        table = TensorIo(name="tokens", dtype="f32", shape=(rows, 2), element_bytes=4, row_bytes=8)
        extra = [HbmRegion(name="tokens", input=table)]
    regions = [
        HbmRegion(name="x", input=_hidden("x", key.x, rows, "bf16")),
        HbmRegion(name="residual", input=_hidden("residual", key.out, rows, "bf16")),
        *(
            HbmRegion(
                name=name,
                parameter=Relocation(
                    tensor=name,
                    shape=tensors[name].shape,
                    begin=(0,) * tensors[name].ndim,
                    end=tensors[name].shape,
                    layout=layout,
                ),
            )
            for name, layout in layouts.items()
        ),
        HbmRegion(name="zeros", derived=Zeros(size=4 * rows * per_slice)),
        HbmRegion(name="y", output=_hidden("y", key.out, rows, key.dtype.name.lower())),
        *extra,
    ]
    ops = [RegionOp(r.name, content_attribute(r)) for r in regions]
    block = Block(arg_types=[BufferType(Memory.HBM, 0)] * len(ops))
    refs = {r.name: Ref(argument) for r, argument in zip(regions, block.args, strict=True)}
    _emit(Emitter(block), key, tiling, refs)
    for op in ops:
        module.body.block.add_op(op)
    module.body.block.add_op(BlockOp("product", Region(block)))
    module.body.block.add_op(CallOp("product", [op.buffer for op in ops]))
    for step in backend_phase(Bucket.decode(1, 8)):
        if not isinstance(step, TilePass):
            step.apply(Context(), module)
    program = encode_program(module, "product")
    check_order(program)
    device = Device()
    device.load(program, tensors.__getitem__)
    return _gathered(device.execute(program, inputs)["y"], key.out)


def _emit(
    emit: Emitter,
    key: ProductKey,
    tiling: MatmulTiling,
    refs: Mapping[str, Ref],
) -> None:
    y, zeros = refs["y"], refs["zeros"]
    product = product_type(tiling, blocks=key.block is not None)(
        emit,
        _loaded(emit, refs["x"], key.x, key),
        refs["w"],
        emit.activation(key.out, key.tokens, "y", key.dtype, key.groups),
        tiling,
        bias=refs["bias"] if key.bias else None,
        residual=_loaded(emit, refs["residual"], key.out, key) if key.residual else None,
        zeros=zeros,
        weight_dtype=key.weight_dtype,
        scales=_scales(emit, key, refs) if key.scales else None,
    )
    linear(product)
    for loops, run, inside, outside in _group_runs(product.y):
        back = [(n, b, a) for n, a, b in loops]
        emit.dma(back, run, inside, y.at(outside))
    if key.groups > 1 and product.y.slices_used < SLICES:
        size = key.tokens * key.groups * key.dtype.bytes_for(product.y.per_slice)
        buffer = emit.alloc(Memory.DM, size, "zeros")
        emit.dma([(SLICES, 0, SLICE_ADDRESS_BYTES)], size, zeros, buffer)
        rest = SLICES - product.y.slices_used
        emit.dma(
            [(rest, SLICE_ADDRESS_BYTES, size)], size, buffer, y.at(product.y.slices_used * size)
        )


def _scales(emit: Emitter, key: ProductKey, refs: Mapping[str, Ref]) -> Scales:
    size, ring = 8 * key.tokens, SLICES // key.groups
    tokens = emit.alloc(Memory.DM, size, "token_scales")
    loops = [(key.groups, size, ring * SLICE_ADDRESS_BYTES), (ring, 0, SLICE_ADDRESS_BYTES)]
    emit.dma(loops, size, refs["tokens"], tokens)
    number = load_number(emit, refs["number"])
    return Scales(
        refs["scale"],
        number if "number" in key.scales else None,
        tokens if "tokens" in key.scales else None,
        key.shape.cells,
    )


def _scale_layout(key: ProductKey, shape: tuple[int, ...]) -> Layout:
    per_slice = features_per_slice(key.out)
    if key.block is None:
        return ScaleLayout(order=key.out, per_slice=per_slice, shape=shape, rows=1)
    return BlockScaleLayout(
        out=key.out,
        into=key.x,
        per_slice=per_slice,
        k_padded=key.shape.k,
        parts=key.shape.parts,
        shape=shape,
        rows=key.block[0],
        columns=key.block[1],
    )


def _loaded(emit: Emitter, source: Ref, order: FeatureOrder, key: ProductKey) -> Activation:
    x = emit.activation(order, key.tokens, "x", groups=key.groups)
    for loops, run, inside, outside in _group_runs(x):
        emit.dma(loops, run, source.at(outside), inside)
    return x


def _group_runs(x: Activation) -> Iterator[tuple[list[tuple[int, int, int]], int, Ref, int]]:
    """(loops, run, place in DM, place in HBM) of x, which HBM holds as [slice, M, C]."""
    all_rows = x.tokens * x.groups
    row = x.dtype.bytes_for(x.per_slice)
    pieces = x.per_slice // x.unit
    for number in range(x.units if x.groups > 1 else 1):
        outside = number * x.ring // pieces * all_rows * row
        of_piece = row // pieces
        slices = SLICES if x.groups == 1 else min(x.ring // pieces, x.slices_used)
        loops = [
            (slices, all_rows * row, pieces * SLICE_ADDRESS_BYTES),
            (pieces, of_piece, SLICE_ADDRESS_BYTES),
            (x.groups, x.tokens * row, x.ring * SLICE_ADDRESS_BYTES),
            (x.tokens, row, of_piece),
        ]
        yield loops, of_piece, x.place(number * x.unit), outside


def _hidden(name: str, order: FeatureOrder, tokens: int, dtype: Any) -> TensorIo:
    size = 4 if dtype == "f32" else 2
    per_slice = features_per_slice(order)
    return TensorIo(
        name=name,
        dtype=dtype,
        shape=(SLICES, tokens, per_slice),
        element_bytes=size,
        row_bytes=size * per_slice,
    )


def _features(order: FeatureOrder) -> Array:
    """i64[64·C]: the feature at each position, -1 for padding."""
    found = order.feature_at()
    size = SLICES * features_per_slice(order)
    return np.concatenate([found, np.full(size - len(found), -1)])


def _spread(values: Array, order: FeatureOrder) -> Array:
    """[M, N] -> [slice, M, C], padding zero."""
    features = _features(order)
    spread = np.where(features < 0, 0, values[:, features].astype(np.float32))
    spread = spread.reshape(len(values), SLICES, -1).swapaxes(0, 1)
    return np.ascontiguousarray(spread).astype(ml_dtypes.bfloat16)


def _gathered(y: Array, order: FeatureOrder) -> Array:
    """[slice, M, C] -> f32 [M, N]; what stands at padding positions that are read must be zero."""
    features = _features(order)
    flat = y.swapaxes(0, 1).reshape(y.shape[1], -1).astype(np.float32)
    used = -(-order.positions // features_per_slice(order)) * features_per_slice(order)
    assert not flat[:, :used][:, features[:used] < 0].any()
    out = np.empty((len(flat), order.features), np.float32)
    out[:, features[features >= 0]] = flat[:, features >= 0]
    return out
