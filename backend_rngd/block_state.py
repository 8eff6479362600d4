"""What has been emitted of a block: its values so far, and the HBM arguments that it reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from xdsl.dialects import func
from xdsl.ir import Block, Operation, SSAValue

from ..ir import paged
from ..ir.types import dtype_of, f32, shape_of
from .block_needs import Argument, Crossing, Need, Part, whole_of
from .emitter import Activation, Emitter, Ref
from .fusion import fusions
from .isa.dtypes import DType
from .isa.layout import Layout, RopeTable, features_per_slice, plain
from .isa.plan import Memory
from .isa.rules import SLICES_PER_PE
from .kernels import rows
from .kernels.exchange import Piece, Summand
from .lower_quant import ChunkScales
from .rngd import BufferType
from .tiling import Pins
from .tokens import WORD_BYTES, Chunk, TokenShape
from .value_uses import feature_orders, parts_of_modules, wide_values


@dataclass
class ChunkState:
    """What has been computed of one chunk."""

    chunk: Chunk
    scales: ChunkScales
    values: dict[SSAValue, Activation] = field(default_factory=dict)
    parked: set[SSAValue] = field(default_factory=set)
    """Residuals that stand in HBM until they are added."""
    angles: list[tuple[SSAValue, RopeTable, Ref]] = field(default_factory=list)
    """Rotary angles that are in data memory, with their positions and the table they are from."""
    summands: dict[SSAValue, Summand] = field(default_factory=dict)
    """Where values stand that are to be summed over ranks."""
    own_parts: dict[SSAValue, tuple[Piece, ...]] = field(default_factory=dict)
    """Of sums over ranks, what this rank has summed."""


@dataclass
class BlockState:
    """What has been emitted of a block, and of what."""

    name: str
    function: func.FuncOp
    shape: TokenShape
    chunks: Sequence[Chunk]
    logits: frozenset[int]
    """Numbers of the results that are logits."""
    pins: Pins = field(default_factory=dict)
    """Prescribed tilings by patterns of module paths."""
    compare: bool = False
    """Record the next best tilings too; it takes time to find them."""
    segment: Sequence[Operation] | None = None
    """The operators that this block is for; None: all of the function."""
    crossings: dict[SSAValue, Crossing] = field(default_factory=dict)
    """What earlier segments have left in HBM; this one adds its own."""
    groups: int = 1
    """Groups of slices that have a part of the chunk's tokens each."""
    needs: list[Need] = field(default_factory=list)
    block: Block = field(default_factory=Block)
    starts: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.body = self.function.body.block
        self.emit = Emitter(self.block)
        self.states = [
            ChunkState(chunk, ChunkScales(self.emit, self.parameter)) for chunk in self.chunks
        ]
        self.now = self.states[0]
        self.orders = feature_orders(self.body)
        self.wide = wide_values(self.body, self.logits)
        self.parts = parts_of_modules(self.body)
        self.fused = fusions(self.body)

    @property
    def chunk(self) -> Chunk:
        """The chunk that is being worked on."""
        return self.now.chunk

    @property
    def values(self) -> dict[SSAValue, Activation]:
        """What has been computed so far of its values."""
        return self.now.values

    def need(self, need: Need, start: int = 0) -> Ref:
        """The place `start` bytes into the HBM buffer that stands for `need`.

        Where a buffer's first use begins is a matter of the call, so that calls for other tokens
        can share the block.
        """
        if need not in self.needs:
            self.needs.append(need)
            self.starts.append(start)
            self.block.insert_arg(BufferType(Memory.HBM, 0), len(self.needs) - 1)
        number = self.needs.index(need)
        return Ref(self.block.args[number]).at(start - self.starts[number])

    def argument(self, value: SSAValue, start: int = 0) -> Ref:
        """The place `start` bytes into an argument of the function."""
        return self.need(Argument(self.body.args.index(value)), start)

    def cache(self, value: SSAValue) -> Ref:
        """The cache that operators write in place and return."""
        while isinstance(value.owner, paged.WriteOp):
            value = value.owner.cache
        return self.argument(value)

    def parameter(self, value: SSAValue, layout: Layout) -> Ref:
        """A weight, or a slice of one, in the layout that a kernel reads."""
        value, part = whole_of(value, Part.all_of(value))
        return self.need(Argument(self.body.args.index(value), layout, part))

    def of(self, value: SSAValue) -> Activation:
        """A computed value; a function's hidden argument is loaded at its first use."""
        if value not in self.values:
            crossing = self.crossings.get(value)
            order = self.orders.get(value) or plain(shape_of(value)[-1])
            if crossing is not None:
                order = crossing.order
            start = self.chunk.first(self.shape) * features_per_slice(order) * 2
            used = -(-order.positions // features_per_slice(order))
            self.values[value] = rows.load_rows(
                self.emit,
                self.argument(value, start) if crossing is None else self.need(crossing, start),
                order,
                self.shape.all_tokens,
                0,
                self.chunk.count,
                SLICES_PER_PE if crossing is None else used + used % 2,
                self.groups,
            )
        return self.values[value]

    def input(self, value: SSAValue, element_bytes: int, row_bytes: int) -> Ref:
        """A program input at the chunk's first sequence and token."""
        start = self.chunk.first_sequence * row_bytes + self.chunk.first_token * element_bytes
        return self.argument(value, start)

    def positions(self, value: SSAValue) -> Ref:
        """Position ids at the chunk's first sequence and token."""
        return self.input(value, WORD_BYTES, self.shape.row_bytes("position_ids"))

    def store_crossing(self, value: SSAValue, x: Activation) -> None:
        """Leave a value in HBM for later segments."""
        assert x.dtype == DType.BF16, x
        crossing = self.crossings.setdefault(
            value, Crossing(len(self.crossings), x.order, self.shape.all_tokens)
        )
        out = self.need(crossing, self.chunk.first(self.shape) * x.row_bytes)
        rows.store_rows(self.emit, x, out, self.shape.all_tokens, 0, x.slices_read)

    def dtype_of(self, value: SSAValue) -> DType:
        """The type that a value is computed to."""
        return DType.F32 if value in self.wide or dtype_of(value) == f32 else DType.BF16
