"""Addresses on chip: buffers alive together never overlap, and dead ones give way."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from xdsl.dialects.builtin import IntegerAttr, UnitAttr, i64
from xdsl.ir import Block, Region

from furiosa_llm.backend_rngd.isa.dtypes import DType
from furiosa_llm.backend_rngd.isa.instructions import Commit, Context, Exec, Head, Port, Stream
from furiosa_llm.backend_rngd.isa.plan import Memory
from furiosa_llm.backend_rngd.place import assign_addresses, lifetimes
from furiosa_llm.backend_rngd.rngd import AllocOp, ExecOp, RepeatOp
from furiosa_llm.errors import CompileError

MOVE = Exec(Head(Context.SUB), (), Port(), Stream(16), Port(0, DType.BF16), Commit(columns=16))


def alloc(block: Block, size_bytes: int = 64) -> AllocOp:
    op = AllocOp(Memory.DM, size_bytes, "x")
    block.add_op(op)
    return op


def use(block: Block, source: AllocOp, out: AllocOp) -> None:
    block.add_op(ExecOp(MOVE, a=source.buffer, out=out.buffer))


@given(
    sizes=st.lists(st.integers(1, 60_000), min_size=2, max_size=12),
    uses=st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11)), max_size=20),
)
def test_buffers_alive_together_do_not_overlap(
    sizes: list[int], uses: list[tuple[int, int]]
) -> None:
    block = Block()
    buffers = [alloc(block, size) for size in sizes]
    for a, b in uses:
        use(block, buffers[a % len(buffers)], buffers[b % len(buffers)])
    try:
        addresses = assign_addresses(block)
    except CompileError as error:
        assert error.code == "BCK004"  # noqa: PT017
        return
    lives = lifetimes(block)
    for i, x in enumerate(lives):
        assert addresses[x.alloc] % 32 == 0
        for y in lives[:i]:
            together = x.first < y.end and y.first < x.end
            apart = (
                addresses[x.alloc] >= addresses[y.alloc] + y.alloc.size_bytes
                or addresses[y.alloc] >= addresses[x.alloc] + x.alloc.size_bytes
            )
            assert apart or not together


def test_a_dead_buffer_gives_way() -> None:
    block = Block()
    x, y = alloc(block), alloc(block)
    use(block, x, y)
    z = alloc(block)
    use(block, y, z)
    addresses = assign_addresses(block)
    assert addresses[z] == addresses[x]


def test_what_a_repeat_reads_lives_to_its_end() -> None:
    block, body = Block(), Block()
    x, y = alloc(block), alloc(block)
    use(body, x, y)
    inner = alloc(body)
    use(body, y, inner)
    block.add_op(RepeatOp(2, Region(body)))
    addresses = assign_addresses(block)
    assert addresses[inner] not in (addresses[x], addresses[y])


def test_too_much_at_once_is_an_error_that_names_the_buffers() -> None:
    block = Block()
    x, y = alloc(block, 300_000), alloc(block, 300_000)
    use(block, x, y)
    with pytest.raises(CompileError) as caught:
        assign_addresses(block)
    assert caught.value.code == "BCK004"
    assert "x 300000" in caught.value.cause


def test_resident_buffers_keep_their_place_and_meet_nobody() -> None:
    block = Block()
    early, kept, late = alloc(block), alloc(block), alloc(block)
    kept.resident, kept.address = UnitAttr(), IntegerAttr(32, i64)
    use(block, early, early)
    use(block, late, late)
    addresses = assign_addresses(block)
    assert addresses[kept] == 32
    assert addresses[early] == addresses[late] == 96
