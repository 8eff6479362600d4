"""Matrix products with weights as the stream and tokens in the lanes of the register file.

N is spread over the slices, K lies in the packet and then in time. A packet of weights meets one
register-file row per lane and token; two rows per lane cost nothing, because a packet takes two
fetch cycles (docs/isa.md, "A worked matmul").
"""

from __future__ import annotations

from dataclasses import dataclass

from ... import errors
from ..emitter import Activation, Emitter, Ref, power_of_two_at_least
from ..isa.dtypes import DType
from ..isa.instructions import (
    Alu,
    Birth,
    Commit,
    Context,
    Contraction,
    Counter,
    Fate,
    Op,
    Sink,
    Source,
    Stream,
    Switch,
    Topology,
    Vector,
    VectorOp,
)
from ..isa.layout import FeatureOrder
from ..isa.plan import SLICE_ADDRESS_BYTES, Memory
from ..isa.rules import LANES, SLICES_PER_PE, TRANSPOSER_ROWS, TRF_BYTES

PACKET = 32
"""bf16 elements of a 64 B packet."""
WEIGHT_TILE_BYTES = 65536
"""Weights of one tile in a slice; two tiles are in memory at a time."""
FREE_ROWS = 2
"""Register-file rows per lane that one packet meets while the next is fetched."""


@dataclass(frozen=True)
class TokenGroups:
    """`count` groups of tokens, each served by one pass over the weights.

    In a group, token row · lanes + lane stands in that row of that lane of the register file;
    only the first `valid` lanes hold a token.
    """

    first: int
    count: int
    rows: int
    lanes: int
    valid: int

    @property
    def tokens(self) -> int:
        """Tokens of one group."""
        return self.rows * self.valid


def k_padded(x: Activation) -> int:
    """Positions that a product over `x` sums, a multiple of 32."""
    return x.slices_read * x.per_slice


def token_groups(tokens: int, k: int) -> list[TokenGroups]:
    """Full groups first, then what is left. Raises: BCK002 if not even one row fits."""
    lanes = min(LANES, power_of_two_at_least(tokens))
    while lanes > 1 and k * 2 * lanes > TRF_BYTES:
        lanes //= 2
    if k * 2 * lanes > TRF_BYTES:
        raise errors.reduction_too_long(k, TRF_BYTES // 2)
    rows = min(FREE_ROWS, TRF_BYTES // (k * 2 * lanes), max(1, tokens // lanes))
    full, left = divmod(tokens, rows * lanes)
    groups = [TokenGroups(0, full, rows, lanes, lanes)]
    if left >= lanes:
        groups.append(TokenGroups(tokens - left, 1, left // lanes, lanes, lanes))
        left %= lanes
    if left:
        groups.append(TokenGroups(tokens - left, 1, 1, power_of_two_at_least(left), left))
    return [group for group in groups if group.count]


def tile_rows(per_slice: int, k: int) -> int:
    """Output features of a slice whose weights are in memory at a time; a multiple of 4."""
    rows = max(4, WEIGHT_TILE_BYTES // (k * 2))
    unit = next(unit for unit in (16, 8, 4) if rows >= unit)
    return min(per_slice, rows // unit * unit)


def linear(
    emit: Emitter,
    x: Activation,
    weight: Ref,
    out_order: FeatureOrder,
    *,
    label: str,
    bias: Ref | None = None,
    dtype: DType = DType.BF16,
) -> Activation:
    """y = x · wᵀ (+ bias), summed in f32 and rounded once to `dtype`.

    `weight` is laid out by `RowsLayout(out_order, x.order)`, `bias` by `VectorLayout`.
    """
    y = emit.activation(out_order, x.tokens, label, dtype)
    k, per_slice = k_padded(x), y.per_slice
    rows = tile_rows(per_slice, k)
    whole, rest = divmod(per_slice, rows)
    product = _Product(emit, x, y, k, token_groups(x.tokens, k))
    bias_vrf = load_vector(emit, bias, per_slice) if bias is not None else None
    buffers = [emit.alloc(Memory.DM, rows * k * 2, "weights") for _ in range(min(2, whole))]
    for tile in emit.loop(whole):
        product.tile(
            weight.moved(tile, rows * k * 2),
            buffers[tile.value % len(buffers)],
            rows,
            y.ref.moved(tile, dtype.bytes_for(rows)),
            bias_vrf.moved(tile, rows * 4) if bias_vrf else None,
        )
    if rest:
        product.tile(
            weight.at(whole * rows * k * 2),
            buffers[whole % len(buffers)],
            rest,
            y.ref.at(dtype.bytes_for(whole * rows)),
            bias_vrf.at(whole * rows * 4) if bias_vrf else None,
        )
    return y


def load_vector(emit: Emitter, vector: Ref, per_slice: int) -> Ref:
    """A parameter of one value per feature, as f32 in the VRF: [C]."""
    dm = emit.alloc(Memory.DM, per_slice * 2, "vector")
    emit.load_slices(vector, dm, per_slice * 2)
    return emit.load_vrf(dm, per_slice, "vector", DType.BF16)


@dataclass
class _Product:
    """One linear's passes; the register file is filled once if it can hold all tokens."""

    emit: Emitter
    x: Activation
    y: Activation
    k: int
    groups: list[TokenGroups]
    _filled: Ref | None = None

    def __post_init__(self) -> None:
        if len(self.groups) == 1 and self.groups[0].count == 1:
            self._filled = self._fill(self.groups[0], self.x.ref)

    def tile(self, weight: Ref, buffer: Ref, rows: int, out: Ref, bias: Ref | None) -> None:
        """Bring `rows` features' weights into memory and multiply all tokens with them."""
        tile_bytes = rows * self.k * 2
        per_slice_bytes = self.y.per_slice * self.k * 2
        self.emit.dma(
            [(SLICES_PER_PE, per_slice_bytes, SLICE_ADDRESS_BYTES)], tile_bytes, weight, buffer
        )
        for groups in self.groups:
            for turn in self.emit.loop(groups.count):
                x = self.x.ref.at(groups.first * self.x.row_bytes)
                y = out.at(groups.first * self.y.row_bytes)
                trf = self._filled or self._fill(
                    groups, x.moved(turn, groups.tokens * self.x.row_bytes)
                )
                y = y.moved(turn, groups.tokens * self.y.row_bytes)
                self._multiply(groups, buffer, rows, trf, y, bias)

    def _fill(self, group: TokenGroups, x: Ref) -> Ref:
        """Broadcast a group's features from all slices into every slice's register file."""
        trf = self.emit.trf()
        row_bytes, slice_bytes = self.x.row_bytes, self.x.per_slice * 2
        self.emit.exec(
            Context.SUB,
            [
                Counter(group.rows, a=group.lanes * row_bytes, trf=self.k * 2),
                Counter(group.valid, a=row_bytes, lanes=1),
                Counter(self.x.slices_read, birth=Birth.SLICE, slices=1, trf=slice_bytes),
                Counter(self.x.per_slice // 16, a=32, trf=32),
            ],
            Stream(16),
            a=x,
            out=trf,
            commit=Commit(Sink.TRF, columns=16),
            switch=Switch(Topology.BROADCAST01, SLICES_PER_PE),
            trf_lanes=group.lanes,
        )
        return trf

    def _multiply(
        self, group: TokenGroups, weights: Ref, rows: int, trf: Ref, y: Ref, bias: Ref | None
    ) -> None:
        size = self.y.dtype.bits // 8
        add_bias = (VectorOp(Alu.FMA, Op.ADD, y=Source.VRF),) if bias else ()
        self.emit.exec(
            Context.MAIN,
            [
                Counter(rows, a=self.k * 2, vrf=4 if bias else 0, commit=size),
                Counter(self.k // PACKET, fate=Fate.MSUM, a=64, trf=64),
                Counter(
                    group.rows,
                    birth=Birth.REUSE,
                    trf=self.k * 2,
                    commit=group.lanes * self.y.row_bytes,
                ),
            ],
            Stream(PACKET),
            a=weights,
            trf=trf,
            vrf=bias,
            out=y,
            out_dtype=self.y.dtype,
            contraction=Contraction(lanes=group.lanes),
            vector=Vector(add_bias),
            commit=Commit(
                lanes=group.valid,
                lane_stride=self.y.row_bytes,
                transpose_rows=min(group.lanes, TRANSPOSER_ROWS[self.y.dtype.bits]),
                transpose_columns=min(16, rows),
            ),
        )
