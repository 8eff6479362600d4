"""Programs cut into pipeline stages at load: the same values from separate memories, and times."""

from __future__ import annotations

import functools
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from decoder_cases import SLOTS, Case, fill_cache
from hypothesis import given
from hypothesis import strategies as st
from small_decoder import Decoder

from furiosa_llm import errors
from furiosa_llm.backend_rngd.isa.container import read_program, write_program
from furiosa_llm.backend_rngd.isa.instructions import Dma, Space
from furiosa_llm.backend_rngd.isa.machine import load_machine
from furiosa_llm.backend_rngd.isa.program import Piece, Program, Reload, StageCut
from furiosa_llm.backend_rngd.stage_cuts import Spans, with_stage_cuts
from furiosa_llm.models.config_types import Bucket
from furiosa_llm.runtime_sim.device import Device
from furiosa_llm.runtime_sim.pipeline_timing import send_cycles, time_stages
from furiosa_llm.runtime_sim.timing import time_program

BOOK, SILICON = load_machine("book"), load_machine("silicon")
DECODE = Case(Decoder(Bucket.decode(2, 48), layers=3), (40, 7))
CHUNKS = Case(Decoder(Bucket.prefill(1, 300), layers=2), (290,))
"""A prompt in two chunks: layers are cut at their attention."""


@functools.cache
def program_of(case: Case) -> Program:
    return read_program(write_program(case.decoder.program()))


def logits(case: Case, program: Program, starts: tuple[int, ...]) -> np.ndarray:
    device = Device()
    device.load(program, case.decoder.weights().__getitem__, starts)
    device.allocate_caches(program, SLOTS)
    for layer, past in enumerate(case.past()):
        fill_cache(device.cache(layer), past.view(torch.int16).numpy())
    return device.execute(program, case.inputs())["logits"]


def starts_of(program: Program) -> tuple[int, ...]:
    return tuple(cut.call for cut in program.header.stage_cuts)


@pytest.mark.parametrize(
    ("case", "cuts"),
    [(DECODE, slice(None)), (DECODE, slice(1, 2)), (CHUNKS, slice(None))],
    ids=["decode, all cuts", "decode, one cut", "chunks, all cuts"],
)
def test_stages_compute_what_one_does(case: Case, cuts: slice) -> None:
    """Bitwise: the same commands on the same bytes."""
    program = program_of(case)
    expected = logits(case, program, ())
    assert np.isfinite(expected[0, 0]).all()
    found = logits(case, program, starts_of(program)[cuts])
    assert np.array_equal(found.view(np.uint8), expected.view(np.uint8))


def test_every_layer_may_begin_a_stage() -> None:
    program = program_of(DECODE)
    prefixes = [program.calls[start].prefix for start in starts_of(program)]
    assert {f"layers.{i}" for i in range(3)} <= set(prefixes)


def test_calls_that_share_a_cache_stay_together() -> None:
    """A layer's chunks write their keys in calls before those that attend."""
    program = program_of(CHUNKS)
    users = [
        {b.region for b in call.bindings if program.regions[b.region].cache is not None}
        for call in program.calls
    ]
    shared = [i for i in range(1, len(users)) if users[i - 1] & users[i]]
    assert shared
    for start in starts_of(program):
        before, after = set().union(*users[:start]), set().union(*users[start:])
        assert not before & after


def test_what_another_stage_was_not_sent_is_noticed() -> None:
    program = program_of(DECODE)
    cut = program.header.stage_cuts[1]
    assert cut.sends
    header = program.header.model_copy(
        update={"stage_cuts": (cut.model_copy(update={"sends": ()}),)}
    )
    with pytest.raises(errors.SimulationFault) as fault:
        logits(DECODE, Program(header, program.commands), (cut.call,))
    assert fault.value.code == "SIM012"


def test_what_a_stage_does_not_load_again_is_noticed() -> None:
    """A chained program hands loads over from call to call."""
    program = program_of(DECODE)
    chained = [cut for cut in program.header.stage_cuts if cut.reloads]
    assert chained
    cut = chained[0].model_copy(update={"reloads": ()})
    header = program.header.model_copy(update={"stage_cuts": (cut,)})
    with pytest.raises(errors.SimulationFault) as fault:
        logits(DECODE, Program(header, program.commands), (cut.call,))
    assert fault.value.code == "SIM012"


@pytest.mark.parametrize("starts", [(99,), (2, 1), (1, 1)])
def test_other_cuts_are_refused_with_those_that_are_possible(starts: tuple[int, ...]) -> None:
    program = program_of(DECODE)
    with pytest.raises(errors.SimulationFault) as fault:
        Device().load(program, lambda name: np.zeros(0), starts)
    assert fault.value.code == "SIM029"
    assert str(list(starts_of(program))) in fault.value.next_step


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"call": 0}, "between two calls"),
        ({"call": 99}, "between two calls"),
        ({"sends": (Piece(region=99, offset=0, size=1),)}, "no such region"),
        ({"sends": (Piece(region=0, offset=0, size=1),)}, "are not what calls write"),
        ({"reloads": (Reload(call=4, entry=0),)}, "before it have loaded"),
        ({"reloads": (Reload(call=0, entry=9999),)}, "no such entry"),
    ],
)
def test_a_cut_names_what_exists(change: dict[str, object], problem: str) -> None:
    program = program_of(DECODE)
    cut = StageCut(call=2, sends=()).model_copy(update=change)
    header = program.header.model_copy(update={"stage_cuts": (cut,)})
    with pytest.raises(errors.BinaryError) as error:
        read_program(write_program(Program(header, program.commands)))
    assert error.value.code == "VED004"
    assert problem in str(error.value)


def test_only_loads_are_made_again() -> None:
    program = program_of(DECODE)
    block = program.blocks[program.calls[0].block]
    entries = program.block_commands(block)
    wrong = next(
        i
        for i, c in enumerate(entries)
        if not isinstance(c, Dma) or c.destination.space == Space.HBM
    )
    cut = StageCut(call=1, sends=(), reloads=(Reload(call=0, entry=wrong),))
    header = program.header.model_copy(update={"stage_cuts": (cut,)})
    with pytest.raises(errors.BinaryError, match="VED004"):
        read_program(write_program(Program(header, program.commands)))


def test_results_that_stand_in_data_memory_are_not_cut() -> None:
    """The second call's block reads what the first one's has computed on the chip."""
    program = program_of(DECODE)
    commands = list(program.commands)
    block = program.blocks[program.calls[1].block]
    first = next(
        i
        for i in range(block.first, block.first + block.count)
        if isinstance(c := commands[i], Dma)
        and c.source.space == Space.HBM
        and c.index is None
        and c.source.register is not None
        and program.regions[_bound(program, 1, c.source.register)].scratch_bytes
    )
    loaded = commands[first]
    assert isinstance(loaded, Dma)
    commands[first] = replace(loaded, destination=replace(loaded.destination, base=1 << 18))
    cut = with_stage_cuts(Program(program.header, tuple(commands)))
    assert 2 in starts_of(program)
    assert 2 not in starts_of(cut)


def _bound(program: Program, call: int, register: int) -> int:
    (region,) = (b.region for b in program.calls[call].bindings if b.register_number == register)
    return region


def test_what_a_layer_leaves_to_itself_is_not_sent() -> None:
    """Rows of two chunks fill a region together, with gaps in what each transfer writes."""
    program = program_of(CHUNKS)
    begins = next(cut for cut in program.header.stage_cuts if is_first_of(program, cut, "layers.1"))
    (piece,) = begins.sends
    assert program.regions[piece.region].name.startswith("hidden")


def is_first_of(program: Program, cut: StageCut, prefix: str) -> bool:
    before, call = program.calls[cut.call - 1], program.calls[cut.call]
    return call.prefix == prefix != before.prefix


# --- times ---


def test_one_stage_takes_the_program_s_time() -> None:
    program = program_of(DECODE)
    timing = time_stages(program, BOOK, ())
    assert timing.latency_cycles == timing.slowest_cycles == time_program(program, BOOK).cycles


def test_a_step_takes_all_stages_and_a_full_pipeline_the_slowest() -> None:
    program = program_of(DECODE)
    starts = starts_of(program)
    timing = time_stages(program, BOOK, starts)
    whole = time_program(program, BOOK)
    frame = BOOK.control.launch_cycles + BOOK.control.finish_cycles
    own = [stage.timing.cycles - frame for stage in timing.stages]
    assert sum(own) == whole.cycles - frame
    assert timing.latency_cycles == sum(stage.cycles for stage in timing.stages)
    assert timing.slowest_cycles == max(stage.cycles for stage in timing.stages)
    assert sum(stage.timing.hbm_bytes for stage in timing.stages) == whole.hbm_bytes
    sent = [sum(piece.size for piece in cut.sends) for cut in program.header.stage_cuts]
    assert [stage.sent_bytes for stage in timing.stages] == [0, *sent]
    assert [bool(stage.reload_cycles) for stage in timing.stages[1:]] == [
        bool(cut.reloads) for cut in program.header.stage_cuts
    ]


def test_stages_of_one_card_copy_in_hbm_and_others_use_pcie() -> None:
    program = program_of(DECODE)
    starts = starts_of(program)[:2]
    near, far = (time_stages(program, BOOK, starts, cards=cards) for cards in ((0, 0, 1), ()))
    size = near.stages[1].sent_bytes
    pcie = BOOK.exchange.p2p_latency_cycles + -(-size // 30)
    assert near.stages[1].send_cycles < far.stages[1].send_cycles == pcie
    assert near.stages[2].send_cycles == far.stages[2].send_cycles


def test_busy_stages_of_one_card_share_its_hbm() -> None:
    program = program_of(DECODE)
    starts = starts_of(program)[:2]
    near, far = (
        time_stages(program, SILICON, starts, sharers=4, cards=cards) for cards in ((0, 0, 1), ())
    )
    assert [stage.busy_cycles for stage in far.stages] == [stage.cycles for stage in far.stages]
    first, second, third = near.stages
    assert first.busy_cycles > first.cycles == far.stages[0].cycles
    assert second.busy_cycles > second.cycles
    assert third.busy_cycles == third.cycles
    shared = time_program(program, SILICON, sharers=8, calls=range(starts[0]))
    assert first.busy_cycles == shared.cycles
    assert near.slowest_cycles == max(stage.busy_cycles for stage in near.stages)


def test_sends_cost_what_the_documents_say() -> None:
    """A copy inside HBM reads and writes 256 B units; PCIe moves 30 B a cycle for all ranks."""
    assert send_cycles([8192], 1, BOOK, across_cards=False) == 500 + 2 * 8192 // 256
    assert send_cycles([3000, 3000], 1, BOOK, across_cards=True) == 2000 + 200
    assert send_cycles([3000], 4, BOOK, across_cards=True) == 2000 + 400
    assert send_cycles([], 4, BOOK, across_cards=True) == 0


# --- sets of bytes ---


def test_spans_join_and_part() -> None:
    spans = Spans([(0, 4), (8, 12), (4, 6)])
    assert list(spans) == [(0, 6), (8, 12)]
    spans.remove(2, 9)
    assert list(spans) == [(0, 2), (9, 12)]
    assert spans.common(1, 10) == [(1, 2), (9, 10)]


changes = st.tuples(st.booleans(), st.integers(0, 40), st.integers(1, 12))


@given(st.lists(changes, max_size=20), st.integers(0, 40), st.integers(1, 12))
def test_spans_are_sets_of_bytes(steps: list[tuple[bool, int, int]], low: int, length: int) -> None:
    spans, expected = Spans(), set[int]()
    for adds, first, size in steps:
        (spans.add if adds else spans.remove)(first, first + size)
        changed = set(range(first, first + size))
        expected = expected | changed if adds else expected - changed
    found = [byte for a, b in spans for byte in range(a, b)]
    assert found == sorted(expected)
    assert all(a[1] < b[0] for a, b in pairwise(spans))
    shared = [byte for a, b in spans.common(low, low + length) for byte in range(a, b)]
    assert shared == sorted(expected & set(range(low, low + length)))
