from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from furiosa_llm.llm.kv_blocks import KvBlocks

PADDING = 0
NUM_BLOCKS = 9


class AllocatorMachine(RuleBasedStateMachine):
    """Any order of allocations and releases."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = KvBlocks(NUM_BLOCKS, PADDING)
        self.held: list[list[int]] = []

    @rule(count=st.integers(0, NUM_BLOCKS))
    def allocate(self, count: int) -> None:
        free = self.pool.free_blocks
        blocks = self.pool.allocate(count)
        if count > free:
            assert blocks is None
            assert self.pool.free_blocks == free
        else:
            assert blocks is not None
            assert len(blocks) == count
            self.held.append(blocks)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.pool.release(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @invariant()
    def no_block_has_two_owners(self) -> None:
        owned = [block for blocks in self.held for block in blocks]
        assert len(owned) == len(set(owned))
        assert set(owned) <= set(range(NUM_BLOCKS))

    @invariant()
    def the_padding_block_is_never_given_out(self) -> None:
        assert all(PADDING not in blocks for blocks in self.held)

    @invariant()
    def no_block_is_lost(self) -> None:
        assert self.pool.free_blocks + sum(map(len, self.held)) == self.pool.usable_blocks


TestAllocator = AllocatorMachine.TestCase
TestAllocator.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)


def test_a_block_cannot_be_released_twice() -> None:
    pool = KvBlocks(4)
    blocks = pool.allocate(2)
    assert blocks == [1, 2]
    pool.release(blocks)
    with pytest.raises(AssertionError, match="not in use"):
        pool.release(blocks)


def test_the_padding_block_may_be_any() -> None:
    assert KvBlocks(4, padding_block=2).allocate(3) == [0, 1, 3]
