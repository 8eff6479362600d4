"""Products in a block: their tilings, their weights' layouts, and where results go."""

from __future__ import annotations

from dataclasses import replace

from xdsl.ir import Operation

from ..ir.types import shape_of
from .block_state import BlockState
from .emitter import Activation
from .isa.layout import WEIGHT_TYPES, FeatureOrder, RowsLayout, VectorLayout, Zeros, plain
from .isa.machine import load_machine
from .kernels.linear import Product, linear
from .kernels.linear_groups import product_type
from .kernels.linear_limits import check_tiling
from .lower_quant import block_of, scale_names, weight_dtype
from .lower_sums import room
from .rngd import TilingOp
from .tiling import MatmulTiling, ProductName, pinned
from .tiling_search import ProductKey, predict, runner_up, search
from .value_uses import Linear, is_read_by_heads, module_of


def lower_linear(state: BlockState, op: Linear) -> Activation:
    """A product by itself."""
    product = product_of(state, op, key_of(state, op), output_of(state, op))
    linear(product)
    return product.y


def key_of(state: BlockState, op: Linear) -> ProductKey:
    """What the choice of a tiling depends on."""
    x = state.of(op.x)
    return ProductKey(
        x.order,
        _order_of(state, op),
        x.tokens,
        state.dtype_of(op.y),
        op.bias is not None,
        weight_dtype=weight_dtype(op),
        scales=scale_names(op),
        may_repeat=is_read_by_heads(op.y),
        groups=state.groups,
        block=block_of(op),
    )


def _order_of(state: BlockState, op: Linear) -> FeatureOrder:
    return state.orders.get(op.y) or plain(shape_of(op.w)[0])


def output_of(state: BlockState, op: Linear) -> Activation:
    """Where the product is to be written."""
    return room(state, op.y, _order_of(state, op), state.of(op.x).tokens)


def product_of(state: BlockState, op: Linear, key: ProductKey, y: Activation) -> Product:
    """The product, and the record of its tiling: the caller emits it and no other."""
    state.emit.location = op.location
    tiling = tiling_of(state, op, key)
    other = runner_up(key, tiling, load_machine()) if state.compare else None
    name, next_best = str(_product_name(state, op, key)), other.to_text() if other else None
    state.emit.append(TilingOp(name, tiling.to_text(), next_best))
    x = state.of(op.x)
    layout = RowsLayout(
        out=y.order,
        into=x.order,
        per_slice=y.per_slice,
        k_padded=x.slices_read * x.per_slice,
        parts=tiling.k_split,
        dtype=WEIGHT_TYPES[key.weight_dtype],
    )
    bias = None
    if op.bias is not None:
        bias = state.parameter(op.bias, VectorLayout(order=y.order, per_slice=y.per_slice))
    weight = state.parameter(op.w, layout)
    zeros = None if tiling.every_slice else state.need(Zeros(size=y.size_bytes))
    return product_type(tiling, blocks=key.block is not None)(
        state.emit,
        x,
        weight,
        y,
        tiling,
        bias,
        zeros=zeros,
        weight_dtype=key.weight_dtype,
        scales=state.now.scales.of_product(op, key, y),
        location=op.location,
    )


def tiling_of(state: BlockState, op: Operation, key: ProductKey) -> MatmulTiling:
    """The product's pin if there is one, else what the search finds. Raises: BCK006."""
    machine, product = load_machine(), _product_name(state, op, key)
    tiling = pinned(state.pins, product)
    if tiling is None:
        return search(key, machine)
    check_tiling(key.shape, tiling, product.module)
    return replace(tiling, predicted=predict(key, tiling, machine))


def _product_name(state: BlockState, op: Operation, key: ProductKey) -> ProductName:
    return ProductName(
        state.function.sym_name.data, module_of(op), state.parts.get(op, 0), key.tokens
    )
