"""Reads the packets of a pass as one array, whatever the order of its axes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np

from .. import errors
from ..backend_rngd.isa.dtypes import DType
from ..backend_rngd.isa.instructions import Birth, Stream
from ..backend_rngd.isa.plan import bitmap_bytes
from . import numerics
from .axes import Axis, Kind, Pass, element_steps, gathers

Array = np.ndarray
Where = Callable[[], str]


class StreamReader:
    """Port A (0) or B (1) of a pass, with the fetch adapter's cast.

    `raw`: elements as the stream's type keeps them in memory; otherwise f32 or i32.
    `repeat`: also walk axes along which the stream stands still.
    """

    def __init__(
        self, work: Pass, port: int, axes: Sequence[Axis], *, raw: bool, repeat: bool = False
    ) -> None:
        c = work.plan.command
        self._dtype = (c.a, c.b)[port].dtype
        self._port = port
        self._packet = work.packet
        self._command = c
        self._axes = tuple(axes)
        self._convert = _converter(self._dtype, c.stream, raw)
        self._footprint = work.plan.footprints[port]
        self._slices = work.slices
        self.gathers = gathers(c)
        """Whether packets are collected by `bind` alone."""
        self.shape = tuple(axis.n if repeat or self._moves(axis) else 1 for axis in axes)
        """Shape of the array: 1 along axes that do not move the port, unless `repeat`."""
        self.owned = self._convert is not None or not work.packet.direct
        """Whether `read` makes a new array (or returns the memory itself)."""

    def _moves(self, axis: Axis) -> bool:
        return bool(axis.source_slices or (axis.b if self._port else axis.a))

    @property
    def geometry(self) -> tuple[object, ...]:
        """What decides, with the address, which bytes are read and how."""
        s = self._command.stream
        axes = tuple(
            (axis.n, axis.kind in _IN_PACKET, axis.source_slices, axis.b if self._port else axis.a)
            for axis in self._axes
        )
        gathered = () if self._packet.direct else (s.run, s.run_step, s.runs, s.run_stride, s.pad)
        return self._dtype, s.lookup, s.cast, s.zero_point, axes, gathered

    def bind(
        self, buffer: Array, slice_bytes: int, address: int, where: Where
    ) -> Callable[[], Array]:
        """A function that reads the stream, of `shape`, from a u8[slices, slice_bytes].

        It raises SIM025, naming `where`, when bitmaps do not fit the counter that walks them.
        """
        if not self.gathers:
            view = self.view(buffer, slice_bytes, address)
            return lambda: self.read(view)
        low, high = address + self._footprint.low, address + self._footprint.high
        collect = self._by_bitmap if self._command.switch.bitmap is not None else self._strided

        def gather() -> Array:
            content = buffer[:, low:high]
            if self._dtype.bits < 8:
                content = numerics.nibbles(content, self._dtype == DType.I4)
            else:
                content = np.ascontiguousarray(content)
            packets = collect(content, address - low, where, buffer)
            return self.read(packets)

        return gather

    def _strided(self, content: Array, start: int, where: Where, memory: Array) -> Array:
        """Packets [axes outside the packet, runs, run] of a part of data memory."""
        del where, memory
        every = zip(self._axes, self.shape, strict=True)
        return self._packets(content, start, [(a, n) for a, n in every if a.kind not in _IN_PACKET])

    def _packets(self, content: Array, start: int, axes: Sequence[tuple[Axis, int]]) -> Array:
        s = self._command.stream
        scale = 1 if self._dtype.bits >= 8 else 2
        strides = [
            axis.source_slices * content.strides[0] + (axis.b if self._port else axis.a) * scale
            for axis, _ in axes
        ]
        strides += [s.run_stride * scale, element_steps(self._command)[self._port]]
        shape = (*(n for _, n in axes), s.runs, s.run)
        raw = numerics.raw_dtype(self._dtype)
        return np.ndarray(shape, raw, content, start * scale, tuple(strides))

    def _by_bitmap(self, content: Array, start: int, where: Where, memory: Array) -> Array:
        """The same with the slices that each slice's bitmap names, in the ring's order."""
        sources = self._sources(memory, where)  # [slices, steps]
        axes = [i for i, axis in enumerate(self._axes) if axis.kind not in _IN_PACKET]
        own = [i for i in axes if self._axes[i].kind == Kind.SLICE]
        walks = [i for i in axes if i not in own and self._axes[i].source_slices]
        inner = [i for i in axes if i not in (*own, *walks)]
        every = (Axis(Kind.SLICE, len(content), source_slices=1), len(content))
        rest = [(self._axes[i], self.shape[i]) for i in inner]
        offered = self._packets(content, start, [every, *rest])
        taken = offered[sources if walks else sources[:, 0]]
        # Slice axes are in the order of the slice number only in the pass.
        numbered = [next(i for i in own if self._axes[i] is axis) for axis in self._slices]
        taken = taken.reshape(*(axis.n for axis in self._slices), *taken.shape[1:])
        have = [*numbered, *walks, *inner]
        positions = [have.index(i) for i in axes]
        ordered: Array = taken.transpose(*positions, taken.ndim - 2, taken.ndim - 1)
        return ordered

    def _sources(self, memory: Array, where: Where) -> Array:
        """[slices, steps]: the source slices that each slice's bitmap names. Raises: SIM025."""
        switch = self._command.switch
        assert switch.bitmap is not None
        slices = math.prod(axis.n for axis in self._slices)
        steps = math.prod(k.n for k in self._command.counters if k.birth == Birth.SLICE)
        rows = memory[:slices, switch.bitmap : switch.bitmap + bitmap_bytes(switch.ring)]
        named = np.unpackbits(rows, axis=1, bitorder="little")
        counts = named.sum(axis=1)
        wrong = np.flatnonzero((counts != steps) | named[:, switch.ring :].any(axis=1))
        if len(wrong):
            first = int(wrong[0])
            raise errors.bad_bitmap(where(), first, int(counts[first]), steps, switch.ring)
        places = np.nonzero(named)[1].reshape(slices, steps)
        own = np.arange(slices) // switch.ring * switch.ring
        sources: Array = places + own[:, None]
        return sources

    def view(self, buffer: Array, slice_bytes: int, address: int) -> Array:
        """The elements in place; along the last two axes runs if the packet is not direct."""
        raw = numerics.raw_dtype(self._dtype)
        axes = [
            (axis, n)
            for axis, n in zip(self._axes, self.shape, strict=True)
            if self._packet.direct or axis.kind not in _IN_PACKET
        ]
        shape = [n for _, n in axes]
        strides = [axis.fetch_stride(self._port, slice_bytes) for axis, _ in axes]
        if not self._packet.direct:
            s = self._command.stream
            shape += [s.runs, s.run]
            strides += [s.run_stride, element_steps(self._command)[self._port]]
        return np.ndarray(tuple(shape), raw, buffer, address, tuple(strides))

    def read(self, view: Array) -> Array:
        """The stream's values from a `view`, of `shape`."""
        if self._packet.direct:
            return view if self._convert is None else self._convert(view)
        values = np.ascontiguousarray(view) if self._convert is None else self._convert(view)
        return self._filled(values)

    def _filled(self, values: Array) -> Array:
        """Packets filled with zeros up to their size, then split into axes."""
        head = values.shape[:-2]
        valid = values.shape[-2] * values.shape[-1]
        packets = np.zeros((*head, self._packet.elements), values.dtype)
        packets[..., :valid] = values.reshape((*head, valid))
        steps = iter(packets.strides)
        strides = [
            (axis.b if self._port else axis.a) * values.itemsize
            if axis.kind in _IN_PACKET
            else next(steps)
            for axis in self._axes
        ]
        return np.ndarray(self.shape, values.dtype, packets, 0, tuple(strides))


_IN_PACKET = (Kind.COLUMN, Kind.TERM)


def _converter(dtype: DType, stream: Stream, raw: bool) -> Callable[[Array], Array] | None:
    """What turns a port's elements into the stream's; None where they are what is asked for."""
    steps: list[Callable[[Array], Array]] = []
    if stream.lookup is not None:
        table = numerics.lookup_table(dtype, stream.lookup)
        steps.append(lambda codes: table.take(codes))
        dtype = stream.lookup
    last = _cast(dtype, stream.cast, raw and stream.zero_point is None)
    steps += [] if last is None else [last]
    if stream.zero_point is not None:
        zero = np.int32(stream.zero_point)
        steps.append(lambda values: values - zero)
    if len(steps) > 1:
        return lambda values: functools.reduce(lambda x, step: step(x), steps, values)
    return steps[0] if steps else None


def _cast(dtype: DType, cast: DType | None, raw: bool) -> Callable[[Array], Array] | None:
    if cast == DType.BF16 and dtype != DType.BF16:
        narrow = numerics.encoder(DType.BF16)
        if raw:
            return narrow
        widen = numerics.decoder(DType.BF16)
        return lambda values: widen(narrow(values))
    if dtype in (DType.F32, DType.I32) or (raw and cast in (None, dtype)):
        return None
    return numerics.decoder(dtype)
