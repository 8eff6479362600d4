"""Small random programs in the form of the import, for tests that hold passes to contracts.

A program is an embedding, some layers and a head; a layer is a list of gadgets, each of which
maps a stream [B, T, D] to another one and holds something that a pass looks for. Layers of one
kind are equal but for their parameters, and ops carry the module paths of a real model.
Also the Llama-shaped case: `norm`, `attention` and `gated_mlp` are what PyTorch exports for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from hypothesis import strategies as st
from xdsl.dialects.builtin import ModuleOp
from xdsl.dialects.func import FuncOp, ReturnOp
from xdsl.ir import Attribute, Block, Operation, Region, SSAValue

from furiosa_llm.ir import nn, quant
from furiosa_llm.ir.provenance import located, make
from furiosa_llm.ir.types import bf16, dims_of, f32, i32, tensor

VOCABULARY, WIDTH, HEADS, GROUPS, HEAD_SIZE = 13, 16, 4, 2, 8
INV_FREQ = np.array([1.0, 0.1, 0.01, 0.001], np.float32)


@dataclass
class Writer:
    """Appends ops to @forward; `path` is the module that they are in."""

    dtype: Attribute
    block: Block
    declarations: list[nn.ParameterOp] = field(default_factory=list)
    path: str = ""
    nodes: int = 0
    layer: int = 0

    def add(self, op: Operation, path: str | None = None) -> SSAValue:
        self.nodes += 1
        location = make(self.path if path is None else path, f"node_{self.nodes}")
        self.block.add_op(located(op, location))
        return op.results[0]

    def parameter(self, name: str, *dims: int) -> SSAValue:
        path = f"{self.path}.{name}".lstrip(".")
        type = tensor(dims, self.dtype)
        self.declarations.append(located(nn.ParameterOp(f"{path}.weight", type), make(path)))
        return self.add(nn.GetParameterOp(self.declarations[-1]), path)

    def linear(self, x: SSAValue, width: int, name: str, *, bias: bool = False) -> SSAValue:
        weight = self.parameter(name, width, int(dims_of(x)[-1]))
        extra = self.parameter(f"{name}.bias", width) if bias else None
        return self.add(nn.LinearOp(x, weight, extra), f"{self.path}.{name}")

    @property
    def position_ids(self) -> SSAValue:
        return self.block.args[1]


Gadget = Callable[[Writer, SSAValue, str], SSAValue]
"""`(writer, x [B, T, D], unique name) -> y [B, T, D]`"""


def activations(w: Writer, x: SSAValue, name: str) -> SSAValue:
    y = w.add(nn.NegOp(w.add(nn.NegOp(w.add(nn.SiluOp(x))))))
    return w.add(nn.ScaleOp(w.add(nn.ScaleOp(y, factor=1.0)), factor=-0.5))


def casts(w: Writer, x: SSAValue, name: str) -> SSAValue:
    wide = w.add(nn.CastOp(x, dtype=f32))
    same = w.add(nn.CastOp(wide, dtype=f32))
    back = w.add(nn.CastOp(wide, dtype=w.dtype))
    y = w.add(nn.OffsetOp(w.add(nn.PowOp(same, exponent=1.0)), value=0.25))
    return w.add(nn.AddOp(back, w.add(nn.CastOp(y, dtype=w.dtype))))


def views(w: Writer, x: SSAValue, name: str) -> SSAValue:
    batch, seq, _ = dims_of(x)
    split = w.add(nn.ReshapeOp(x, (batch, seq, 2, WIDTH // 2)))
    heads = w.add(nn.ReshapeOp(split, (batch, seq, HEADS, WIDTH // HEADS)))
    turned = w.add(nn.TransposeOp(heads, dim0=1, dim1=2))
    back = w.add(nn.TransposeOp(w.add(nn.TanhOp(turned)), dim0=2, dim1=1))
    again = w.add(nn.TransposeOp(w.add(nn.TransposeOp(back, dim0=0, dim1=1)), dim0=0, dim1=1))
    return w.add(nn.ReshapeOp(again, dims_of(x)))


def cuts(w: Writer, x: SSAValue, name: str) -> SSAValue:
    half = w.add(nn.SliceOp(x, dim=2, start=0, end=12))
    part = w.add(nn.SliceOp(half, dim=2, start=4, end=8))
    whole = w.add(nn.SliceOp(x, dim=2, start=0, end=WIDTH))
    rest = w.add(nn.SliceOp(whole, dim=2, start=4, end=WIDTH))
    joined = w.add(nn.ConcatOp([w.add(nn.ConcatOp([part], dim=2)), rest], dim=2))
    twice = w.add(nn.ConcatOp([joined, part], dim=2))
    return w.add(nn.SliceOp(w.add(nn.SigmoidOp(twice)), dim=2, start=0, end=WIDTH))


def broadcasts(w: Writer, x: SSAValue, name: str) -> SSAValue:
    row = w.parameter(f"{name}.row", WIDTH)
    y = w.add(nn.MulOp(x, w.add(nn.ExpandOp(row, dims_of(x)))))
    constant = w.add(nn.ConstantOp(np.linspace(-1, 1, WIDTH, dtype=np.float32)))
    flat = w.add(nn.ReshapeOp(w.add(nn.ReshapeOp(constant, (2, WIDTH // 2))), (1, WIDTH)))
    return w.add(nn.SubOp(y, w.add(nn.CastOp(flat, dtype=w.dtype))))


def repeats(w: Writer, x: SSAValue, name: str) -> SSAValue:
    """The same twice, and something that nothing needs."""
    first = w.add(nn.GeluOp(x, approximate="tanh"))
    second = w.add(nn.GeluOp(x, approximate="tanh"), f"{w.path}.again")
    w.add(nn.ExpOp(first))
    w.parameter(f"{name}.unused", 3)
    return w.add(nn.AddOp(first, second))


def gated_mlp(w: Writer, x: SSAValue, name: str) -> SSAValue:
    """As Phi-3 has it: one projection, cut in two."""
    both = w.linear(x, 2 * WIDTH, f"{name}.gate_up_proj", bias=True)
    gate = w.add(nn.SliceOp(both, dim=2, start=0, end=WIDTH))
    up = w.add(nn.SliceOp(both, dim=2, start=WIDTH, end=2 * WIDTH))
    y = w.add(nn.MulOp(up, w.add(nn.SiluOp(gate))))
    return w.linear(y, WIDTH, f"{name}.down_proj")


def shared_projection(w: Writer, x: SSAValue, name: str) -> SSAValue:
    """Cut, but also used whole: stays one projection."""
    whole = w.linear(x, WIDTH, f"{name}.proj")
    half = w.add(nn.SliceOp(whole, dim=2, start=0, end=WIDTH // 2))
    return w.add(nn.AddOp(whole, w.add(nn.ConcatOp([half, half], dim=2))))


def norm(w: Writer, x: SSAValue, name: str) -> SSAValue:
    wide = w.add(nn.CastOp(x, dtype=f32))
    mean = w.add(nn.MeanOp(w.add(nn.PowOp(wide, exponent=2.0)), dims=[-1], keepdim=True))
    inverse = w.add(nn.RsqrtOp(w.add(nn.OffsetOp(mean, value=1e-5))))
    rows = w.add(nn.CastOp(w.add(nn.MulOp(wide, inverse)), dtype=w.dtype))
    return w.add(nn.MulOp(w.parameter(name, int(dims_of(x)[-1])), rows))


def _rotary_table(w: Writer, kind: type[nn.CosOp | nn.SinOp], size: int) -> SSAValue:
    batch, seq = dims_of(w.position_ids)
    position = w.add(nn.CastOp(w.add(nn.ReshapeOp(w.position_ids, (batch, seq, 1))), dtype=f32))
    angles = w.add(nn.MulOp(position, w.add(nn.ConstantOp(INV_FREQ[: size // 2]))))
    function = w.add(kind(w.add(nn.ConcatOp([angles, angles], dim=2))))
    table = w.add(nn.CastOp(w.add(nn.ScaleOp(function, factor=1.25)), dtype=w.dtype))
    return w.add(nn.ReshapeOp(table, (batch, 1, seq, size)))


def rope(w: Writer, x: SSAValue, size: int) -> SSAValue:
    """On the first `size` elements of each head."""
    head_size = int(dims_of(x)[3])
    rotary = x if size == head_size else w.add(nn.SliceOp(x, dim=3, start=0, end=size))
    cos, sin = (_rotary_table(w, kind, size) for kind in (nn.CosOp, nn.SinOp))
    first = w.add(nn.SliceOp(rotary, dim=3, start=0, end=size // 2))
    second = w.add(nn.SliceOp(rotary, dim=3, start=size // 2, end=size))
    half = w.add(nn.ConcatOp([w.add(nn.NegOp(second)), first], dim=3))
    straight = w.add(nn.MulOp(rotary, cos))
    y = w.add(nn.AddOp(straight, w.add(nn.MulOp(half, sin))))
    if size == head_size:
        return y
    return w.add(nn.ConcatOp([y, w.add(nn.SliceOp(x, dim=3, start=size, end=head_size))], dim=3))


def through_codes(w: Writer, x: SSAValue, name: str) -> SSAValue:
    """x as the nearest codes say it, as the import of quantised caches leaves it."""
    scale = w.parameter(name, 1)
    codes = w.add(quant.QuantizeOp(x, scale))
    return w.add(quant.DequantizeOp(codes, scale, dtype=w.dtype))


def attention(
    w: Writer, x: SSAValue, *, rotary: int, window: int | None, codes: bool = False
) -> SSAValue:
    """Grouped-query attention; `rotary` elements of each head have RoPE, 0 for none.

    With `codes` keys and values are quantised.
    """
    batch, seq, _ = dims_of(x)
    outer, w.path = w.path, f"{w.path}.self_attn"

    def heads(name: str, number: int) -> SSAValue:
        split = nn.ReshapeOp(w.linear(x, number * HEAD_SIZE, name), (batch, seq, number, HEAD_SIZE))
        return w.add(nn.TransposeOp(w.add(split), dim0=1, dim1=2))

    q, k, v = heads("q_proj", HEADS), heads("k_proj", GROUPS), heads("v_proj", GROUPS)
    if rotary:
        q, k = rope(w, q, rotary), rope(w, k, rotary)
    if codes:
        k, v = through_codes(w, k, "k_scale"), through_codes(w, v, "v_scale")
    attend = nn.AttentionOp(q, k, v, scale=HEAD_SIZE**-0.5, window=window, layer=w.layer)
    y = w.add(nn.ReshapeOp(w.add(attend), (batch, seq, HEADS * HEAD_SIZE)))
    y = w.linear(y, WIDTH, "o_proj")
    w.path = outer
    return y


GADGETS: tuple[Gadget, ...] = (
    activations,
    casts,
    views,
    cuts,
    broadcasts,
    repeats,
    gated_mlp,
    shared_projection,
    norm,
)


@dataclass(frozen=True)
class LayerKind:
    """What one layer does after its attention, each gadget around a residual connection."""

    gadgets: tuple[Gadget, ...]
    rotary: int
    window: int | None
    codes: bool = False
    """Whether keys and values are quantised."""


@dataclass(frozen=True)
class Program:
    """A random program; `layers` names the kind of each layer."""

    dtype: Attribute
    layers: tuple[LayerKind, ...]
    head: tuple[Gadget, ...]

    def module(self) -> ModuleOp:
        tokens = tensor(("batch", "seq"), i32)
        w = Writer(self.dtype, Block(arg_types=[tokens, tokens]))
        for argument, hint in zip(w.block.args, ("input_ids", "position_ids"), strict=True):
            argument.name_hint = hint
        w.path = "model"
        table = w.parameter("embed_tokens", VOCABULARY, WIDTH)
        x = w.add(nn.EmbeddingOp(w.block.args[0], table), "model.embed_tokens")
        for index, kind in enumerate(self.layers):
            w.path, w.layer = f"model.layers.{index}", index
            x = _layer(w, x, kind)
        w.path = "model"
        for number, gadget in enumerate(self.head):
            x = gadget(w, x, f"head_{number}")
        w.path = ""
        weight = w.parameter("lm_head", VOCABULARY, WIDTH)
        logits = w.add(nn.LinearOp(x, weight), "lm_head")
        w.block.add_op(located(ReturnOp(logits), make("", "output")))
        types = (list(w.block.arg_types), [logits.type])
        return ModuleOp(
            [*w.declarations, located(FuncOp("forward", types, Region(w.block)), make(""))]
        )


def _layer(w: Writer, x: SSAValue, kind: LayerKind) -> SSAValue:
    attended = attention(
        w,
        norm(w, x, "input_layernorm"),
        rotary=kind.rotary,
        window=kind.window,
        codes=kind.codes,
    )
    x = w.add(nn.AddOp(x, attended))
    for number, gadget in enumerate(kind.gadgets):
        x = w.add(nn.AddOp(x, gadget(w, x, f"gadget_{number}")))
    return x


LLAMA = Program(bf16, (LayerKind((gated_mlp,), HEAD_SIZE, None),) * 3, (norm,))

EVERYTHING = Program(
    bf16,
    (
        LayerKind(GADGETS, HEAD_SIZE, None),
        LayerKind((), 4, 3),
        LayerKind((), 0, 100, codes=True),
        LayerKind((), 4, 3),
    ),
    (norm, repeats, gated_mlp),
)


def programs(*, codes: bool = False) -> st.SearchStrategy[Program]:
    """One or two kinds of layers, up to three; with `codes` some quantise keys and values."""
    gadgets = st.lists(st.sampled_from(GADGETS), max_size=2).map(tuple)
    kind = st.builds(
        LayerKind,
        gadgets,
        st.sampled_from([0, 4, HEAD_SIZE]),
        st.sampled_from([None, 2, 100]),
        st.booleans() if codes else st.just(False),
    )

    def layers(kinds: Sequence[LayerKind]) -> st.SearchStrategy[tuple[LayerKind, ...]]:
        return st.lists(st.sampled_from(kinds), min_size=1, max_size=3).map(tuple)

    several = st.lists(kind, min_size=1, max_size=2).flatmap(layers)
    return st.builds(Program, st.sampled_from([bf16, f32]), several, gadgets)
