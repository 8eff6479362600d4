"""The order of ranks: what a transfer into another rank's memory needs, and what faults say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from furiosa_llm import errors
from furiosa_llm.backend_rngd.isa.container import read_program, write_program
from furiosa_llm.backend_rngd.isa.expand import expand_commands
from furiosa_llm.backend_rngd.isa.happens_before import happens_before
from furiosa_llm.backend_rngd.isa.instructions import (
    Commit,
    Context,
    Control,
    Counter,
    Dma,
    Exec,
    Head,
    Indirect,
    Instruction,
    PeerSignal,
    Port,
    Side,
    Space,
    Stream,
    Wait,
)
from furiosa_llm.backend_rngd.isa.ordering import check_order
from furiosa_llm.backend_rngd.isa.plan import plan_dma
from furiosa_llm.backend_rngd.isa.program import Block, Call, Header, Program, Provenance

MAIN, DMA = Context.MAIN, Context.DMA
FREE, ARRIVED, MADE, USED = range(4)
"""Semaphores: from the receiver, from the sender, and between the contexts of a rank."""
SLICE = 1 << 22
PART, SLOTS, SUM = 0, 4096, 65536
"""Where a rank keeps its own part, those of the others, and the result."""


def push(
    peer: int,
    target: int,
    waits: Sequence[Wait] = (),
    signals: Sequence[PeerSignal] = (),
    own: tuple[int, ...] = (),
) -> Dma:
    """1 KiB of every slice to the same slices of a peer."""
    return Dma(
        head=Head(DMA, tuple(waits), own, 1, tuple(signals)),
        n=(64,),
        run=1024,
        source=Side(Space.DM, PART, (SLICE,)),
        destination=Side(Space.DM, target, (SLICE,), peer=peer),
    )


def work(source: int, target: int, head: Head) -> Exec:
    """A pass over 1 KiB of every slice."""
    return Exec(
        head=head,
        counters=(Counter(16, a=64, commit=64),),
        a=Port(source),
        stream=Stream(32),
        commit_port=Port(target),
        commit=Commit(columns=32, column_stride=2),
    )


def program(*commands: Instruction, ranks: int = 2) -> Program:
    modules = ("o_proj", "all_reduce", "norm")
    header = Header(
        model_name="model",
        bucket="decode:1,16",
        tensor_parallel_size=ranks,
        regions=(),
        blocks=(
            Block(
                name="layer",
                first=0,
                count=len(commands),
                provenance=tuple(Provenance(path=path) for path in modules),
            ),
        ),
        calls=(Call(block=0, prefix="layers.0", bindings=()),),
    )
    return read_program(write_program(Program(header, commands)))


def rotation(ranks: int) -> list[Instruction]:
    """Every rank sends its part to all others, one slot for each sender, and uses them once."""
    others = tuple(range(1, ranks))
    begin = work(8192 * 2, PART, Head(MAIN, (), (MADE,), 0, (PeerSignal(FREE, others),)))
    pushes = [
        push(
            peer,
            SLOTS + 1024 * peer,
            ((Wait(MADE, 1),) if peer == 1 else ()) + (Wait(FREE, 1, (peer,)),),
            (PeerSignal(ARRIVED, (peer,)),),
        )
        for peer in others
    ]
    use = replace(
        work(SLOTS, SUM, Head(MAIN, (Wait(ARRIVED, 1, others),), (), 2)),
        counters=(Counter(16 * ranks, a=64, commit=64),),
    )
    return [begin, *pushes, use]


def fault(*commands: Instruction, ranks: int = 2) -> errors.FuriosaLLMError:
    with pytest.raises(errors.FuriosaLLMError) as caught:
        check_order(program(*commands, ranks=ranks))
    return caught.value


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_a_handshake_orders_a_rotation(ranks: int) -> None:
    check_order(program(*rotation(ranks), ranks=ranks))


def test_a_buffer_must_be_free_before_it_is_written() -> None:
    """Without the wait the peer may still be in an earlier call."""
    begin, send, use = rotation(2)
    assert isinstance(begin, Exec)
    assert isinstance(send, Dma)
    begin = replace(begin, head=replace(begin.head, peer_signals=()))
    send = replace(send, head=replace(send.head, waits=(Wait(MADE, 1),)))
    error = fault(begin, send, use)
    assert error.code == "SIM026"
    assert "layer[1] dma dm to dm (layers.0.all_reduce) writes to" in error.message
    assert "rank r ^ 1" in error.message


def test_a_transfer_is_waited_for_before_the_call_ends() -> None:
    begin, send, _ = rotation(2)
    assert isinstance(send, Dma)
    error = fault(begin, replace(send, head=replace(send.head, peer_signals=())))
    assert error.code == "SIM026"
    assert "until the call ends" in error.message


def test_a_slot_is_not_read_before_its_transfer_has_arrived() -> None:
    """The fault names the peer's command and my own, each with its module."""
    begin, send, use = rotation(2)
    use = work(SLOTS + 1024, SUM, Head(MAIN, (), (), 2))
    late = work(SUM, SUM + 8192, Head(MAIN, (Wait(ARRIVED, 1, (1,)),), (), 2))
    error = fault(begin, send, use, late)
    assert error.code == "SIM007"
    assert "layer[1] dma dm to dm of rank r ^ 1 (layers.0.all_reduce)" in error.message
    assert "layer[2] main move to dm (layers.0.norm)" in error.message


def test_a_slot_is_not_written_again_before_it_is_used() -> None:
    """The second round's transfer must wait until the peer has used the first one's."""
    use_signals = Head(MAIN, (Wait(ARRIVED, 1, (1,)),), (USED,), 2, (PeerSignal(FREE, (1,)),))
    begin, send, _ = rotation(2)
    use = work(SLOTS + 1024, SUM, use_signals)
    last = work(SLOTS + 1024, SUM, Head(MAIN, (Wait(ARRIVED, 1, (1,)),), (), 2))
    again = push(
        1, SLOTS + 1024, (Wait(FREE, 1, (1,)), Wait(USED, 1)), (PeerSignal(ARRIVED, (1,)),)
    )
    check_order(program(begin, send, use, again, last))
    # My own use of the slot says nothing about the peer's.
    use = replace(use, head=replace(use.head, peer_signals=()))
    again = replace(again, head=replace(again.head, waits=(Wait(USED, 1),)))
    assert fault(begin, send, use, again, last).code == "SIM007"


def test_one_command_cannot_exchange_a_buffer_in_place() -> None:
    """Who comes first would overwrite what the peer has not sent yet."""
    begin, send, use = rotation(2)
    assert isinstance(send, Dma)
    swap = replace(send, destination=replace(send.destination, base=PART))
    assert fault(begin, swap, use).code == "SIM007"


def test_news_of_a_third_rank_comes_through_the_second() -> None:
    """1 tells 0 that it is ready, 0 tells 2: then 2 may write to 1, three away."""
    ready = work(8192, 16384, Head(MAIN, (), (), 0, (PeerSignal(FREE, (1,)),)))
    pass_on = work(
        16384, 8192 * 3, Head(MAIN, (Wait(FREE, 1, (1,)),), (MADE,), 0, (PeerSignal(USED, (2,)),))
    )
    send = push(3, SLOTS, (Wait(USED, 1, (2,)), Wait(MADE, 1)), (PeerSignal(ARRIVED, (3,)),))
    use = work(SLOTS, SUM, Head(MAIN, (Wait(ARRIVED, 1, (3,)),), (), 2))
    check_order(program(ready, pass_on, send, use, ranks=4))
    direct = replace(pass_on, head=replace(pass_on.head, waits=()))
    ready = replace(ready, head=replace(ready.head, peer_signals=()))
    assert fault(ready, direct, send, use, ranks=4).code == "SIM026"


def test_parts_at_the_ranks_own_places_do_not_meet() -> None:
    """Every rank writes its part into all others' buffers, at the place of its own number."""
    begin, *_ = rotation(4)
    sends = [
        replace(
            push(peer, SLOTS, (Wait(FREE, 1, (peer,)),), (PeerSignal(ARRIVED, (peer,)),)),
            destination=Side(Space.DM, SLOTS, (SLICE,), peer=peer, rank_stride=1024),
        )
        for peer in (1, 2, 3)
    ]
    first = replace(
        sends[0], head=replace(sends[0].head, waits=(Wait(MADE, 1), *sends[0].head.waits))
    )
    use = replace(
        work(SLOTS, SUM, Head(MAIN, (Wait(ARRIVED, 1, (1, 2, 3)),), (), 2)),
        counters=(Counter(64, a=64, commit=64),),
    )
    check_order(program(begin, first, *sends[1:], use, ranks=4))
    meeting = replace(sends[2], destination=replace(sends[2].destination, rank_mask=1))
    assert fault(begin, first, sends[1], meeting, use, ranks=4).code == "SIM007"


def test_a_group_starts_when_all_its_ranks_are_ready() -> None:
    """What a rank did before a common pass needs no signal to the others of the group."""
    begin, send, _ = rotation(2)
    assert isinstance(send, Dma)
    together = replace(
        work(SLOTS + 1024, SUM, Head(MAIN, (Wait(ARRIVED, 1, (1,)),), (USED,), 2)), group=1
    )
    again = push(1, SLOTS + 1024, (Wait(USED, 1),), (PeerSignal(ARRIVED, (1,)),))
    last = work(SLOTS + 1024, SUM, Head(MAIN, (Wait(ARRIVED, 1, (1,)),), (), 2))
    check_order(program(begin, send, together, again, last))
    alone = replace(together, group=0)
    assert fault(begin, send, alone, again, last).code == "SIM007"


def test_a_wait_for_a_peer_that_never_signals_names_both_sides() -> None:
    begin, send, use = rotation(2)
    assert isinstance(send, Dma)
    silent = replace(send, head=replace(send.head, peer_signals=()))
    error = fault(begin, silent, use)
    assert error.code == "SIM006"
    assert "layer[2] main move to dm (layers.0.norm) waits for ever" in error.message
    assert "no command of rank r ^ 1 signals it" in error.cause


def test_a_signal_that_comes_later_is_named() -> None:
    begin, send, use = rotation(2)
    error = fault(begin, use, send)
    assert error.code == "SIM006"
    assert "rank r ^ 1 signals it in layer[2] dma dm to dm (layers.0.all_reduce)" in error.cause


def test_a_peer_s_signal_that_nobody_takes_names_both_sides() -> None:
    begin, send, use = rotation(2)
    twice = push(1, SLOTS + 2048, (), (PeerSignal(ARRIVED, (1,)),))
    error = fault(begin, send, use, twice)
    assert error.code in ("SIM005", "SIM026")
    more = work(8192, 16384, Head(MAIN, (), (), 2, (PeerSignal(FREE, (1,)),)))
    error = fault(begin, send, use, more)
    assert error.code == "SIM005"
    assert "rank r ^ 1 signals last in layer[3] main move to dm (layers.0.norm)" in error.cause
    assert "waiting last: layer[1] dma dm to dm (layers.0.all_reduce)" in error.cause


def test_signals_of_different_ranks_do_not_replace_each_other() -> None:
    """Two signals of one peer are not one of each."""
    begin, *sends, use = rotation(4)
    first, second = sends[:2]
    assert isinstance(second, Dma)
    wrong = replace(second, head=replace(second.head, peer_signals=(PeerSignal(ARRIVED, (1,)),)))
    error = fault(begin, first, wrong, sends[2], use, ranks=4)
    assert error.code == "SIM006"
    assert "rank r ^ 2" in error.cause


@pytest.mark.parametrize(
    ("command", "what"),
    [
        (push(2, SLOTS), "writes to the memory of"),
        (push(1, SLOTS, (Wait(0, 1, (3,)),)), "waits for semaphore 0 from"),
        (push(1, SLOTS, (), (PeerSignal(5, (4,)),)), "signals semaphore 5 of"),
        (replace(work(0, 8192, Head(MAIN)), group=2), "works in one group with"),
    ],
)
def test_a_partner_that_does_not_exist_is_refused_when_a_file_is_read(
    command: Instruction, what: str
) -> None:
    with pytest.raises(errors.BinaryError) as caught:
        program(command)
    assert caught.value.code == "VED014"
    assert what in caught.value.message
    assert "layer[0]" in caught.value.message


@pytest.mark.parametrize("ranks", [0, 3, 16])
def test_ranks_are_1_2_4_or_8(ranks: int) -> None:
    with pytest.raises(ValueError, match="tensor_parallel_size"):
        program(*rotation(2), ranks=ranks)


@pytest.mark.parametrize("indirect", [Indirect.SOURCE, Indirect.DESTINATION, Indirect.NONE])
def test_one_side_of_a_transfer_is_the_rank_s_own(indirect: Indirect) -> None:
    command = replace(push(1, 0), source=Side(Space.DM, 0, (SLICE,), peer=1), indirect=indirect)
    if indirect == Indirect.SOURCE:
        command = replace(command, destination=Side(Space.DM, 0, (SLICE,)))
    with pytest.raises(errors.BinaryError) as caught:
        plan_dma(command, "here")
    assert (caught.value.code, caught.value.at) == ("VED011", "here")
    assert "`peer`" in caught.value.message


def test_knowledge_passes_fences_but_fences_do_not_make_it() -> None:
    """A fence is a rank's own: the peer may be in another iteration."""
    begin, send, use = rotation(2)
    order = happens_before(expand_commands([Control(2, 3), begin, send, use], "b"), "b")
    place = order.neighbours.place[1]
    finished = [clock[place : place + 3] for clock in order.clocks]
    # In the second iteration the peer is known to have sent once, which its first pass preceded.
    assert finished == [(0, 0, 0), (1, 0, 0), (1, 0, 1), (1, 0, 1), (3, 0, 1), (3, 0, 2)]
