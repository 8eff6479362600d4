"""The container of a GGUF file: metadata and tensor table, checked against the file's size.

The format is described in ggml's docs/gguf.md (versions 2 and 3, little endian). The `gguf`
library's reader makes an array object per string, 3 s for a 49,000-token vocabulary; this one
takes 0.1 s and says at which byte a truncated file ends. Types and block sizes are the library's.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from .. import errors
from .checkpoint import Array

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4

STRING, ARRAY = 8, 9
SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
"""Type codes of metadata values -> numpy types."""


class _Broken(Exception):
    """Why the file cannot be read; becomes GGF001."""


@dataclass(frozen=True)
class GgufTensor:
    """One entry of the tensor table; `shape` is outermost first, as numpy has it."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    begin: int
    """First byte of the data, from the start of the file."""

    @property
    def row_bytes(self) -> int:
        """Stored bytes of one innermost row: whole quantisation blocks."""
        block, block_bytes = GGML_QUANT_SIZES[self.type]
        return self.shape[-1] // block * block_bytes

    @property
    def end(self) -> int:
        return self.begin + prod(self.shape[:-1]) * self.row_bytes


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file; opening reads the header and checks that all tensor data is there."""

    path: Path
    metadata: dict[str, Any] = field(repr=False)
    tensors: dict[str, GgufTensor] = field(repr=False)

    @staticmethod
    def open(path: Path) -> GgufFile:
        """Raises: GGF001 if the file is truncated, corrupt or of an unknown version."""
        try:
            metadata, tensors = _read_header(np.asarray(np.memmap(path, np.uint8, "r")))
        except (_Broken, ValueError, OSError) as error:  # numpy refuses to map an empty file
            raise errors.broken_gguf(str(path), str(error)) from error
        return GgufFile(path, metadata, tensors)

    def rows(self, name: str) -> Array:
        """The stored bytes, [rows, row_bytes], as a view of the mapped file."""
        tensor = self.tensors[name]
        return self._bytes[tensor.begin : tensor.end].reshape(-1, tensor.row_bytes)

    @cached_property
    def _bytes(self) -> Array:
        return np.asarray(np.memmap(self.path, np.uint8, "r"))


@dataclass
class _Cursor:
    """A place in the file that only moves forward and never leaves the file."""

    data: memoryview
    at: int = 0

    def take(self, size: int) -> memoryview:
        end = self.at + size
        if end > len(self.data):
            raise _Broken(f"byte {end} is needed, but the file ends at byte {len(self.data)}")
        taken, self.at = self.data[self.at : end], end
        return taken

    def u32(self) -> int:
        return int(struct.unpack("<I", self.take(4))[0])

    def u64(self) -> int:
        return int(struct.unpack("<Q", self.take(8))[0])

    def string(self) -> str:
        return str(self.take(self.u64()), "utf-8")

    def value(self, code: int) -> Any:
        if code == STRING:
            return self.string()
        if code == ARRAY:
            return self.array()
        return np.frombuffer(self.take(_scalar(code).itemsize), _scalar(code))[0].item()

    def array(self) -> list[Any]:
        code, count = self.u32(), self.u64()
        if code == STRING:
            return [self.string() for _ in range(count)]
        dtype = _scalar(code)
        items: list[Any] = np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()
        return items


def _scalar(code: int) -> np.dtype[Any]:
    if code not in SCALARS:
        raise _Broken(f"a metadata value has the unknown type {code}")
    return np.dtype(SCALARS[code])


def _read_header(data: Array) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    cursor = _Cursor(data.data)
    if bytes(cursor.take(4)) != MAGIC:
        raise _Broken("it does not start with the bytes GGUF")
    version = cursor.u32()
    if version not in VERSIONS:
        raise _Broken(f"version {version} is not one of {VERSIONS} (in little-endian order)")
    tensor_count, value_count = cursor.u64(), cursor.u64()

    metadata: dict[str, Any] = {}
    for _ in range(value_count):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.u32())
    entries = [_read_entry(cursor) for _ in range(tensor_count)]

    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise _Broken(f"general.alignment is {alignment!r}")
    data_begin = -(-cursor.at // alignment) * alignment
    return metadata, _place(entries, data_begin, len(data))


def _read_entry(cursor: _Cursor) -> GgufTensor:
    """One row of the tensor table, its data offset still relative to the data section."""
    name = cursor.string()
    dims = cursor.u32()
    if not 1 <= dims <= MAX_DIMS:
        raise _Broken(f"tensor `{name}` has {dims} dims")
    shape = tuple(reversed([cursor.u64() for _ in range(dims)]))
    code, offset = cursor.u32(), cursor.u64()
    if code not in GGMLQuantizationType._value2member_map_:
        raise _Broken(f"tensor `{name}` has the unknown type {code}")
    tensor = GgufTensor(name, shape, GGMLQuantizationType(code), offset)
    block = GGML_QUANT_SIZES[tensor.type][0]
    if 0 in shape or shape[-1] % block:
        raise _Broken(f"tensor `{name}` of shape {shape} is not made of {tensor.type.name} blocks")
    return tensor


def _place(entries: list[GgufTensor], data_begin: int, size: int) -> dict[str, GgufTensor]:
    """The table by name, with offsets from the start of the file, all inside the file."""
    tensors: dict[str, GgufTensor] = {}
    for entry in entries:
        placed = GgufTensor(entry.name, entry.shape, entry.type, data_begin + entry.begin)
        if placed.name in tensors:
            raise _Broken(f"tensor `{placed.name}` occurs twice")
        if placed.end > size:
            raise _Broken(
                f"tensor `{placed.name}` ends at byte {placed.end}, the file at byte {size}"
            )
        tensors[placed.name] = placed
    return tensors
