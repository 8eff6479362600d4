"""Matrix products with weights as the stream and tokens in the lanes of the register file.

K lies in the packet and then in time. A packet of weights meets one register-file row per lane and
token; two rows per lane cost nothing, because a packet takes two fetch cycles (docs/isa.md, "A
matrix product"). Each load of weights and each fill of the register file has a buffer of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..emitter import Ref, power_of_two_at_least
from ..isa.dtypes import DType
from ..isa.instructions import (
    Alu,
    Birth,
    Commit,
    Context,
    Contraction,
    Counter,
    Digit,
    Fate,
    Op,
    Reduce,
    Sink,
    Source,
    Stream,
    Switch,
    Topology,
    Vector,
    VectorOp,
)
from ..isa.plan import Memory
from ..isa.rules import LANES, SLICES_PER_PE, TRANSPOSER_ROWS, TRF_BYTES
from .linear import CHUNK_BYTES, GROUP, Numbers, Product, load_vector
from .rescale import ADD_VRF, MULTIPLY_VRF, feature_scales, rescale, widened

LOOP_COMMANDS = 300
"""Commands of one product beyond which its loads are repeated instead of written out."""
BODY_COMMANDS = 64
"""Commands of the body of such a loop."""


@dataclass(frozen=True)
class TokenGroup:
    """Tokens that one pass over the weights serves.

    Token row · lanes + lane stands in that row of that lane of the register file; only the first
    `valid` lanes hold a token.
    """

    first: int
    rows: int
    lanes: int
    valid: int

    @property
    def tokens(self) -> int:
        return self.rows * self.valid


def token_groups(tokens: int, at_most: int) -> list[TokenGroup]:
    """Groups of up to `at_most` tokens, each of whole lanes or of one row."""
    groups = []
    first = 0
    while first < tokens:
        left = min(at_most, tokens - first)
        lanes = min(LANES, power_of_two_at_least(left))
        rows = max(1, left // lanes)
        group = TokenGroup(first, rows, lanes, min(lanes, left))
        groups.append(group)
        first += group.tokens
    return groups


def weights_stream(product: Product) -> None:
    """Emit the product."""
    _WeightsStream(product).run()


class _WeightsStream:
    def __init__(self, product: Product) -> None:
        self.p = product
        self.emit = product.emit
        self.groups = token_groups(product.x.tokens, product.tiling.tokens)
        self.bias: Ref | None = None
        """f32 in the VRF: what sums over all of K get added."""
        self.scale: Ref | None = None
        """f32 in data memory: what sums over codes are multiplied by."""
        self.kept: list[Ref] = []
        """Fills that serve the whole product, when all tokens fit the register file."""

    def run(self) -> None:
        p, t, bias = self.p, self.p.tiling, None
        if p.bias is not None:
            bias = load_vector(self.emit, p.bias, p.y.per_slice)
            if not self._rescaled:
                self.bias = self.emit.load_vrf(bias, p.y.per_slice, "vector", DType.BF16)
        if p.scales is not None:
            self.scale = feature_scales(p)
        if len(self.groups) <= (2 if p.row_bytes * self._most_rows <= TRF_BYTES // 2 else 1):
            self.kept = [self._fill(group) for group in self.groups]
        out = sums = p.y.ref
        if self._rescaled:
            out = sums = self._f32_rows("scaled_sums")
        if p.parts > 1:
            out = self._f32_rows("partial_sums")
        for row, rows, at, own in self._loads(t.load_rows, out):
            weights = p.load(row, rows, 0, p.k_chunks)
            numbers = self._numbers(own, rows)
            for group in self.groups:
                trf = self.kept[self.groups.index(group)] if self.kept else self._fill(group)
                for first in range(0, rows, t.rows):
                    self._multiply(group, weights, rows, first, trf, at, numbers)
        if p.parts > 1:
            self._combine(out, sums)
        if self._rescaled:
            assert p.scales is not None
            wide = widened(self.emit, bias, p.y.per_slice) if bias is not None else None
            rescale(p, sums, p.scales.tokens, wide)

    def _numbers(self, own: Ref | None, rows: int) -> Numbers | None:
        """Those of a load's features, in the VRF: biases are there for the whole product."""
        if own is None or self.scale is None:
            return Numbers(own, 4, 4 * GROUP) if own is not None else None
        return self.p.load_numbers(own, rows)

    def _number_bytes(self, feature: int) -> int:
        """Bytes of scales or biases before those of a slice's feature."""
        scales = self.p.scales
        return 4 * feature if scales is None else scales.bytes_before(feature)

    @property
    def _rescaled(self) -> bool:
        """Whether the register port, which scales take, is wanted for more than them."""
        scales = self.p.scales
        return scales is not None and (scales.tokens is not None or self.p.bias is not None)

    def _f32_rows(self, label: str) -> Ref:
        return self.emit.alloc(Memory.DM, self.p.y.tokens * self.p.y.per_slice * 4, label)

    @property
    def _most_rows(self) -> int:
        """Rows of tokens, over all lanes, of the largest group."""
        return max(group.rows * group.lanes for group in self.groups)

    @property
    def _out_dtype(self) -> DType:
        return DType.F32 if self.p.parts > 1 or self._rescaled else self.p.y.dtype

    @property
    def _out_row_bytes(self) -> int:
        return self._out_dtype.bytes_for(self.p.y.per_slice)

    def _loads(self, load_rows: int, out: Ref) -> Iterator[tuple[Ref, int, Ref, Ref | None]]:
        """For each load: its first row in HBM, rows, where its results are, and the f32 numbers
        of its features: scales, or biases if they are added to each product.
        """
        size = self._out_dtype.bytes_for(1)
        numbers = self.scale or (self.bias if self.p.parts == 1 else None)
        whole, rest = divmod(self.p.y.per_slice, load_rows)
        per_load = 1 + len(self.groups) * (-(-load_rows // self.p.tiling.rows) + (not self.kept))
        whole_groups = max(1, GROUP // load_rows)
        body = max(1, BODY_COMMANDS // per_load // whole_groups) * whole_groups
        turns = whole // body if whole * per_load > LOOP_COMMANDS else 0

        def load(number: int, rows: int) -> tuple[Ref, int, Ref, Ref | None]:
            first = number * load_rows
            return (
                self.p.weight_row(first),
                rows,
                out.at(first * size),
                numbers.at(self._number_bytes(first)) if numbers else None,
            )

        if turns > 1:
            step = body * load_rows
            for turn in self.emit.loop(turns, straight=1):
                for number in range(body):
                    row, rows, at, own = load(number, load_rows)
                    yield (
                        row.moved(turn, step * self.p.stored_row_bytes),
                        rows,
                        at.moved(turn, step * size),
                        own.moved(turn, self._number_bytes(step)) if own else None,
                    )
        for number in range(turns * body if turns > 1 else 0, whole):
            yield load(number, load_rows)
        if rest:
            yield load(whole, rest)

    def _fill_bytes(self, group: TokenGroup) -> int:
        return group.rows * group.lanes * self.p.row_bytes

    def _fill(self, group: TokenGroup) -> Ref:
        """Broadcast a group's features from the slices of each ring into their register files."""
        p = self.p
        trf = self.emit.trf(self._fill_bytes(group))
        row_bytes = p.x.row_bytes
        self.emit.exec(
            Context.SUB,
            [
                Counter(group.rows, a=group.lanes * row_bytes, trf=p.row_bytes),
                Counter(group.valid, a=row_bytes, lanes=1),
                *p.x_counters(),
            ],
            Stream(CHUNK_BYTES // 2),
            a=p.x.ref.at(group.first * row_bytes),
            out=trf,
            commit=Commit(Sink.TRF, columns=CHUNK_BYTES // 2),
            switch=Switch(Topology.BROADCAST01, p.ring),
            trf_lanes=group.lanes,
        )
        return trf

    def _multiply(
        self,
        group: TokenGroup,
        weights: Ref,
        loaded: int,
        first: int,
        trf: Ref,
        out: Ref,
        numbers: Numbers | None,
    ) -> None:
        """Rows from `first` of `loaded` ones, as many as one command takes.

        Their sums are multiplied by `numbers` if there are scales, else these are added.
        """
        p = self.p
        dtype, row_bytes = self._out_dtype, self._out_row_bytes
        size = dtype.bytes_for(1)
        rows = min(p.tiling.rows, loaded - first)
        number, row = divmod(first, GROUP)
        own, group_bytes = min(rows, GROUP), min(loaded, GROUP) * p.stored_row_bytes
        if numbers is None:
            vector = Vector()
        elif self.scale is None:
            vector = Vector((ADD_VRF,))
        else:
            vector = Vector((MULTIPLY_VRF,), reduce=p.reduces(p.k_chunks))
        of_row, of_group, of_cell = (
            (numbers.row, numbers.group, numbers.cell) if numbers else (0, 0, 0)
        )
        stream, trf_read, depth = p.weights_packet
        self.emit.exec(
            Context.MAIN,
            [
                Counter(rows // own, a=group_bytes, vrf=of_group, commit=own * size),
                Counter(own, a=p.stored_chunk_bytes, vrf=of_row, commit=size),
                *p.weight_counters(group_bytes // p.k_chunks, of_cell),
                Counter(
                    group.rows,
                    birth=Birth.REUSE,
                    trf=p.row_bytes,
                    commit=group.lanes * row_bytes,
                ),
            ],
            stream,
            a=weights.at(number * group_bytes + row * p.stored_chunk_bytes),
            dtype=p.weight_dtype,
            trf=trf,
            vrf=numbers.vrf.at(number * of_group + row * of_row) if numbers else None,
            out=out.at(group.first * row_bytes + first * size),
            out_dtype=dtype,
            contraction=Contraction(lanes=group.lanes, trf_read=trf_read, depth=depth),
            vector=vector,
            commit=Commit(
                lanes=group.valid,
                lane_stride=row_bytes,
                transpose_rows=min(group.lanes, TRANSPOSER_ROWS[dtype.bits]),
                transpose_columns=min(16, rows),
            ),
            valid_slices=p.loaded_slices,
        )

    def _combine(self, partial: Ref, out: Ref) -> None:
        """Add the parts of K: slice s of every part gets the sum over slices s of all parts."""
        p = self.p
        add_bias = (VectorOp(Alu.CLIP_ADD, Op.ADD, y=Source.VRF),) if self.bias else ()
        flits, dtype = p.y.per_slice // 8, DType.F32 if self._rescaled else p.y.dtype
        row_bytes = dtype.bytes_for(p.y.per_slice)
        self.emit.exec(
            Context.MAIN,
            [
                Counter(p.y.tokens, a=p.y.per_slice * 4, commit=row_bytes),
                Counter(flits, a=32, vrf=32 if self.bias else 0, commit=dtype.bytes_for(8)),
                Counter(p.parts, birth=Birth.SLICE, slices=p.ring, fate=Fate.VSUM),
            ],
            Stream(8),
            a=partial,
            dtype=DType.F32,
            vrf=self.bias,
            out=out,
            out_dtype=dtype,
            switch=Switch(
                Topology.BROADCAST1,
                SLICES_PER_PE,
                (Digit(0, p.ring.bit_length() - 1, slices=1),),
            ),
            vector=Vector(add_bias, reduce=Reduce.ADD, vrf_column=4 if self.bias else 0),
            commit=Commit(columns=8, column_stride=dtype.bytes_for(1)),
        )
