"""How the loader lays tensors out in HBM, and the tables it derives.

The layout of a parameter is a function of its shape, type and rank slice, never of the bucket,
so all buckets share one copy; files on disk keep the checkpoint's own layout.

Letters: N rows and K columns of a weight, C features per slice, p position, f feature.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from .dtypes import DType
from .rules import SLICES_PER_PE
from .scale_cells import ScaleCells, cells_of, common_block

CHUNK = 16
"""Features per slice come in multiples of this, so that a 32 B flit stays in one slice."""
ROTARY_RUN = 8
"""First-half features that stand together; their rotary partners follow them."""
KEY_RUN = 8
"""Keys of a sequence that stand together in a slice."""
Count = Annotated[int, Field(ge=0, le=1 << 40)]
Size = Annotated[int, Field(ge=1, le=1 << 31)]


class Table(BaseModel):
    """Base of everything in a container's header: strict, closed, immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class FeatureOrder(Table):
    """Which feature stands at which position: heads padded to `padded`, each maybe in rotary order.

    In rotary order a head's position 16·g + i holds feature 8·g + i of its first half, and
    position 16·g + 8 + i that feature's partner in the second half. Plain features are one head.
    """

    heads: Size
    head_dim: Size
    padded: Size
    rotary: bool = False

    @property
    def positions(self) -> int:
        return self.heads * self.padded

    @property
    def features(self) -> int:
        return self.heads * self.head_dim

    def feature_at(self) -> np.ndarray:
        """i64[positions]: the feature at each position, -1 for padding."""
        in_head = np.arange(self.padded)
        if self.rotary:
            half = self.head_dim // 2
            group, i = np.divmod(in_head, 2 * ROTARY_RUN)
            low = group * ROTARY_RUN + i % ROTARY_RUN
            valid = low < half
            feature = np.where(i < ROTARY_RUN, low, low + half)
        else:
            feature, valid = in_head, in_head < self.head_dim
        per_head = np.where(valid, feature, -1)
        heads = np.arange(self.heads)[:, None] * self.head_dim
        return np.where(per_head < 0, -1, heads + per_head).reshape(-1)


def plain(features: int) -> FeatureOrder:
    """Features in their own order."""
    return FeatureOrder(heads=1, head_dim=features, padded=features)


def heads(count: int, head_dim: int, *, rotary: bool) -> FeatureOrder:
    """Heads padded to whole chunks; a rotary half is padded to whole runs."""
    unit = 2 * ROTARY_RUN
    padded = 2 * _round_up(head_dim // 2, ROTARY_RUN) if rotary else _round_up(head_dim, unit)
    return FeatureOrder(heads=count, head_dim=head_dim, padded=padded, rotary=rotary)


def features_per_slice(order: FeatureOrder) -> int:
    """C: how many positions a slice holds when `order` is spread over one PE.

    Heads never straddle slices at odd places: C divides the padded head by a power of two, or
    is a multiple of it.
    """
    least = math.ceil(order.positions / SLICES_PER_PE)
    if order.heads == 1:
        return _round_up(least, CHUNK)
    part = order.padded
    while part % 2 == 0 and (part // 2) % CHUNK == 0 and part // 2 >= least:
        part //= 2
    return part if part >= least else _round_up(least, order.padded)


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


WeightType = Literal["bf16", "f8e4m3", "f8e5m2"]
WEIGHT_TYPES: Mapping[DType, WeightType] = MappingProxyType(
    {DType.BF16: "bf16", DType.F8E4M3: "f8e4m3", DType.F8E5M2: "f8e5m2"}
)


class RowsLayout(Table):
    """A weight [N, K] as [part][slice][C / 16][chunk][16][k slices · 16], rows s·C + j of N.

    Columns are the positions of `into`: chunk c of a source slice holds its positions 16·c to
    16·c + 15, and a chunk of all source slices stands together. So 16 rows are one run whatever
    range of K is read. With `parts` > 1 the source slices are in so many parts, and only 64 / parts
    slices of rows exist: each part of the slices sums its part of K.
    """

    kind: Literal["rows"] = "rows"
    out: FeatureOrder
    into: FeatureOrder
    per_slice: Size
    k_padded: Size
    parts: Size = 1
    dtype: WeightType = "bf16"

    @model_validator(mode="after")
    def _whole_chunks(self) -> RowsLayout:
        if self.per_slice % CHUNK or self.k_padded % features_per_slice(self.into):
            raise ValueError("rows and columns are whole chunks of whole slices")
        slices = self.k_padded // features_per_slice(self.into)
        if SLICES_PER_PE % self.parts or slices % self.parts:
            raise ValueError("slices are divided evenly")
        return self

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """The shape of what `place` takes."""
        return self.out.features, self.into.features

    @property
    def bytes(self) -> int:
        elements = SLICES_PER_PE * self.per_slice * (self.k_padded // self.parts)
        return self.element_type.bytes_for(elements)

    @property
    def element_type(self) -> DType:
        return DType[self.dtype.upper()]

    def place(self, tensor: np.ndarray) -> np.ndarray:
        """[N, K] -> [64, C / 16, chunks, 16, k slices · 16 / parts]; padding is zero."""
        slices = SLICES_PER_PE // self.parts
        rows = _padded(self.out.feature_at(), slices * self.per_slice)
        columns = _padded(self.into.feature_at(), self.k_padded)
        chunks = features_per_slice(self.into) // CHUNK
        columns = columns.reshape(-1, chunks, CHUNK).swapaxes(0, 1).reshape(-1)
        placed = _take(_take(tensor, rows, 0), columns, 1)
        groups = placed.reshape(
            slices, self.per_slice // CHUNK, CHUNK, chunks, self.parts, -1
        ).transpose(4, 0, 1, 3, 2, 5)
        return np.ascontiguousarray(groups).reshape(SLICES_PER_PE, *groups.shape[2:])


class VectorLayout(Table):
    """A vector [N] as bf16 [slice][C]; `repeat` tiles a per-head vector over all heads."""

    kind: Literal["vector"] = "vector"
    order: FeatureOrder
    per_slice: Size
    repeat: bool = False

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """The shape of what `place` takes."""
        return (self.order.head_dim if self.repeat else self.order.features,)

    @property
    def bytes(self) -> int:
        return SLICES_PER_PE * self.per_slice * 2

    def place(self, tensor: np.ndarray) -> np.ndarray:
        """bf16[N] or, with `repeat`, bf16[head_dim] -> bf16[64, C]."""
        features = self.order.feature_at()
        if self.repeat:
            features = np.where(features < 0, -1, features % self.order.head_dim)
        taken = _take(tensor, _padded(features, SLICES_PER_PE * self.per_slice), 0)
        return taken.reshape(SLICES_PER_PE, self.per_slice)


class ScaleLayout(Table):
    """Multipliers as f32 [slice][C], stored in any float type: one for each `rows` features.

    `shape` is that of the stored tensor, which holds ceil(N / rows) numbers and nothing else. With
    as many rows as features one number stands everywhere. Padding is zero.
    """

    kind: Literal["scale"] = "scale"
    order: FeatureOrder
    per_slice: Size
    shape: tuple[Size, ...]
    rows: Size

    @model_validator(mode="after")
    def _one_for_each(self) -> ScaleLayout:
        if math.prod(self.shape) != -(-self.order.features // self.rows):
            raise ValueError("there is one number for each group of rows")
        return self

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """The shape of what `place` takes."""
        return self.shape

    @property
    def bytes(self) -> int:
        return SLICES_PER_PE * self.per_slice * 4

    def place(self, tensor: np.ndarray) -> np.ndarray:
        """`shape` of any float type -> f32[64, C]."""
        stored = tensor.astype(np.float32).reshape(-1)
        features = _padded(self.order.feature_at(), SLICES_PER_PE * self.per_slice)
        values = np.where(features < 0, np.float32(0.0), stored[features // self.rows])
        return values.reshape(SLICES_PER_PE, self.per_slice)


@functools.lru_cache(maxsize=256)
def scale_cells(
    out: FeatureOrder,
    into: FeatureOrder,
    per_slice: int,
    k_padded: int,
    parts: int,
    block: tuple[int, int],
) -> ScaleCells | None:
    """The cells of a weight that lies as such a `RowsLayout`; None if blocks divide no chunk."""
    rows = _padded(out.feature_at(), SLICES_PER_PE // parts * per_slice)
    columns = _padded(into.feature_at(), k_padded)
    columns = columns.reshape(-1, features_per_slice(into) // CHUNK, CHUNK)
    return cells_of(rows.reshape(-1, CHUNK), columns, parts, block)


MOST_POSITIONS = 1 << 22
"""Rows or columns of a weight whose scales are those of blocks."""


class BlockScaleLayout(Table):
    """Scales of blocks of `rows` x `columns` weights as f32 [part][slice][C / 16][numbers].

    The weights lie as a `RowsLayout` with the same `out`, `into`, `per_slice`, `k_padded` and
    `parts`. A group of 16 rows has the numbers of its cells (`scale_cells`), [cell][row] if its
    rows have scales of their own; what fills the last flit is zero, as scales of padding are.
    `shape` is that of the stored tensor, which holds the grid of blocks and nothing else.
    """

    kind: Literal["block_scale"] = "block_scale"
    out: FeatureOrder
    into: FeatureOrder
    per_slice: Size
    k_padded: Size
    parts: Size
    shape: tuple[Size, ...]
    rows: Size
    columns: Size

    @model_validator(mode="after")
    def _one_for_each(self) -> BlockScaleLayout:
        if self.per_slice % CHUNK or self.k_padded % features_per_slice(self.into):
            raise ValueError("rows and columns are whole chunks of whole slices")
        slices = self.k_padded // features_per_slice(self.into)
        if SLICES_PER_PE % self.parts or slices % self.parts:
            raise ValueError("slices are divided evenly")
        rows, columns = self.out.positions, max(self.k_padded, self.into.positions)
        if max(rows, columns, SLICES_PER_PE * self.per_slice) > MOST_POSITIONS:
            raise ValueError(f"a weight has at most {MOST_POSITIONS} rows and columns")
        if math.prod(self.shape) != math.prod(self._grid):
            raise ValueError("there is one number for each block")
        if self._found is None:
            raise ValueError("a chunk of K has one scale")
        return self

    @property
    def _grid(self) -> tuple[int, int]:
        return -(-self.out.features // self.rows), -(-self.into.features // self.columns)

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """The shape of what `place` takes."""
        return self.shape

    @property
    def cells(self) -> ScaleCells:
        """How the numbers are dealt to cells."""
        assert self._found is not None
        return self._found

    @property
    def _found(self) -> ScaleCells | None:
        block = self.rows, self.columns
        return scale_cells(self.out, self.into, self.per_slice, self.k_padded, self.parts, block)

    @property
    def bytes(self) -> int:
        return SLICES_PER_PE * self.per_slice // CHUNK * self.cells.group_numbers * 4

    def place(self, tensor: np.ndarray) -> np.ndarray:
        """`shape` of any float type -> f32[64, C / 16, numbers]."""
        cells = self.cells
        features = _padded(self.out.feature_at(), SLICES_PER_PE // self.parts * self.per_slice)
        rows = common_block(features.reshape(-1, CHUNK // cells.row_numbers), self.rows)
        features = _padded(self.into.feature_at(), self.k_padded)
        of_cell = cells.slices * cells.chunks * CHUNK
        columns = common_block(features.reshape(-1, of_cell), self.columns)
        assert rows is not None
        assert columns is not None
        grid = tensor.astype(np.float32).reshape(self._grid)
        padding = (rows[:, None] < 0) | (columns < 0)
        values = np.where(padding, np.float32(0.0), grid[rows[:, None], columns])
        values = values.reshape(-1, cells.row_numbers, self.parts, cells.count)
        placed = np.zeros((self.parts, len(values), cells.group_numbers), np.float32)
        numbers = values.transpose(2, 0, 3, 1).reshape(self.parts, len(values), -1)
        placed[..., : numbers.shape[-1]] = numbers
        return placed.reshape(SLICES_PER_PE, -1, cells.group_numbers)


NUMBER_STRIDE_BYTES = 256
"""Between the copies of a number for two slices: neighbours would be read from one HBM channel."""


def one_number(shape: tuple[int, ...]) -> ScaleLayout:
    """A tensor of one element, for each slice a copy at a multiple of `NUMBER_STRIDE_BYTES`."""
    per_slice = NUMBER_STRIDE_BYTES // 4
    copies = per_slice * SLICES_PER_PE
    return ScaleLayout(order=plain(copies), per_slice=per_slice, shape=shape, rows=copies)


class RowTableLayout(Table):
    """An embedding [V, N] as bf16 [V][64·C]: a row can be gathered into all slices at once."""

    kind: Literal["row_table"] = "row_table"
    order: FeatureOrder
    per_slice: Size
    rows: Size

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """The shape of what `place` takes."""
        return self.rows, self.order.features

    @property
    def bytes(self) -> int:
        return self.rows * SLICES_PER_PE * self.per_slice * 2

    def place(self, tensor: np.ndarray) -> np.ndarray:
        """bf16[V, N] -> bf16[V, 64·C]."""
        columns = _padded(self.order.feature_at(), SLICES_PER_PE * self.per_slice)
        return _take(tensor, columns, 1)


Layout = Annotated[
    RowsLayout | VectorLayout | ScaleLayout | BlockScaleLayout | RowTableLayout,
    Field(discriminator="kind"),
]


def _padded(features: np.ndarray, size: int) -> np.ndarray:
    """`features` cut or filled with -1 to `size` positions."""
    return np.concatenate([features[:size], np.full(max(0, size - len(features)), -1)])


def _take(tensor: np.ndarray, features: np.ndarray, axis: int) -> np.ndarray:
    """The features along `axis`; position -1 gives zero."""
    shape = list(tensor.shape)
    shape[axis] = len(features)
    out = np.zeros(shape, tensor.dtype)
    for positions, source in _runs(features):
        where = (slice(None),) * axis
        out[(*where, positions)] = tensor[(*where, source)]
    return out


def _runs(features: np.ndarray) -> list[tuple[slice, slice]]:
    """Maximal runs of consecutive features as (positions, features); padding is left out."""
    padding = features < 0
    breaks = np.flatnonzero((np.diff(features) != 1) | padding[1:] | padding[:-1]) + 1
    edges = [0, *breaks.tolist(), len(features)]
    return [
        (slice(low, high), slice(int(features[low]), int(features[low]) + high - low))
        for low, high in itertools.pairwise(edges)
        if high > low and features[low] >= 0
    ]


class RopeTable(Table):
    """cos and signed sin as f32 [position][slice][C / 16][half][cos 8 | sin 8].

    The angle of feature pair i at position p is the f32 product p · inv_freq[i], cos and sin are
    times `scaling` (transformers' attention scaling). The sine of a first half is negated, since
    its output is x·cos - partner·sin. Pairs past the end of `inv_freq` do not turn.
    """

    kind: Literal["rope"] = "rope"
    rows: Size
    order: FeatureOrder
    per_slice: Size
    inv_freq: tuple[float, ...]
    scaling: float = 1.0

    @property
    def row_bytes(self) -> int:
        return SLICES_PER_PE * self.per_slice * 8

    @property
    def bytes(self) -> int:
        return self.rows * self.row_bytes

    def derive(self) -> np.ndarray:
        """f32[rows, 64, C / 16, 2, 2, 8]."""
        half = self.order.head_dim // 2
        angle = np.zeros((self.rows, half), np.float32)
        turning = np.asarray(self.inv_freq, np.float32)
        angle[:, : len(turning)] = np.arange(self.rows, dtype=np.float32)[:, None] * turning
        scaling = np.float32(self.scaling)
        tables = []
        for values, still in ((np.cos(angle), 1.0), (np.sin(angle), 0.0)):
            values = (values * scaling).astype(np.float32)
            values[:, len(turning) :] = still
            tables.append(values)
        return self._spread(*tables)

    def _spread(self, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
        positions = SLICES_PER_PE * self.per_slice
        feature = _padded(self.order.feature_at(), positions)
        in_head = np.where(feature < 0, -1, feature % self.order.head_dim)
        half = self.order.head_dim // 2
        pair = np.where(in_head >= half, in_head - half, in_head)
        sign = np.where(in_head < half, -1.0, 1.0).astype(np.float32)
        out = np.zeros((self.rows, positions, 2), np.float32)
        out[:, :, 0] = np.where(pair < 0, np.float32(1.0), cos[:, pair])
        out[:, :, 1] = np.where(pair < 0, np.float32(0.0), sin[:, pair] * sign)
        blocks = out.reshape(self.rows, SLICES_PER_PE, self.per_slice // CHUNK, 2, ROTARY_RUN, 2)
        return np.ascontiguousarray(np.moveaxis(blocks, -1, -2))


class KeyIndex(Table):
    """i32 [slice][key]: the index of each key that a slice attends to.

    Slices come in groups of `splits`. The keys of a sequence are dealt to the splits of a group
    in runs of KEY_RUN, so that key j of split c is (j / 8 · splits + c) · 8 + j mod 8.
    """

    kind: Literal["key_index"] = "key_index"
    splits: Size
    keys: Size

    @property
    def bytes(self) -> int:
        return SLICES_PER_PE * self.keys * 4

    def derive(self) -> np.ndarray:
        """i32[64, keys]."""
        split = np.arange(SLICES_PER_PE) % self.splits
        run, in_run = np.divmod(np.arange(self.keys), KEY_RUN)
        index = (run * self.splits + split[:, None]) * KEY_RUN + in_run
        return index.astype(np.int32)


class RankNumbers(Table):
    """i32 [count]: one number of the rank's own, `count` times over.

    For what differs between ranks beside their parameters: the first row of a vocabulary's part.
    """

    kind: Literal["rank_numbers"] = "rank_numbers"
    numbers: tuple[Annotated[int, Field(ge=-(1 << 31), lt=1 << 31)], ...]
    """For each rank."""
    count: Size

    @property
    def bytes(self) -> int:
        return 4 * self.count

    def derive(self, rank: int) -> np.ndarray:
        """i32[count]."""
        return np.full(self.count, self.numbers[rank], np.int32)


class Zeros(Table):
    """Bytes that are zero."""

    kind: Literal["zeros"] = "zeros"
    size: Size

    @property
    def bytes(self) -> int:
        return self.size

    def derive(self) -> np.ndarray:
        """u8[size]."""
        return np.zeros(self.size, np.uint8)


Derived = Annotated[RopeTable | KeyIndex | RankNumbers | Zeros, Field(discriminator="kind")]
