"""One function of tensors through the whole backend: inputs and results are bf16 numbers.

What it reads comes as rows of an embedding, one per token, and what it gives goes through a
product with the identity to f32 logits: both are exact. Tokens that are padding, and slots of the
cache that nobody owns, are NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
from decoder_cases import fill_cache
from sequences import PADDING_ID, sequence_inputs
from xdsl.context import Context
from xdsl.dialects import func
from xdsl.dialects.builtin import FunctionType, ModuleOp, bf16, i32
from xdsl.ir import Attribute, Block, Operation, Region, SSAValue

from furiosa_llm.backend_rngd.encode import encode_program
from furiosa_llm.backend_rngd.isa.program import Program
from furiosa_llm.backend_rngd.pipeline import backend_phase
from furiosa_llm.ir import nn, paged, provenance
from furiosa_llm.ir.nn_parameters import NUMPY_DTYPES
from furiosa_llm.ir.types import AnyTensor, shape_of, tensor
from furiosa_llm.models.config_types import Bucket
from furiosa_llm.runtime_sim.device import Device

Array = np.ndarray[Any, Any]


def to_bf16(values: Array) -> Array:
    """The nearest bf16 numbers, as f64."""
    return values.astype(ml_dtypes.bfloat16).astype(np.float64)


@dataclass
class Scope:
    """What the function's body sees; `add` appends an operator and gives its result."""

    block: Block
    bucket: Bucket
    x: list[SSAValue]
    positions: SSAValue
    slots: SSAValue
    table: SSAValue
    lengths: SSAValue
    weights: dict[str, SSAValue]
    cache: SSAValue | None

    def add(self, op: Operation) -> SSAValue:
        self.block.add_op(provenance.located(op, provenance.make("work", op.name)))
        return op.results[0]

    def in_heads(self, y: SSAValue, heads: int) -> SSAValue:
        """[B, T, heads · d] -> [B, T, heads, d]."""
        batch, tokens, width = shape_of(y)
        return self.add(nn.ReshapeOp(y, (batch, tokens, heads, width // heads)))

    def joined(self, y: SSAValue) -> SSAValue:
        """[B, T, heads, d] -> [B, T, heads · d]."""
        batch, tokens, heads, width = shape_of(y)
        return self.add(nn.ReshapeOp(y, (batch, tokens, heads * width)))

    def swapped(self, y: SSAValue) -> SSAValue:
        """[B, T, heads, d] <-> [B, heads, T, d]."""
        return self.add(nn.TransposeOp(y, dim0=1, dim1=2))


Body = Callable[[Scope], SSAValue]
"""Gives [B, T, N]."""


@dataclass
class OneFunction:
    """A function, its bucket and its values.

    Tokens that are no padding are the rows of each `x` [tokens, D], sequence by sequence. Values
    are bf16 numbers, in f64; weights of other types are stored as they are.
    """

    bucket: Bucket
    lengths: Sequence[int]
    x: Sequence[Array]
    body: Body
    weights: Mapping[str, Array] = field(default_factory=dict)
    past: Array | None = None
    """The cache [slots, kv heads, 2, head_dim], NaN where nobody owns a slot; keys are plain."""
    cache_dtype: Attribute = bf16
    seed: int = 0

    def inputs(self) -> dict[str, Array]:
        """Token i of all that are no padding has id i + 1: its row of the embeddings."""
        slots = 1 + sum(self.lengths) if self.past is None else len(self.past)
        found = sequence_inputs(self.bucket, self.lengths, np.random.default_rng(self.seed), slots)
        first = 1 + PADDING_ID
        for row, length in enumerate(self.lengths):
            count = 1 if self.bucket.is_decode else length
            found["input_ids"][row, :count] = np.arange(first, first + count)
            first += count
        return found

    def run(self, inputs: dict[str, Array] | None = None) -> Array:
        """f32 [tokens, N], as the simulated device computes it."""
        program, parameters = self._compiled()
        device = Device()
        device.load(program, parameters.__getitem__)
        if self.past is not None:
            device.allocate_caches(program, len(self.past))
            past = self.past.astype(NUMPY_DTYPES[self.cache_dtype])
            bits = np.int16 if self.cache_dtype == bf16 else np.int8
            fill_cache(device.cache(0), past.view(bits), rotary=False)
        logits = device.execute(program, inputs or self.inputs())["logits"]
        counts = [1 if self.bucket.is_decode else length for length in self.lengths]
        return np.concatenate([logits[row, :count] for row, count in enumerate(counts)])

    def _compiled(self) -> tuple[Program, dict[str, Array]]:
        parameters = {name: _stored(w) for name, w in self.weights.items()}
        for i, x in enumerate(self.x):
            padding = np.full((1, x.shape[1]), np.nan)
            parameters[f"table_{i}"] = np.concatenate([padding, x]).astype(ml_dtypes.bfloat16)
        module = _module(self, parameters)
        context = Context()
        for step in backend_phase(self.bucket):
            step.apply(context, module)
        return encode_program(module, "one_function"), parameters


def _stored(w: Array) -> Array:
    return w.astype(ml_dtypes.bfloat16) if w.dtype == np.float64 else w


def _type_of(w: Array) -> AnyTensor:
    dtype = next(dtype for dtype, known in NUMPY_DTYPES.items() if known == w.dtype)
    return tensor(w.shape, dtype)


def _module(case: OneFunction, parameters: dict[str, Array]) -> ModuleOp:
    """Adds the identity, whose width is the result's, to `parameters`."""
    bucket = case.bucket
    batch, new = bucket.batch_size, bucket.input_ids_size
    ids = tensor((batch, new), i32)
    inputs = [ids, ids, ids, tensor((batch, bucket.attention_size), i32), tensor((batch,), i32)]
    hidden = [tensor((batch, new, x.shape[1]), bf16) for x in case.x]
    caches: list[Attribute] = []
    if case.past is not None:
        caches = [paged.cache_type(case.past.shape[1], case.past.shape[3], case.cache_dtype)]
    functions = []
    for i, result in enumerate(hidden):
        block = Block(arg_types=[ids, tensor(parameters[f"table_{i}"].shape, bf16)])
        embedding = nn.EmbeddingOp(*block.args)
        block.add_op(provenance.located(embedding, provenance.make(f"embed_{i}")))
        functions.append(_function(f"embed_{i}", block, [embedding.y], [result]))
    work = _work(case, [*hidden, *inputs[1:], *caches], parameters)
    results = list(work.function_type.outputs)
    functions += [work, _forward(case, parameters, [*inputs, *caches], hidden, results)]
    named = [nn.ParameterOp(name, _type_of(w)) for name, w in parameters.items()]
    module = ModuleOp([*named, *functions])
    module.verify()
    return module


def _work(
    case: OneFunction, inputs: Sequence[Attribute], parameters: dict[str, Array]
) -> func.FuncOp:
    """The function's body and the product with the identity; caches are results too."""
    weights = {name: _type_of(_stored(w)) for name, w in case.weights.items()}
    block = Block(arg_types=[*inputs, *weights.values()])
    args: list[SSAValue] = list(block.args)
    count = len(case.x)
    positions, slots, table, lengths = args[count : count + 4]
    scope = Scope(
        block,
        case.bucket,
        args[:count],
        positions,
        slots,
        table,
        lengths,
        weights=dict(zip(weights, args[len(inputs) :], strict=True)),
        cache=args[count + 4] if case.past is not None else None,
    )
    y = case.body(scope)
    width = shape_of(y)[-1]
    parameters["identity"] = np.eye(width).astype(ml_dtypes.bfloat16)
    eye = block.insert_arg(tensor((width, width), bf16), len(block.args))
    logits = scope.add(nn.LinearOp(y, eye))
    written = [op.results[0] for op in block.ops if isinstance(op, paged.WriteOp)]
    results = [logits, *written]
    return _function("work", block, results, [value.type for value in results])


def _function(
    name: str, block: Block, results: Sequence[SSAValue], types: Sequence[Attribute]
) -> func.FuncOp:
    block.add_op(func.ReturnOp(*results))
    signature = FunctionType.from_lists([a.type for a in block.args], list(types))
    visibility = None if name == "forward" else "private"
    return func.FuncOp(name, signature, Region(block), visibility)


def _forward(
    case: OneFunction,
    parameters: dict[str, Array],
    inputs: Sequence[Attribute],
    hidden: Sequence[Attribute],
    results: Sequence[Attribute],
) -> func.FuncOp:
    block = Block(arg_types=inputs)

    def get(name: str) -> SSAValue:
        op = nn.GetParameterOp(name, _type_of(parameters[name]))
        block.add_op(op)
        return op.results[0]

    def call(name: str, args: Sequence[SSAValue], out: Sequence[Attribute]) -> Sequence[SSAValue]:
        op = provenance.located(func.CallOp(name, args, out), provenance.make(name))
        block.add_op(op)
        return op.results

    x = [
        call(f"embed_{i}", [block.args[0], get(f"table_{i}")], [out])[0]
        for i, out in enumerate(hidden)
    ]
    weights = [get(name) for name in (*case.weights, "identity")]
    found = call("work", [*x, *block.args[1:], *weights], results)
    return _function("forward", block, found, results)
