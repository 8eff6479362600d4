"""Issue lists become the commands that run, in order, with their registers advanced."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from furiosa_llm import errors
from furiosa_llm.backend_rngd.isa.expand import (
    MAX_ISSUED,
    MAX_NESTING,
    Issued,
    expand_block,
    expand_call,
    expand_commands,
    module_path,
)
from furiosa_llm.backend_rngd.isa.instructions import (
    Context,
    Control,
    Dma,
    Head,
    Instruction,
    Side,
    Space,
    Step,
)
from furiosa_llm.backend_rngd.isa.program import Binding, Block, Call, Header, Program, Provenance

REGION = 1 << 40


def load(base: int, *, source: int | None = None, target: int | None = None) -> Dma:
    """64 B from HBM at `source` to data memory at `base`."""
    return Dma(
        head=Head(Context.DMA),
        n=(),
        run=64,
        source=Side(Space.HBM, 0, (), source),
        destination=Side(Space.DM, base, (), target),
    )


def targets(issued: tuple[Issued, ...]) -> list[int]:
    """Where each transfer goes when registers start at zero."""
    return [command.addresses[1].offset for command in issued]


def test_commands_without_repeats_come_once_in_order() -> None:
    issued = expand_commands([load(0), load(64), load(0)], "block")
    assert targets(issued) == [0, 64, 0]
    assert [command.entry for command in issued] == [0, 1, 2]
    assert issued[0].plan is issued[2].plan


def test_a_repeat_advances_its_registers_and_puts_them_back() -> None:
    body = [load(0, target=3), load(8, source=4)]
    issued = expand_commands(
        [Control(3, 2, (Step(3, 64), Step(4, 4096))), *body, load(0, target=3)], "block"
    )
    assert targets(issued) == [0, 8, 64, 8, 128, 8, 0]
    assert [c.addresses[0].offset for c in issued if c.entry == 2] == [0, 4096, 8192]
    assert [c.addresses[1].step for c in issued] == [0, 0, 64, 0, 128, 0, 0]


def test_repeats_nest_and_count_as_one_entry_of_the_body_around_them() -> None:
    commands: list[Instruction] = [
        Control(2, 4, (Step(1, 1024),)),
        load(0, target=1),
        Control(3, 1, (Step(1, 64),)),
        load(0, target=1),
        load(8, target=1),
        load(16, target=1),
    ]
    assert targets(expand_commands(commands, "block")) == [
        *(0, 0, 64, 128, 8),
        *(1024, 1024, 1088, 1152, 1032),
        16,
    ]


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_nested_counts_multiply(counts: list[int]) -> None:
    commands: list[Instruction] = [
        Control(count, len(counts) - i, (Step(0, 8),)) for i, count in enumerate(counts)
    ]
    issued = expand_commands([*commands, load(0, target=0)], "block")
    product = 1
    for count in counts:
        product *= count
    assert len(issued) == product
    assert issued[-1].addresses[1].offset == 8 * sum(count - 1 for count in counts)


def test_a_body_must_lie_inside_its_block() -> None:
    with pytest.raises(errors.SimulationFault) as fault:
        expand_commands([Control(2, 3), load(0)], "block")
    assert fault.value.code == "SIM001"
    assert "block[0]" in str(fault.value)
    assert "3 entries" in fault.value.message


def test_a_body_must_lie_inside_the_repeat_around_it() -> None:
    with pytest.raises(errors.SimulationFault) as fault:
        expand_commands([Control(2, 2), Control(2, 2), load(0), load(8)], "block")
    assert (fault.value.code, fault.value.at) == ("SIM001", "block[1]")


def test_a_damaged_count_neither_hangs_nor_fills_the_memory() -> None:
    """2^20 · 2^20 commands are counted, not issued."""
    commands: list[Instruction] = [Control(1 << 20, 2), Control(1 << 20, 1), load(0)]
    with pytest.raises(errors.SimulationFault) as fault:
        expand_commands(commands, "block")
    assert fault.value.code == "SIM003"
    assert str(MAX_ISSUED) in fault.value.message


def test_repeats_inside_each_other_have_a_limit() -> None:
    deep: list[Instruction] = [Control(1, 4000 - i) for i in range(4000)]
    with pytest.raises(errors.SimulationFault) as fault:
        expand_commands([*deep, load(0)], "block")
    assert fault.value.code == "SIM002"
    assert str(MAX_NESTING) in fault.value.message


def make_program() -> Program:
    header = Header(
        model_name="model",
        bucket="decode:1,16",
        regions=(),
        blocks=(Block(name="b", first=0, count=1, provenance=(Provenance(path="mlp.up_proj"),)),),
        calls=(
            Call(
                block=0,
                prefix="model.layers.3",
                bindings=(Binding(register_number=7, region=2, offset=256),),
            ),
            Call(block=0, prefix="", bindings=()),
        ),
    )
    return Program(header, (load(0, source=7),))


def test_a_call_is_its_block_and_its_registers() -> None:
    program = make_program()
    expanded = expand_call(program, program.calls[0])
    command = expanded.issued[0]
    assert command.addresses[0].resolve(expanded.registers) == 2 * REGION + 256
    assert command.addresses[1].resolve(expanded.registers) == 0
    assert expand_call(program, program.calls[1]).registers[7] == 0


def test_calls_share_their_block() -> None:
    program = make_program()
    issued = expand_block(program, program.blocks[0])
    assert all(expand_call(program, call).issued is issued for call in program.calls)


def test_the_module_path_joins_the_call_and_the_command() -> None:
    program = make_program()
    paths = [module_path(program, call, load(0)) for call in program.calls]
    assert paths == ["model.layers.3.mlp.up_proj", "mlp.up_proj"]
