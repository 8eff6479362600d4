"""The rngd dialect: text round trips, and each constraint rejects what it should."""

from collections.abc import Callable

import pytest
from xdsl.dialects.builtin import DictionaryAttr, IntegerAttr, ModuleOp, StringAttr, i64
from xdsl.ir import Block, Operation, Region
from xdsl.utils.exceptions import VerifyException

from furiosa_llm.backend_rngd.isa.dtypes import DType
from furiosa_llm.backend_rngd.isa.instructions import (
    Commit,
    Context,
    Dma,
    Exec,
    Head,
    IndexList,
    Indirect,
    Port,
    Side,
    Sink,
    Space,
    Stream,
)
from furiosa_llm.backend_rngd.isa.plan import Memory
from furiosa_llm.backend_rngd.rngd import (
    RNGD,
    AllocOp,
    BlockOp,
    BufferType,
    CallOp,
    CommandAttr,
    DmaOp,
    ExecOp,
    RepeatOp,
)
from furiosa_llm.ir.text import parse_module, print_module

MOVE = Exec(Head(Context.SUB), (), Port(), Stream(16), Port(0, DType.BF16), Commit(columns=16))
STORE = Exec(Head(Context.SUB), (), Port(), Stream(16), Port(), Commit(Sink.TRF, columns=16))
COPY = Dma(Head(Context.DMA), (), 64, Side(Space.HBM, 0), Side(Space.DM, 0))
GATHER = Dma(
    Head(Context.DMA),
    (4,),
    64,
    Side(Space.HBM, 0, (0,)),
    Side(Space.DM, 0, (64,)),
    Indirect.SOURCE,
    IndexList(0, (4,), 64),
)


def buffer(memory: Memory) -> AllocOp:
    return AllocOp(memory, 64, "x")


def hbm() -> Block:
    return Block(arg_types=[BufferType(Memory.HBM, 0)])


def test_programs_round_trip_through_text() -> None:
    block = hbm()
    inner = Block()
    x = buffer(Memory.DM)
    copy = DmaOp(COPY, source=block.args[0], destination=x.buffer, steps={"source": (64,)})
    inner.add_op(copy)
    block.add_ops([x, RepeatOp(3, Region(inner))])
    text = print_module(ModuleOp([BlockOp("b", Region(block))]))
    parsed = parse_module(text, "<text>", {"rngd": lambda: RNGD})
    assert print_module(parse_module(text, "<text>", {"rngd": lambda: RNGD})) == text
    found = next(op for op in parsed.walk() if isinstance(op, DmaOp))
    assert found.dma == COPY


def gather_without_index() -> Operation:
    block = hbm()
    return DmaOp(GATHER, source=block.args[0], destination=buffer(Memory.DM).buffer)


def exec_with_steps(steps: DictionaryAttr) -> Operation:
    op = ExecOp(MOVE, a=buffer(Memory.DM).buffer, out=buffer(Memory.DM).buffer)
    op.steps = steps
    return op


def placed(address: int) -> Operation:
    op = buffer(Memory.VRF)
    op.address = IntegerAttr(address, i64)
    return op


def block_of_chip_memory() -> Operation:
    return BlockOp("b", Region(Block(arg_types=[BufferType(Memory.DM, 64)])))


REJECTED: dict[str, tuple[Callable[[], Operation], str]] = {
    "alloc in HBM": (lambda: AllocOp(Memory.HBM, 64, "x"), "declared, not allocated"),
    "alloc past the end": (lambda: placed(8192 - 32), "ends at 8224 of 8192"),
    "alloc before the start": (lambda: placed(-32), "of 8192 bytes"),
    "exec from the TRF": (
        lambda: ExecOp(MOVE, a=buffer(Memory.TRF).buffer, out=buffer(Memory.DM).buffer),
        "port a needs a buffer in dm",
    ),
    "exec to the wrong sink": (
        lambda: ExecOp(STORE, a=buffer(Memory.DM).buffer, out=buffer(Memory.DM).buffer),
        "port out needs a buffer in trf",
    ),
    "steps of no port": (
        lambda: exec_with_steps(DictionaryAttr({"c": StringAttr("x")})),
        "'c' are not a port's",
    ),
    "steps that are no numbers": (
        lambda: exec_with_steps(DictionaryAttr({"a": StringAttr("x")})),
        "'a' are not a port's",
    ),
    "dma side in the wrong memory": (
        lambda: DmaOp(COPY, source=buffer(Memory.DM).buffer, destination=buffer(Memory.DM).buffer),
        "side in HBM needs a buffer in hbm",
    ),
    "gather without index": (gather_without_index, "index list, and only it"),
    "repeat once": (lambda: RepeatOp(1, Region(Block())), "at least twice"),
    "block argument on chip": (block_of_chip_memory, "buffers in HBM"),
}


@pytest.mark.parametrize("name", REJECTED)
def test_what_makes_no_sense_is_rejected(name: str) -> None:
    build, message = REJECTED[name]
    with pytest.raises(VerifyException, match=message):
        build().verify(verify_nested_ops=False)


def test_a_command_of_the_wrong_kind_is_rejected() -> None:
    op = ExecOp(MOVE, a=buffer(Memory.DM).buffer, out=buffer(Memory.DM).buffer)
    op.command = CommandAttr(COPY)
    with pytest.raises(VerifyException, match="holds an exec command"):
        op.verify(verify_nested_ops=False)
    dma = DmaOp(COPY, source=hbm().args[0], destination=buffer(Memory.DM).buffer)
    dma.command = CommandAttr(MOVE)
    with pytest.raises(VerifyException, match="holds a dma command"):
        dma.verify(verify_nested_ops=False)


@pytest.mark.parametrize("text", ["rngd.buffer<sram, 4>", "rngd.buffer<dm, -4>"])
def test_bad_buffer_types_are_rejected(text: str) -> None:
    from furiosa_llm.errors import FuriosaLLMError

    source = f'%x = "rngd.alloc"() <{{label = "x"}}> : () -> !{text}'
    with pytest.raises((FuriosaLLMError, VerifyException)):
        parse_module(source, "<text>", {"rngd": lambda: RNGD}).verify()


def test_a_call_has_one_start_for_each_buffer() -> None:
    buffers = Block(arg_types=[BufferType(Memory.HBM, 0)] * 2).args
    call = CallOp("block", buffers, [0, 4096])
    call.verify()
    assert [call.start_of(0), call.start_of(1)] == [0, 4096]
    assert CallOp("block", buffers).start_of(1) == 0
    with pytest.raises(VerifyException, match="one start for each buffer"):
        CallOp("block", buffers, [4096]).verify()
