"""The order that `synchronise` writes down: enough to keep conflicts apart, and none of it idle."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from small_decoder import Decoder

from furiosa_llm.backend_rngd.isa.instructions import Context, Control, Dma, Exec, Head, Side, Space
from furiosa_llm.backend_rngd.isa.ordering import Node, check_order
from furiosa_llm.backend_rngd.isa.program import Program
from furiosa_llm.backend_rngd.isa.record_types import MAX_SIGNALS, MAX_WAITS
from furiosa_llm.backend_rngd.synchronise import _Head, _Signal, _signaller, _waiter, semaphore
from furiosa_llm.errors import CompileError, SimulationFault
from furiosa_llm.models.config_types import Bucket

BUCKETS = [Bucket.decode(2, 40), Bucket.prefill(1, 80)]


def without_wait(program: Program, index: int, wait: int) -> Program:
    """The program with one wait of one command left out."""
    commands = list(program.commands)
    command = commands[index]
    assert isinstance(command, Exec | Dma)
    waits = command.head.waits[:wait] + command.head.waits[wait + 1 :]
    commands[index] = replace(command, head=replace(command.head, waits=waits))
    return Program(program.header, tuple(commands))


@pytest.mark.parametrize("bucket", BUCKETS, ids=str)
def test_a_deleted_wait_is_a_fault_that_names_both_commands_and_their_modules(
    bucket: Bucket,
) -> None:
    program = Decoder(bucket, layers=1).program()
    check_order(program)
    waits = [
        (i, wait)
        for i, command in enumerate(program.commands)
        if not isinstance(command, Control)
        for wait in range(len(command.head.waits))
    ]
    assert len(waits) > 40
    for index, wait in waits:
        with pytest.raises(SimulationFault) as caught:
            check_order(without_wait(program, index, wait))
        assert caught.value.code == "SIM007", (index, wait)
        text = str(caught.value)
        assert len(re.findall(r"\w+\[\d+\] (main|sub|dma) ", text)) >= 2, text
        assert re.search(r"layers\.0|embed|final_norm|lm_head", text), text


@pytest.mark.parametrize("bucket", BUCKETS, ids=str)
def test_waits_name_other_contexts_only(bucket: Bucket) -> None:
    program = Decoder(bucket, layers=1).program()
    for command in program.commands:
        if not isinstance(command, Control):
            own = int(command.head.context)
            assert all(wait.semaphore % 3 == own for wait in command.head.waits)
            assert all(semaphore // 3 == own for semaphore in command.head.signals)


def transfer(peer: int) -> Any:
    """A DMA command as it is issued, into this rank's memory (0) or a peer's."""
    side = Side(Space.DM, 0, (0,))
    return SimpleNamespace(
        context=Context.DMA,
        command=Dma(Head(Context.DMA), (1,), 32, side, replace(side, peer=peer)),
    )


def node(command: int, mask: int = 0) -> Node:
    return Node(command, Context.DMA, mask, ())


def name(number: int) -> str:
    return f"command {number}"


def tell(issued: list[Any], heads: list[_Head], finished: Node, context: Context) -> None:
    """Let the last command, in `context`, wait for `finished`."""
    waiting = _Head(context)
    last = node(len(heads))
    signalling = _signaller(issued, [*heads, waiting], finished, last, name)
    number = semaphore(heads[signalling].context, context, of_peer=finished.mask != 0)
    heads[signalling].signal(_Signal(signalling, number, finished.mask))


def test_who_waits_for_a_push_with_no_signal_left_waits_for_what_follows_it() -> None:
    """A push tells its peer that it has come; its own contexts need to know that, too."""
    issued = [transfer(7), transfer(0), transfer(0)]
    heads = [_Head(Context.DMA) for _ in issued]
    tell(issued, heads, node(0, mask=7), Context.DMA)
    for waiting in (Context.MAIN, Context.SUB):
        tell(issued, heads, node(0), waiting)
    built = [head.built() for head in heads]
    counts = [len(head.signals) + len(head.peer_signals) for head in built]
    assert counts == [MAX_SIGNALS, 1, 0]
    assert [len(head.peer_signals) for head in built] == [1, 0, 0]


def test_that_a_push_has_arrived_no_later_command_can_say() -> None:
    issued = [transfer(7), transfer(0)]
    heads = [_Head(Context.DMA) for _ in issued]
    push = node(0, mask=7)
    tell(issued, heads, push, Context.MAIN)
    tell(issued, heads, push, Context.SUB)
    with pytest.raises(CompileError, match="BCK007") as caught:
        tell(issued, heads, push, Context.DMA)
    assert caught.value.at == "command 0"
    assert "command 2" in caught.value.cause


def signal(command: int, sender: int, peer: int = 0) -> _Signal:
    """Of a command of the context that has this number."""
    return _Signal(command, semaphore(Context(sender), Context.DMA, of_peer=peer != 0), peer)


def test_a_command_without_a_wait_left_has_an_earlier_one_wait() -> None:
    """Of its context, after the one that signals, and without a wait for another such signal."""
    issued = [transfer(0) for _ in range(5)]
    heads = [_Head(Context.DMA) for _ in issued]
    for number in range(MAX_WAITS):
        heads[4].wait(_Signal(3, 100 + number, 0))
    heads[3].wait(signal(0, Context.MAIN))
    late, early = signal(1, Context.MAIN), signal(2, Context.SUB)
    assert _waiter(issued, heads, 4, early, name) == 3
    assert _waiter(issued, heads, 4, late, name) == 2
    assert _waiter(issued, heads, 4, signal(1, Context.MAIN, peer=2), name) == 3


def test_nothing_waits_for_what_comes_after_it() -> None:
    issued = [transfer(0) for _ in range(3)]
    heads = [_Head(Context.DMA) for _ in issued]
    for number in range(MAX_WAITS):
        heads[2].wait(_Signal(0, number, 0))
    with pytest.raises(CompileError, match="BCK008") as caught:
        _waiter(issued, heads, 2, _Signal(1, MAX_WAITS, 0), name)
    assert (caught.value.at, "command 1" in caught.value.cause) == ("command 2", True)
