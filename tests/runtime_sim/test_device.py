"""A small program on the device: it doubles rows of an embedding and keeps them in a cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from furiosa_llm import errors
from furiosa_llm.backend_rngd.isa.container import read_program, write_program
from furiosa_llm.backend_rngd.isa.dtypes import DType
from furiosa_llm.backend_rngd.isa.instructions import (
    Alu,
    Birth,
    Commit,
    Context,
    Control,
    Counter,
    Dma,
    Exec,
    Fate,
    Head,
    IndexList,
    Indirect,
    Instruction,
    Op,
    Port,
    Reduce,
    Side,
    Source,
    Space,
    Step,
    Stream,
    Switch,
    Topology,
    Vector,
    VectorOp,
    Wait,
)
from furiosa_llm.backend_rngd.isa.layout import RowTableLayout, plain
from furiosa_llm.backend_rngd.isa.program import (
    Binding,
    Block,
    CacheIo,
    Call,
    Header,
    Program,
    Provenance,
    Region,
    Relocation,
    TensorIo,
)
from furiosa_llm.runtime_sim import device as device_module
from furiosa_llm.runtime_sim.device import Device
from furiosa_llm.runtime_sim.hbm import Parameter, PlacedRoom

TOKENS, VOCABULARY, FEATURES = 4, 16, 1024
ROW = FEATURES * 2
"""Bytes of a row; a slice has 32 of them."""
SLICE = 1 << 22
TABLE, IDS, OUT, CACHE, SCRATCH = range(5)
REGISTERS = {TABLE: 0, IDS: 1, OUT: 2, CACHE: 3, SCRATCH: 4}
EMBEDDING = np.random.default_rng(0).normal(size=(VOCABULARY, FEATURES)).astype(ml_dtypes.bfloat16)
IDS_GIVEN = np.array([[3, 0, 15, 3]], np.int32)

gather = Dma(
    head=Head(Context.DMA, signals=(0,)),
    n=(TOKENS, 64),
    run=32,
    source=Side(Space.HBM, 0, (0, 32), REGISTERS[TABLE]),
    destination=Side(Space.DM, 0, (32, SLICE)),
    indirect=Indirect.SOURCE,
    index=IndexList(0, (8, 0), ROW, REGISTERS[IDS], VOCABULARY),
)
double = Exec(
    head=Head(Context.MAIN, (Wait(0, 1),), (1,), provenance=1),
    counters=(Counter(TOKENS, a=32, commit=32),),
    a=Port(0),
    stream=Stream(16, cast=DType.F32),
    vector=Vector((VectorOp(Alu.FMA, Op.MUL, Source.IMM0),), imm=(0x40000000, 0, 0)),
    commit_port=Port(4096),
    commit=Commit(columns=16, column_stride=2),
)
put = Dma(
    head=Head(Context.DMA, (Wait(1, 1),)),
    n=(TOKENS, 64),
    run=32,
    source=Side(Space.DM, 4096, (32, SLICE)),
    destination=Side(Space.HBM, 0, (ROW, 32), REGISTERS[OUT]),
)
keep = replace(
    put, head=Head(Context.DMA), destination=replace(put.destination, register=REGISTERS[CACHE])
)
COMMANDS: tuple[Instruction, ...] = (gather, double, put, keep)


def make_regions() -> list[Region]:
    relocation = Relocation(
        tensor="embed.weight",
        shape=(VOCABULARY, FEATURES),
        begin=(0, 0),
        end=(VOCABULARY, FEATURES),
        layout=RowTableLayout(order=plain(FEATURES), per_slice=16, rows=VOCABULARY),
    )
    ids = TensorIo(name="ids", dtype="i32", shape=(1, TOKENS), element_bytes=8, row_bytes=32)
    out = TensorIo(
        name="out", dtype="bf16", shape=(TOKENS, FEATURES), element_bytes=2, row_bytes=ROW
    )
    return [
        Region(name="table", parameter=relocation),
        Region(name="ids", input=ids),
        Region(name="out", output=out),
        Region(name="cache", cache=CacheIo(layer=0, kv_heads=2, head_dim=256, padded=256)),
        Region(name="scratch", scratch_bytes=1 << 16),
    ]


def make_program(
    commands: Sequence[Instruction] = COMMANDS, regions: list[Region] | None = None
) -> Program:
    """One block, called once as the module `model`, and read back from its bytes."""
    regions = regions or make_regions()
    header = Header(
        model_name="model",
        bucket="decode:1,16",
        regions=tuple(regions),
        blocks=(
            Block(
                name="block_0",
                first=0,
                count=len(commands),
                provenance=(Provenance(path="embed"), Provenance(path="scale")),
            ),
        ),
        calls=(
            Call(
                block=0,
                prefix="model",
                bindings=tuple(
                    Binding(register_number=REGISTERS[i], region=i) for i in range(len(regions))
                ),
            ),
        ),
    )
    return read_program(write_program(Program(header, tuple(commands))))


def source(name: str) -> np.ndarray:
    assert name == "embed.weight"
    return EMBEDDING


def ready(program: Program, slots: int = TOKENS) -> Device:
    device = Device()
    device.load(program, source)
    device.allocate_caches(program, slots)
    return device


def run(program: Program, ids: np.ndarray = IDS_GIVEN) -> np.ndarray:
    return ready(program).execute(program, {"ids": ids})["out"]


def fault_of(
    commands: Sequence[Instruction], regions: list[Region] | None = None
) -> errors.SimulationFault:
    with pytest.raises(errors.SimulationFault) as fault:
        run(make_program(commands, regions))
    return fault.value


def expected(ids: np.ndarray = IDS_GIVEN) -> np.ndarray:
    wide: np.ndarray = EMBEDDING[ids[0]].astype(np.float32) * 2
    return wide.astype(ml_dtypes.bfloat16)


def test_a_program_gives_its_outputs_in_their_shape_and_type() -> None:
    out = run(make_program())
    assert (out.shape, out.dtype) == ((TOKENS, FEATURES), ml_dtypes.bfloat16)
    assert np.array_equal(out, expected())


def test_a_second_run_sees_new_inputs_and_leaves_the_first_result_alone() -> None:
    program = make_program()
    device = ready(program)
    first = device.execute(program, {"ids": IDS_GIVEN})["out"]
    other = np.array([[1, 2, 4, 8]], np.int32)
    assert np.array_equal(device.execute(program, {"ids": other})["out"], expected(other))
    assert np.array_equal(first, expected())


def test_caches_belong_to_the_device_and_are_shared_by_its_programs() -> None:
    """The second program reads what the first has put into the cache of layer 0."""
    from_cache = replace(put, head=Head(Context.DMA))
    load = Dma(
        head=Head(Context.DMA),
        n=(TOKENS, 64),
        run=32,
        source=replace(put.destination, register=REGISTERS[CACHE]),
        destination=put.source,
    )
    writer, reader = make_program(), make_program([load, from_cache])
    device = ready(writer)
    assert (device.cache(0) == 0xFF).all()
    device.execute(writer, {"ids": IDS_GIVEN})
    device.load(reader, source)
    device.allocate_caches(reader, TOKENS)
    assert np.array_equal(device.execute(reader, {"ids": IDS_GIVEN})["out"], expected())
    assert device.cache(0).shape == (TOKENS, 2048)
    device.allocate_caches(reader, 2 * TOKENS)
    assert (device.cache(0) == 0xFF).all()


def test_a_parameter_that_is_wider_than_bf16_is_rounded() -> None:
    program = make_program()
    device = Device()
    device.load(program, lambda name: EMBEDDING.astype(np.float32) * np.float32(1.001))
    device.allocate_caches(program, TOKENS)
    table = (EMBEDDING.astype(np.float32) * np.float32(1.001)).astype(ml_dtypes.bfloat16)
    out = device.execute(program, {"ids": IDS_GIVEN})["out"]
    assert np.array_equal(out, (table[IDS_GIVEN[0]] * 2).astype(ml_dtypes.bfloat16))


# --- what the device needs ---


@pytest.mark.parametrize(
    ("inputs", "problem"),
    [
        ({}, "missing"),
        ({"ids": IDS_GIVEN[:, :3]}, "shape [1, 3], the program expects [1, 4]"),
        ({"ids": IDS_GIVEN.astype(np.int64)}, "dtype int64"),
        ({"ids": IDS_GIVEN, "mask": IDS_GIVEN}, "only ids"),
    ],
)
def test_inputs_must_be_those_of_the_program(inputs: dict[str, np.ndarray], problem: str) -> None:
    program = make_program()
    with pytest.raises(errors.SimulationFault) as fault:
        ready(program).execute(program, inputs)
    assert fault.value.code == "SIM020"
    assert problem in fault.value.message


def test_a_program_needs_its_parameters_and_its_caches() -> None:
    program, device = make_program(), Device()

    def missing() -> str:
        with pytest.raises(errors.SimulationFault) as fault:
            device.execute(program, {"ids": IDS_GIVEN})
        assert fault.value.code == "SIM022"
        return fault.value.next_step

    assert "Device.load" in missing()
    device.load(program, source)
    assert "Device.allocate_caches" in missing()
    device.allocate_caches(program, TOKENS)
    device.execute(program, {"ids": IDS_GIVEN})


@pytest.mark.parametrize(
    ("tensor", "problem"),
    [(EMBEDDING[:8], "shape [8, 1024]"), (np.zeros((VOCABULARY, FEATURES), np.int8), "dtype int8")],
)
def test_a_tensor_must_be_what_the_program_was_built_for(tensor: np.ndarray, problem: str) -> None:
    program, device = make_program(), Device()
    device.load(program, lambda name: tensor)
    device.allocate_caches(program, TOKENS)
    with pytest.raises(errors.SimulationFault) as fault:
        device.execute(program, {"ids": IDS_GIVEN})
    assert fault.value.code == "SIM021"
    assert "embed.weight" in fault.value.message
    assert problem in fault.value.message


def test_buffers_must_fit_into_the_host() -> None:
    program = make_program()
    with pytest.raises(errors.SimulationFault) as fault:
        ready(program, slots=1 << 40).execute(program, {"ids": IDS_GIVEN})
    assert fault.value.code == "SIM019"


def test_a_host_without_memory_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def allocate(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(device_module, "check_initialised", allocate)
    assert fault_of(COMMANDS).code == "SIM028"


def test_a_program_has_a_limit_of_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_module, "MAX_PROGRAM_WORK", 1 << 20)
    assert fault_of(COMMANDS).code == "SIM018"


# --- what a program must not do; faults name the module and the command ---


def test_a_token_outside_the_table_is_a_fault_of_its_module() -> None:
    program = make_program()
    with pytest.raises(errors.SimulationFault) as fault:
        run(program, np.array([[3, 0, 16, 3]], np.int32))
    assert fault.value.code == "SIM013"
    assert fault.value.at == "model.embed: block_0[0] dma hbm to dm"
    assert "row 16, there are rows 0 to 15" in fault.value.message


def test_reading_what_nobody_wrote_is_a_fault() -> None:
    """One token is missing from the gather."""
    short = replace(gather, n=(TOKENS - 1, 64))
    fault = fault_of([short, *COMMANDS[1:]])
    assert fault.code == "SIM012"
    assert fault.at == "model.scale: block_0[1] main vector to dm"
    assert "byte 0x60 of slice 0" in fault.cause


def test_one_slice_that_nobody_wrote_is_enough() -> None:
    short = replace(gather, n=(TOKENS, 63))
    fault = fault_of([short, *COMMANDS[1:]])
    assert fault.code == "SIM012"
    assert "byte 0x0 of slice 63" in fault.cause


def test_bytes_left_by_another_program_do_not_count() -> None:
    program, late = make_program(), make_program([replace(put, head=Head(Context.DMA))])
    device = ready(program)
    device.execute(program, {"ids": IDS_GIVEN})
    device.load(late, source)
    with pytest.raises(errors.SimulationFault) as fault:
        device.execute(late, {"ids": IDS_GIVEN})
    assert fault.value.code == "SIM012"
    assert fault.value.at == "model.embed: block_0[0] dma dm to hbm"


def test_padding_that_is_not_committed_may_be_unwritten() -> None:
    """A pass that takes 8 of 16 columns reads only those."""
    half = replace(gather, run=16)
    narrow = replace(
        double, stream=Stream(8, cast=DType.F32), commit=replace(double.commit, columns=16)
    )
    run(make_program([half, narrow, *COMMANDS[2:]]))
    wide = replace(double, commit=replace(double.commit, columns=8))
    out = replace(put, run=16)
    assert fault_of([half, wide, out]).code == "SIM023"
    assert fault_of([half, *COMMANDS[1:]]).code == "SIM012"


def test_scratch_that_was_not_written_is_noticed_when_its_copy_is_read() -> None:
    load = Dma(
        head=Head(Context.DMA, signals=(0,)),
        n=(TOKENS, 64),
        run=32,
        source=Side(Space.HBM, 0, (ROW, 32), REGISTERS[SCRATCH]),
        destination=gather.destination,
    )
    fault = fault_of([load, *COMMANDS[1:]])
    assert (fault.code, fault.at) == ("SIM012", "model.scale: block_0[1] main vector to dm")


def test_an_output_must_be_written_to_its_end() -> None:
    fault = fault_of([gather, double, replace(put, n=(TOKENS - 1, 64))])
    assert fault.code == "SIM023"
    assert "[3, 0]" in fault.cause


def test_unordered_commands_are_found_before_anything_runs() -> None:
    fault = fault_of([gather, replace(double, head=Head(Context.MAIN, (Wait(0, 1),))), keep])
    assert fault.code == "SIM007"
    assert "block_0[1] main vector to dm (model.embed)" in fault.message


def test_inputs_and_parameters_are_only_read() -> None:
    for region in (TABLE, IDS):
        target = replace(put.destination, register=REGISTERS[region])
        short = replace(put, n=(1, 1), destination=target)
        assert fault_of([gather, double, short]).code == "SIM014"


SUM = Vector(reduce=Reduce.ADD)


FAR = Switch(Topology.BROADCAST01, 64)
"""A ring of 64, whose fourth step of 32 slices leaves it."""


@pytest.mark.parametrize(
    ("code", "change"),
    [
        ("SIM010", {"a": Port((1 << 19) - 64)}),
        ("SIM010", {"commit_port": Port(4096, limit=4096 + 64)}),
        ("SIM010", {"commit_port": Port(4096, limit=(512 << 10) + 1)}),
        ("SIM011", {"a": Port(0, register=9), "counters": ()}),
        ("SIM015", {"switch": FAR, "counters": (Counter(4, Birth.SLICE, commit=32, slices=32),)}),
        ("SIM018", {"counters": (Counter(65536, fate=Fate.VSUM),) * 2, "vector": SUM}),
    ],
)
def test_a_pass_that_leaves_its_memories_is_a_fault(code: str, change: dict[str, object]) -> None:
    """Register 9 stands at an odd address in the second iteration."""
    broken = replace(double, **change)  # type: ignore[arg-type]
    commands: list[Instruction] = [gather, broken, put]
    if code == "SIM011":
        broken = replace(broken, head=replace(broken.head, waits=(), signals=()))
        commands = [replace(gather, head=Head(Context.DMA)), Control(2, 1, (Step(9, 1),)), broken]
    fault = fault_of(commands)
    assert fault.code == code
    assert fault.at == f"model.scale: block_0[{commands.index(broken)}] main vector to dm"


def test_a_layout_that_contradicts_itself_is_a_fault() -> None:
    """The region announces 64 B more than the layout makes."""
    regions = make_regions()
    relocation = regions[TABLE].parameter
    assert relocation is not None
    parameter = Parameter(0, relocation, 0, PlacedRoom())
    parameter.source = source
    parameter.size += 64
    with pytest.raises(errors.SimulationFault) as fault:
        parameter.content()
    assert fault.value.code == "SIM024"


def test_an_index_list_does_not_address_data_memory() -> None:
    assert (
        fault_of([replace(gather, indirect=Indirect.DESTINATION), *COMMANDS[1:]]).code == "SIM017"
    )
