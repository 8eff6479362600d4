"""HBM as the loader fills it: regions that come to life when they are first used.

Parameters are placed from the checkpoint on demand. Most are weights, which are decoded once
and then never needed as bytes again, so only small ones are kept; the others go when room is
needed or when the run is over, and are placed again if someone asks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import ml_dtypes
import numpy as np

from .. import errors
from ..backend_rngd.isa.dtypes import DType
from ..backend_rngd.isa.layout import (
    BlockScaleLayout,
    Derived,
    Layout,
    RankNumbers,
    RowsLayout,
    RowTableLayout,
    ScaleLayout,
)
from ..backend_rngd.isa.program import Relocation
from . import numerics

Array = np.ndarray
TensorSource = Callable[[str], Array]
"""A checkpoint: tensor name -> array in the checkpoint's own layout. Raises: KeyError."""

KEPT_BYTES = 1 << 20
"""Parameters up to this size stay placed."""
PLACED_BYTES = 256 << 20
"""Room for larger ones."""


class Region:
    """A piece of HBM of `size` bytes."""

    writable = False
    tracked = False
    """Whether it starts uninitialised and reading it too early should be noticed."""

    def __init__(self, name: str, size: int) -> None:
        self.name = name
        self.size = size

    @property
    def stable(self) -> bool:
        """Whether `content` always gives the same array, so that views of it can be kept."""
        return True

    def content(self) -> Array:
        """The bytes, u8[size]."""
        raise NotImplementedError


class Buffer(Region):
    """Memory that programs write: scratch, outputs, KV caches; and inputs, which they read."""

    def __init__(self, name: str, size: int, *, writable: bool, tracked: bool) -> None:
        super().__init__(name, size)
        self.writable = writable
        self.tracked = tracked
        self._bytes: Array | None = None

    def content(self) -> Array:
        if self._bytes is None:
            self._bytes = np.full(self.size, 0xFF, np.uint8)
        return self._bytes


class DerivedTable(Region):
    """A table that the loader computes."""

    def __init__(self, name: str, derived: Derived, rank: int) -> None:
        super().__init__(name, derived.bytes)
        self._derived = derived
        self._rank = rank
        self._bytes: Array | None = None

    def content(self) -> Array:
        if self._bytes is None:
            self._bytes = _laid_out(self.name, self.size, self._derive)
        return self._bytes

    def _derive(self) -> Array:
        derived = self._derived
        return derived.derive(self._rank) if isinstance(derived, RankNumbers) else derived.derive()


class Parameter(Region):
    """A part of a checkpoint tensor in the machine's layout, for a rank."""

    def __init__(self, number: int, relocation: Relocation, rank: int, room: PlacedRoom) -> None:
        super().__init__(relocation.tensor, relocation.layout.bytes)
        self.number = number
        """Tells parameters of a device apart."""
        self.relocation = relocation
        self.rank = rank
        self.source: TensorSource | None = None
        self._room = room

    @property
    def stable(self) -> bool:
        return self.size <= KEPT_BYTES

    def content(self) -> Array:
        placed = self._room.get(self.number)
        if placed is None:
            tensor = self._tensor()
            place = self.relocation.layout.place
            placed = _laid_out(self.name, self.size, lambda: place(tensor))
            self._room.put(self.number, placed)
        return placed

    @property
    def row_bytes(self) -> int | None:
        """Size of a row if rows can be placed one by one."""
        layout = self.relocation.layout
        return layout.bytes // layout.rows if isinstance(layout, RowTableLayout) else None

    def rows(self, numbers: Array) -> Array:
        """u8[len(numbers), row bytes] of a row table; only these rows are placed."""
        r = self.relocation
        if r.cut is None or r.cut.dim != 0:
            return _as_rows(r.layout.place(self._tensor()[numbers]))
        found = r.cut.indices(self.rank)[r.begin[0] + numbers]
        columns = tuple(slice(b, e) for b, e in zip(r.begin[1:], r.end[1:], strict=True))
        rows = _as_bf16(self._whole()[(np.maximum(found, 0), *columns)], r.tensor)
        rows[found < 0] = 0
        return _as_rows(r.layout.place(rows))

    def _tensor(self) -> Array:
        """The part of the tensor that the program uses on this rank, in the layout's type."""
        r = self.relocation
        whole = self._whole()
        own = whole if r.cut is None else r.cut.take(whole, self.rank)
        part = own[tuple(slice(b, e) for b, e in zip(r.begin, r.end, strict=True))]
        return _as_placed(np.asarray(part), r.layout, r.tensor)

    def _whole(self) -> Array:
        """The checkpoint's tensor. Raises: SIM021, SIM022."""
        r = self.relocation
        if self.source is None:
            raise errors.program_not_ready(f"`{r.tensor}` has no value", "Device.load")
        try:
            tensor = self.source(r.tensor)
        except KeyError:
            raise errors.parameter_mismatch(r.tensor, "no such tensor") from None
        if tuple(tensor.shape) != r.shape:
            problem = f"shape {list(tensor.shape)}, the program expects {list(r.shape)}"
            raise errors.parameter_mismatch(r.tensor, problem)
        return tensor


class PlacedRoom:
    """Placed bytes by parameter; small ones for ever, of large ones the last used."""

    def __init__(self, limit_bytes: int = PLACED_BYTES) -> None:
        self._limit = limit_bytes
        self._small: dict[int, Array] = {}
        self._large: OrderedDict[int, Array] = OrderedDict()

    def get(self, number: int) -> Array | None:
        if number in self._large:
            self._large.move_to_end(number)
            return self._large[number]
        return self._small.get(number)

    def put(self, number: int, placed: Array) -> None:
        if placed.nbytes <= KEPT_BYTES:
            self._small[number] = placed
            return
        self._large[number] = placed
        while len(self._large) > 1 and sum(p.nbytes for p in self._large.values()) > self._limit:
            self._large.popitem(last=False)

    def clear_large(self) -> None:
        """Forget what can be placed again."""
        self._large.clear()


FLOAT_TYPES = (ml_dtypes.bfloat16, np.float16, np.float32, ml_dtypes.float8_e8m0fnu)
"""Types that scales are stored in."""


def _as_placed(tensor: Array, layout: Layout, name: str) -> Array:
    """A tensor as its layout takes it: codes and scales as they are stored, the rest as bf16."""
    if isinstance(layout, ScaleLayout | BlockScaleLayout):
        if tensor.dtype not in FLOAT_TYPES:
            problem = f"dtype {tensor.dtype}, the program expects a scale in floats"
            raise errors.parameter_mismatch(name, problem)
        return tensor
    if isinstance(layout, RowsLayout) and layout.element_type != DType.BF16:
        wanted = layout.element_type.numpy
        if tensor.dtype != wanted:
            problem = f"dtype {tensor.dtype}, the program expects {wanted}"
            raise errors.parameter_mismatch(name, problem)
        return tensor
    return _as_bf16(tensor, name)


def _as_bf16(tensor: Array, name: str) -> Array:
    """A float tensor as bf16; wider ones are rounded as the machine would."""
    if tensor.dtype == ml_dtypes.bfloat16:
        return tensor
    if tensor.dtype in (np.float16, np.float32):
        wide = np.ascontiguousarray(tensor, np.float32)
        return numerics.f32_to_bf16(wide).view(ml_dtypes.bfloat16)
    raise errors.parameter_mismatch(name, f"dtype {tensor.dtype}, the program expects bfloat16")


def _laid_out(name: str, size: int, make: Callable[[], Array]) -> Array:
    """What `make` gives as bytes. Raises: SIM024 if the layout's numbers contradict each other."""
    try:
        content = _as_bytes(make())
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise errors.layout_does_not_fit(name, str(error)) from None
    if content.size != size:
        cause = f"it gives {content.size} bytes and announces {size}"
        raise errors.layout_does_not_fit(name, cause)
    return content


def _as_bytes(array: Array) -> Array:
    return np.ascontiguousarray(array).view(np.uint8).reshape(-1)


def _as_rows(array: Array) -> Array:
    return np.ascontiguousarray(array).view(np.uint8).reshape(len(array), -1)
