"""Quantised linear layers through binaries: against the interpreter, and what they load.

A decoder whose layers are codes and scales computes what its bf16 roundings allow, like any other
(`decoder_cases`): scales are applied in f32 and cost no rounding to bf16.
"""

from __future__ import annotations

import math
from dataclasses import replace

import ml_dtypes
import pytest
from decoder_cases import Case, check
from small_decoder import Decoder, Scheme
from xdsl.context import Context
from xdsl.dialects import test
from xdsl.dialects.builtin import IntegerAttr, f16, f32, i64

from furiosa_llm.backend_rngd.isa.container import Program
from furiosa_llm.backend_rngd.isa.instructions import Control, Dma
from furiosa_llm.backend_rngd.isa.layout import RowsLayout
from furiosa_llm.backend_rngd.tile import TilePass
from furiosa_llm.errors import CompileError, SimulationFault
from furiosa_llm.ir import quant
from furiosa_llm.ir.types import tensor
from furiosa_llm.models.config_types import Bucket
from furiosa_llm.runtime_sim.device import Device

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
}


@pytest.mark.parametrize("name", CASES)
def test_logits_agree_with_the_interpreter(name: str) -> None:
    check(CASES[name])


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


def test_scales_of_blocks_are_refused_by_name() -> None:
    decoder = Decoder(Bucket.decode(1, 8), layers=1, scheme=CHANNEL)
    module = decoder.module()
    linear = next(op for op in module.walk() if isinstance(op, quant.LinearOp))
    scale = test.TestOp(result_types=[tensor((1, 3), f32)])
    block = linear.parent_block()
    assert block is not None
    block.insert_op_before(scale, linear)
    linear.operands[2] = scale.results[0]
    linear.rows, linear.columns = IntegerAttr(72, i64), IntegerAttr(24, i64)
    with pytest.raises(CompileError, match="blocks of 72 x 24") as caught:
        TilePass.for_bucket(decoder.bucket).apply(Context(), module)
    assert caught.value.code == "BCK001"
    assert "attn.q" in str(caught.value)
