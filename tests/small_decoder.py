"""A small Llama-like decoder as the backend gets it: outlined, paged, for one bucket."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import ml_dtypes
import numpy as np
from xdsl.context import Context
from xdsl.dialects import func
from xdsl.dialects.builtin import FunctionType, IntegerAttr, ModuleOp, bf16, i32, i64
from xdsl.ir import Attribute, Block, Operation, Region, SSAValue

from furiosa_llm.backend_rngd.encode import encode_program
from furiosa_llm.backend_rngd.isa.program import Program
from furiosa_llm.backend_rngd.pipeline import backend_phase
from furiosa_llm.backend_rngd.place import PlacePass
from furiosa_llm.backend_rngd.rngd import AllocOp
from furiosa_llm.ir import nn, paged, provenance, quant
from furiosa_llm.ir.nn_parameters import NUMPY_DTYPES
from furiosa_llm.ir.types import AnyTensor, f8e4m3, f32, shape_of, tensor
from furiosa_llm.models.config_types import Bucket

Array = np.ndarray[Any, Any]
Body = Callable[[Block], list[SSAValue]]


@dataclass(frozen=True)
class Scheme:
    """How a decoder's linear layers are quantised, all of them alike."""

    weights: Literal["tensor", "channel"] | tuple[int, int] = "channel"
    """What has a scale; rows and columns of a block."""
    inputs: Literal["none", "tensor", "column", "token", "group"] = "none"
    group: int = 0
    """Neighbours of a token that share a scale."""
    scale_dtype: Attribute = bf16
    rank: int = 2
    """Dims of the scales of channels: [N] or [N, 1]."""

    def block_of(self, weight: tuple[int, ...]) -> tuple[int, int]:
        """Rows and columns that share a scale."""
        if isinstance(self.weights, tuple):
            return self.weights
        return (weight[0] if self.weights == "tensor" else 1), weight[1]

    def scale_shape(self, weight: tuple[int, ...]) -> tuple[int, ...]:
        if isinstance(self.weights, tuple):
            return quant.grid_of((weight[0], weight[1]), *self.weights)
        return () if self.weights == "tensor" else (weight[0], 1)[: self.rank]


CODES = np.dtype(ml_dtypes.float8_e4m3fn)
LARGEST_CODE = 448.0


@dataclass(frozen=True)
class Decoder:
    """D hidden, H query heads, G kv heads, head_dim, F feed-forward, V vocabulary."""

    bucket: Bucket
    hidden: int = 72
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 12
    feed_forward: int = 152
    vocabulary: int = 97
    layers: int = 2
    bias: bool = False
    head_norms: bool = False
    last_token_only: bool = True
    scheme: Scheme | None = None
    cache_scales: tuple[float, float] | None = None
    """Of keys and values in a cache of codes."""

    @property
    def cache_dtype(self) -> Attribute:
        return bf16 if self.cache_scales is None else f8e4m3

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Weights of a block's linear layers."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        d, f = self.hidden, self.feed_forward
        attention = {"q": (q, d), "k": (kv, d), "v": (kv, d), "o": (d, q)}
        return attention | {"gate": (f, d), "up": (f, d), "down": (d, f)}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameters of a block, in the order of its arguments."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        d, f = self.hidden, self.feed_forward
        shapes: dict[str, tuple[int, ...]] = {"norm": (d,), "q": (q, d), "k": (kv, d), "v": (kv, d)}
        shapes |= {"o": (d, q), "norm2": (d,), "gate": (f, d), "up": (f, d), "down": (d, f)}
        if self.bias:
            shapes |= {"q_bias": (q,), "k_bias": (kv,), "v_bias": (kv,)}
        if self.head_norms:
            shapes |= {"q_norm": (self.head_dim,), "k_norm": (self.head_dim,)}
        if self.scheme is not None:
            for name, weight in self.matrices.items():
                shapes[f"{name}_scale"] = self.scheme.scale_shape(weight)
                if self.scheme.inputs in ("tensor", "column"):
                    stored = 1 if self.scheme.inputs == "tensor" else weight[1]
                    shapes[f"{name}_input_scale"] = (stored,)
        if self.cache_scales is not None:
            shapes |= {"k_cache_scale": (1,), "v_cache_scale": ()}
        return shapes

    def type_of(self, name: str) -> AnyTensor:
        """The type of a parameter, by its checkpoint name."""
        last, shape = name.rpartition(".")[2], self.parameters[name]
        if self.scheme is not None and last in self.matrices:
            return tensor(shape, f8e4m3)
        if last in ("k_cache_scale", "v_cache_scale"):
            return tensor(shape, f32 if shape else bf16)
        if last.endswith("_scale"):
            assert self.scheme is not None
            return tensor(shape, f32 if "input" in last else self.scheme.scale_dtype)
        return tensor(shape, bf16)

    @property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """All parameters by checkpoint name."""
        named = {"embed": (self.vocabulary, self.hidden), "final_norm": (self.hidden,)}
        for layer in range(self.layers):
            named |= {f"{layer}.{name}": shape for name, shape in self.shapes.items()}
        return named

    def weights(self, seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
        """bf16 weights of a sensible size, norms around one; or codes and scales that say them."""
        rng = np.random.default_rng(seed)
        found = {}
        for name, shape in self.parameters.items():
            if not name.endswith("_scale"):
                scale = shape[-1] ** -0.5 if len(shape) == 2 else 0.1
                values = rng.standard_normal(shape) * scale + ("norm" in name)
                found[name] = values.astype(ml_dtypes.bfloat16)
        if self.cache_scales is not None:
            for layer in range(self.layers):
                k_scale, v_scale = self.cache_scales
                found[f"{layer}.k_cache_scale"] = np.array([k_scale], np.float32)
                found[f"{layer}.v_cache_scale"] = np.array(v_scale, ml_dtypes.bfloat16)
        if self.scheme is not None:
            for layer in range(self.layers):
                for name in self.matrices:
                    found |= self._codes(self.scheme, f"{layer}.{name}", found, rng)
        return found

    def _codes(
        self, scheme: Scheme, name: str, weights: dict[str, Array], rng: np.random.Generator
    ) -> dict[str, Array]:
        """The weight in codes, and its scales."""
        wide = weights[name].astype(np.float64)
        rows, columns = scheme.block_of(wide.shape)
        grid = quant.grid_of((wide.shape[0], wide.shape[1]), rows, columns)
        dtype = NUMPY_DTYPES[scheme.scale_dtype]
        padded = np.zeros((grid[0] * rows, grid[1] * columns))
        padded[: wide.shape[0], : wide.shape[1]] = np.abs(wide)
        largest = padded.reshape(grid[0], rows, grid[1], columns).max(axis=(1, 3))
        scale = np.asarray(largest / LARGEST_CODE, dtype)
        each = scale.astype(np.float64).repeat(rows, axis=0).repeat(columns, axis=1)
        each = each[: wide.shape[0], : wide.shape[1]]
        codes = np.clip(wide / each, -LARGEST_CODE, LARGEST_CODE).astype(CODES)
        found = {name: codes, f"{name}_scale": scale.reshape(self.parameters[f"{name}_scale"])}
        stored = self.parameters.get(f"{name}_input_scale")
        if stored is not None:
            found[f"{name}_input_scale"] = rng.uniform(0.005, 0.01, stored).astype(np.float32)
        return found

    def module(self) -> ModuleOp:
        return _ModuleBuilder(self).build()

    def program(self, *, apart: bool = False, level: int = 2) -> Program:
        """The binary's program, through the whole backend at a level of `build -O`.

        `apart` gives each buffer of data memory bytes of its own, so that no buffer is taken for
        written because an older one had been.
        """
        module, context = self.module(), Context()
        for step in backend_phase(self.bucket, level):
            step.apply(context, module)
            if apart and isinstance(step, PlacePass):
                _keep_apart(module)
            module.verify()
        return encode_program(module, "small")


def _keep_apart(module: ModuleOp) -> None:
    for block in module.ops:
        end = 0
        for op in block.walk():
            if isinstance(op, AllocOp) and op.memory == "dm" and op.resident is None:
                op.address = IntegerAttr(end, i64)
                end += op.size_bytes


@dataclass
class _ModuleBuilder:
    decoder: Decoder
    module: ModuleOp = field(default_factory=lambda: ModuleOp([]))

    def build(self) -> ModuleOp:
        d, bucket = self.decoder, self.decoder.bucket
        self.batch, self.new = bucket.batch_size, bucket.input_ids_size
        ids = tensor((self.batch, self.new), i32)
        table = tensor((self.batch, bucket.attention_size), i32)
        self.inputs = [ids, ids, ids, table, tensor((self.batch,), i32)]
        self.hidden = tensor((self.batch, self.new, d.hidden), bf16)
        self.cache = paged.cache_type(d.kv_heads, d.head_dim, d.cache_dtype)
        for name in d.parameters:
            self.module.body.block.add_op(nn.ParameterOp(name, d.type_of(name)))
        embed = tensor((d.vocabulary, d.hidden), bf16)
        norm = tensor((d.hidden,), bf16)
        block = [d.type_of(f"0.{name}") for name in d.shapes]
        self._function("prologue", [ids, embed], self._prologue)
        self._function("block_0", [self.hidden, *self.inputs[1:], self.cache, *block], self._block)
        self._function("epilogue", [self.hidden, self.inputs[4], norm, embed], self._epilogue)
        self._function("forward", self.inputs + [self.cache] * d.layers, self._forward)
        self.module.verify()
        return self.module

    def _function(self, name: str, inputs: Sequence[Attribute], body: Body) -> None:
        block = Block(arg_types=inputs)
        outputs = body(block)
        block.add_op(func.ReturnOp(*outputs))
        types = FunctionType.from_lists(inputs, [value.type for value in outputs])
        visibility = None if name == "forward" else "private"
        self.module.body.block.add_op(func.FuncOp(name, types, Region(block), visibility))

    def _prologue(self, block: Block) -> list[SSAValue]:
        return [_add(block, nn.EmbeddingOp(*block.args), "embed")]

    def _block(self, block: Block) -> list[SSAValue]:
        d = self.decoder
        h, positions, slots, table, lengths, cache = _values(block)[:6]
        w = dict(zip(d.shapes, block.args[6:], strict=True))
        x = _add(block, nn.RmsNormOp(h, w["norm"], eps=1e-5), "norm")

        def linear(x: SSAValue, name: str, module: str) -> SSAValue:
            return self._linear(block, w, x, name, f"{module}.{name}")

        def project(name: str, heads: int) -> SSAValue:
            y = linear(x, name, "attn")
            y = _add(block, nn.ReshapeOp(y, (self.batch, self.new, heads, d.head_dim)), "attn")
            if f"{name}_norm" in w:
                y = _add(block, nn.RmsNormOp(y, w[f"{name}_norm"], eps=1e-6), f"attn.{name}_norm")
            return _add(block, nn.TransposeOp(y, dim0=1, dim1=2), "attn")

        frequencies = [10000.0 ** (-2 * i / d.head_dim) for i in range(d.head_dim // 2)]

        def rotate(y: SSAValue) -> SSAValue:
            op = nn.RopeOp(y, positions, inv_freq=frequencies, attention_scaling=1.0)
            return _add(block, op, "attn")

        q, k = rotate(project("q", d.heads)), rotate(project("k", d.kv_heads))
        v = project("v", d.kv_heads)
        scales = [w[name] for name in ("k_cache_scale", "v_cache_scale") if name in w]
        if scales:
            k, v = (
                _add(block, quant.QuantizeOp(x, scale), "attn")
                for x, scale in zip((k, v), scales, strict=True)
            )
        cache = _add(block, paged.WriteOp(cache, k, v, slots), "attn")
        scale = d.head_dim**-0.5
        op = paged.AttentionOp(q, cache, table, lengths, positions, *scales, scale=scale)
        y = _add(block, op, "attn")
        y = _add(block, nn.ReshapeOp(y, (self.batch, self.new, d.heads * d.head_dim)), "attn")
        h = _add(block, nn.AddOp(h, linear(y, "o", "attn")), "")
        x = _add(block, nn.RmsNormOp(h, w["norm2"], eps=1e-5), "norm2")
        gate = _add(block, nn.SiluOp(linear(x, "gate", "mlp")), "mlp.act")
        up = linear(x, "up", "mlp")
        y = linear(_add(block, nn.MulOp(gate, up), "mlp"), "down", "mlp")
        return [_add(block, nn.AddOp(h, y), ""), cache]

    def _linear(
        self, block: Block, w: Mapping[str, SSAValue], x: SSAValue, name: str, module: str
    ) -> SSAValue:
        """A linear layer as the decoder's scheme has it."""
        scheme, bias = self.decoder.scheme, w.get(f"{name}_bias")
        if scheme is None:
            return _add(block, nn.LinearOp(x, w[name], bias), module)
        n, k = shape_of(w[name])
        x_scale = w.get(f"{name}_input_scale")
        if scheme.inputs in ("token", "group"):
            group = scheme.group or k
            x_scale = _add(block, quant.DynamicScaleOp(x, group=group), module)
        if x_scale is not None:
            x = _add(block, quant.QuantizeOp(x, x_scale), module)
        if scheme.inputs == "column":
            assert x_scale is not None
            x, x_scale = _add(block, quant.DequantizeOp(x, x_scale), module), None
        rows, columns = scheme.block_of((n, k))
        op = quant.LinearOp(
            x, w[name], w[f"{name}_scale"], x_scale, bias, rows=rows, columns=columns, dtype=bf16
        )
        return _add(block, op, module)

    def _epilogue(self, block: Block) -> list[SSAValue]:
        h, lengths, norm, head = _values(block)
        if self.decoder.last_token_only:
            h = _add(block, paged.LastTokenOp(h, lengths), "")
        h = _add(block, nn.RmsNormOp(h, norm, eps=1e-5), "final_norm")
        return [_add(block, nn.LinearOp(h, head), "lm_head")]

    def _forward(self, block: Block) -> list[SSAValue]:
        d = self.decoder

        def get(name: str) -> SSAValue:
            return _add(block, nn.GetParameterOp(name, d.type_of(name)), "")

        def call(name: str, args: Sequence[SSAValue], out: list[Attribute], at: str) -> func.CallOp:
            op = provenance.located(func.CallOp(name, args, out), provenance.make(at))
            block.add_op(op)
            return op

        inputs = block.args
        h = call("prologue", [inputs[0], get("embed")], [self.hidden], "").results[0]
        caches = []
        for layer in range(d.layers):
            weights = [get(f"{layer}.{name}") for name in d.shapes]
            arguments = [h, *inputs[1:5], inputs[5 + layer], *weights]
            op = call("block_0", arguments, [self.hidden, self.cache], f"layers.{layer}")
            h = op.results[0]
            caches.append(op.results[1])
        rows = 1 if d.last_token_only else self.new
        logits = tensor((self.batch, rows, d.vocabulary), bf16)
        last = call("epilogue", [h, inputs[4], get("final_norm"), get("embed")], [logits], "")
        return [last.results[0], *caches]


def _values(block: Block) -> list[SSAValue]:
    return list(block.args)


def _add(block: Block, op: Operation, module: str) -> SSAValue:
    block.add_op(provenance.located(op, provenance.make(module, op.name)))
    return op.results[0]
