"""Writing `rngd` commands: buffers, loops and locations, so that kernels stay short."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from xdsl.dialects.builtin import UNKNOWN_LOC, LocationAttr
from xdsl.ir import Block, Operation, Region, SSAValue

from .affine import factor
from .isa.dtypes import DType
from .isa.instructions import (
    Commit,
    Context,
    Contraction,
    Counter,
    Dma,
    Exec,
    Generate,
    Head,
    IndexList,
    Indirect,
    Port,
    Side,
    Sink,
    Space,
    Stream,
    Switch,
    Vector,
)
from .isa.layout import FeatureOrder, features_per_slice
from .isa.plan import SLICE_ADDRESS_BYTES, Memory
from .isa.rules import SLICES_PER_PE, TRF_BYTES
from .rngd import AllocOp, BufferType, DmaOp, ExecOp, RepeatOp
from .token_groups import unit_positions, unit_stride

UNROLL_LIMIT = 8
"""Longest loop that is written out: only straight code overlaps from one turn to the next."""


NO_VECTOR = Vector()
FORWARD = Switch()


@dataclass(frozen=True)
class Index:
    """A loop's counter: a number when the loop is written out, else its depth among repeats."""

    value: int
    depth: int | None


@dataclass(frozen=True)
class Ref:
    """A place in a buffer: an offset in bytes, and bytes per turn of each enclosing repeat."""

    buffer: SSAValue
    offset: int = 0
    steps: tuple[int, ...] = ()

    def at(self, offset_bytes: int) -> Ref:
        return replace(self, offset=self.offset + offset_bytes)

    def moved(self, index: Index, stride_bytes: int) -> Ref:
        """The place `stride_bytes` further for each turn of the loop."""
        if index.depth is None:
            return self.at(index.value * stride_bytes)
        steps = [*self.steps, *[0] * (index.depth + 1 - len(self.steps))]
        steps[index.depth] += stride_bytes
        return replace(self, steps=tuple(steps))

    @property
    def space(self) -> Space:
        assert isinstance(self.buffer.type, BufferType)
        return Space.HBM if self.buffer.type.memory.data == "hbm" else Space.DM


@dataclass(frozen=True)
class ByRank:
    """What is added to an address so that ranks with the same code work at different places.

    (rank ^ mask) · stride bytes.
    """

    stride: int = 0
    mask: int = 0


HERE = ByRank()


@dataclass(frozen=True)
class ActivationShape:
    """Features of M tokens spread over the slices: slice s holds [M][C], position s·C + j.

    With `groups` > 1 every group of R neighbouring slices has M tokens of its own. Positions are
    cut into units of C, or of a chunk; slice r of a group holds [unit][M][position], the units r,
    r + R, ... (`token_groups`). Tokens are dealt to the groups in runs of `deal`, or each group
    has M that follow each other.
    """

    order: FeatureOrder
    tokens: int
    dtype: DType = DType.BF16
    groups: int = 1
    deal: int | None = None

    @cached_property
    def per_slice(self) -> int:
        """C, features per slice and token if all slices divide them."""
        return features_per_slice(self.order)

    @property
    def ring(self) -> int:
        """Slices that hold a token."""
        return SLICES_PER_PE // self.groups

    @cached_property
    def unit(self) -> int:
        """Positions of a token that stand together in a slice."""
        return self.per_slice if self.groups == 1 else unit_positions(self.order, self.ring)

    @property
    def units(self) -> int:
        """Units in a slice."""
        return -(-self.slices_used * self.per_slice // (self.unit * self.ring))

    @property
    def row_bytes(self) -> int:
        return self.dtype.bytes_for(self.unit)

    @property
    def unit_bytes(self) -> int:
        """Bytes from one unit to the next."""
        return unit_stride(self.tokens * self.row_bytes, self.row_bytes)

    @property
    def size_bytes(self) -> int:
        return (self.units - 1) * self.unit_bytes + self.tokens * self.row_bytes

    @cached_property
    def slices_used(self) -> int:
        """Slices that hold at least one position of the order."""
        return -(-self.order.positions // self.per_slice)

    @property
    def slices_read(self) -> int:
        """Slices whose positions a product sums over: an even number, for whole 64 B packets."""
        return self.slices_used + self.slices_used % 2


@dataclass(frozen=True)
class Activation(ActivationShape):
    """Its data memory. Padding positions up to the end of the last slice pair in use are zero, so
    that a product may read them.
    """

    ref: Ref = field(kw_only=True)

    def place(self, position: int) -> Ref:
        """Where one of a slice's positions stands, for the first token."""
        unit, inside = divmod(position, self.unit)
        return self.ref.at(unit * self.unit_bytes + self.dtype.bytes_for(inside))


@dataclass(frozen=True)
class FetchedActivation(Activation):
    """An activation whose units come from HBM when they are first used.

    Units are places of one buffer, or buffers of their own, which live only as long as needed.
    """

    refs: tuple[Ref, ...] = ()
    fetch: Callable[[int, Ref], None] | None = None
    """Emits the transfer of a unit."""
    fetched: set[int] = field(default_factory=set)

    def place(self, position: int) -> Ref:
        assert self.fetch is not None
        unit, inside = divmod(position, self.unit)
        if unit not in self.fetched:
            self.fetched.add(unit)
            self.fetch(unit, self.refs[unit])
        return self.refs[unit].at(self.dtype.bytes_for(inside))


@dataclass
class Emitter:
    """Appends commands to a block; `location` is given to each of them."""

    block: Block
    location: LocationAttr = UNKNOWN_LOC
    _depth: int = field(default=0, init=False)

    def append(self, op: Operation) -> None:
        op.location = self.location
        self.block.add_op(op)

    def alloc(self, memory: Memory, size_bytes: int, label: str) -> Ref:
        """A buffer on chip of `size_bytes` per slice."""
        op = AllocOp(memory, -(-size_bytes // 32) * 32, label)
        self.append(op)
        return Ref(op.buffer)

    def trf(self, size_bytes: int = TRF_BYTES) -> Ref:
        """Half of the register file if `size_bytes` (of all lanes) fit there, else all of it.

        Two halves can be filled and used side by side, whatever their numbers of lanes.
        """
        half = TRF_BYTES // 2
        return self.alloc(Memory.TRF, half if size_bytes <= half else TRF_BYTES, "trf")

    def activation(
        self,
        order: FeatureOrder,
        tokens: int,
        label: str,
        dtype: DType = DType.BF16,
        groups: int = 1,
        deal: int | None = None,
    ) -> Activation:
        """A buffer in data memory for `tokens` rows of features, for so many in each group."""
        shape = order, tokens, dtype, groups, deal
        size_bytes = ActivationShape(*shape).size_bytes
        return Activation(*shape, ref=self.alloc(Memory.DM, size_bytes, label))

    def fetched_activation(
        self, x: Activation, fetch: Callable[[int, Ref], None], *, split: bool
    ) -> FetchedActivation:
        """Like x, which says where its units stand; with `split` in buffers of their own."""
        units = range(x.units)
        if split:
            refs = [self.alloc(Memory.DM, x.tokens * x.row_bytes, "residual") for _ in units]
        else:
            refs = [x.ref.at(unit * x.unit_bytes) for unit in units]
        shape = x.order, x.tokens, x.dtype, x.groups, x.deal
        return FetchedActivation(*shape, ref=x.ref, refs=tuple(refs), fetch=fetch)

    def loop(self, count: int, straight: int = UNROLL_LIMIT) -> Iterator[Index]:
        """Turns of a loop; the body of one of over `straight` is emitted once, inside a repeat."""
        if count <= straight:
            yield from (Index(i, None) for i in range(count))
            return
        outer, self.block = self.block, Block()
        self._depth += 1
        yield Index(0, self._depth - 1)
        self._depth -= 1
        body, self.block = self.block, outer
        self.append(RepeatOp(count, Region(body)))

    def exec(
        self,
        context: Context,
        counters: Sequence[Counter],
        stream: Stream,
        *,
        a: Ref | None,
        out: Ref,
        commit: Commit,
        dtype: DType = DType.BF16,
        out_dtype: DType | None = None,
        b: Ref | None = None,
        trf: Ref | None = None,
        vrf: Ref | None = None,
        contraction: Contraction | None = None,
        vector: Vector = NO_VECTOR,
        switch: Switch = FORWARD,
        trf_lanes: int = 8,
        valid_slices: int = 0,
        group: int = 0,
        generate: Generate | None = None,
    ) -> None:
        """One pass. `dtype` is that of the fetched tensors, `out_dtype` of what is committed.

        What codes are looked up as is the type in the register file, too.
        """
        streamed = stream.lookup or dtype
        command = Exec(
            head=Head(context),
            counters=tuple(c for c in counters if c.n > 1),
            a=Port(a.offset if a else 0, dtype),
            b=Port(b.offset, dtype) if b else Port(),
            trf=Port(trf.offset, streamed) if trf else Port(),
            vrf=Port(vrf.offset, DType.F32) if vrf else Port(),
            commit_port=Port(out.offset, out_dtype or streamed),
            stream=stream,
            commit=commit,
            switch=switch,
            contraction=contraction,
            trf_lanes=contraction.lanes if contraction else trf_lanes,
            vector=vector,
            group=group,
            generate=generate,
            valid_slices=0 if valid_slices == SLICES_PER_PE else valid_slices,
        )
        refs = {"a": a, "b": b, "trf": trf, "vrf": vrf, "out": out}
        self.append_exec(command, {name: ref for name, ref in refs.items() if ref is not None})

    def append_exec(self, command: Exec, refs: Mapping[str, Ref]) -> None:
        """A pass whose ports, by name, stand at these places."""
        self.append(
            ExecOp(
                command,
                **{name: ref.buffer for name, ref in refs.items()},
                steps={name: ref.steps for name, ref in refs.items()},
            )
        )

    def dma(
        self,
        loops: Sequence[tuple[int, int, int]],
        run_bytes: int,
        source: Ref,
        destination: Ref,
        *,
        peer: int = 0,
        source_rank: ByRank = HERE,
        destination_rank: ByRank = HERE,
    ) -> None:
        """Copy runs; each loop is (count, source stride, destination stride), outermost first.

        The destination is that of rank ^ peer.
        """
        n, source_strides, destination_strides = _transposed(
            [loop for loop in loops if loop[0] > 1], 3
        )
        self.append_dma(
            Dma(
                Head(Context.DMA),
                n,
                run_bytes,
                Side(
                    source.space,
                    source.offset,
                    source_strides,
                    rank_stride=source_rank.stride,
                    rank_mask=source_rank.mask,
                ),
                Side(
                    destination.space,
                    destination.offset,
                    destination_strides,
                    peer=peer,
                    rank_stride=destination_rank.stride,
                    rank_mask=destination_rank.mask,
                ),
            ),
            source,
            destination,
        )

    def gather(
        self,
        loops: Sequence[tuple[int, int, int, int]],
        run_bytes: int,
        source: Ref,
        destination: Ref,
        *,
        index: Ref,
        row_bytes: int,
        origin: int = 0,
        scatter: bool = False,
    ) -> None:
        """Copy runs whose source (destination, for a scatter) row is named by an i32 list.

        Each loop is (count, source stride, destination stride, index stride); `origin` is the
        list's number of row 0.
        """
        n, source_strides, destination_strides, index_strides = _transposed(
            [loop for loop in loops if loop[0] > 1], 4
        )
        self.append_dma(
            Dma(
                Head(Context.DMA),
                n,
                run_bytes,
                Side(source.space, source.offset, source_strides),
                Side(destination.space, destination.offset, destination_strides),
                Indirect.DESTINATION if scatter else Indirect.SOURCE,
                IndexList(index.offset, index_strides, row_bytes, origin=origin),
            ),
            source,
            destination,
            index,
        )

    def append_dma(
        self, command: Dma, source: Ref, destination: Ref, index: Ref | None = None
    ) -> None:
        """A transfer between these places."""
        refs = {"source": source, "destination": destination, "index": index}
        self.append(
            DmaOp(
                command,
                source=source.buffer,
                destination=destination.buffer,
                index=index.buffer if index else None,
                steps={name: ref.steps for name, ref in refs.items() if ref is not None},
            )
        )

    def regroup(
        self,
        source: Ref,
        source_slice: np.ndarray,
        source_byte: np.ndarray,
        destination: Ref,
        destination_slice: np.ndarray,
        destination_byte: np.ndarray,
        run_bytes: int,
    ) -> None:
        """Move runs between slices of data memory; the arrays broadcast to one entry per run."""
        for nest in factor(
            source_slice * SLICE_ADDRESS_BYTES + source_byte,
            destination_slice * SLICE_ADDRESS_BYTES + destination_byte,
        ):
            loops = list(zip(nest.n, *nest.strides, strict=True))
            self.dma(loops, run_bytes, source.at(nest.bases[0]), destination.at(nest.bases[1]))

    def load_slices(self, source: Ref, destination: Ref, run_bytes: int) -> None:
        """One run per slice from HBM, where the slices' runs follow each other."""
        self.dma([(SLICES_PER_PE, run_bytes, SLICE_ADDRESS_BYTES)], run_bytes, source, destination)

    def load_vrf(
        self,
        source: Ref,
        elements: int,
        label: str,
        dtype: DType = DType.F32,
        valid_slices: int = 0,
    ) -> Ref:
        """`elements` values of DM as 32-bit words in a new VRF buffer, by the sub context."""
        vrf = self.alloc(Memory.VRF, 4 * elements, label)
        run = math.gcd(elements, 8)
        self.exec(
            Context.SUB,
            [Counter(elements // run, a=dtype.bytes_for(run), vrf=4 * run)],
            Stream(run, cast=DType.F32 if dtype == DType.BF16 else None),
            a=source,
            dtype=dtype,
            out=vrf,
            out_dtype=DType.F32 if dtype == DType.BF16 else dtype,
            commit=Commit(Sink.VRF, columns=run),
            valid_slices=valid_slices,
        )
        return vrf


def _transposed(loops: Sequence[tuple[int, ...]], width: int) -> tuple[tuple[int, ...], ...]:
    return tuple(zip(*loops, strict=True)) if loops else ((),) * width


def bits(value: float) -> int:
    """The 32-bit pattern of an f32 immediate."""
    return int(np.float32(value).view(np.uint32))


def power_of_two_at_least(value: int) -> int:
    return 1 << (value - 1).bit_length()


def power_of_two_at_most(value: int) -> int:
    return 1 << (value.bit_length() - 1)
