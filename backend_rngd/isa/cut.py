"""How a tensor is divided among ranks: a part for each, filled up with zeros to one size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated

import numpy as np
from pydantic import AfterValidator, Field, model_validator

from .instructions import MAX_RANKS
from .layout import Count, Size, Table

Range = tuple[Count, Count]
"""First element and the one past the last, of the whole tensor; an empty one holds zeros."""
Slots = tuple[Range, ...]


def _some(slots: tuple[Slots, ...]) -> tuple[Slots, ...]:
    if not slots or not slots[0] or len({len(own) for own in slots}) > 1:
        raise ValueError("every rank has as many slots, one at least")
    return slots


class Cut(Table):
    """Along `dim` each rank has slots of `length` elements, each with a range of the whole tensor.

    What a range leaves of its slot is zero. Ranges may stand on several ranks, or on none.
    """

    dim: Annotated[int, Field(ge=0, le=7)]
    length: Size
    slots: Annotated[tuple[Slots, ...], Field(max_length=MAX_RANKS), AfterValidator(_some)]
    """For each rank, what its slots hold."""

    @model_validator(mode="after")
    def _fitting(self) -> Cut:
        if any(not 0 <= e - b <= self.length for own in self.slots for b, e in own):
            raise ValueError("a slot's range is no longer than the slot")
        return self

    @property
    def local_size(self) -> int:
        """Elements along the dimension that each rank has, zeros included."""
        return len(self.slots[0]) * self.length

    @property
    def end(self) -> int:
        """Elements of the whole tensor along the dimension that some rank needs it to have."""
        return max(e for own in self.slots for _, e in own)

    def pieces(self, rank: int) -> Iterator[tuple[slice, slice]]:
        """(elements of the rank's part, elements of the whole tensor) of what it holds."""
        for slot, (begin, end) in enumerate(self.slots[rank]):
            if begin < end:
                at = slot * self.length
                yield slice(at, at + end - begin), slice(begin, end)

    def local_shape(self, whole: Sequence[int]) -> tuple[int, ...]:
        """The shape of a rank's part."""
        return (*whole[: self.dim], self.local_size, *whole[self.dim + 1 :])

    def whole_shape(self, part: Sequence[int]) -> tuple[int, ...]:
        """The shape that is needed of the whole tensor for parts of this shape."""
        return (*part[: self.dim], self.end, *part[self.dim + 1 :])

    def take(self, tensor: np.ndarray, rank: int) -> np.ndarray:
        """The rank's part of a whole tensor; a view where it is one."""
        before = (slice(None),) * self.dim
        pieces = list(self.pieces(rank))
        if len(pieces) == 1 and pieces[0][0] == slice(0, self.local_size):
            return tensor[(*before, pieces[0][1])]
        part = np.zeros(self.local_shape(tensor.shape), tensor.dtype)
        for mine, whole in pieces:
            part[(*before, mine)] = tensor[(*before, whole)]
        return part

    def indices(self, rank: int) -> np.ndarray:
        """i64[local size]: the element of the whole tensor that each one of the part is, or -1."""
        found = np.full(self.local_size, -1)
        for mine, whole in self.pieces(rank):
            found[mine] = np.arange(whole.start, whole.stop)
        return found

    def covers(self) -> bool:
        """Whether the parts together are the whole tensor up to `end`."""
        ranges = sorted(held for own in self.slots for held in own if held[0] < held[1])
        reached = 0
        for begin, end in ranges:
            if begin > reached:
                return False
            reached = max(reached, end)
        return reached > 0

    def assemble(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """The whole tensor from all ranks' parts; padding is dropped."""
        before = (slice(None),) * self.dim
        tensor = np.empty(self.whole_shape(parts[0].shape), parts[0].dtype)
        for rank, part in enumerate(parts):
            for mine, whole in self.pieces(rank):
                tensor[(*before, whole)] = part[(*before, mine)]
        return tensor
