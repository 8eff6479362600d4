"""The search for a product's tiling: emit what a tiling means, add up what its commands cost.

The contexts overlap, so a tiling costs what its busiest context does, and what nothing can hide:
what comes before the first product and after the last load. Candidates are
few, because everything else follows: loads that are long enough for their start-up cost to vanish
and short enough that several are in memory, and register files filled to half or to the whole.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from xdsl.ir import Block, SSAValue

from .emitter import ActivationShape, Emitter, Ref
from .isa.cost import dma_cost, exec_cost
from .isa.cost_exchange import message_cycles
from .isa.dtypes import DType
from .isa.instructions import Context, Dma, Exec, Sink
from .isa.layout import CHUNK, FeatureOrder
from .isa.machine import Machine
from .isa.plan import Memory, plan_dma, plan_exec
from .isa.rules import TRF_BYTES, VRF_BYTES
from .kernels.linear import (
    CHUNK_BYTES,
    GROUP,
    NUMBER_BYTES,
    TILE_FEATURES,
    MatmulShape,
    Scales,
    group_chunks,
    linear,
    shape_of_product,
)
from .kernels.linear_groups import product_type
from .rngd import AllocOp, ArriveOp, BufferType, DmaOp, ExecOp, RepeatOp, TilingOp, WorkOp
from .tiling import Cycles, MatmulTiling, Role

LOAD_BYTES = (131072, 65536, 32768, 16384)
"""Weights in a slice that one load may bring, the first of these first."""
MOST_STREAMED_TOKENS = 128
"""Beyond so many tokens, streaming the weights once per group of 16 is never best."""
MOST_EQUAL_LOADS = 6
"""Loads into which few rows are divided evenly."""
INDIFFERENT = 0.01
"""Tilings that cost at most so much more are as good: then fewer bytes and smaller loads count."""


@dataclass(frozen=True)
class ProductKey:
    """A product as far as its tiling goes."""

    x: FeatureOrder
    out: FeatureOrder
    tokens: int
    dtype: DType = DType.BF16
    bias: bool = False
    residual: bool = False
    weight_dtype: DType = DType.BF16
    scales: frozenset[str] = frozenset()
    """Names of the `Scales` that it has."""
    may_repeat: bool = False
    """Whether slices without features may hold copies of others."""
    groups: int = 1
    """Groups of slices that have `tokens` of their own."""

    @property
    def shape(self) -> MatmulShape:
        x = ActivationShape(self.x, self.tokens, groups=self.groups)
        y = ActivationShape(self.out, self.tokens, self.dtype, self.groups)
        return shape_of_product(x, y, self.weight_dtype, self.may_repeat)


def search(key: ProductKey, machine: Machine) -> MatmulTiling:
    """The tiling that costs least."""
    return cheapest(_priced(key, machine))


def runner_up(key: ProductKey, tiling: MatmulTiling, machine: Machine) -> MatmulTiling | None:
    """The best of the others; None if there is no other."""
    others = [t for t in _priced(key, machine) if t != tiling]
    return cheapest(others) if others else None


@functools.lru_cache(maxsize=1024)
def _priced(key: ProductKey, machine: Machine) -> list[MatmulTiling]:
    # A kernel that streams weights adds no residual.
    roles = {Role.TOKENS} if key.residual else set(Role)
    found = (t for t in candidates(key.shape) if t.role in roles)
    return [replace(t, predicted=predict(key, t, machine)) for t in found]


def cheapest(priced: list[MatmulTiling]) -> MatmulTiling:
    """The least score; among those that are as good, weights of used slices and small loads."""
    least = min(score(t) for t in priced)
    good = [t for t in priced if score(t) <= least * (1 + INDIFFERENT)]
    return min(
        good, key=lambda t: (t.every_slice, t.load_rows * t.load_chunks // t.k_split, score(t))
    )


def score(tiling: MatmulTiling) -> float:
    """What a tiling costs, see `Cycles.score`."""
    assert tiling.predicted is not None
    return tiling.predicted.score


# --- candidates ---


def candidates(shape: MatmulShape) -> Iterator[MatmulTiling]:
    """Tilings that are worth a price, in a fixed order."""
    if shape.groups > 1:
        yield from _groups_stream(shape)
        return
    yield from _weights_stream(shape, shape.parts)
    yield from _tokens_stream(shape, shape.parts)


def _weights_stream(shape: MatmulShape, parts: int) -> Iterator[MatmulTiling]:
    row_bytes = shape.k // parts * 2
    stored_bytes = shape.weight_dtype.bytes_for(shape.k // parts)
    sizes = [size for size in (16, 8, 4, 2, 1) if size * row_bytes <= TRF_BYTES]
    if shape.tokens > MOST_STREAMED_TOKENS:
        return
    enough = [size for size in sizes if size >= shape.tokens]
    tokens = [*enough[-1:], *[size for size in sizes if size < shape.tokens][:2]]
    slices = [True] if parts > 1 or shape.slices_read == 64 else [False, True]
    for size in tokens:
        for rows in _row_counts(shape.per_slice, stored_bytes, 4):
            for every in slices:
                yield MatmulTiling(
                    Role.WEIGHTS,
                    min(size, shape.tokens),
                    rows,
                    rows,
                    shape.k_chunks,
                    shape.k_chunks,
                    parts,
                    every_slice=every,
                )


def _row_counts(per_slice: int, row_bytes: int, least: int) -> list[int]:
    """Rows of a load, at least `least`: equal parts of a slice's rows, or the sizes of loads."""
    # Scales of a load's rows stand in half of the VRF.
    most = min(LOAD_BYTES[0] // row_bytes, VRF_BYTES // 8)
    equal = [-(-per_slice // loads) for loads in range(1, MOST_EQUAL_LOADS + 1)]
    equal.append(per_slice * 3 // 4)  # a short load at the end
    sized = [size // row_bytes for size in LOAD_BYTES]
    whole = {_whole_groups(min(most, per_slice, rows)) for rows in (*equal, *sized)}
    return sorted({max(least, rows) for rows in whole}, reverse=True)


def _whole_groups(rows: int) -> int:
    """Whole groups of rows, or the largest part of a group."""
    return rows // GROUP * GROUP or (8 if rows >= 8 else 4)


def _tokens_stream(shape: MatmulShape, parts: int) -> Iterator[MatmulTiling]:
    chunk_bytes = shape.k_slices // parts * CHUNK_BYTES
    half = TRF_BYTES // 2 // TILE_FEATURES // chunk_bytes
    command = min(shape.k_chunks, half)
    base = MatmulTiling(
        Role.TOKENS, shape.tokens, TILE_FEATURES, TILE_FEATURES, command, command, parts
    )
    chunk_stored = shape.weight_dtype.bytes_for(shape.k_slices // parts * CHUNK)
    tile_bytes = TILE_FEATURES * shape.k_chunks * chunk_stored
    if tile_bytes <= LOAD_BYTES[0]:
        for rows in _row_counts(shape.per_slice, tile_bytes // TILE_FEATURES, TILE_FEATURES):
            yield replace(base, load_rows=rows, load_chunks=shape.k_chunks)
    for times in (1, 2, 4):
        if command * times < shape.k_chunks:
            if TILE_FEATURES * command * times * chunk_stored <= LOAD_BYTES[0]:
                yield replace(base, load_chunks=command * times)


def _groups_stream(shape: MatmulShape) -> Iterator[MatmulTiling]:
    chunks, chunk_bytes = group_chunks(shape)
    parts = -(-chunks * chunk_bytes // (TRF_BYTES // 2 // TILE_FEATURES))
    command = -(-chunks // parts)
    base = MatmulTiling(
        Role.TOKENS,
        shape.tokens,
        TILE_FEATURES,
        TILE_FEATURES,
        chunks,
        command,
        shape.parts,
        groups=shape.groups,
    )
    yield base
    for times in (1, 2):
        if command * times < chunks and not shape.by_chunk:
            yield replace(base, load_chunks=command * times)


# --- prices ---


def predict(key: ProductKey, tiling: MatmulTiling, machine: Machine) -> Cycles:
    """What the commands of a tiling cost, as far as they overlap."""
    block = Block()
    emit = Emitter(block)
    weight, vector, zeros, scale = (
        Ref(block.insert_arg(BufferType(Memory.HBM, 0), i)) for i in range(4)
    )
    x = emit.activation(key.x, key.tokens, "x", groups=key.groups)
    residual = emit.activation(key.out, key.tokens, "residual", groups=key.groups)
    product = product_type(tiling)(
        emit,
        x,
        weight,
        emit.activation(key.out, key.tokens, "y", key.dtype, key.groups),
        tiling,
        bias=vector if key.bias else None,
        residual=residual if key.residual else None,
        zeros=zeros,
        weight_dtype=key.weight_dtype,
        scales=_scales(emit, key, scale) if key.scales else None,
    )
    linear(product)
    return block_cycles(block, machine)


def _scales(emit: Emitter, key: ProductKey, weight: Ref) -> Scales:
    """As the key names them; nothing has to be waited for."""
    tokens = emit.alloc(Memory.DM, NUMBER_BYTES * key.tokens, "token_scales")
    return Scales(
        weight,
        number=tokens if "number" in key.scales else None,
        tokens=tokens if "tokens" in key.scales else None,
    )


def block_cycles(block: Block, machine: Machine, ranks: int = 1) -> Cycles:
    """What a block's commands cost each of `ranks`, as far as they overlap in their order."""
    return _Price(machine, ranks).of(block)


# The tiles of a product, and those of other tilings, mostly run the same commands.
@functools.lru_cache(maxsize=8192)
def _exec_cycles(command: Exec, machine: Machine) -> int:
    return exec_cost(plan_exec(command, ""), machine).total_cycles


@functools.lru_cache(maxsize=8192)
def _dma_cycles(command: Dma, machine: Machine, ranks: int) -> int:
    return dma_cost(plan_dma(command, ""), machine, ranks).total_cycles


class _Price:
    """Runs the commands against a clock, their contexts side by side.

    A command waits for those before it in its queue and for what it reads. The sub context counts
    as two queues, register files ahead of sums: the scheduler may put fills first. Messages to
    other ranks are on their way one after the other.
    """

    def __init__(self, machine: Machine, ranks: int) -> None:
        self._machine = machine
        self._ranks = ranks
        self._delivered = 0
        self._busy = dict.fromkeys(Context, 0)
        self._free: dict[tuple[Context, bool], int] = {}
        self._written: dict[SSAValue, int] = {}
        self._end = 0

    def of(self, block: Block) -> Cycles:
        self._walk(block, 1)
        busy = self._busy
        total = max(self._end, *busy.values())
        return Cycles(busy[Context.MAIN], busy[Context.SUB], busy[Context.DMA], total)

    def _walk(self, block: Block, times: int) -> None:
        for op in block.ops:
            match op:
                case DmaOp():
                    cycles = _dma_cycles(op.dma, self._machine, self._ranks)
                    self._run(Context.DMA, False, cycles, times, [op.source], op.destination)
                case ExecOp():
                    cycles = _exec_cycles(op.exec, self._machine)
                    fills = op.exec.commit.sink != Sink.DM
                    reads = [value for name, value in op.ports().items() if name != "out"]
                    self._run(op.exec.head.context, fills, cycles, times, reads, op.out)
                case ArriveOp():
                    sent = max(self._delivered, self._written[op.buffer])
                    self._delivered = sent + message_cycles(self._machine, self._ranks)
                    self._written[op.buffer] = self._delivered
                    self._end = max(self._end, self._delivered)
                case RepeatOp():
                    start, turns = self._end, op.count.value.data
                    self._walk(op.body.block, times * turns)
                    self._end += (turns - 1) * (self._end - start)
                    self._free = dict.fromkeys(self._free, self._end)
                case _:
                    assert isinstance(op, AllocOp | WorkOp | TilingOp), op.name

    def _run(
        self,
        context: Context,
        fills: bool,
        cycles: int,
        times: int,
        reads: Sequence[SSAValue],
        out: SSAValue,
    ) -> None:
        queue = context, fills
        start = max([self._free.get(queue, 0), *(self._written.get(v, 0) for v in reads)])
        finish = start + cycles
        self._busy[context] += cycles * times
        self._free[queue] = finish
        self._written[out] = max(self._written.get(out, 0), finish)
        self._end = max(self._end, finish)
