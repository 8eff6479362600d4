"""Decoders of any sizes, for tests of sharding: heads, widths and vocabularies that do not divide.

In the form that `fuse-primitives` leaves, before blocks are outlined.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from hypothesis import strategies as st
from nn_programs import Writer, through_codes
from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp
from xdsl.dialects.func import FuncOp, ReturnOp
from xdsl.ir import Attribute, Block, Region, SSAValue

from furiosa_llm.ir import nn
from furiosa_llm.ir.provenance import located, make
from furiosa_llm.ir.types import bf16, dims_of, f32, i32, tensor
from furiosa_llm.models.config_types import Bucket
from furiosa_llm.models.quantization import Quantization
from furiosa_llm.passes.contract import ContractPass
from furiosa_llm.passes.import_fp8_quantization import describe_quantization
from furiosa_llm.passes.pipeline import (
    bucket_phase,
    import_phase,
    model_phase,
    run_passes,
    shard_phase,
)
from furiosa_llm.passes.pipeline_text import parse_passes
from furiosa_llm.passes.shard_tensor_parallel import ShardTensorParallelPass

DECODE = Bucket.decode(2, 5)
BUCKETS = (DECODE, Bucket.prefill(1, 4))


@dataclass(frozen=True)
class RandomModel:
    """Sizes and features of a decoder."""

    dtype: Attribute = bf16
    layers: int = 2
    kv_heads: int = 2
    group: int = 2
    """Query heads for each KV head."""
    head_size: int = 4
    width: int = 10
    inner: int = 14
    """Features between the two products of the feed-forward part."""
    vocabulary: int = 11
    biases: bool = False
    head_norms: bool = False
    whole_norms: bool = False
    """Norms of queries and keys over all heads, which no rank can compute alone."""
    tied: bool = False
    fused: bool = False
    """Query, key and value weights in one tensor, and gate and up too."""
    codes: bool = False
    """Keys and values are quantised."""

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group

    def module(self) -> ModuleOp:
        tokens = tensor(("batch", "seq"), i32)
        w = Writer(self.dtype, Block(arg_types=[tokens, tokens]))
        w.path = "model"
        table = w.parameter("embed_tokens", self.vocabulary, self.width)
        x = w.add(nn.EmbeddingOp(w.block.args[0], table), "model.embed_tokens")
        for layer in range(self.layers):
            w.path, w.layer = f"model.layers.{layer}", layer
            x = w.add(nn.AddOp(x, self._attention(w, self._norm(w, x, "input_layernorm"))))
            x = w.add(nn.AddOp(x, self._feed_forward(w, self._norm(w, x, "post_layernorm"))))
        w.path = "model"
        x = self._norm(w, x, "norm")
        w.path = ""
        head = table if self.tied else w.parameter("lm_head", self.vocabulary, self.width)
        logits = w.add(nn.LinearOp(x, head), "lm_head")
        w.block.add_op(located(ReturnOp(logits), make("", "output")))
        types = (list(w.block.arg_types), [logits.type])
        forward = located(FuncOp("forward", types, Region(w.block)), make(""))
        return ModuleOp([*w.declarations, forward])

    def _norm(self, w: Writer, x: SSAValue, name: str) -> SSAValue:
        weight = w.parameter(name, int(dims_of(x)[-1]))
        return w.add(nn.RmsNormOp(x, weight, eps=1e-5), f"{w.path}.{name}")

    def _split(self, w: Writer, x: SSAValue, name: str, sizes: list[int]) -> list[SSAValue]:
        """Products of the same input: one weight, or one weight cut into slices."""
        if not self.fused:
            return [
                w.linear(x, size, f"{name}_{index}", bias=self.biases)
                for index, size in enumerate(sizes)
            ]
        both = w.linear(x, sum(sizes), name, bias=self.biases)
        ends = [sum(sizes[: index + 1]) for index in range(len(sizes))]
        last = len(dims_of(x)) - 1
        return [
            w.add(nn.SliceOp(both, dim=last, start=end - size, end=end))
            for size, end in zip(sizes, ends, strict=True)
        ]

    def _attention(self, w: Writer, x: SSAValue) -> SSAValue:
        batch, seq, _ = dims_of(x)
        counts = [self.heads, self.kv_heads, self.kv_heads]
        parts = self._split(w, x, "qkv", [count * self.head_size for count in counts])
        heads = []
        for index, (part, count) in enumerate(zip(parts, counts, strict=True)):
            if self.whole_norms and index < 2:
                part = self._norm(w, part, f"norm_{index}")
            split = w.add(nn.ReshapeOp(part, (batch, seq, count, self.head_size)))
            if self.head_norms and index < 2:
                split = self._norm(w, split, f"head_norm_{index}")
            turned = w.add(nn.TransposeOp(split, dim0=1, dim1=2))
            if index < 2:
                turned = w.add(nn.RopeOp(turned, w.position_ids, inv_freq=[1.0, 0.1]))
            if self.codes and index > 0:
                turned = through_codes(w, turned, f"scale_{index}")
            heads.append(turned)
        y = w.add(nn.AttentionOp(*heads, scale=self.head_size**-0.5, layer=w.layer))
        y = w.add(nn.ReshapeOp(y, (batch, seq, self.heads * self.head_size)))
        return w.linear(y, self.width, "o_proj", bias=self.biases)

    def _feed_forward(self, w: Writer, x: SSAValue) -> SSAValue:
        gate, up = self._split(w, x, "gate_up", [self.inner, self.inner])
        y = w.add(nn.MulOp(w.add(nn.SiluOp(gate)), up))
        return w.linear(y, self.width, "down_proj", bias=self.biases)


def lowered(
    model: RandomModel,
    bucket: Bucket = DECODE,
    describe: Callable[[ModuleOp], Quantization] | None = None,
) -> ModuleOp:
    """The model as `shard` takes it: blocks outlined, caches, the sizes of a bucket.

    `describe` says which of its layers are quantised.
    """
    module = model.module()
    if describe is not None:
        run_passes(module, parse_passes("canonicalize,cse,dce,fuse-primitives"))
        describe_quantization(module, describe(module))
    run_passes(module, [*import_phase(), *model_phase(), *bucket_phase(bucket)])
    return module


@dataclass(frozen=True)
class ShardPhase(ContractPass):
    """The passes of the phase, one after the other; each result is verified."""

    name = "shard"
    contract = ShardTensorParallelPass.contract

    tp: int
    partial_sum: Literal["f32", "bf16"]
    stages: int

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        run_passes(op, shard_phase(self.tp, partial_sum=self.partial_sum, stages=self.stages))


@st.composite
def random_models(draw: st.DrawFn) -> RandomModel:
    """1 to 40 query heads of which KV heads serve equally many, and odd sizes."""
    heads = draw(st.integers(1, 40))
    kv_heads = draw(st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0]))
    return RandomModel(
        dtype=draw(st.sampled_from([bf16, f32])),
        layers=draw(st.integers(1, 4)),
        kv_heads=kv_heads,
        group=heads // kv_heads,
        width=draw(st.integers(1, 29)),
        inner=draw(st.integers(1, 37)),
        vocabulary=draw(st.integers(1, 43)),
        biases=draw(st.booleans()),
        head_norms=draw(st.booleans()),
        whole_norms=draw(st.booleans()),
        tied=draw(st.booleans()),
        fused=draw(st.booleans()),
        codes=draw(st.booleans()),
    )
