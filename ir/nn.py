"""The `nn` dialect: tensor operators with PyTorch's semantics and names.

One convention for all ops: the constructor takes the operands by position and the attributes by
keyword, infers the type of the result `y`, and raises VerifyException if the operands do not fit.
Types that the operands do not determine are arguments (`dims` of reshape and expand, `dtype` of
cast). Set the location with `provenance.located`.

    x = nn.RmsNormOp(hidden, weight, eps=1e-5)
    q = nn.LinearOp(x.y, w_q.y, bias=None)
    heads = nn.TransposeOp(nn.ReshapeOp(q.y, ("batch", "seq", 9, 64)).y, dim0=1, dim1=2)
"""

from __future__ import annotations

from xdsl.ir import Dialect

from .nn_elementwise import (
    AddOp,
    BinaryOp,
    CastOp,
    CosOp,
    DivOp,
    ExpOp,
    GeluOp,
    MulOp,
    NegOp,
    OffsetOp,
    PowOp,
    RsqrtOp,
    ScaleOp,
    SigmoidOp,
    SiluOp,
    SinOp,
    SqrtOp,
    SubOp,
    TanhOp,
    UnaryOp,
)
from .nn_layers import AttentionOp, EmbeddingOp, LinearOp, MatmulOp, RmsNormOp, RopeOp
from .nn_parameters import ConstantOp, GetParameterOp, ParameterOp
from .nn_shape import ConcatOp, ExpandOp, MeanOp, ReshapeOp, SliceOp, TransposeOp
from .types import DimsAttr

__all__ = [
    "NN",
    "AddOp",
    "AttentionOp",
    "BinaryOp",
    "CastOp",
    "ConcatOp",
    "ConstantOp",
    "CosOp",
    "DimsAttr",
    "DivOp",
    "EmbeddingOp",
    "ExpOp",
    "ExpandOp",
    "GeluOp",
    "GetParameterOp",
    "LinearOp",
    "MatmulOp",
    "MeanOp",
    "MulOp",
    "NegOp",
    "OffsetOp",
    "ParameterOp",
    "PowOp",
    "ReshapeOp",
    "RmsNormOp",
    "RopeOp",
    "RsqrtOp",
    "ScaleOp",
    "SigmoidOp",
    "SiluOp",
    "SinOp",
    "SliceOp",
    "SqrtOp",
    "SubOp",
    "TanhOp",
    "TransposeOp",
    "UnaryOp",
]

NN = Dialect(
    "nn",
    [
        ParameterOp,
        GetParameterOp,
        ConstantOp,
        AddOp,
        SubOp,
        MulOp,
        DivOp,
        NegOp,
        RsqrtOp,
        SqrtOp,
        ExpOp,
        SigmoidOp,
        SiluOp,
        TanhOp,
        GeluOp,
        CosOp,
        SinOp,
        ScaleOp,
        OffsetOp,
        PowOp,
        CastOp,
        ReshapeOp,
        TransposeOp,
        SliceOp,
        ConcatOp,
        ExpandOp,
        MeanOp,
        MatmulOp,
        LinearOp,
        EmbeddingOp,
        RmsNormOp,
        RopeOp,
        AttentionOp,
    ],
    [DimsAttr],
)
