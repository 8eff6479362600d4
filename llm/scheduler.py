"""Which sequences run next, together, in which bucket."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from ..models.config_types import Bucket
from .kv_blocks import KvBlocks
from .sequence import Sequence


@dataclass(frozen=True)
class Batch:
    """Sequences that one run of `bucket` serves; at most `bucket.batch_size`."""

    bucket: Bucket
    sequences: tuple[Sequence, ...]


class Scheduler:
    """Prompts first, in the order of arrival; then every running sequence gets a token.

    A sequence starts when the KV cache has room for all it may ever need, so that none has to be
    stopped half-way. Callers have checked that each sequence fits alone.
    """

    def __init__(self, buckets: Iterable[Bucket], kv_blocks: KvBlocks) -> None:
        buckets = tuple(buckets)
        self._prefill = tuple(bucket for bucket in buckets if bucket.is_prefill)
        self._decode = tuple(bucket for bucket in buckets if bucket.is_decode)
        self._kv_blocks = kv_blocks
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._planned: deque[Batch] = deque()

    def add(self, sequence: Sequence) -> None:
        self._waiting.append(sequence)

    def next_batch(self) -> Batch | None:
        """What to run now; None when all sequences are finished."""
        if not self._planned:
            self._planned.extend(self._plan())
        return self._planned.popleft() if self._planned else None

    def finish(self, sequence: Sequence) -> None:
        """Free what `sequence` holds; it is in no later batch."""
        self._running.remove(sequence)
        self._kv_blocks.release(sequence.blocks)
        sequence.blocks = []

    def _plan(self) -> Iterator[Batch]:
        started = self._start()
        if started:
            return plan_batches(started, self._prefill)
        assert self._running or not self._waiting, "a sequence alone does not fit in the KV cache"
        return plan_batches(self._running, self._decode)

    def _start(self) -> list[Sequence]:
        started = []
        while self._waiting:
            blocks = self._kv_blocks.allocate(self._waiting[0].blocks_needed)
            if blocks is None:
                break
            sequence = self._waiting.popleft()
            sequence.blocks = blocks
            started.append(sequence)
        self._running += started
        return started


def plan_batches(sequences: Iterable[Sequence], buckets: Seq[Bucket]) -> Iterator[Batch]:
    """Every sequence in one batch. Longest first, so that whatever joins a batch fits in it."""
    rest = sorted(sequences, key=lambda sequence: -sequence.length)
    while rest:
        bucket = choose_bucket(buckets, len(rest), rest[0].length)
        yield Batch(bucket, tuple(rest[: bucket.batch_size]))
        rest = rest[bucket.batch_size :]


def choose_bucket(buckets: Seq[Bucket], count: int, length: int) -> Bucket:
    """The smallest bucket for `count` sequences of up to `length` tokens.

    If none takes that many, the one that takes most of them.
    """
    fitting = [bucket for bucket in buckets if bucket.attention_size >= length]
    assert fitting, f"no bucket holds {length} tokens"
    enough = [bucket for bucket in fitting if bucket.batch_size >= count]
    if enough:
        return min(enough, key=lambda b: (b.batch_size, b.attention_size))
    return min(fitting, key=lambda b: (-b.batch_size, b.attention_size))
