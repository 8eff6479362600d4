"""Safetensors files, single or sharded, mapped into memory and read tensor by tensor.

All tensors of the shards that an index names belong to the checkpoint, also those that it does not
list: transformers loads them, too.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from .. import errors
from ..errors import CompileError
from .checkpoint import Array, TensorInfo

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

DTYPES: Mapping[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
"""Type names of the format -> numpy types."""

STORED_NAMES: Mapping[np.dtype[Any], str] = {dtype: name for name, dtype in DTYPES.items()}
"""The other way round."""


@dataclass(frozen=True)
class SafetensorsFile:
    """One file. The library checks the header (sizes, order, coverage); data is mapped, not read.

    The library's own numpy reader copies each tensor and lacks fp8, so views are made here.
    """

    path: Path

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """In the order of the data. Raises: CKP002, CKP007."""
        return {name: self._info(name, entry) for name, entry in self._header[1].items()}

    def read(self, name: str) -> Array:
        """A read-only view of the whole tensor."""
        return self.read_rows(name, 0, None)

    def read_rows(self, name: str, begin: int, end: int | None) -> Array:
        """A read-only view of rows [begin, end) of dim 0; None is the tensor's end."""
        data_begin, entries = self._header
        first, last = entries[name]["data_offsets"]
        info = self.tensors[name]
        raw = self._bytes[data_begin + first : data_begin + last]
        whole = raw.view(info.dtype).reshape(info.shape)
        return whole[begin:end] if info.shape else whole

    def _info(self, name: str, entry: dict[str, Any]) -> TensorInfo:
        stored = entry["dtype"]
        if stored not in DTYPES:
            raise errors.unsupported_tensor_dtype(str(self.path), name, stored)
        return TensorInfo(name, tuple(entry["shape"]), DTYPES[stored], stored)

    @cached_property
    def _bytes(self) -> Array:
        return np.asarray(np.memmap(self.path, np.uint8, "r"))

    @cached_property
    def _header(self) -> tuple[int, dict[str, dict[str, Any]]]:
        """Where the data begins, and the header's entry of each tensor."""
        try:
            with safe_open(self.path, framework="numpy"):
                pass
        except (SafetensorError, OSError) as error:
            raise errors.broken_safetensors(str(self.path), str(error)) from error
        with self.path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            entries = json.loads(file.read(length))
        entries.pop("__metadata__", None)
        by_offset = sorted(entries, key=lambda name: entries[name]["data_offsets"])
        return 8 + length, {name: entries[name] for name in by_offset}


@dataclass(frozen=True)
class SafetensorsCheckpoint:
    """A model directory's safetensors: `model.safetensors`, or shards with an index."""

    directory: Path

    @property
    def path(self) -> str:
        return str(self.directory)

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor by name, shard by shard.

        Raises: CKP001 to CKP004, CKP007, CKP008.
        """
        return {name: file.tensors[name] for name, file in self._file_of.items()}

    def read(self, name: str) -> Array:
        return self.file_of(name).read(name)

    def read_rows(self, name: str, begin: int, end: int) -> Array:
        return self.file_of(name).read_rows(name, begin, end)

    def file_of(self, name: str) -> SafetensorsFile:
        """The file that holds the tensor. Raises: CKP006."""
        if name not in self._file_of:
            raise errors.unknown_tensor(self.path, name)
        return self._file_of[name]

    @cached_property
    def _file_of(self) -> Mapping[str, SafetensorsFile]:
        single, index = self.directory / SINGLE_FILE, self.directory / INDEX_FILE
        if index.is_file():
            return _sharded(index)
        if single.is_file():
            file = SafetensorsFile(single)
            return dict.fromkeys(file.tensors, file)
        raise no_weights_in(self.directory)


def has_weights(directory: Path) -> bool:
    """Whether the directory names weights at all; says nothing about whether they are whole."""
    return (directory / SINGLE_FILE).is_file() or (directory / INDEX_FILE).is_file()


def no_weights_in(directory: Path) -> CompileError:
    """CKP001, which names files in torch's own format if there are any."""
    pickles = sorted(path.name for path in directory.glob("*.bin"))
    return errors.no_weights(str(directory), pickles)


def _sharded(index: Path) -> Mapping[str, SafetensorsFile]:
    """The file of each tensor.

    Raises: CKP003, CKP004 with every missing shard and tensor, CKP008 with those that are there
    twice: libraries differ in which one they take.
    """
    shard_of = _read_index(index)
    files = {name: SafetensorsFile(index.parent / name) for name in sorted(set(shard_of.values()))}
    missing = [name for name, file in files.items() if not file.path.is_file()]
    if missing:
        first = {shard: tensor for tensor, shard in reversed(shard_of.items())}
        raise errors.incomplete_shards(
            str(index), [f"{name} is missing (it holds `{first[name]}`)" for name in missing]
        )
    absent = [
        f"{shard} does not hold `{tensor}`"
        for tensor, shard in shard_of.items()
        if tensor not in files[shard].tensors
    ]
    if absent:
        raise errors.incomplete_shards(str(index), absent)
    _check_once(index.parent, files)
    listed = {tensor: files[shard] for tensor, shard in shard_of.items()}
    every = {tensor: file for file in files.values() for tensor in file.tensors}
    return {**listed, **every}


def _check_once(directory: Path, files: Mapping[str, SafetensorsFile]) -> None:
    """Raises: CKP008."""
    if SINGLE_FILE not in files and (directory / SINGLE_FILE).is_file():
        problem = f"{SINGLE_FILE} is there, and {INDEX_FILE} names other files"
        raise errors.tensors_stored_twice(str(directory), [problem])
    holders: dict[str, list[str]] = {}
    for shard, file in files.items():
        for tensor in file.tensors:
            holders.setdefault(tensor, []).append(shard)
    twice = [
        f"`{tensor}` is in {' and in '.join(shards)}"
        for tensor, shards in holders.items()
        if len(shards) > 1
    ]
    if twice:
        raise errors.tensors_stored_twice(str(directory), twice)


def _read_index(index: Path) -> dict[str, str]:
    """Tensor name -> file name. Raises: CKP003, also for names that leave the directory."""
    try:
        shard_of = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise errors.broken_index(str(index), f"{type(error).__name__}: {error}") from error
    if not isinstance(shard_of, dict) or not shard_of:
        raise errors.broken_index(str(index), "`weight_map` is not a table of tensors and files")
    for tensor, shard in shard_of.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise errors.broken_index(str(index), f"`{tensor}` is in {shard!r}, not a file name")
    return shard_of
