"""Commands as text: what is written can be read back, and bad text is refused with its column."""

from __future__ import annotations

import pytest
from hypothesis import given
from random_commands import commands

from furiosa_llm.backend_rngd.isa.assembly import disassemble, format_command, parse_command
from furiosa_llm.backend_rngd.isa.instructions import (
    Birth,
    Commit,
    Context,
    Control,
    Counter,
    Dma,
    Exec,
    Head,
    Instruction,
    Port,
    Side,
    Space,
    Step,
    Stream,
    Wait,
)
from furiosa_llm.backend_rngd.isa.program import (
    Binding,
    Block,
    Call,
    Header,
    Program,
    Provenance,
    Region,
)
from furiosa_llm.errors import BinaryError

COPY = Exec(
    head=Head(Context.MAIN, waits=(Wait(3, 2),), signals=(1, 2), provenance=1),
    counters=(Counter(4, a=64, commit=64), Counter(2, Birth.SLICE, slices=1)),
    a=Port(register=5),
    stream=Stream(run=32),
    commit_port=Port(base=65536),
    commit=Commit(columns=32, column_stride=2),
)
LOAD = Dma(
    Head(Context.DMA), (64,), 4096, Side(Space.HBM, 0, (4096,)), Side(Space.DM, 0, (1 << 22,))
)


@given(commands)
def test_text_reads_back(command: Instruction) -> None:
    text = format_command(command)
    assert parse_command(text) == command
    assert '"' not in text
    assert "\n" not in text


def test_only_what_is_not_default_is_printed() -> None:
    assert format_command(COPY) == (
        "exec context=main wait(semaphore=3 count=2) signals=1,2 provenance=1 "
        "counter(n=4 a=64 commit=64) counter(n=2 birth=slice slices=1) a(register=5) "
        "stream(run=32) commit_port(base=65536) commit(columns=32 column_stride=2)"
    )
    assert format_command(LOAD) == (
        "dma n=64 run=4096 source(space=hbm base=0 strides=4096) "
        "destination(space=dm base=0 strides=4194304)"
    )
    assert format_command(Control(4, 12, (Step(1, 8192),))) == (
        "repeat count=4 length=12 step(register=1 bytes=8192)"
    )


@pytest.mark.parametrize(
    ("text", "column", "cause"),
    [
        ("", 1, "expected the name of a command"),
        ("move a()", 1, "'move' is none of exec, dma, repeat"),
        ("repeat count=4", 15, "lacks 'length'"),
        ("repeat count=x length=1", 14, "count is an integer"),
        ("repeat count=1 count=1", 16, "'count' stands twice"),
        ("repeat count=1, length=2", 15, "expected a field of Control"),
        ("repeat length(1) count=1", 14, "expected '='"),
        ("exec context=boo", 14, "context is one of main, sub, dma"),
        ("exec context=main a(bas=1)", 21, "Port has no field 'bas'"),
        ("exec context=main a=1", 20, "expected '('"),
        ("exec context=main a(base=1", 27, "expected ')'"),
        ("exec a() stream(run=1) commit_port() commit()", 46, "context=main"),
        (format_command(LOAD) + " context=sub", 113, "dma has none"),
        ("exec context=main vector(imm=1,2)", 33, "imm has 3 values, here are 2"),
    ],
)
def test_bad_text_names_its_column(text: str, column: int, cause: str) -> None:
    with pytest.raises(BinaryError) as caught:
        parse_command(text)
    assert caught.value.code == "VED020"
    assert caught.value.at is not None
    assert caught.value.at.startswith(f"column {column}:")
    assert cause in caught.value.cause
    assert "docs/isa.md" in caught.value.next_step


def test_numbers_may_be_hexadecimal() -> None:
    assert parse_command("repeat count=0x10 length=1") == Control(16, 1)


def test_disassembly_shows_regions_blocks_and_calls() -> None:
    header = Header(
        model_name="tiny",
        bucket="decode:1,16",
        regions=(Region(name="scratch", scratch_bytes=4096),),
        blocks=(
            Block(
                name="block_0",
                first=0,
                count=3,
                provenance=(Provenance(path=""), Provenance(path="mlp.up_proj", macs=64)),
            ),
        ),
        calls=(
            Call(
                block=0,
                prefix="model.layers.0",
                bindings=(Binding(register_number=5, region=0, offset=256),),
            ),
        ),
    )
    text = disassemble(Program(header, (Control(2, 1), COPY, LOAD)))
    lines = [line for line in text.splitlines() if line]
    assert lines[0] == "program decode:1,16 of tiny"
    assert lines[1].startswith("region 0 scratch_bytes scratch: 4096")
    assert lines[2].startswith("block 0 block_0: 3 entries, ")
    assert lines[4] == "  provenance 1 mlp.up_proj macs=64"
    assert lines[5] == "  0000 repeat count=2 length=1"
    assert lines[6] == f"  0001   {format_command(COPY)}"  # inside the repeat
    assert lines[7] == f"  0002 {format_command(LOAD)}"
    assert lines[8] == "call 0 block_0 prefix=model.layers.0 r5=scratch+256"
