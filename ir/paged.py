"""The `paged` dialect: KV caches as values, and attention that reads them through block tables.

A cache holds one layer: `[S, G, 2, H]` with S slots, and K at index 0, V at index 1 of its third
dimension, so that a token's K and V lie in one run. Shape letters: B sequences, T tokens, A keys
that a sequence may see, Q query heads, G KV heads, H head size, D model.
A cache may hold codes: attention then has a scale for K and one for V, as in `quant`.
Constructors follow the convention of `nn`.
"""

from __future__ import annotations

import math

from xdsl.dialects.builtin import Float64Type, FloatAttr, IntegerAttr
from xdsl.ir import Attribute, Dialect, SSAValue
from xdsl.irdl import (
    AttrSizedOperandSegments,
    IRDLOperation,
    irdl_op_definition,
    operand_def,
    opt_operand_def,
    opt_prop_def,
    prop_def,
    result_def,
    traits_def,
)
from xdsl.traits import Pure
from xdsl.utils.exceptions import VerifyException

from .exact_floats import Exact
from .nn_layers import check_attention
from .types import (
    CACHE_TENSOR,
    FLOAT_TENSOR,
    I64_ATTR,
    INT_TENSOR,
    SCALE_TENSOR,
    AnyTensor,
    Dim,
    dims_of,
    dtype_of,
    expect_dims,
    expect_rank,
    expect_same_dtype,
    expect_type,
    f8e4m3,
    f64,
    i64,
    shape_of,
    show_dims,
    tensor,
)


def cache_type(groups: int, head_size: int, dtype: Attribute, slots: Dim = "slots") -> AnyTensor:
    """The type of one layer's cache."""
    return tensor((slots, groups, 2, head_size), dtype)


@irdl_op_definition
class WriteOp(IRDLOperation):
    """Put the K and V of each token into its slot; the result is the cache afterwards.

    A token whose slot is outside 0 to S - 1 is padding and is not written. If two tokens name
    one slot, the slot holds either of them. Codes go to a cache of codes.

    Shapes: cache [S, G, 2, H], k and v [B, G, T, H], slot_mapping [B, T] -> y [S, G, 2, H].
    """

    name = "paged.write"

    cache = operand_def(CACHE_TENSOR)
    k = operand_def(CACHE_TENSOR)
    v = operand_def(CACHE_TENSOR)
    slot_mapping = operand_def(INT_TENSOR)
    y = result_def(CACHE_TENSOR)

    traits = traits_def(Pure())

    assembly_format = (
        "$cache `,` $k `,` $v `,` $slot_mapping attr-dict"
        " `:` type($cache) `,` type($k) `,` type($v) `,` type($slot_mapping) `->` type($y)"
    )

    def __init__(self, cache: SSAValue, k: SSAValue, v: SSAValue, slot_mapping: SSAValue) -> None:
        super().__init__(
            operands=[cache, k, v, slot_mapping],
            result_types=[self.infer(cache, k, v, slot_mapping)],
        )

    @staticmethod
    def infer(cache: SSAValue, k: SSAValue, v: SSAValue, slot_mapping: SSAValue) -> AnyTensor:
        expect_same_dtype(cache=cache, k=k, v=v)
        batch, groups, seq, size = expect_rank("k", k, 4)
        expect_dims("v", v, dims_of(k))
        expect_dims("slot_mapping", slot_mapping, (batch, seq))
        slots = expect_rank("cache", cache, 4)[0]
        expect_dims("cache", cache, (slots, groups, 2, size))
        return tensor(dims_of(cache), dtype_of(cache))

    def verify_(self) -> None:
        expect_type(self.y, self.infer(self.cache, self.k, self.v, self.slot_mapping))


@irdl_op_definition
class AttentionOp(IRDLOperation):
    """Attention of the queries to keys and values in the cache, in f32, rounded once.

    Key j of sequence b lies in slot `block_table[b, j]`. Query (b, t) at position
    `p = position_ids[b, t]` sees key j if j < lengths[b] and j <= p and, with `window`,
    j > p - window. Keys and values that a query does not see are selected away before any
    product, so they may hold anything, NaN too, and their table entries need not be slots.
    A query that sees no key gives zeros.

    In a cache of codes K is `codes * k_scale` and V is `codes * v_scale`, both in f32.

    Shapes: q [B, Q, T, H], cache [S, G, 2, H], block_table [B, A], lengths [B],
    position_ids [B, T], k_scale and v_scale of one element -> y [B, T, Q, H].
    """

    name = "paged.attention"

    q = operand_def(FLOAT_TENSOR)
    cache = operand_def(CACHE_TENSOR)
    block_table = operand_def(INT_TENSOR)
    lengths = operand_def(INT_TENSOR)
    position_ids = operand_def(INT_TENSOR)
    k_scale = opt_operand_def(SCALE_TENSOR)
    v_scale = opt_operand_def(SCALE_TENSOR)
    scale = prop_def(FloatAttr[Float64Type])
    window = opt_prop_def(I64_ATTR)
    y = result_def(FLOAT_TENSOR)

    irdl_options = (AttrSizedOperandSegments(as_property=True),)
    traits = traits_def(Pure())

    custom_directives = (Exact,)
    assembly_format = (
        "$q `,` $cache `,` $block_table `,` $lengths `,` $position_ids"
        " (`k_scale` $k_scale^)? (`v_scale` $v_scale^)?"
        " `scale` custom<Exact>($scale) (`window` $window^)? attr-dict `:` type($q) `,`"
        " type($cache) `,` type($block_table) `,` type($lengths) `,` type($position_ids)"
        " (`k_scale` type($k_scale)^)? (`v_scale` type($v_scale)^)? `->` type($y)"
    )

    def __init__(
        self,
        q: SSAValue,
        cache: SSAValue,
        block_table: SSAValue,
        lengths: SSAValue,
        position_ids: SSAValue,
        k_scale: SSAValue | None = None,
        v_scale: SSAValue | None = None,
        *,
        scale: float,
        window: int | None = None,
    ) -> None:
        super().__init__(
            operands=[q, cache, block_table, lengths, position_ids, k_scale, v_scale],
            result_types=[self.infer(q, cache, block_table, lengths, position_ids)],
            properties={
                "scale": FloatAttr(scale, f64),
                "window": None if window is None else IntegerAttr(window, i64),
            },
        )

    @staticmethod
    def infer(
        q: SSAValue,
        cache: SSAValue,
        block_table: SSAValue,
        lengths: SSAValue,
        position_ids: SSAValue,
    ) -> AnyTensor:
        if not holds_codes(cache):
            expect_same_dtype(q=q, cache=cache)
        batch, heads, seq, size = expect_rank("q", q, 4)
        slots, groups, _, _ = expect_rank("cache", cache, 4)
        expect_dims("cache", cache, (slots, groups, 2, size))
        width = expect_rank("block_table", block_table, 2)[1]
        expect_dims("block_table", block_table, (batch, width))
        expect_dims("lengths", lengths, (batch,))
        expect_dims("position_ids", position_ids, (batch, seq))
        if isinstance(heads, str) or isinstance(groups, str) or heads % groups:
            raise VerifyException(f"Q = {heads} is not a multiple of G = {groups}")
        return tensor((batch, seq, heads, size), dtype_of(q))

    def verify_(self) -> None:
        operands = (self.q, self.cache, self.block_table, self.lengths, self.position_ids)
        expect_type(self.y, self.infer(*operands))
        check_attention(self.scale, self.window)
        scales = {"k_scale": self.k_scale, "v_scale": self.v_scale}
        for name, scale in scales.items():
            if (scale is not None) != holds_codes(self.cache):
                raise VerifyException(f"there is a {name} exactly if the cache holds codes")
            if scale is not None and math.prod(shape_of(scale)) != 1:
                raise VerifyException(
                    f"{name} is one number, but it is {show_dims(dims_of(scale))}"
                )


def holds_codes(cache: SSAValue) -> bool:
    return dtype_of(cache) == f8e4m3


@irdl_op_definition
class LastTokenOp(IRDLOperation):
    """The row of each sequence's last token: `x[b, min(lengths[b], T) - 1]`, row 0 if that is -1.

    In a decode step `lengths` counts the cached tokens too, and the one row is the last.

    Shapes: x [B, T, D], lengths [B] -> y [B, 1, D].
    """

    name = "paged.last_token"

    x = operand_def(FLOAT_TENSOR)
    lengths = operand_def(INT_TENSOR)
    y = result_def(FLOAT_TENSOR)

    traits = traits_def(Pure())

    assembly_format = "$x `,` $lengths attr-dict `:` type($x) `,` type($lengths) `->` type($y)"

    def __init__(self, x: SSAValue, lengths: SSAValue) -> None:
        super().__init__(operands=[x, lengths], result_types=[self.infer(x, lengths)])

    @staticmethod
    def infer(x: SSAValue, lengths: SSAValue) -> AnyTensor:
        batch, _, width = expect_rank("x", x, 3)
        expect_dims("lengths", lengths, (batch,))
        return tensor((batch, 1, width), dtype_of(x))

    def verify_(self) -> None:
        expect_type(self.y, self.infer(self.x, self.lengths))


PAGED = Dialect("paged", [WriteOp, AttentionOp, LastTokenOp], [])
