"""The `.vedf` file: one bucket's program, self-contained but for its weights.

    bytes 0..3    magic "VEDF"
          4..7    format version, u32
          8..15   length of the header, u64
          16..23  length of the records, u64
          24..55  SHA-256 of all that follows byte 64
          56..63  zero
          64..    header: JSON, canonical (sorted keys, no spaces), UTF-8
          then    records: exec, dma, control, issue list, each padded to 64 B

The header holds what is read once (regions, relocations, blocks, calls, provenance), the records
what is executed. All integers are little-endian.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from ... import errors
from .canonical import canonical
from .header_checks import check_references
from .instructions import Control, Dma, Exec, Instruction
from .program import Header, Program
from .record_decoding import decode_control, decode_dma, decode_exec
from .record_encoding import encode_control, encode_dma, encode_exec
from .record_types import CONTROL, DMA, EXEC, KIND_CONTROL, KIND_DMA, KIND_EXEC

MAGIC = b"VEDF"
FORMAT_VERSION = 7
PREAMBLE = struct.Struct("<4sIQQ32s8s")
ALIGNMENT = 64
INSTRUCTION_BUDGET_BYTES = 720_896
"""Documented instruction memory of a compiled block."""
MAX_HEADER_BYTES = 1 << 28


# --- writing ---


def write_program(program: Program) -> bytes:
    """The bytes of `program`; equal programs give equal bytes. Raises: VED005 (code too long)."""
    for block in program.blocks:
        code_bytes = program.block_code_bytes(block)
        if code_bytes > INSTRUCTION_BUDGET_BYTES:
            raise errors.code_over_budget(block.name, code_bytes, INSTRUCTION_BUDGET_BYTES)
    header = json.dumps(
        program.header.model_dump(mode="json", exclude_none=True),
        sort_keys=True,
        separators=(",", ":"),
        ensure_ascii=False,
    ).encode()
    records = _encode_records(program.commands)
    body = _padded(header) + records
    digest = hashlib.sha256(body).digest()
    preamble = PREAMBLE.pack(MAGIC, FORMAT_VERSION, len(header), len(records), digest, b"\0" * 8)
    return preamble + body


def _encode_records(commands: tuple[Instruction, ...]) -> bytes:
    tables: dict[int, list[np.ndarray]] = {KIND_EXEC: [], KIND_DMA: [], KIND_CONTROL: []}
    entries: dict[Instruction, int] = {}
    commands = tuple(canonical(command) for command in commands)
    for command in dict.fromkeys(commands):
        kind, record = _encode(command)
        entries[command] = kind << 24 | len(tables[kind])
        tables[kind].append(record)
    issue = np.array([entries[c] for c in commands], "<u4")
    counts = np.array([*(len(tables[k]) for k in sorted(tables)), len(issue)], "<u8")
    parts = [counts.tobytes()]
    parts += [b"".join(r.tobytes() for r in tables[kind]) for kind in sorted(tables)]
    parts.append(issue.tobytes())
    return b"".join(_padded(part) for part in parts)


def _encode(command: Instruction) -> tuple[int, np.ndarray]:
    match command:
        case Exec():
            return KIND_EXEC, encode_exec(command)
        case Dma():
            return KIND_DMA, encode_dma(command)
        case Control():
            return KIND_CONTROL, encode_control(command)


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % ALIGNMENT)


# --- reading ---


def read_program(source: Path | bytes) -> Program:
    """The program in a `.vedf` file or in its bytes.

    Raises: VED001 (not a container, truncated), VED002 (version), VED003 (checksum),
    VED004 (header), VED010 and VED011 (records), VED014 (a rank's partner does not exist).
    """
    name = str(source) if isinstance(source, Path) else "<bytes>"
    data = source.read_bytes() if isinstance(source, Path) else source
    if len(data) < PREAMBLE.size or data[:4] != MAGIC:
        raise errors.not_a_binary(name, "it does not begin with the magic bytes VEDF")
    _, version, header_bytes, record_bytes, digest, zero = PREAMBLE.unpack_from(data)
    if version != FORMAT_VERSION:
        raise errors.binary_version(name, version, FORMAT_VERSION)
    expected = PREAMBLE.size + len_padded(header_bytes) + record_bytes
    if header_bytes > MAX_HEADER_BYTES or len(data) != expected or zero != b"\0" * 8:
        raise errors.not_a_binary(name, f"it has {len(data)} bytes and announces {expected}")
    if hashlib.sha256(memoryview(data)[PREAMBLE.size :]).digest() != digest:
        raise errors.binary_checksum(name)
    header = _read_header(name, data[PREAMBLE.size : PREAMBLE.size + header_bytes])
    commands = _decode_records(name, data[expected - record_bytes :])
    program = Program(header, commands)
    check_references(name, program)
    return program


def len_padded(length: int) -> int:
    return length + -length % ALIGNMENT


def _read_header(name: str, text: bytes) -> Header:
    try:
        return Header.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise errors.bad_header(name, place, first["msg"]) from None


def _decode_records(name: str, data: bytes) -> tuple[Instruction, ...]:
    if len(data) < ALIGNMENT:
        raise errors.not_a_binary(name, "the record section is cut off")
    counts = [int(n) for n in np.frombuffer(data, "<u8", 4)]
    sizes = (EXEC.itemsize, DMA.itemsize, CONTROL.itemsize, 4)
    lengths = [len_padded(n * size) for n, size in zip(counts, sizes, strict=True)]
    if ALIGNMENT + sum(lengths) != len(data):
        raise errors.not_a_binary(name, "the record counts do not add up to the section's length")
    offset = ALIGNMENT
    tables: dict[int, list[Instruction]] = {}
    decoders: list[tuple[np.dtype[Any], Callable[[Any, str], Instruction]]]
    decoders = [(EXEC, decode_exec), (DMA, decode_dma), (CONTROL, decode_control)]
    kinds = (KIND_EXEC, KIND_DMA, KIND_CONTROL)
    for kind, (dtype, decode), n, length in zip(kinds, decoders, counts, lengths, strict=False):
        records = np.frombuffer(data, dtype, n, offset)
        label = dtype_name(kind)
        tables[kind] = [decode(r, f"{name}: {label}[{i}]") for i, r in enumerate(records)]
        offset += length
    issue = np.frombuffer(data, "<u4", counts[3], offset)
    return tuple(_issued(name, tables, int(entry), i) for i, entry in enumerate(issue))


def dtype_name(kind: int) -> str:
    return {KIND_EXEC: "exec", KIND_DMA: "dma", KIND_CONTROL: "control"}[kind]


def _issued(
    name: str, tables: dict[int, list[Instruction]], entry: int, position: int
) -> Instruction:
    kind, index = entry >> 24, entry & 0xFFFFFF
    if kind not in tables or index >= len(tables[kind]):
        raise errors.bad_record_field(f"{name}: issue[{position}]", "entry", entry, "a record")
    return tables[kind][index]
