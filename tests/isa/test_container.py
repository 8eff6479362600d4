"""The `.vedf` file: equal programs give equal bytes, and damage is noticed and named."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from furiosa_llm.backend_rngd.isa.container import PREAMBLE, len_padded, read_program, write_program
from furiosa_llm.backend_rngd.isa.instructions import (
    Commit,
    Context,
    Control,
    Counter,
    Dma,
    Exec,
    Head,
    Port,
    Side,
    Space,
    Step,
    Stream,
    Wait,
)
from furiosa_llm.backend_rngd.isa.machine import load_machine
from furiosa_llm.backend_rngd.isa.program import (
    Binding,
    Block,
    Call,
    Header,
    Program,
    Provenance,
    Region,
)
from furiosa_llm.errors import BinaryError, SimulationFault
from furiosa_llm.runtime_sim.timing import time_program

LOAD = Dma(
    Head(Context.DMA, signals=(0,)),
    (64,),
    256,
    Side(Space.HBM, 0, (256,), register=3),
    Side(Space.DM, 0, (1 << 22,)),
)
COPY = Exec(
    head=Head(Context.MAIN, (Wait(0, 1),), provenance=1),
    counters=(Counter(8, a=32, commit=32),),
    a=Port(),
    stream=Stream(run=16),
    commit_port=Port(base=4096),
    commit=Commit(columns=16, column_stride=2),
)
COMMANDS = (Control(4, 2, (Step(3, 16384),)), LOAD, COPY, LOAD, COPY)


def make(commands: tuple[Exec | Dma | Control, ...] = COMMANDS) -> Program:
    header = Header(
        model_name="tiny",
        bucket="prefill:1,16",
        regions=(Region(name="scratch", scratch_bytes=65536),),
        blocks=(
            Block(
                name="block",
                first=0,
                count=len(commands),
                provenance=(Provenance(path="load"), Provenance(path="copy", macs=3)),
            ),
        ),
        calls=(Call(block=0, prefix="l", bindings=(Binding(register_number=3, region=0),)),),
    )
    return Program(header, commands)


DATA = write_program(make())


def mended(data: bytes) -> bytes:
    """`data` with the checksum of what it holds now."""
    digest = hashlib.sha256(data[PREAMBLE.size :]).digest()
    return data[:24] + digest + data[56:]


def with_header(change: Callable[[dict[str, Any]], object]) -> bytes:
    """The file with its header changed, everything else consistent."""
    magic, version, size, records, _, zero = PREAMBLE.unpack_from(DATA)
    header = json.loads(DATA[PREAMBLE.size : PREAMBLE.size + size])
    change(header)
    text = json.dumps(header).encode()
    body = text + b"\0" * (-len(text) % 64) + DATA[PREAMBLE.size + len_padded(size) :]
    return mended(PREAMBLE.pack(magic, version, len(text), records, b"\0" * 32, zero) + body)


def test_programs_read_back_and_equal_ones_have_equal_bytes() -> None:
    program = read_program(DATA)
    assert program.header == make().header
    assert program.commands == COMMANDS
    assert write_program(program) == DATA == write_program(make())


def test_equal_commands_share_a_record() -> None:
    program = read_program(DATA)
    assert program.commands[1] is program.commands[3]
    assert program.block_code_bytes(program.blocks[0]) == 64 + 256 + 640 + 5 * 4


def test_files_are_read_like_bytes(tmp_path: Path) -> None:
    path = tmp_path / "prefill-1-16.vedf"
    path.write_bytes(DATA)
    assert read_program(path).commands == COMMANDS


@pytest.mark.parametrize(
    ("data", "code", "cause"),
    [
        (b"", "VED001", "magic"),
        (b"ELF" + DATA[3:], "VED001", "magic"),
        (DATA[:100], "VED001", "announces"),
        (DATA + b"\0", "VED001", "announces"),
        (DATA[:4] + b"\x63" + DATA[5:], "VED002", ""),
        (DATA[:70] + b"?" + DATA[71:], "VED003", ""),
        (with_header(lambda h: h.update(bucket="both")), "VED004", "pattern"),
        (with_header(lambda h: h.update(colour="red")), "VED004", "Extra inputs"),
        (with_header(lambda h: h["calls"][0].update(block=7)), "VED004", "no such block"),
        (with_header(lambda h: h["calls"][0].update(successor=7)), "VED004", "no such call"),
        (with_header(lambda h: h["regions"].clear()), "VED004", "no such region"),
        (with_header(lambda h: h["blocks"][0].update(count=9)), "VED004", "has 5 entries"),
        (with_header(lambda h: h["blocks"][0]["provenance"].pop()), "VED004", "no entry"),
        (
            with_header(lambda h: h["regions"][0].pop("scratch_bytes")),
            "VED004",
            "exactly one content",
        ),
    ],
)
def test_damage_is_named(data: bytes, code: str, cause: str) -> None:
    with pytest.raises(BinaryError) as caught:
        read_program(data)
    assert caught.value.code == code
    assert cause in caught.value.cause
    assert caught.value.next_step


@pytest.mark.parametrize(
    ("commands", "bound", "cause"),
    [
        (COMMANDS, (), "register 3 stands for no region"),
        (COMMANDS, (3, 3), "bound twice"),
        ((replace(LOAD, source=replace(LOAD.source, register=None)),), (3,), "has no register"),
        ((replace(COPY, a=Port(register=4)),), (), "nothing moves it"),
        ((Control(4, 1, (Step(4, 8),)), replace(COPY, a=Port(register=4))), (4,), "on chip"),
        ((Control(4, 1, (Step(5, 8),)), LOAD), (3,), "nothing inside uses"),
    ],
)
def test_registers_have_a_value_and_a_use(
    commands: tuple[Exec | Dma | Control, ...], bound: tuple[int, ...], cause: str
) -> None:
    header = make(commands).header
    bindings = tuple(Binding(register_number=number, region=0) for number in bound)
    calls = (header.calls[0].model_copy(update={"bindings": bindings}),)
    data = write_program(Program(header.model_copy(update={"calls": calls}), commands))
    with pytest.raises(BinaryError) as caught:
        read_program(data)
    assert caught.value.code == "VED004"
    assert cause in caught.value.cause


def test_code_beyond_the_instruction_memory_is_refused() -> None:
    many = tuple(
        Exec(COPY.head, (), Port(base=8 * i), COPY.stream, COPY.commit_port, COPY.commit)
        for i in range(1127)
    )
    with pytest.raises(BinaryError) as caught:
        write_program(make(many))
    assert caught.value.code == "VED005"
    assert "720,896" in str(caught.value) or "720896" in str(caught.value)


@given(st.integers(PREAMBLE.size, len(DATA) - 1), st.integers(0, 7))
@settings(max_examples=300)
def test_flipped_bits_with_a_mended_checksum_do_no_harm(place: int, bit: int) -> None:
    """A coded error, or a program that can be timed."""
    data = bytearray(DATA)
    data[place] ^= 1 << bit
    try:
        time_program(read_program(mended(bytes(data))), load_machine())
    except (BinaryError, SimulationFault) as error:
        refused = error
        assert refused.code[:3] in ("VED", "SIM")
