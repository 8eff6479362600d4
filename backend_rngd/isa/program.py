"""A bucket's program: what the header of its binary says, and its commands."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import AfterValidator, Field

from .cut import Cut
from .dtypes import DType
from .instructions import MAX_RANKS, REGISTERS, Control, Dma, Exec, Instruction
from .layout import Count, Derived, Layout, Size, Table
from .record_types import CONTROL, DMA, EXEC

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


def io_dtype(io: TensorIo) -> DType:
    """The element type of an input or output."""
    return {"i32": DType.I32, "f32": DType.F32, "bf16": DType.BF16}[io.dtype]
