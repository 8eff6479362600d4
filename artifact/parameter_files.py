"""Put parameters into an artifact, streamed: never more than a few rows are in memory.

Names and shapes are the checkpoint's, so that files can be linked and swapped.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from .. import errors
from ..frontend.checkpoint import Array
from ..frontend.parameters import BoundParameters, ParameterSpec
from ..frontend.safetensors_checkpoint import STORED_NAMES, SafetensorsCheckpoint
from .schema import FileEntry

MAX_SHARD_BYTES = 5_000_000_000
CHUNK_BYTES = 16 << 20
"""Rows that are read and written at once; a single larger row is read whole."""


@dataclass(frozen=True)
class ParameterFiles:
    """What was put into a directory."""

    files: Mapping[str, FileEntry]
    file_of: Mapping[str, str]
    """Parameter -> file name."""


def size_bytes(spec: ParameterSpec) -> int:
    return prod(spec.shape) * spec.dtype.itemsize


def copy_parameters(
    directory: Path, source: BoundParameters, max_shard_bytes: int = MAX_SHARD_BYTES
) -> ParameterFiles:
    """Write every parameter in its declared type to `params-*.safetensors`.

    The bytes depend on the parameters alone. Raises: CKPxxx and GGFxxx while reading.
    """
    shards = list(_shards(source.specs.values(), max_shard_bytes))
    files: dict[str, FileEntry] = {}
    file_of: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = _file_name(number, len(shards))
        files[name] = _write_file(directory / name, shard, source)
        file_of |= dict.fromkeys((spec.name for spec in shard), name)
    return ParameterFiles(files, file_of)


def link_parameters(directory: Path, source: BoundParameters) -> ParameterFiles:
    """Hard-link the checkpoint's own files into `directory`.

    Raises: BLD008 if they are no safetensors files, on another file system, or of another type
    than the model declares.
    """
    checkpoint = source.checkpoint
    if not isinstance(checkpoint, SafetensorsCheckpoint):
        raise errors.cannot_link_weights(checkpoint.path, "they are not safetensors files")
    for name, spec in source.specs.items():
        stored = checkpoint.tensors[source.stored_name(name)].dtype
        if stored != spec.dtype:
            reason = f"`{name}` is stored as {stored} and must be converted to {spec.dtype}"
            raise errors.cannot_link_weights(checkpoint.path, reason)

    path_of = {name: checkpoint.file_of(source.stored_name(name)).path for name in source.specs}
    paths = sorted(set(path_of.values()))
    names = {path: _file_name(i, len(paths)) for i, path in enumerate(paths, start=1)}
    for path, name in names.items():
        try:
            os.link(path.resolve(), directory / name)
        except OSError as error:
            raise errors.cannot_link_weights(str(path), errors.in_words(error)) from error
    return ParameterFiles(
        {
            name: FileEntry(size_bytes=path.stat().st_size, sha256=None)
            for path, name in names.items()
        },
        {name: names[path] for name, path in path_of.items()},
    )


def _file_name(number: int, count: int) -> str:
    return f"params-{number:05}-of-{count:05}.safetensors"


def _shards(specs: Iterable[ParameterSpec], max_bytes: int) -> Iterator[list[ParameterSpec]]:
    """Parameters by name, in runs of at most `max_bytes`; a larger one has a file of its own."""
    shard: list[ParameterSpec] = []
    shard_bytes = 0
    for spec in sorted(specs, key=lambda spec: spec.name):
        if shard and shard_bytes + size_bytes(spec) > max_bytes:
            yield shard
            shard, shard_bytes = [], 0
        shard.append(spec)
        shard_bytes += size_bytes(spec)
    if shard:
        yield shard


def _write_file(path: Path, specs: list[ParameterSpec], source: BoundParameters) -> FileEntry:
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for piece in (_header(specs), *_data(specs, source)):
            digest.update(piece)
            file.write(piece)
        return FileEntry(size_bytes=file.tell(), sha256=digest.hexdigest())


def _header(specs: list[ParameterSpec]) -> bytes:
    """Length and JSON, padded with spaces so that the data begins at a multiple of 8."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for spec in specs:
        end = begin + size_bytes(spec)
        entries[spec.name] = {
            "dtype": STORED_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _data(specs: list[ParameterSpec], source: BoundParameters) -> Iterator[bytes]:
    for spec in specs:
        for rows in _row_chunks(spec, source):
            yield rows.tobytes()


def _row_chunks(spec: ParameterSpec, source: BoundParameters) -> Iterator[Array]:
    if not spec.shape or not size_bytes(spec):
        yield source.read(spec.name)
        return
    rows = spec.shape[0]
    step = max(1, CHUNK_BYTES // (size_bytes(spec) // rows))
    for begin in range(0, rows, step):
        yield source.read_rows(spec.name, begin, min(begin + step, rows))
