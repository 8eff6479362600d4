"""Cycles of exchanges: messages come one after the other, engines go on meanwhile."""

from __future__ import annotations

import pytest
from timed_programs import BOOK, SLICE, add, block_cycles, load, program

from furiosa_llm.backend_rngd.isa.cost import dma_cost, exec_cost
from furiosa_llm.backend_rngd.isa.instructions import (
    Context,
    Dma,
    Head,
    Instruction,
    PeerSignal,
    Side,
    Space,
    Wait,
)
from furiosa_llm.backend_rngd.isa.plan import plan_dma, plan_exec
from furiosa_llm.backend_rngd.isa.program import Program
from furiosa_llm.runtime_sim.timeline import timeline
from furiosa_llm.runtime_sim.timing import time_program

SIGNAL = BOOK.exchange.signal_cycles
MESSAGE = 700
CALIBRATED = BOOK.replace("exchange.message_cycles", MESSAGE)
ARRIVED = 5


def push(peer: int, *, size: int = 256, pull: bool = False, **head: object) -> Dma:
    """`size` bytes of every slice to the same slices of a peer, or from there."""
    own, there = Side(Space.DM, 0, (SLICE,)), Side(Space.DM, 65536, (SLICE,), peer=peer)
    head_of = Head(Context.DMA, **head)  # type: ignore[arg-type]
    return Dma(head_of, (64,), size, *((there, own) if pull else (own, there)))


def arriving(peer: int, **head: object) -> Dma:
    return push(peer, peer_signals=(PeerSignal(ARRIVED, (peer,)),), **head)  # type: ignore[arg-type]


def of_ranks(ranks: int, *commands: Instruction, paths: tuple[str, ...] = ("",)) -> Program:
    made = program(*commands, paths=paths)
    header = made.header.model_copy(update={"tensor_parallel_size": ranks})
    return Program(header, made.commands)


def transfer(command: Dma) -> int:
    return dma_cost(plan_dma(command, "test"), BOOK).total_cycles


WORK = exec_cost(plan_exec(add(), "test"), BOOK).total_cycles


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_a_round_of_messages_takes_one_after_the_other(ranks: int) -> None:
    wait = add(waits=(Wait(ARRIVED, 1, (1,)),))
    timing = time_program(of_ranks(ranks, arriving(1), wait), CALIBRATED)
    assert block_cycles(timing) == transfer(push(1)) + ranks * MESSAGE + SIGNAL + WORK
    assert timing.exchange_cycles == ranks * MESSAGE + SIGNAL
    assert timing.engines["exchange"] == ranks * MESSAGE


def test_rounds_queue_up_while_the_engine_sends_on() -> None:
    """Three pushes are sent before the first round has arrived."""
    waits = (Wait(ARRIVED, 1, (1, 2, 3)),)
    timing = time_program(
        of_ranks(4, arriving(1), arriving(2), arriving(3), add(waits=waits)), CALIBRATED
    )
    assert block_cycles(timing) == transfer(push(1)) + 3 * 4 * MESSAGE + SIGNAL + WORK


def test_weights_stream_while_messages_are_on_their_way() -> None:
    """The load begins when the push has been sent, and hides in the message's way."""
    commands = (arriving(1), load(4096), add(waits=(Wait(ARRIVED, 1, (1,)),)))
    slow = BOOK.replace("exchange.message_cycles", 10_000)
    events = list(timeline(of_ranks(2, *commands), slow))
    assert events[1].start == events[0].end
    assert events[1].end < events[2].start
    timing = time_program(of_ranks(2, *commands), slow)
    assert block_cycles(timing) == transfer(push(1)) + 20_000 + SIGNAL + WORK


def test_by_formula_a_message_costs_its_transfer() -> None:
    timing = time_program(of_ranks(2, arriving(1), add(waits=(Wait(ARRIVED, 1, (1,)),))), BOOK)
    assert block_cycles(timing) == transfer(push(1)) + SIGNAL + WORK
    assert timing.exchange_cycles == SIGNAL


def test_what_is_fetched_has_come_when_the_command_ends() -> None:
    fetch = push(1, pull=True, signals=(1,))
    timing = time_program(of_ranks(2, fetch, add(waits=(Wait(1, 1),))), CALIBRATED)
    assert block_cycles(timing) == transfer(push(1)) + 2 * MESSAGE + WORK


def test_a_signal_alone_is_no_message_but_overtakes_none() -> None:
    ready = add(peer_signals=(PeerSignal(1, (1,)),))
    timing = time_program(of_ranks(2, ready, add(waits=(Wait(1, 1, (1,)),))), CALIBRATED)
    assert block_cycles(timing) == 2 * WORK + SIGNAL
    after = push(1, signals=(2,)), add(waits=(Wait(2, 1),), peer_signals=(PeerSignal(1, (1,)),))
    timing = time_program(of_ranks(2, *after, add(waits=(Wait(1, 1, (1,)),))), CALIBRATED)
    assert block_cycles(timing) == transfer(push(1)) + 2 * MESSAGE + SIGNAL + WORK


def test_the_way_of_a_message_belongs_to_who_waits_and_is_its_bound() -> None:
    commands = (
        add(provenance=0),
        arriving(1, provenance=1),
        add(provenance=1, waits=(Wait(ARRIVED, 1, (1,)),)),
    )
    made = of_ranks(8, *commands, paths=("o_proj", "all_reduce"))
    rows = {row.path: row for row in time_program(made, CALIBRATED).modules}
    assert rows["layer.o_proj"].exchange_cycles == 0
    assert rows["layer.all_reduce"].exchange_cycles == 8 * MESSAGE + SIGNAL
    assert rows["layer.all_reduce"].bound == "exchange"


def test_the_range_of_a_message_counts_once_for_each_rank() -> None:
    from furiosa_llm.backend_rngd.isa.machine import load_machine

    silicon = load_machine("silicon")
    own = silicon.parameters["exchange.message_cycles"]
    assert own.low is not None
    assert own.high is not None
    made = of_ranks(4, arriving(1), add(waits=(Wait(ARRIVED, 1, (1,)),)))
    changes = time_program(made, silicon).spread.changes["exchange.message_cycles"]
    assert isinstance(own.value, int)
    assert changes == (4 * (own.low - own.value), 4 * (own.high - own.value))


def test_ranks_share_hbm() -> None:
    one, eight = (time_program(of_ranks(n, load(65536)), BOOK) for n in (1, 8))
    assert eight.cycles > 1.2 * one.cycles
    shared = time_program(program(load(65536)), BOOK, sharers=8)
    assert (eight.cycles, eight.hbm_bytes) == (shared.cycles, shared.hbm_bytes)


def test_a_transfer_to_the_other_cluster_crosses_over() -> None:
    """Inside a cluster reads and writes add, across they overlap at 128 B per cycle."""
    near, far, own = (transfer(push(peer, size=4096)) for peer in (3, 4, 0))
    assert near == own + BOOK.dma.remote_cycles
    moved = 64 * 4096
    assert far == 500 + moved // 128 + BOOK.dma.cross_cluster_cycles
    hbm = Side(Space.HBM, 0, (4096,))
    there = Side(Space.DM, 0, (SLICE,), peer=4)
    assert transfer(Dma(Head(Context.DMA), (64,), 4096, hbm, there)) == far
