"""Addresses of buffers as the ports of commands see them."""

import pytest
from xdsl.dialects.builtin import IntegerAttr, i64
from xdsl.ir import Block, Region

from furiosa_llm.backend_rngd.emitter import Emitter
from furiosa_llm.backend_rngd.encode import Registers, encode_command
from furiosa_llm.backend_rngd.isa.instructions import Commit, Context, Counter, Exec, Sink, Stream
from furiosa_llm.backend_rngd.isa.plan import Memory
from furiosa_llm.backend_rngd.isa.rules import TRF_BYTES
from furiosa_llm.backend_rngd.rngd import AllocOp, BlockOp, ExecOp

HALF = TRF_BYTES // 2


@pytest.mark.parametrize(
    ("size_bytes", "expected"), [(64, HALF), (HALF, HALF), (HALF + 32, TRF_BYTES)]
)
def test_the_register_file_is_given_out_in_halves(size_bytes: int, expected: int) -> None:
    emit = Emitter(Block())
    owner = emit.trf(size_bytes).buffer.owner
    assert isinstance(owner, AllocOp)
    assert owner.size_bytes == expected


@pytest.mark.parametrize("lanes", [1, 4, 8])
def test_a_port_addresses_one_lane_of_the_register_file(lanes: int) -> None:
    block = Block()
    emit = Emitter(block)
    source, trf = emit.alloc(Memory.DM, 1024, "x"), emit.trf(HALF)
    emit.exec(
        Context.SUB,
        [Counter(lanes, a=32, lanes=1)],
        Stream(16),
        a=source,
        out=trf.at(64),
        commit=Commit(Sink.TRF, columns=16),
        trf_lanes=lanes,
    )
    fill = list(block.ops)[-1]
    assert isinstance(fill, ExecOp)
    for op, address in ((source.buffer.owner, 0), (trf.buffer.owner, HALF)):
        assert isinstance(op, AllocOp)
        op.address = IntegerAttr(address, i64)
    command = encode_command(fill, Registers(BlockOp("b", Region(block))))
    assert isinstance(command, Exec)
    assert command.commit_port.base == HALF // lanes + 64
    assert command.commit_port.limit == TRF_BYTES // lanes
