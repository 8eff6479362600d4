"""Operators that one product computes together: see `fusion`."""

from __future__ import annotations

from dataclasses import replace

from xdsl.ir import Operation, SSAValue

from ..ir import paged, quant
from ..ir.types import shape_of
from .block_state import BlockState
from .emitter import Activation, Ref
from .fusion import Fusion, Gated, KeysValues, ReducedResidual, Residual
from .isa.layout import plain
from .kernels import rows
from .kernels.cache import write_joined
from .kernels.linear import linear
from .kernels.linear_groups import JoinedProduct, can_join
from .kernels.linear_tokens import gated
from .kernels.rope import rope
from .lower_attention import angles_of
from .lower_products import key_of, output_of, product_of, tiling_of
from .lower_sums import all_reduce
from .tiling import Role
from .tokens import INDEX_BYTES
from .value_uses import is_last_use, is_returned


def lower_fused(state: BlockState, op: Operation, fusion: Fusion) -> bool:
    """Emit operators as one product; False, and nothing, where that is not possible."""
    if isinstance(fusion, KeysValues):
        return _keys_values(state, op, fusion)
    if isinstance(fusion, Gated):
        return _gated(state, op, fusion)
    if isinstance(fusion, ReducedResidual):
        return _reduced_with_residual(state, op, fusion)
    return _with_residual(state, op, fusion)


def _gated(state: BlockState, op: Operation, fusion: Gated) -> bool:
    keys = {x: key_of(state, x) for x in (fusion.gate, fusion.up)}
    first, second = (tiling_of(state, x, key) for x, key in keys.items())
    same = replace(first, predicted=None) == replace(second, predicted=None)
    if first.role != Role.TOKENS or not same or op.results[0] in state.wide:
        return False
    y = output_of(state, fusion.gate)
    gate, up = (product_of(state, x, key, y) for x, key in keys.items())
    state.emit.location = op.location
    gated(gate, up, fusion.activation.name)
    state.values[op.results[0]] = y
    return True


def _keys_values(state: BlockState, op: Operation, fusion: KeysValues) -> bool:
    assert isinstance(op, paged.WriteOp)
    keys = {x: key_of(state, x) for x in (fusion.keys, fusion.values)}
    first, second = (replace(tiling_of(state, x, key), predicted=None) for x, key in keys.items())
    orders = [(key.out.heads, key.out.padded) for key in keys.values()]
    y = output_of(state, fusion.keys)
    if not (first == second and orders[0] == orders[1] and orders[0][0] == 1 and can_join(y)):
        return False
    both, values = (product_of(state, x, key, replace(y, order=key.out)) for x, key in keys.items())
    product = JoinedProduct(
        state.emit,
        both.x,
        both.weight,
        y,
        both.tiling,
        location=both.location,
        second=values.weight,
    )
    linear(product)
    state.emit.location = fusion.rope.location
    rotated = rope(state.emit, y, angles_of(state, fusion.rope, y), "rotated")
    state.emit.location = op.location
    if isinstance(op.k.owner, quant.QuantizeOp) and isinstance(op.v.owner, quant.QuantizeOp):
        scales = state.now.scales
        rotated, y = scales.apply(op.k.owner, rotated), scales.apply(op.v.owner, y)
    slots = state.input(op.slot_mapping, INDEX_BYTES, state.shape.row_bytes("slot_mapping"))
    write_joined(state.emit, y, rotated, state.cache(op.cache), slots, INDEX_BYTES)
    return True


def _with_residual(state: BlockState, op: Operation, fusion: Residual) -> bool:
    key = key_of(state, fusion.linear)
    if tiling_of(state, fusion.linear, key).role != Role.TOKENS or op.results[0] in state.wide:
        return False
    residual = _residual(state, fusion.other)
    if residual.order != key.out:
        return False
    # A tile of the sum takes the place of the residual's, if nobody else wants it.
    y = residual if is_last_use(fusion.other, op) else output_of(state, fusion.linear)
    product = product_of(state, fusion.linear, replace(key, residual=True), y)
    linear(replace(product, residual=residual))
    if state.groups > 1 and not is_returned(op.results[0]):
        state.now.parked.add(op.results[0])
    state.values[op.results[0]] = product.y
    return True


def _reduced_with_residual(state: BlockState, op: Operation, fusion: ReducedResidual) -> bool:
    state.values[op.results[0]] = all_reduce(state, fusion.reduce, op.results[0], fusion.other)
    return True


def _residual(state: BlockState, value: SSAValue) -> Activation:
    """A residual; one that stands in HBM comes when it is added."""
    first, parked = state.chunk.first(state.shape), value in state.now.parked
    if state.groups == 1 or (value in state.values and not parked):
        return state.of(value)
    if parked:
        x = state.values[value]
        state.store_crossing(value, x)
        source = state.need(state.crossings[value], first * x.row_bytes)
    else:
        order = plain(shape_of(value)[-1])
        tokens = state.chunk.count // state.groups
        x = state.emit.activation(order, tokens, "residual", groups=state.groups)
        source = state.argument(value, first * x.row_bytes)

    def fetch(unit: int, place: Ref) -> None:
        rows.load_unit(state.emit, source, x, state.shape.all_tokens, unit, place)

    return state.emit.fetched_activation(x, fetch, split=parked)
