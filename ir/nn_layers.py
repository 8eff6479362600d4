"""`nn` ops that are layers of a transformer: products, norms, positions, attention.

Shape letters: B sequences, T tokens, D model, Q query heads, G KV heads, H head size,
V vocabulary; M, K, N for a matmul.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from xdsl.dialects.builtin import (
    DenseArrayBase,
    Float32Type,
    Float64Type,
    FloatAttr,
    IntegerAttr,
    IntegerType,
    UnitAttr,
)
from xdsl.ir import Attribute, SSAValue
from xdsl.irdl import (
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
from .types import (
    FLOAT_TENSOR,
    I64_ATTR,
    INT_TENSOR,
    AnyTensor,
    broadcast,
    dims_of,
    dtype_of,
    expect_dims,
    expect_rank,
    expect_same_dtype,
    expect_type,
    f32,
    f64,
    i64,
    tensor,
)

I64 = IntegerAttr[IntegerType]


@irdl_op_definition
class MatmulOp(IRDLOperation):
    """Compute `y = a @ b`, summed in f32 and rounded once; leading dims broadcast.

    Shapes: a [..., M, K], b [..., K, N] -> y [..., M, N].
    """

    name = "nn.matmul"

    a = operand_def(FLOAT_TENSOR)
    b = operand_def(FLOAT_TENSOR)
    y = result_def(FLOAT_TENSOR)

    traits = traits_def(Pure())

    assembly_format = "$a `,` $b attr-dict `:` type($a) `,` type($b) `->` type($y)"

    def __init__(self, a: SSAValue, b: SSAValue) -> None:
        super().__init__(operands=[a, b], result_types=[self.infer(a, b)])

    @staticmethod
    def infer(a: SSAValue, b: SSAValue) -> AnyTensor:
        expect_same_dtype(a=a, b=b)
        a_dims, b_dims = dims_of(a), dims_of(b)
        if len(a_dims) < 2 or len(b_dims) < 2:
            raise VerifyException("a and b have at least two dimensions")
        if a_dims[-1] != b_dims[-2]:
            raise VerifyException(f"a has K = {a_dims[-1]} but b has K = {b_dims[-2]}")
        batch = broadcast(a_dims[:-2], b_dims[:-2])
        return tensor((*batch, a_dims[-2], b_dims[-1]), dtype_of(a))

    def verify_(self) -> None:
        expect_type(self.y, self.infer(self.a, self.b))


@irdl_op_definition
class LinearOp(IRDLOperation):
    """Compute `y = x @ w.T + bias`, summed in f32 and rounded once to y's type.

    y has x's element type, or f32: then it is a sum that is not rounded yet.

    Shapes: x [..., K], w [N, K], bias [N] -> y [..., N].
    """

    name = "nn.linear"

    x = operand_def(FLOAT_TENSOR)
    w = operand_def(FLOAT_TENSOR)
    bias = opt_operand_def(FLOAT_TENSOR)
    y = result_def(FLOAT_TENSOR)

    traits = traits_def(Pure())

    assembly_format = (
        "$x `,` $w (`bias` $bias^)? attr-dict"
        " `:` type($x) `,` type($w) (`bias` type($bias)^)? `->` type($y)"
    )

    def __init__(
        self,
        x: SSAValue,
        w: SSAValue,
        bias: SSAValue | None = None,
        *,
        dtype: Attribute | None = None,
    ) -> None:
        """`dtype` is y's, if it is not x's."""
        y = tensor(dims_of(self.infer(x, w, bias)), dtype or dtype_of(x))
        super().__init__(operands=[x, w, bias], result_types=[y])

    @staticmethod
    def infer(x: SSAValue, w: SSAValue, bias: SSAValue | None) -> AnyTensor:
        expect_same_dtype(x=x, w=w, bias=bias)
        x_dims = dims_of(x)
        if not x_dims:
            raise VerifyException("x has at least one dimension")
        n, k = expect_rank("w", w, 2)
        if x_dims[-1] != k:
            raise VerifyException(f"x has K = {x_dims[-1]} but w has K = {k}")
        if bias is not None:
            expect_dims("bias", bias, (n,))
        return tensor((*x_dims[:-1], n), dtype_of(x))

    def verify_(self) -> None:
        rounded = self.infer(self.x, self.w, self.bias)
        if dtype_of(self.y) == f32:
            rounded = tensor(dims_of(rounded), f32)
        expect_type(self.y, rounded)


@irdl_op_definition
class EmbeddingOp(IRDLOperation):
    """Look up one row of `table` per id.

    Shapes: ids [...], table [V, D] -> y [..., D].
    """

    name = "nn.embedding"

    ids = operand_def(INT_TENSOR)
    table = operand_def(FLOAT_TENSOR)
    y = result_def(FLOAT_TENSOR)

    traits = traits_def(Pure())

    assembly_format = "$ids `,` $table attr-dict `:` type($ids) `,` type($table) `->` type($y)"

    def __init__(self, ids: SSAValue, table: SSAValue) -> None:
        super().__init__(operands=[ids, table], result_types=[self.infer(ids, table)])

    @staticmethod
    def infer(ids: SSAValue, table: SSAValue) -> AnyTensor:
        _, width = expect_rank("table", table, 2)
        return tensor((*dims_of(ids), width), dtype_of(table))

    def verify_(self) -> None:
        expect_type(self.y, self.infer(self.ids, self.table))


@irdl_op_definition
class RmsNormOp(IRDLOperation):
    """Divide each row by its root mean square, then multiply by `weight`.

    `y = (x * rsqrt(mean(x * x) + eps)).to(dtype) * weight`, in f32 up to the rounding to x's
    dtype, which comes before the product with the weight (as Llama does).

    Shapes: x [..., D], weight [D] -> y [..., D].
    """

    name = "nn.rms_norm"

    x = operand_def(FLOAT_TENSOR)
    weight = operand_def(FLOAT_TENSOR)
    eps = prop_def(FloatAttr[Float64Type])
    y = result_def(FLOAT_TENSOR)

    traits = traits_def(Pure())

    custom_directives = (Exact,)
    assembly_format = (
        "$x `,` $weight `eps` custom<Exact>($eps) attr-dict"
        " `:` type($x) `,` type($weight) `->` type($y)"
    )

    def __init__(self, x: SSAValue, weight: SSAValue, *, eps: float) -> None:
        super().__init__(
            operands=[x, weight],
            result_types=[self.infer(x, weight)],
            properties={"eps": FloatAttr(eps, f64)},
        )

    @staticmethod
    def infer(x: SSAValue, weight: SSAValue) -> AnyTensor:
        expect_same_dtype(x=x, weight=weight)
        if not dims_of(x):
            raise VerifyException("x has at least one dimension")
        expect_dims("weight", weight, dims_of(x)[-1:])
        return tensor(dims_of(x), dtype_of(x))

    def verify_(self) -> None:
        expect_type(self.y, self.infer(self.x, self.weight))
        if not 0 <= self.eps.value.data < math.inf:
            raise VerifyException(f"eps is finite and not negative, not {self.eps.value.data}")


@irdl_op_definition
class RopeOp(IRDLOperation):
    """Rotate the first 2n of H elements by the position's angles; the tail passes through.

    n = len(inv_freq). Element i pairs with element i + n ("rotate half"): with the angles
    `a = position * inv_freq` in f32, `cos` and `sin` of `a` times `attention_scaling` are rounded
    to x's dtype, and `y = x * cos + rotate_half(x) * sin` in that dtype.

    Shapes: x [B, Q, T, H], position_ids [B, T] -> y [B, Q, T, H].
    """

    name = "nn.rope"

    x = operand_def(FLOAT_TENSOR)
    position_ids = operand_def(INT_TENSOR)
    inv_freq = prop_def(DenseArrayBase.constr(f32))
    attention_scaling = prop_def(FloatAttr[Float32Type])
    y = result_def(FLOAT_TENSOR)

    traits = traits_def(Pure())

    custom_directives = (Exact,)
    assembly_format = (
        "$x `,` $position_ids `scaling` custom<Exact>($attention_scaling)"
        " `inv_freq` custom<Exact>($inv_freq) attr-dict"
        " `:` type($x) `,` type($position_ids) `->` type($y)"
    )

    def __init__(
        self,
        x: SSAValue,
        position_ids: SSAValue,
        *,
        inv_freq: Sequence[float],
        attention_scaling: float = 1.0,
    ) -> None:
        """`inv_freq` and `attention_scaling` are rounded to f32."""
        super().__init__(
            operands=[x, position_ids],
            result_types=[self.infer(x, position_ids)],
            properties={
                "inv_freq": DenseArrayBase.from_list(f32, inv_freq),
                "attention_scaling": FloatAttr(attention_scaling, f32),
            },
        )

    @staticmethod
    def infer(x: SSAValue, position_ids: SSAValue) -> AnyTensor:
        batch, _, seq, _ = expect_rank("x", x, 4)
        expect_dims("position_ids", position_ids, (batch, seq))
        return tensor(dims_of(x), dtype_of(x))

    def verify_(self) -> None:
        expect_type(self.y, self.infer(self.x, self.position_ids))
        frequencies = self.inv_freq.get_values()
        if not frequencies or not all(math.isfinite(f) for f in frequencies):
            raise VerifyException("inv_freq has at least one value, and all are finite")
        size = dims_of(self.x)[3]
        if isinstance(size, str) or 2 * len(frequencies) > size:
            raise VerifyException(
                f"inv_freq has {len(frequencies)} values, more than half of H = {size}"
            )
        if not math.isfinite(self.attention_scaling.value.data):
            raise VerifyException("attention_scaling is finite")


@irdl_op_definition
class AttentionOp(IRDLOperation):
    """Scaled dot-product attention over the tokens of one call, before there are caches.

    `softmax(q @ k.T * scale) @ v` per head with the softmax in f32, as eager transformers does;
    Q is a multiple of G and each KV head serves Q / G query heads. With `causal`, token t sees
    tokens j <= t; with `window` only those with j > t - window. `layer` numbers the layer in the
    model, so that a cache can be found for it.

    Shapes: q [B, Q, T, H], k and v [B, G, T, H] -> y [B, T, Q, H].
    """

    name = "nn.attention"

    q = operand_def(FLOAT_TENSOR)
    k = operand_def(FLOAT_TENSOR)
    v = operand_def(FLOAT_TENSOR)
    scale = prop_def(FloatAttr[Float64Type])
    causal = opt_prop_def(UnitAttr)
    window = opt_prop_def(I64_ATTR)
    layer = opt_prop_def(I64_ATTR)
    y = result_def(FLOAT_TENSOR)

    traits = traits_def(Pure())

    custom_directives = (Exact,)
    assembly_format = (
        "$q `,` $k `,` $v `scale` custom<Exact>($scale) (`causal` $causal^)? (`window` $window^)?"
        " (`layer` $layer^)? attr-dict `:` type($q) `,` type($k) `,` type($v) `->` type($y)"
    )

    def __init__(
        self,
        q: SSAValue,
        k: SSAValue,
        v: SSAValue,
        *,
        scale: float,
        causal: bool = True,
        window: int | None = None,
        layer: int | None = None,
    ) -> None:
        super().__init__(
            operands=[q, k, v],
            result_types=[self.infer(q, k, v)],
            properties={
                "scale": FloatAttr(scale, f64),
                "causal": UnitAttr() if causal else None,
                "window": None if window is None else IntegerAttr(window, i64),
                "layer": None if layer is None else IntegerAttr(layer, i64),
            },
        )

    @staticmethod
    def infer(q: SSAValue, k: SSAValue, v: SSAValue) -> AnyTensor:
        expect_same_dtype(q=q, k=k, v=v)
        batch, heads, seq, size = expect_rank("q", q, 4)
        groups = expect_rank("k", k, 4)[1]
        expect_dims("k", k, (batch, groups, seq, size))
        expect_dims("v", v, (batch, groups, seq, size))
        if isinstance(heads, str) or isinstance(groups, str) or heads % groups:
            raise VerifyException(f"Q = {heads} is not a multiple of G = {groups}")
        return tensor((batch, seq, heads, size), dtype_of(q))

    def verify_(self) -> None:
        expect_type(self.y, self.infer(self.q, self.k, self.v))
        check_attention(self.scale, self.window)
        if self.layer is not None and self.layer.value.data < 0:
            raise VerifyException(f"layer is not negative, but it is {self.layer.value.data}")


def check_attention(scale: FloatAttr[Float64Type], window: I64 | None) -> None:
    """What `nn.attention` and `paged.attention` both ask of their attributes."""
    if not math.isfinite(scale.value.data):
        raise VerifyException("scale is finite")
    if window is not None and window.value.data < 1:
        raise VerifyException(f"window is at least 1, but it is {window.value.data}")
