"""Which KV cache blocks belong to which sequence. A block is one token's slot."""

from __future__ import annotations

from collections.abc import Iterable


class KvBlocks:
    """A pool of blocks; padding tokens write to the padding block, which is never given out."""

    def __init__(self, num_blocks: int, padding_block: int = 0) -> None:
        assert 0 <= padding_block < num_blocks
        self.num_blocks = num_blocks
        self.padding_block = padding_block
        # A stack, lowest block on top: the first sequence gets the first blocks.
        self._free = [b for b in reversed(range(num_blocks)) if b != padding_block]
        self._used: set[int] = set()

    @property
    def free_blocks(self) -> int:
        return len(self._free)

    @property
    def usable_blocks(self) -> int:
        """Blocks that sequences can have at most."""
        return self.num_blocks - 1

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks, or None (and nothing changes) if fewer are free."""
        if count > len(self._free):
            return None
        blocks = [self._free.pop() for _ in range(count)]
        self._used.update(blocks)
        return blocks

    def release(self, blocks: Iterable[int]) -> None:
        """Give blocks back. Their contents stay, and are never read before they are written."""
        for block in sorted(blocks, reverse=True):
            assert block in self._used, f"block {block} is not in use"
            self._used.remove(block)
            self._free.append(block)
