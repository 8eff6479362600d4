"""Reads the packets of a pass as one array, whatever the order of its axes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ..backend_rngd.isa.dtypes import DType
from . import numerics
from .axes import Axis, Kind, Pass, element_steps

Array = np.ndarray


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
        self._convert = _converter(self._dtype, c.stream.cast, raw)
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
        return self._dtype, s.cast, axes, gathered

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


def _converter(dtype: DType, cast: DType | None, raw: bool) -> Callable[[Array], Array] | None:
    """What turns a port's elements into the stream's; None where they are what is asked for."""
    if cast == DType.BF16 and dtype != DType.BF16:
        narrow = numerics.encoder(DType.BF16)
        if raw:
            return narrow
        widen = numerics.decoder(DType.BF16)
        return lambda values: widen(narrow(values))
    if dtype in (DType.F32, DType.I32) or (raw and cast in (None, dtype)):
        return None
    return numerics.decoder(dtype)
