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
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, Field, ValidationError

from ... import errors
from .canonical import canonical
from .cut import Cut
from .dtypes import DType
from .instructions import MAX_RANKS, REGISTERS, Control, Dma, Exec, Instruction, Space
from .layout import Count, Derived, Layout, RankNumbers, Size, Table
from .rank_rules import partners
from .record_types import CONTROL, DMA, EXEC, KIND_CONTROL, KIND_DMA, KIND_EXEC
from .records import (
    decode_control,
    decode_dma,
    decode_exec,
    encode_control,
    encode_dma,
    encode_exec,
)
from .registers import BlockRegisters

MAGIC = b"VEDF"
FORMAT_VERSION = 7
PREAMBLE = struct.Struct("<4sIQQ32s8s")
ALIGNMENT = 64
INSTRUCTION_BUDGET_BYTES = 720_896
"""Documented instruction memory of a compiled block."""
MAX_HEADER_BYTES = 1 << 28

Name = Annotated[str, Field(max_length=1024)]


def _power_of_two(ranks: int) -> int:
    if ranks & (ranks - 1):
        raise ValueError("ranks are a power of two")
    return ranks


Ranks = Annotated[int, Field(ge=1, le=MAX_RANKS), AfterValidator(_power_of_two)]


class Relocation(Table):
    """What part of which checkpoint tensor a region holds, and in which layout.

    `shape` is the tensor's. With `cut` each rank has a part of it. `begin` and `end` bound the rows
    and columns of the tensor, or of a rank's part, that this program uses (half-open).
    """

    tensor: Name
    shape: tuple[Size, ...]
    begin: tuple[Count, ...]
    end: tuple[Count, ...]
    layout: Layout
    cut: Cut | None = None

    @property
    def local_shape(self) -> tuple[int, ...]:
        """The shape of each rank's part."""
        return self.shape if self.cut is None else self.cut.local_shape(self.shape)


class TensorIo(Table):
    """An input or output: element (…, i) stands at row · row_bytes + i · element_bytes.

    All ranks get an input. An output is that of rank 0, or put together from the ranks' parts
    according to `cut`; `shape` is that of a part.
    """

    name: Name
    dtype: Literal["i32", "f32", "bf16"]
    shape: tuple[Size, ...]
    element_bytes: Size
    row_bytes: Size
    cut: Cut | None = None

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """What the host gets: the ranks' parts put together."""
        return self.shape if self.cut is None else self.cut.whole_shape(self.shape)

    @property
    def bytes(self) -> int:
        return int(np.prod(self.shape[:-1], dtype=np.int64)) * self.row_bytes


class CacheIo(Table):
    """The KV cache of one layer on one rank: `slot_bytes` for each slot; the loader picks slots.

    A slot is [kv_heads][K|V][padded head_dim] of `dtype`, keys in rotary order.
    """

    layer: Count
    kv_heads: Size
    head_dim: Size
    padded: Size
    dtype: Literal["bf16", "f8e4m3"] = "bf16"

    @property
    def slot_bytes(self) -> int:
        element_bytes = 2 if self.dtype == "bf16" else 1
        return self.kv_heads * 2 * self.padded * element_bytes


class Region(Table):
    """A piece of HBM that calls bind registers to. Exactly one of the fields says what it is."""

    name: Name
    parameter: Relocation | None = None
    derived: Derived | None = None
    input: TensorIo | None = None
    output: TensorIo | None = None
    cache: CacheIo | None = None
    scratch_bytes: Size | None = None

    def bytes_for(self, slots: int) -> int:
        """Size in bytes when the KV cache has `slots` slots."""
        if self.parameter is not None:
            return self.parameter.layout.bytes
        if self.cache is not None:
            return self.cache.slot_bytes * slots
        for content in (self.derived, self.input, self.output):
            if content is not None:
                return content.bytes
        assert self.scratch_bytes is not None
        return self.scratch_bytes


class Provenance(Table):
    """The module that commands work for, relative to the call's prefix."""

    path: Name
    node: Name = ""
    macs: Count = 0
    """Useful multiply-accumulates of this entry in one run of the block."""
    successor: bool = False
    """The commands load for the next call: the path is relative to that call's prefix."""


class Block(Table):
    """Code that calls share: `count` entries of the issue list from `first`."""

    name: Name
    first: Count
    count: Size
    provenance: tuple[Provenance, ...]


class Binding(Table):
    """A register's value at the start of a call: `offset` bytes into a region."""

    register_number: Annotated[int, Field(ge=0, lt=REGISTERS)]
    region: Count
    offset: Count = 0


class Call(Table):
    """One run of a block. `successor` is the next call.

    A block may expect that the call before it has loaded what it begins with; then that call's
    registers point at this call's parameters too.
    """

    block: Count
    prefix: Name
    bindings: tuple[Binding, ...]
    successor: Count | None = None


class Piece(Table):
    """Bytes of a region."""

    region: Count
    offset: Count
    size: Size


class Reload(Table):
    """A transfer of a call, with that call's registers."""

    call: Count
    entry: Count


class StageCut(Table):
    """A pipeline stage may begin with `call`, which has memories of its own then.

    It gets `sends` from the stage before it, and runs `reloads` first: the transfers by which
    earlier calls have brought constants to data memory that it finds there.
    """

    call: Count
    sends: tuple[Piece, ...]
    reloads: tuple[Reload, ...] = ()


class Header(Table):
    """Everything but the records."""

    model_name: Name
    bucket: Annotated[str, Field(pattern=r"^(prefill|decode):[0-9]+,[0-9]+$")]
    tensor_parallel_size: Ranks = 1
    """Ranks that run the calls together, each on a PE."""
    regions: tuple[Region, ...]
    blocks: tuple[Block, ...]
    calls: tuple[Call, ...]
    stage_cuts: tuple[StageCut, ...] = ()
    """Where the calls may be cut into pipeline stages, in their order; the loader chooses."""


class Program:
    """A bucket's program: its header, and the commands of its issue list.

    `commands[i]` is what entry i of the issue list runs; equal commands share one record.
    """

    def __init__(self, header: Header, commands: tuple[Instruction, ...]) -> None:
        self.header = header
        self.commands = commands

    @property
    def bucket(self) -> str:
        return self.header.bucket

    @property
    def regions(self) -> tuple[Region, ...]:
        return self.header.regions

    @property
    def blocks(self) -> tuple[Block, ...]:
        return self.header.blocks

    @property
    def calls(self) -> tuple[Call, ...]:
        return self.header.calls

    @property
    def inputs(self) -> tuple[TensorIo, ...]:
        return tuple(r.input for r in self.regions if r.input is not None)

    @property
    def outputs(self) -> tuple[TensorIo, ...]:
        return tuple(r.output for r in self.regions if r.output is not None)

    @property
    def caches(self) -> tuple[CacheIo, ...]:
        return tuple(r.cache for r in self.regions if r.cache is not None)

    @property
    def parameters(self) -> tuple[Relocation, ...]:
        return tuple(r.parameter for r in self.regions if r.parameter is not None)

    def block_commands(self, block: Block) -> tuple[Instruction, ...]:
        return self.commands[block.first : block.first + block.count]

    def block_code_bytes(self, block: Block) -> int:
        """Bytes of the distinct records of a block and of its issue list."""
        sizes = {Exec: EXEC.itemsize, Dma: DMA.itemsize, Control: CONTROL.itemsize}
        commands = self.block_commands(block)
        return sum(sizes[type(c)] for c in dict.fromkeys(commands)) + 4 * len(commands)


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
    _check_references(name, program)
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


def _check_references(name: str, program: Program) -> None:
    """Every index in the header points at something. Raises: VED004."""
    header, n = program.header, len(program.commands)
    for i, region in enumerate(header.regions):
        kinds = region.model_dump(exclude_none=True, exclude={"name"})
        if len(kinds) != 1:
            raise errors.bad_header(name, f"regions.{i}", "a region has exactly one content")
        if region.parameter is not None:
            _check_relocation(name, f"regions.{i}.parameter", region.parameter)
        for io in filter(None, (region.input, region.output)):
            _check_io(name, f"regions.{i}", io)
        _check_ranks(name, f"regions.{i}", region, header.tensor_parallel_size)
    for i, block in enumerate(header.blocks):
        if block.first + block.count > n:
            raise errors.bad_header(name, f"blocks.{i}", f"the issue list has {n} entries")
        for entry, command in enumerate(program.block_commands(block)):
            if isinstance(command, Control):
                continue
            if command.head.provenance >= len(block.provenance):
                raise errors.bad_header(name, f"blocks.{i}.provenance", "a command has no entry")
            _check_partners(name, program, block, entry, command)
    registers = [BlockRegisters.of(program.block_commands(block)) for block in header.blocks]
    for i, found in enumerate(registers):
        if found.problem is not None:
            raise errors.bad_header(name, f"blocks.{i}", found.problem)
    for i, call in enumerate(header.calls):
        if call.block >= len(header.blocks):
            raise errors.bad_header(name, f"calls.{i}.block", "no such block")
        if call.successor is not None and call.successor >= len(header.calls):
            raise errors.bad_header(name, f"calls.{i}.successor", "no such call")
        if call.successor is None and any(
            entry.successor for entry in header.blocks[call.block].provenance
        ):
            raise errors.bad_header(name, f"calls.{i}.successor", "its block loads for one")
        if any(b.region >= len(header.regions) for b in call.bindings):
            raise errors.bad_header(name, f"calls.{i}.bindings", "no such region")
        problem = registers[call.block].problem_of([b.register_number for b in call.bindings])
        if problem is not None:
            raise errors.bad_header(name, f"calls.{i}.bindings", problem)
    for i, cut in enumerate(header.stage_cuts):
        problem = _problem_of_cut(program, cut)
        if problem is not None:
            raise errors.bad_header(name, f"stage_cuts.{i}", problem)
    numbers = [cut.call for cut in header.stage_cuts]
    if numbers != sorted(set(numbers)):
        raise errors.bad_header(name, "stage_cuts", "cuts come in the order of their calls")


def _problem_of_cut(program: Program, cut: StageCut) -> str | None:
    """What a cut names that does not exist."""
    if not 0 < cut.call < len(program.calls):
        return "a stage begins between two calls"
    for piece in cut.sends:
        if piece.region >= len(program.regions):
            return "no such region"
        region = program.regions[piece.region]
        sent = region.output is not None or region.scratch_bytes is not None
        if not sent or piece.offset + piece.size > region.bytes_for(slots=0):
            return f"the bytes of {region.name} that are sent are not what calls write"
    for reload in cut.reloads:
        if reload.call >= cut.call:
            return "a stage loads again what calls before it have loaded"
        block = program.blocks[program.calls[reload.call].block]
        if reload.entry >= block.count:
            return "no such entry"
        c = program.commands[block.first + reload.entry]
        if not isinstance(c, Dma) or (c.source.space, c.destination.space) != (
            Space.HBM,
            Space.DM,
        ):
            return "a stage loads again by transfers from HBM to data memory"
    return None


def _check_partners(name: str, program: Program, block: Block, entry: int, c: Exec | Dma) -> None:
    """Every rank has the partners that the command names. Raises: VED004, VED014."""
    ranks = program.header.tensor_parallel_size
    for side in (c.source, c.destination) if isinstance(c, Dma) else ():
        if side.rank_mask >= ranks or (side.rank_stride and ranks == 1):
            cause = "an address depends on ranks that do not exist"
            raise errors.bad_header(name, f"{block.name}[{entry}]", cause)
    for mask, what in partners(c):
        if mask >= ranks:
            module = block.provenance[c.head.provenance].path or block.name
            raise errors.missing_partner(name, f"{block.name}[{entry}]", module, what, mask, ranks)


def _check_relocation(name: str, where: str, relocation: Relocation) -> None:
    cut, begin, end = relocation.cut, relocation.begin, relocation.end
    if cut is not None and (
        cut.dim >= len(relocation.shape) or cut.end > relocation.shape[cut.dim]
    ):
        raise errors.bad_header(name, where, "the cut does not lie inside the tensor's shape")
    shape = relocation.local_shape
    if not len(shape) == len(begin) == len(end) or any(
        not b < e <= n for n, b, e in zip(shape, begin, end, strict=False)
    ):
        raise errors.bad_header(name, where, "the bounds do not lie inside the tensor's shape")
    extents = tuple(e - b for b, e in zip(begin, end, strict=True))
    if extents != relocation.layout.tensor_shape:
        raise errors.bad_header(name, where, "the layout is for another shape than the bounds")


def _check_ranks(name: str, where: str, region: Region, ranks: int) -> None:
    """What a region says of ranks it says of all of them. Raises: VED004."""
    parameter, derived, output = region.parameter, region.derived, region.output
    if isinstance(derived, RankNumbers) and len(derived.numbers) != ranks:
        raise errors.bad_header(name, f"{where}.derived", f"one number for each of {ranks} ranks")
    if region.input is not None and region.input.cut is not None:
        raise errors.bad_header(name, f"{where}.input.cut", "all ranks get all of an input")
    cuts = [content.cut for content in (parameter, output) if content is not None]
    if any(cut is not None and len(cut.slots) != ranks for cut in cuts):
        raise errors.bad_header(name, where, f"a cut has a part for each of {ranks} ranks")
    if output is not None and output.cut is not None:
        cut = output.cut
        fits = cut.dim < len(output.shape) and output.shape[cut.dim] == cut.local_size
        if not fits or not cut.covers():
            raise errors.bad_header(name, f"{where}.output.cut", "its parts are not the output")


def _check_io(name: str, where: str, io: TensorIo) -> None:
    element_bytes = io_dtype(io).bytes_for(1)
    if not io.shape or io.element_bytes < element_bytes:
        raise errors.bad_header(name, where, f"an element of {io.dtype} has {element_bytes} bytes")
    if (io.shape[-1] - 1) * io.element_bytes + element_bytes > io.row_bytes:
        raise errors.bad_header(name, where, "a row is shorter than its elements")


def io_dtype(io: TensorIo) -> DType:
    """The element type of an input or output."""
    return {"i32": DType.I32, "f32": DType.F32, "bf16": DType.BF16}[io.dtype]
