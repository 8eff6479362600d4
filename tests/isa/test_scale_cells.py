"""Scales of blocks in HBM: each position of a weight finds its block's."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from furiosa_llm.backend_rngd.isa.layout import (
    CHUNK,
    BlockScaleLayout,
    FeatureOrder,
    features_per_slice,
    heads,
    plain,
    scale_cells,
)
from furiosa_llm.backend_rngd.isa.rules import SLICES_PER_PE

head_dims = st.integers(1, 8).map(lambda chunks: CHUNK * chunks)
orders = st.one_of(
    st.integers(1, 5000).map(plain),
    st.builds(heads, st.integers(1, 9), head_dims, rotary=st.just(False)),
)


def layout_of(
    out: FeatureOrder, into: FeatureOrder, block: tuple[int, int], parts: int = 1, dims: int = 2
) -> BlockScaleLayout:
    """As products have it: an even number of slices holds K."""
    per_slice = features_per_slice(into)
    slices = -(-into.positions // per_slice)
    grid = -(-out.features // block[0]), -(-into.features // block[1])
    return BlockScaleLayout(
        out=out,
        into=into,
        per_slice=features_per_slice(out),
        k_padded=(slices + slices % 2) * per_slice,
        parts=parts,
        shape=grid if dims == 2 else (grid[0], 1, grid[1], 1),
        rows=block[0],
        columns=block[1],
    )


def features(order: FeatureOrder, size: int) -> Any:
    found = order.feature_at()[:size]
    return np.concatenate([found, np.full(size - len(found), -1)])


@settings(max_examples=40, deadline=None)
@given(
    out=orders,
    into=orders,
    rotary=st.booleans(),
    block=st.tuples(st.integers(1, 200), st.sampled_from([16, 32, 48, 64, 128])),
    dims=st.sampled_from([2, 4]),
)
def test_positions_find_the_scale_of_their_block(
    out: FeatureOrder, into: FeatureOrder, rotary: bool, block: tuple[int, int], dims: int
) -> None:
    if rotary and out.heads > 1:
        out = heads(out.heads, out.head_dim, rotary=True)
    layout = layout_of(out, into, block, dims=dims)
    cells = layout.cells
    scales = np.random.default_rng(0).permutation(int(np.prod(layout.shape))) + 1.0
    placed = layout.place(scales.astype(np.float32).reshape(layout.shape))
    assert placed.nbytes == layout.bytes
    # [slice, group, slice cell, chunk cell, row] -> [row, slice, chunk]
    numbers = placed[..., : cells.count * cells.row_numbers].reshape(
        -1, cells.slice_cells, cells.chunk_cells, cells.row_numbers
    )
    numbers = numbers.repeat(CHUNK // cells.row_numbers, axis=3)
    numbers = numbers.repeat(cells.slices, axis=1).repeat(cells.chunks, axis=2)
    found = numbers.transpose(0, 3, 1, 2).reshape(len(numbers) * CHUNK, -1)
    found = found.repeat(CHUNK, axis=1)
    rows = features(out, SLICES_PER_PE * layout.per_slice)[:, None]
    columns = features(into, layout.k_padded)
    grid = scales.reshape(-(-out.features // block[0]), -1)
    expected = grid[rows // block[0], columns // block[1]]
    real = (rows >= 0) & (columns >= 0)
    assert (found[real] == expected[real]).all()


@pytest.mark.parametrize(
    ("features", "columns", "cells"),
    [
        (4096, 128, (2, 4, 32, 1)),  # 64 positions in a slice: a block is two slices
        (8192, 128, (1, 8, 64, 1)),
        (14336, 128, (1, 2, 64, 7)),  # 224 in a slice: a block is a part of two
        (5120, 128, (1, 1, 64, 5)),
        (4096, 32, (1, 2, 64, 2)),
        (576, 128, (4, 1, 9, 1)),  # four and a half blocks in 36 slices of 16
    ],
)
def test_cells_are_as_large_as_slices_permit(
    features: int, columns: int, cells: tuple[int, ...]
) -> None:
    found = layout_of(plain(512), plain(features), (128, columns)).cells
    assert (found.slices, found.chunks, found.slice_cells, found.chunk_cells) == cells
    assert not found.per_row


@pytest.mark.parametrize(("rows", "per_row"), [(128, False), (64, True), (32, True), (1, True)])
def test_rotary_heads_put_two_rows_of_blocks_into_a_group(rows: int, per_row: bool) -> None:
    out = heads(4, 128, rotary=True)
    assert layout_of(out, plain(512), (rows, 128)).cells.per_row == per_row


def test_parts_of_k_have_scales_of_their_own() -> None:
    out, into, block = heads(2, 64, rotary=False), plain(1024), (64, 128)
    layout = layout_of(out, into, block, parts=4)
    grid = np.arange(16, dtype=np.float32).reshape(2, 8)
    placed = layout.place(grid)
    assert layout.cells.count == 2
    # Part p has slices 16p to 16p + 15: of them eight have features, in two groups of heads.
    first = placed.reshape(4, 16, -1)[:, :, :2]
    assert (first[:, 0] == grid[0].reshape(4, 2)).all()
    assert (first[:, 4] == grid[1].reshape(4, 2)).all()


def test_codes_of_exponents_are_scales_too() -> None:
    layout = layout_of(plain(64), plain(64), (32, 32))
    stored = np.exp2([[-3.0, 1.0], [0.0, 8.0]]).astype(ml_dtypes.float8_e8m0fnu)
    assert set(layout.place(stored).ravel()) == {0.0, 0.125, 2.0, 1.0, 256.0}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"shape": (3, 1)}, "one number"),
        ({"columns": 24, "shape": (1, 3)}, "one scale"),
        ({"k_padded": 72}, "whole chunks"),
        ({"parts": 3}, "evenly"),
        ({"per_slice": 1 << 20}, "at most"),
    ],
)
def test_fields_fit_together(changes: dict[str, Any], problem: str) -> None:
    fields = layout_of(plain(64), plain(64), (64, 32)).model_dump() | changes
    with pytest.raises(ValidationError, match=problem):
        BlockScaleLayout.model_validate(fields)


def test_blocks_that_divide_no_chunk_have_no_cells() -> None:
    assert scale_cells(plain(64), plain(64), 16, 64, 1, (64, 24)) is None
