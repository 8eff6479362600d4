"""The search for a product's tiling: emit what a tiling means, add up what its commands cost.

The contexts overlap, so a tiling costs what its busiest context does, and what nothing can hide:
what comes before the first product and after the last load. Candidates are
few, because everything else follows: loads that are long enough for their start-up cost to vanish
and short enough that several are in memory, and register files filled to half or to the whole.

What commands cost only grows while they are emitted, so a candidate that has become dearer than
the best one is given up there.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from xdsl.ir import Block, Operation, SSAValue

from .emitter import UNROLL_LIMIT, ActivationShape, Emitter, Index, Ref
from .isa.cost import dma_cost, exec_cost, without_addresses
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
    linear,
    shape_of_product,
)
from .kernels.linear_groups import product_type
from .kernels.linear_limits import command_suits, group_chunks, scales_fit
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
    block: tuple[int, int] | None = None
    """Rows and columns of weights that share a scale, if several scales meet in a sum."""

    @property
    def shape(self) -> MatmulShape:
        x = ActivationShape(self.x, self.tokens, groups=self.groups)
        y = ActivationShape(self.out, self.tokens, self.dtype, self.groups)
        return shape_of_product(x, y, self.weight_dtype, self.may_repeat, self.block)


@functools.lru_cache(maxsize=1024)
def search(key: ProductKey, machine: Machine) -> MatmulTiling:
    """The tiling that costs least."""
    return cheapest(_priced(key, _possible(key), machine))


def runner_up(key: ProductKey, tiling: MatmulTiling, machine: Machine) -> MatmulTiling | None:
    """The best of the others; None if there is no other."""
    others = [t for t in _possible(key) if t != replace(tiling, predicted=None)]
    return cheapest(_priced(key, others, machine)) if others else None


def _possible(key: ProductKey) -> list[MatmulTiling]:
    # A kernel that streams weights adds no residual.
    roles = {Role.TOKENS} if key.residual else set(Role)
    return [t for t in candidates(key.shape) if t.role in roles]


def _priced(
    key: ProductKey, tilings: Sequence[MatmulTiling], machine: Machine
) -> list[MatmulTiling]:
    """Those that may be the cheapest, in their order."""

    def streams_weights_again(number: int) -> bool:
        return tilings[number].role == Role.WEIGHTS and tilings[number].tokens < key.tokens

    limit, priced = math.inf, {}
    # What is rarely best comes last: it is given up early, as the limit is low then.
    for number in sorted(range(len(tilings)), key=streams_weights_again):
        cycles = _cycles_within(limit, key, tilings[number], machine)
        if cycles is not None:
            limit = min(limit, cycles.score * (1 + INDIFFERENT))
            priced[number] = replace(tilings[number], predicted=cycles)
    return [priced[number] for number in sorted(priced)]


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
            if shape.cells is not None and not scales_fit(shape.cells, rows):
                continue
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
    command = _command_chunks(shape, chunk_bytes)
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


def _command_chunks(shape: MatmulShape, chunk_bytes: int) -> int:
    """The most chunks of K that a command sums."""
    half = TRF_BYTES // 2 // TILE_FEATURES // chunk_bytes
    if shape.cells is None:
        return min(shape.k_chunks, half)
    # Main fills the register file, so nothing fills a half of it meanwhile; and the more chunks
    # a cell has, the fewer sums the vector engine has to multiply.
    most = min(shape.k_chunks, 2 * half)
    return max(n for n in range(1, most + 1) if command_suits(shape.cells, n))


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
    cycles = _cycles_within(math.inf, key, tiling, machine)
    assert cycles is not None
    return cycles


def _cycles_within(
    limit: float, key: ProductKey, tiling: MatmulTiling, machine: Machine
) -> Cycles | None:
    """What a tiling costs; None if its score is above `limit`."""
    emit = _PricedEmitter(Block(), machine, limit)
    try:
        _emit_product(emit, key, tiling)
    except _AboveLimit:
        return None
    cycles = emit.price.cycles
    return cycles if cycles.score <= limit else None  # the end of a loop is no command


def _emit_product(emit: Emitter, key: ProductKey, tiling: MatmulTiling) -> None:
    """The product alone, between buffers of its own."""
    hbm = BufferType(Memory.HBM, 0)
    weight, vector, zeros, scale = (Ref(emit.block.insert_arg(hbm, i)) for i in range(4))
    x = emit.activation(key.x, key.tokens, "x", groups=key.groups)
    residual = emit.activation(key.out, key.tokens, "residual", groups=key.groups)
    product = product_type(tiling, blocks=key.block is not None)(
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


def _scales(emit: Emitter, key: ProductKey, weight: Ref) -> Scales:
    """As the key names them; nothing has to be waited for."""
    tokens = emit.alloc(Memory.DM, NUMBER_BYTES * key.tokens, "token_scales")
    return Scales(
        weight,
        number=tokens if "number" in key.scales else None,
        tokens=tokens if "tokens" in key.scales else None,
        cells=key.shape.cells,
    )


def block_cycles(block: Block, machine: Machine, ranks: int = 1) -> Cycles:
    """What a block's commands cost each of `ranks`, as far as they overlap in their order."""
    price = _Price(machine, ranks)
    for op in block.ops:
        price.add(op)
    return price.cycles


# The tiles of a product, and those of other tilings, mostly run the same commands.
@functools.lru_cache(maxsize=8192)
def _exec_cycles(shape: Exec, machine: Machine) -> int:
    return exec_cost(plan_exec(shape, ""), machine).total_cycles


@functools.lru_cache(maxsize=8192)
def _dma_cycles(command: Dma, machine: Machine, ranks: int) -> int:
    return dma_cost(plan_dma(command, ""), machine, ranks).total_cycles


class _AboveLimit(Exception):
    """The commands so far cost more than a limit."""


class _PricedEmitter(Emitter):
    """Prices commands instead of keeping them; raises `_AboveLimit` above a score of `limit`."""

    def __init__(self, block: Block, machine: Machine, limit: float) -> None:
        super().__init__(block)
        self.price = _Price(machine, ranks=1)
        self._limit = limit

    def append_exec(self, command: Exec, refs: Mapping[str, Ref]) -> None:
        reads = [ref.buffer for name, ref in refs.items() if name != "out"]
        self.price.exec(command, reads, refs["out"].buffer)
        self._check()

    def append_dma(
        self, command: Dma, source: Ref, destination: Ref, index: Ref | None = None
    ) -> None:
        self.price.dma(command, source.buffer, destination.buffer)
        self._check()

    def _check(self) -> None:
        if self.price.cycles.score > self._limit:
            raise _AboveLimit

    def loop(self, count: int, straight: int = UNROLL_LIMIT) -> Iterator[Index]:
        turns = super().loop(count, straight)
        if count <= straight:
            yield from turns
            return
        with self.price.repeated(count):
            yield from turns


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
        self._times = 1

    @property
    def cycles(self) -> Cycles:
        """Of the commands so far; none of them becomes less with another command."""
        busy = self._busy
        total = max(self._end, *busy.values())
        return Cycles(busy[Context.MAIN], busy[Context.SUB], busy[Context.DMA], total)

    @contextmanager
    def repeated(self, turns: int) -> Iterator[None]:
        """What is added meanwhile is the body of a loop, whose turns do not overlap."""
        start = self._end
        self._times *= turns
        yield
        self._times //= turns
        self._end += (turns - 1) * (self._end - start)
        self._free = dict.fromkeys(self._free, self._end)

    def add(self, op: Operation) -> None:
        """The next command."""
        match op:
            case DmaOp():
                self.dma(op.dma, op.source, op.destination)
            case ExecOp():
                reads = [value for name, value in op.ports().items() if name != "out"]
                self.exec(op.exec, reads, op.out)
            case ArriveOp():
                sent = max(self._delivered, self._written[op.buffer])
                self._delivered = sent + message_cycles(self._machine, self._ranks)
                self._written[op.buffer] = self._delivered
                self._end = max(self._end, self._delivered)
            case RepeatOp():
                with self.repeated(op.count.value.data):
                    for inner in op.body.block.ops:
                        self.add(inner)
            case _:
                assert isinstance(op, AllocOp | WorkOp | TilingOp), op.name

    def dma(self, command: Dma, source: SSAValue, destination: SSAValue) -> None:
        """The next command is a transfer."""
        cycles = _dma_cycles(command, self._machine, self._ranks)
        self._run(Context.DMA, False, cycles, [source], destination)

    def exec(self, command: Exec, reads: Sequence[SSAValue], out: SSAValue) -> None:
        """The next command is a pass."""
        cycles = _exec_cycles(without_addresses(command), self._machine)
        fills = command.commit.sink != Sink.DM
        self._run(command.head.context, fills, cycles, reads, out)

    def _run(
        self,
        context: Context,
        fills: bool,
        cycles: int,
        reads: Sequence[SSAValue],
        out: SSAValue,
    ) -> None:
        queue = context, fills
        start = max([self._free.get(queue, 0), *(self._written.get(v, 0) for v in reads)])
        finish = start + cycles
        self._busy[context] += cycles * self._times
        self._free[queue] = finish
        self._written[out] = max(self._written.get(out, 0), finish)
        self._end = max(self._end, finish)
