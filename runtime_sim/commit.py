"""The commit: results are cast and written to data memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..backend_rngd.isa.instructions import Fate
from ..backend_rngd.isa.plan import ExecPlan, Footprint
from ..backend_rngd.isa.rules import DM_BYTES
from . import numerics
from .axes import Axis, Kind, Pass, element_bytes
from .memory import Box, ChipMemory

Array = np.ndarray
WRITTEN = 0xFF


class Commit:
    """Cast and write to data memory: results with one dimension per axis of `order`."""

    def __init__(
        self, work: Pass, order: Sequence[Axis], address: int, memory: ChipMemory, raw: bool
    ) -> None:
        plan = work.plan
        c = plan.command
        self._memory = memory
        self._encode = None if raw else numerics.encoder(c.commit_port.dtype)
        # The last unit may have seen the bits as another type of 32 bits.
        self._result = np.float32 if plan.result_dtype.is_float else np.int32
        self._relu = c.commit.relu
        footprint = plan.footprints[-1]
        self._box = Box(address + footprint.low, address + footprint.high, 0, plan.slices)
        self._place = _Place(plan, memory, address)
        self._filled = _fills(work, footprint)
        self._columns: tuple[int, ...] = ()
        if work.splits_columns:
            columns = [axis for axis in work.packet.axes if axis.kind == Kind.COLUMN]
            self._columns = tuple(order.index(axis) for axis in columns)
        self._kept = work.kept_columns
        out = [axis for axis in order if axis.kind != Kind.COLUMN or not self._columns]
        shape = [axis.n if axis.fate == Fate.OUT else 1 for axis in out]
        strides = [self._place.stride(axis) for axis in out]
        if self._columns:
            shape.append(self._kept)
            strides.append(c.commit.column_stride)
        self._target = self._place.view(shape, strides, 0)
        self._zeros = self._zero_columns(work)
        self._full_shape = tuple(axis.n if axis.fate == Fate.OUT else 1 for axis in order)

    def _zero_columns(self, work: Pass) -> Array:
        stride = work.plan.command.commit.column_stride
        axes = [*work.slices, *work.counters, *work.lanes]
        shape = [axis.n if axis.fate == Fate.OUT else 1 for axis in axes]
        skipped = work.kept_columns if work.zero_columns else 0
        strides = [*(self._place.stride(axis) for axis in axes), stride]
        return self._place.view([*shape, work.zero_columns], strides, skipped * stride)

    def mark(self) -> None:
        """Set every byte that a write would write to `WRITTEN`."""
        self._place.load()
        for target in (self._target, self._zeros):
            target.view(f"i{target.itemsize}")[...] = -1
        self._place.store()

    def write(self, x: Array) -> None:
        if self._encode is not None:
            x = x.view(self._result)
            if self._relu:
                x = numerics.relu(x)
            x = self._encode(x)
        if self._columns:
            x = self._merged(x)
        if self._memory.tiles:
            self._memory.overwrite(self._box, self._filled)
        self._place.load()
        self._target[...] = x
        if self._zeros.size:
            self._zeros[...] = 0
        self._place.store()

    def _merged(self, x: Array) -> Array:
        """Column axes joined into one at the end, cut to the columns that are kept."""
        x = np.broadcast_to(x, self._full_shape)
        last = range(x.ndim - len(self._columns), x.ndim)
        x = np.moveaxis(x, self._columns, tuple(last))
        return x.reshape((*x.shape[: last.start], -1))[..., : self._kept]


class _Place:
    """Where results go: data memory itself, or for 4-bit results a copy with a byte for each."""

    def __init__(self, plan: ExecPlan, memory: ChipMemory, address: int) -> None:
        dtype = plan.command.commit_port.dtype
        self._raw = numerics.raw_dtype(dtype)
        self._content: Array = memory.dm
        self._start = address
        self._bytes: Array | None = None
        if dtype.bits < 8:
            footprint = plan.footprints[-1]
            low, high = address + footprint.low, address + footprint.high
            self._bytes = memory.dm[: plan.slices, low:high]
            self._content = np.zeros((plan.slices, 2 * (high - low)), np.int8)
            self._start = -2 * footprint.low

    def stride(self, axis: Axis) -> int:
        if axis.kind != Kind.SLICE:
            return axis.out
        return axis.out // DM_BYTES * int(self._content.shape[1])

    def view(self, shape: Sequence[int], strides: Sequence[int], offset: int) -> Array:
        start = self._start + offset
        return np.ndarray(tuple(shape), self._raw, self._content, start, tuple(strides))

    def load(self) -> None:
        """Bring what is there to the copy."""
        if self._bytes is not None:
            self._content[...] = numerics.nibbles(self._bytes, True)

    def store(self) -> None:
        """Bring the copy back."""
        if self._bytes is not None:
            self._bytes[...] = numerics.packed_nibbles(self._content)


def _fills(work: Pass, footprint: Footprint) -> bool:
    """Whether a commit writes every byte of its footprint."""
    c = work.plan.command
    if c.commit_port.dtype.bits < 8:
        return False  # halves of bytes stay
    written = element_bytes(c.commit_port.dtype) * c.commit.columns * c.commit.lanes
    for k in c.counters:
        written *= k.n if k.fate == Fate.OUT else 1
    return written == footprint.high - footprint.low
