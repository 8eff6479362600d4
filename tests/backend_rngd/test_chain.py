"""Calls load what the next call begins with: the same values, sooner, from the right layer."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest
from decoder_cases import Case, executed
from small_decoder import Decoder
from xdsl.context import Context

from furiosa_llm.backend_rngd.chain import ChainPass
from furiosa_llm.backend_rngd.isa.container import read_program, write_program
from furiosa_llm.backend_rngd.isa.instructions import Context as Queue
from furiosa_llm.backend_rngd.isa.instructions import Dma
from furiosa_llm.backend_rngd.isa.machine import load_machine
from furiosa_llm.backend_rngd.isa.ordering import check_order
from furiosa_llm.backend_rngd.isa.program import Call, Program
from furiosa_llm.backend_rngd.pipeline import backend_phase
from furiosa_llm.models.config_types import Bucket
from furiosa_llm.runtime_sim.timeline import timeline
from furiosa_llm.runtime_sim.timing import ProgramTiming, time_program

DECODER = Decoder(
    Bucket.decode(2, 64),
    hidden=512,
    heads=8,
    kv_heads=2,
    head_dim=64,
    feed_forward=1024,
    vocabulary=512,
    layers=4,
)
LENGTHS = (64, 9)


@functools.cache
def compiled(decoder: Decoder, level: int) -> Program:
    return read_program(write_program(decoder.program(level=level)))


def ahead(program: Program, call: Call) -> list[Dma]:
    """The commands of a call that work for the next one."""
    block = program.blocks[call.block]
    return [
        command
        for command in program.block_commands(block)
        if isinstance(command, Dma) and block.provenance[command.head.provenance].successor
    ]


def timing(level: int) -> ProgramTiming:
    return time_program(compiled(DECODER, level), load_machine())


def test_values_are_those_of_a_program_that_loads_nothing_ahead() -> None:
    case = Case(DECODER, LENGTHS)
    programs = [compiled(DECODER, level) for level in (1, 2)]
    check_order(programs[1])
    plain, chained = (executed(program, case, float("nan")) for program in programs)
    assert np.array_equal(plain, chained)


def test_calls_load_parameters_of_the_next_call() -> None:
    program = compiled(DECODER, 2)
    names = [region.name for region in program.regions]
    loads = 0
    for i, call in enumerate(program.calls):
        regions = {b.register_number: names[b.region] for b in call.bindings}
        found = [
            regions[command.source.register]
            for command in ahead(program, call)
            if command.source.register is not None
        ]
        loads += len(found)
        parameters = [name for name in found if program.regions[names.index(name)].parameter]
        owner = f"{i}." if i < DECODER.layers else ("final_norm", "embed")
        assert all(name.startswith(owner) for name in parameters), (i, parameters)
    assert loads > DECODER.layers


@pytest.mark.parametrize("level", [0, 1])
def test_lower_levels_load_nothing_ahead(level: int) -> None:
    program = compiled(DECODER, level)
    assert not any(ahead(program, call) for call in program.calls)


def test_dma_has_no_gap_at_the_end_of_a_layer() -> None:
    """Its last transfer stores the hidden state; the one before it ends where that can start."""
    program = compiled(DECODER, 2)
    events = [e for e in timeline(program, load_machine()) if e.context == Queue.DMA]
    of_layer = [event for event in events if event.call == 2]
    gap = of_layer[-1].start - of_layer[-2].end
    plain = [
        event
        for event in timeline(compiled(DECODER, 1), load_machine())
        if event.context == Queue.DMA and event.call == 2
    ]
    assert gap < (plain[-1].start - plain[-2].end) / 4


def test_blocks_do_not_multiply_with_layers() -> None:
    few, many = (compiled(replace(DECODER, layers=n), 2) for n in (3, 6))
    assert [b.name for b in few.blocks] == [b.name for b in many.blocks]
    assert [b.name for b in few.blocks if b.name.startswith("block_0")] == [
        "block_0",
        "block_0_before_epilogue",
    ]


def test_bytes_and_cycles_belong_to_the_module_that_wants_them() -> None:
    modules = {row.path: row for row in timing(2).modules}
    plain = {row.path: row for row in timing(1).modules}
    assert modules.keys() == plain.keys()
    for layer in range(DECODER.layers):
        for name in ("norm", "attn.q", "attn.k", "mlp.gate", "mlp.down"):
            path = f"layers.{layer}.{name}"
            assert modules[path].hbm_bytes == plain[path].hbm_bytes, path
    assert sum(row.cycles for row in modules.values()) == timing(2).cycles


def test_constants_that_all_layers_share_are_loaded_once() -> None:
    """Angles and the like belong to attention; later layers find them where they are."""
    bytes_of = {row.path: row.hbm_bytes for row in timing(2).modules}
    first, *others = [bytes_of[f"layers.{layer}.attn"] for layer in range(DECODER.layers)]
    assert first > others[0]
    assert len(set(others)) == 1


def test_running_the_pass_again_changes_nothing() -> None:
    module, context = DECODER.module(), Context()
    for step in backend_phase(DECODER.bucket, 2)[:2]:
        step.apply(context, module)
    before = str(module)
    ChainPass().apply(context, module)
    assert str(module) == before
