"""Quantised linear layers through binaries: against the interpreter, and what they load.

A decoder whose layers are codes and scales computes what its bf16 roundings allow, like any other
(`decoder_cases`): scales are applied in f32 and cost no rounding to bf16.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from decoder_cases import INPUTS_BOUND, Case, check, simulated
from error_bounds import Approx
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from one_function import OneFunction, Scope
from small_decoder import Decoder, Scheme
from value_cases import normal, rows_of
from xdsl.context import Context
from xdsl.dialects import test
from xdsl.dialects.builtin import bf16, f16, f32
from xdsl.ir import SSAValue

from furiosa_llm.backend_rngd.isa.instructions import Control, Dma
from furiosa_llm.backend_rngd.isa.layout import RowsLayout, plain
from furiosa_llm.backend_rngd.isa.program import Program
from furiosa_llm.backend_rngd.kernels.quantize import has_groups
from furiosa_llm.backend_rngd.lower_quant import reason_against
from furiosa_llm.backend_rngd.tile import TilePass
from furiosa_llm.errors import CompileError, SimulationFault
from furiosa_llm.ir import nn, quant, quant_semantics
from furiosa_llm.ir.types import f8e4m3, tensor
from furiosa_llm.models.config_types import Bucket
from furiosa_llm.runtime_sim.device import Device

Array = np.ndarray[Any, Any]
CHANNEL, TENSOR = Scheme("channel"), Scheme("tensor")
CASES = {
    "one token": Case(Decoder(Bucket.decode(1, 40), scheme=CHANNEL), (7,)),
    "ragged decode": Case(
        Decoder(Bucket.decode(4, 100), bias=True, scheme=Scheme("tensor", scale_dtype=f32)),
        (100, 1, 37, 64),
    ),
    "prefill": Case(
        Decoder(Bucket.prefill(2, 24), bias=True, scheme=Scheme(scale_dtype=f16, rank=1)), (20, 11)
    ),
    "prefill in parts": Case(Decoder(Bucket.prefill(1, 380), layers=2, scheme=CHANNEL), (371,)),
    "heads in rotary order": Case(
        Decoder(Bucket.prefill(1, 24), heads=9, kv_heads=3, head_dim=64, scheme=TENSOR), (24,)
    ),
    "blocks, ragged decode": Case(
        Decoder(Bucket.decode(4, 100), hidden=80, head_dim=16, bias=True, scheme=Scheme((32, 16))),
        (100, 1, 37, 64),
    ),
    "blocks of heads, prefill": Case(
        Decoder(
            Bucket.prefill(1, 380),
            hidden=288,
            heads=5,
            head_dim=64,
            kv_heads=1,
            scheme=Scheme((128, 128), scale_dtype=f32),
        ),
        (371,),
    ),
    "groups of a row": Case(
        Decoder(Bucket.prefill(2, 24), hidden=96, heads=4, head_dim=32, scheme=Scheme((1, 32))),
        (20, 11),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_logits_agree_with_the_interpreter(name: str) -> None:
    check(CASES[name])


STATIC, DYNAMIC = Scheme("tensor", "tensor"), Scheme("channel", "token")
GROUPS, COLUMNS = Scheme("channel", "group", group=16), Scheme("channel", "column")
CODES_CASES = {
    "static, ragged decode": Case(
        Decoder(Bucket.decode(4, 100), bias=True, scheme=STATIC), (100, 1, 37, 64)
    ),
    "static, prefill in parts": Case(Decoder(Bucket.prefill(1, 380), scheme=STATIC), (371,)),
    "by columns, ragged decode": Case(
        Decoder(Bucket.decode(4, 100), bias=True, scheme=COLUMNS), (100, 1, 37, 64)
    ),
    "by columns, prefill": Case(
        Decoder(Bucket.prefill(1, 24), heads=9, kv_heads=3, head_dim=64, scheme=COLUMNS), (24,)
    ),
    "dynamic, one token": Case(Decoder(Bucket.decode(1, 40), scheme=DYNAMIC), (33,)),
    "dynamic, prefill": Case(Decoder(Bucket.prefill(2, 24), bias=True, scheme=DYNAMIC), (20, 11)),
    "groups of 16": Case(
        Decoder(
            Bucket.prefill(2, 24), hidden=96, heads=6, head_dim=16, feed_forward=160, scheme=GROUPS
        ),
        (20, 11),
    ),
    "dynamic, heads in few slices": Case(
        Decoder(Bucket.prefill(1, 24), heads=9, kv_heads=3, head_dim=64, scheme=DYNAMIC), (24,)
    ),
}


@pytest.mark.parametrize("name", CODES_CASES)
def test_logits_of_codes_agree_with_the_interpreter(name: str) -> None:
    check(CODES_CASES[name], INPUTS_BOUND)


def test_garbage_in_padding_changes_no_bit() -> None:
    case = CODES_CASES["dynamic, prefill"]
    assert (simulated(case, garbage=0.0) == simulated(case)).all()


# --- inputs in codes ---

tokens = st.sampled_from(
    [
        (Bucket.decode(1, 8), (5,)),
        (Bucket.decode(13, 9), (9, 1, 4, 4, 7)),
        (Bucket.prefill(2, 37), (37, 20)),
        (Bucket.prefill(1, 300), (290,)),
    ]
)
sources = st.sampled_from(["stored", "computed"])
WIDEST_IDENTITY = 1200
"""What a function gives goes through a product with the identity, which takes time."""
groups = st.sampled_from([16, 32, 64, 80, 128, 256])


@dataclass(frozen=True)
class Inputs:
    """Rows of bf16 numbers, and how they become codes: by stored numbers, or by each group's own.

    A group is a row, or some neighbours in it.
    """

    x: Array
    stored: Array | None
    """f32 [] or [K]."""
    group: int

    @staticmethod
    def random(
        rng: np.random.Generator, rows: int, width: int, source: str, group: int | None = None
    ) -> Inputs:
        """Some of the rows are zero, some are too large for the number, one is tiny."""
        x = normal(rng, rows, width) * np.exp2(rng.integers(-9, 9, (rows, 1)))
        if group is not None:
            x *= np.exp2(rng.integers(-5, 5, (rows, width // group))).repeat(group, axis=1)
        x[rng.integers(rows)] = 0.0
        x[rng.integers(rows)] *= 2.0**-60
        by_column = rng.uniform(0.002, 0.05, width).astype(np.float32)
        stored = {"stored": np.array(0.0136, np.float32), "columns": by_column}.get(source)
        return Inputs(x, stored, group or width)

    @property
    def scale(self) -> Array:
        """f32 [rows, K]: what each code is multiplied by."""
        if self.stored is not None:
            return np.broadcast_to(self.stored, self.x.shape)
        by_group = np.abs(self.x).reshape(len(self.x), -1, self.group)
        largest = by_group.max(axis=2).astype(np.float32) / np.float32(448.0)
        spread: Array = largest.repeat(self.group, axis=1)
        return spread

    @property
    def codes(self) -> Array:
        """What the reference semantics give, as numbers."""
        x, scale = (torch.from_numpy(a.astype(np.float32)) for a in (self.x, self.scale))
        return quant_semantics.quantize(x, scale).double().numpy()

    @property
    def parameters(self) -> dict[str, Array]:
        return {} if self.stored is None else {"scale": self.stored}

    def emit(self, f: Scope) -> tuple[SSAValue, SSAValue]:
        """Codes and their scale."""
        scale = f.weights.get("scale")
        if scale is None:
            scale = f.add(quant.DynamicScaleOp(f.x[0], group=self.group))
        return f.add(quant.QuantizeOp(f.x[0], scale)), scale


@settings(max_examples=12)
@given(
    where=tokens,
    width=st.integers(1, 1500),
    source=sources | st.just("columns"),
    seed=st.integers(0, 999),
)
def test_codes_and_what_they_mean_are_those_of_the_reference(
    where: tuple[Bucket, tuple[int, ...]], width: int, source: str, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    inputs = Inputs.random(rng, rows_of(*where), width, source)

    def body(f: Scope) -> SSAValue:
        return f.add(quant.DequantizeOp(*inputs.emit(f)))

    found = OneFunction(*where, [inputs.x], body, inputs.parameters).run()
    expected = (inputs.codes * inputs.scale).astype(np.float32).astype(ml_dtypes.bfloat16)
    assert (found == expected.astype(np.float32)).all()


@settings(max_examples=10)
@given(where=tokens, group=groups, count=st.integers(2, 24), seed=st.integers(0, 999))
@example(where=(Bucket.decode(1, 8), (5,)), group=128, count=40, seed=0).via("begin in slices")
@example(where=(Bucket.prefill(2, 37), (37, 20)), group=128, count=112, seed=0).via("and wider")
def test_codes_in_groups(
    where: tuple[Bucket, tuple[int, ...]], group: int, count: int, seed: int
) -> None:
    """Groups are parts of a row: what their codes mean stands in bf16, and is multiplied so."""
    rng = np.random.default_rng(seed)
    width = group * count
    assume(has_groups(plain(width), group))
    inputs = Inputs.random(rng, rows_of(*where), width, "computed", group)
    weights = {
        "w": normal(rng, 40, width).astype(ml_dtypes.float8_e4m3fn),
        "w_scale": rng.uniform(0.01, 0.1, 40).astype(np.float16),
    }

    def meaning(f: Scope) -> SSAValue:
        return f.add(quant.DequantizeOp(*inputs.emit(f)))

    def product(f: Scope) -> SSAValue:
        x, scale = inputs.emit(f)
        w, w_scale = f.weights["w"], f.weights["w_scale"]
        op = quant.LinearOp(x, w, w_scale, scale, rows=1, columns=width, dtype=bf16)
        return f.add(op)

    wide = (inputs.codes * inputs.scale).astype(np.float32).astype(ml_dtypes.bfloat16)
    if width <= WIDEST_IDENTITY:
        found = OneFunction(*where, [inputs.x], meaning).run()
        assert (found == wide.astype(np.float32)).all()
    scaling = [weights["w_scale"].astype(np.float64)[None]]
    exact = Approx.exact(wide).scaled_linear(weights["w"].astype(np.float64), scaling, 1)
    exact.check_bf16(OneFunction(*where, [inputs.x], product, weights).run())


@settings(max_examples=12)
@given(
    where=tokens,
    shape=st.tuples(st.integers(1, 700), st.integers(1, 700)),
    source=sources,
    bias=st.booleans(),
    head_dim=st.none() | st.integers(1, 40),
    seed=st.integers(0, 999),
)
def test_products_of_codes(
    where: tuple[Bucket, tuple[int, ...]],
    shape: tuple[int, int],
    source: str,
    bias: bool,
    head_dim: int | None,
    seed: int,
) -> None:
    """The codes are exact, so the product has the bound of a sum in f32 that is scaled."""
    rng = np.random.default_rng(seed)
    inputs = Inputs.random(rng, rows_of(*where), shape[1], source)
    rows = shape[0] if head_dim is None else 2 * head_dim * (1 + shape[0] % 5)
    weights: dict[str, Array] = {
        "w": normal(rng, rows, shape[1]).astype(ml_dtypes.float8_e4m3fn),
        "w_scale": rng.uniform(0.01, 0.1, rows).astype(np.float16),
    }
    if bias:
        weights["bias"] = normal(rng, rows)

    def body(f: Scope) -> SSAValue:
        w = f.weights
        x, scale = inputs.emit(f)
        y = f.add(
            quant.LinearOp(
                x, w["w"], w["w_scale"], scale, w.get("bias"), rows=1, columns=shape[1], dtype=bf16
            )
        )
        if head_dim is None:
            return y
        split = f.swapped(f.in_heads(y, rows // (2 * head_dim)))
        zero = [0.0] * head_dim  # nothing turns, but heads stand in rotary order
        turned = nn.RopeOp(split, f.positions, inv_freq=zero, attention_scaling=1.0)
        return f.joined(f.swapped(f.add(turned)))

    rescaled = inputs.scale[:, :1].astype(np.float64)
    scaling = [weights["w_scale"].astype(np.float64)[None], rescaled]
    addends = [weights["bias"]] if bias else []
    codes = Approx.exact(inputs.codes)
    expected = codes.scaled_linear(weights["w"].astype(np.float64), scaling, 2, *addends)
    found = OneFunction(*where, [inputs.x], body, inputs.parameters | weights).run()
    expected.check_bf16(found)


# --- what is loaded ---

WIDE = Decoder(
    Bucket.decode(1, 64),
    hidden=1024,
    heads=16,
    kv_heads=16,
    head_dim=64,
    feed_forward=2048,
    layers=2,
)
"""Every slice has features of every product, so none is loaded for nothing."""


def weight_bytes(program: Program) -> int:
    """Bytes of linear layers' weights that a step brings into data memory, by its transfers."""
    total = 0
    for call in program.calls:
        commands = program.block_commands(program.blocks[call.block])
        assert not any(isinstance(command, Control) for command in commands), "no repeats"
        bound = {b.register_number: program.regions[b.region] for b in call.bindings}
        for command in commands:
            if isinstance(command, Dma) and command.source.register is not None:
                parameter = bound[command.source.register].parameter
                if parameter is not None and isinstance(parameter.layout, RowsLayout):
                    linear = "embed" not in parameter.tensor
                    total += linear * math.prod(command.n) * command.run
    return total


@pytest.mark.parametrize("level", [0, 2])
def test_weights_of_codes_are_half_of_the_traffic(level: int) -> None:
    stored = sum(math.prod(shape) for shape in WIDE.matrices.values()) * WIDE.layers
    assert weight_bytes(WIDE.program(level=level)) == 2 * stored
    assert weight_bytes(replace(WIDE, scheme=CHANNEL).program(level=level)) == stored


# --- what is refused ---


def test_a_weight_of_another_type_is_refused() -> None:
    decoder = Decoder(Bucket.decode(1, 8), layers=1, scheme=CHANNEL)
    weights = decoder.weights()
    for name, dtype, problem in [
        ("0.up", ml_dtypes.float8_e5m2, "dtype float8_e5m2, the program expects float8_e4m3fn"),
        ("0.up_scale", ml_dtypes.float8_e5m2, "expects a scale in floats"),
    ]:
        changed = {**weights, name: weights[name].astype(dtype)}
        device = Device()
        program = decoder.program()
        device.load(program, changed.__getitem__)
        device.allocate_caches(program, 400)
        with pytest.raises(SimulationFault, match=problem) as fault:
            device.execute(program, Case(decoder, (7,)).inputs())
        assert fault.value.code == "SIM021"


@pytest.mark.parametrize(
    ("head_dim", "columns", "problem"),
    [
        (16, 24, "attn.q (quant.linear): scales of blocks of 72 x 24 weights, where pieces of 16"),
        (12, 16, "attn.o (quant.linear): scales of blocks of 72 x 16 weights, where pieces of 16"),
    ],
)
def test_blocks_that_no_sum_divides_are_refused_by_name(
    head_dim: int, columns: int, problem: str
) -> None:
    decoder = Decoder(
        Bucket.decode(1, 8), layers=1, head_dim=head_dim, scheme=Scheme((72, columns))
    )
    with pytest.raises(CompileError, match="belong to two blocks") as caught:
        TilePass.for_bucket(decoder.bucket).apply(Context(), decoder.module())
    assert caught.value.code == "BCK001"
    assert problem in str(caught.value)
    assert ("in heads of 12" in str(caught.value)) == (head_dim == 12)


WITH_GROUPS = Decoder(
    Bucket.decode(1, 8),
    hidden=96,
    heads=6,
    head_dim=16,
    feed_forward=192,
    layers=1,
    scheme=GROUPS,
)


def test_groups_that_no_ring_of_slices_holds_are_refused_by_name() -> None:
    decoder = replace(WITH_GROUPS, scheme=replace(GROUPS, group=48))
    with pytest.raises(
        CompileError, match="groups of 48 inputs, of which a slice holds 16"
    ) as caught:
        decoder.program()
    assert caught.value.code == "BCK001"
    assert "attn.q" in str(caught.value)


def test_codes_of_groups_are_multiplied_by_the_scales_that_made_them() -> None:
    """Anything else would need sums over each group."""
    module = WITH_GROUPS.module()
    linear = next(op for op in module.walk() if isinstance(op, quant.LinearOp))
    made = linear.x.owner
    assert isinstance(made, quant.QuantizeOp)
    other = quant.DynamicScaleOp(made.x, group=GROUPS.group)
    block = linear.parent_block()
    assert block is not None
    block.insert_op_before(other, linear)
    linear.operands[3] = other.y
    with pytest.raises(CompileError, match="made by others") as caught:
        TilePass.for_bucket(WITH_GROUPS.bucket).apply(Context(), module)
    assert caught.value.code == "BCK001"


def test_more_scales_than_registers_hold_are_refused() -> None:
    """Slices hold 41 chunks, of which blocks of 128 leave one alone: 2,624 sums for 16 rows."""
    k = 64 * 41 * 16
    found = test.TestOp(
        result_types=[tensor((1, 1, k), bf16), tensor((128, k), f8e4m3), tensor((1, k // 128), f32)]
    )
    op = quant.LinearOp(*found.results, rows=128, columns=128)
    reason = reason_against(op)
    assert reason is not None
    assert "cut into 2624 sums" in reason
