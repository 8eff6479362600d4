"""How tensors stand in HBM: every feature once, padding zero."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from error_bounds import rope_factors
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from furiosa_llm.backend_rngd.isa.layout import (
    CHUNK,
    NUMBER_STRIDE_BYTES,
    FeatureOrder,
    KeyIndex,
    RopeTable,
    RowsLayout,
    RowTableLayout,
    ScaleLayout,
    VectorLayout,
    features_per_slice,
    heads,
    one_number,
    plain,
)
from furiosa_llm.backend_rngd.isa.rules import SLICES_PER_PE

orders = st.one_of(
    st.integers(1, 5000).map(plain),
    st.builds(
        lambda count, half, rotary: heads(count, 2 * half, rotary=rotary),
        st.integers(1, 40),
        st.integers(1, 80),
        st.booleans(),
    ),
)


@given(order=orders)
def test_an_order_holds_every_feature_once(order: FeatureOrder) -> None:
    features = order.feature_at()
    assert sorted(features[features >= 0].tolist()) == list(range(order.features))


@given(order=orders)
def test_an_order_fits_the_slices_in_whole_chunks(order: FeatureOrder) -> None:
    per_slice = features_per_slice(order)
    assert per_slice % CHUNK == 0
    assert per_slice * SLICES_PER_PE >= order.positions
    if order.heads > 1:
        whole = max(per_slice, order.padded) // min(per_slice, order.padded)
        assert max(per_slice, order.padded) % min(per_slice, order.padded) == 0
        assert per_slice > order.padded or whole & (whole - 1) == 0


@given(count=st.integers(1, 9), half=st.integers(1, 40))
def test_rotary_partners_are_one_run_apart(count: int, half: int) -> None:
    features = heads(count, 2 * half, rotary=True).feature_at().reshape(-1, 2, 8)
    first, partner = features[:, 0], features[:, 1]
    assert ((partner - first == half) | (first < 0)).all()
    assert ((first < 0) == (partner < 0)).all()


@settings(max_examples=50, deadline=None)
@given(out=orders, into=orders, data=st.data())
def test_a_placed_weight_gives_the_same_product(
    out: FeatureOrder, into: FeatureOrder, data: st.DataObject
) -> None:
    if out.features * into.features > 200_000:
        out, into = plain(out.features % 50 + 1), into
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    weight = rng.integers(-4, 5, (out.features, into.features)).astype(ml_dtypes.bfloat16)
    x = rng.integers(-4, 5, into.features)
    per_slice = features_per_slice(out)
    k = -(-into.positions // features_per_slice(into)) * features_per_slice(into)
    placed = RowsLayout(out=out, into=into, per_slice=per_slice, k_padded=k).place(weight)
    positions = np.zeros(k)
    feature_at = into.feature_at()
    positions[: len(feature_at)][feature_at >= 0] = x[feature_at[feature_at >= 0]]
    chunks = features_per_slice(into) // CHUNK
    by_chunk = positions.reshape(-1, chunks, CHUNK).swapaxes(0, 1).reshape(chunks, -1)
    product = np.einsum("sgcrk,ck->sgr", placed.astype(np.float64), by_chunk).reshape(-1)
    expected = weight.astype(np.float64) @ x
    out_at = out.feature_at()
    assert (product[: len(out_at)][out_at >= 0] == expected[out_at[out_at >= 0]]).all()
    assert not product[: len(out_at)][out_at < 0].any()
    assert not product[len(out_at) :].any()


def test_sixteen_rows_are_one_run_for_each_chunk_of_k() -> None:
    out, into = plain(2048), plain(3 * 64 * CHUNK)
    weight = np.arange(2048 * into.positions, dtype=np.float64).reshape(2048, -1)
    layout = RowsLayout(out=out, into=into, per_slice=32, k_padded=into.positions)
    placed = layout.place(weight)
    assert placed.shape == (64, 2, 3, 16, 64 * CHUNK)
    row, chunk = 32 * 5 + 16 + 7, 2
    columns = np.arange(64)[:, None] * 3 * CHUNK + chunk * CHUNK + np.arange(CHUNK)
    assert (placed[5, 1, chunk, 7] == weight[row, columns.reshape(-1)]).all()


def test_rows_and_columns_are_whole_chunks() -> None:
    with pytest.raises(ValidationError):
        RowsLayout(out=plain(64), into=plain(64), per_slice=8, k_padded=64)
    with pytest.raises(ValidationError):
        RowsLayout(out=plain(64), into=plain(64), per_slice=16, k_padded=40)


def test_a_per_head_vector_is_repeated_over_heads() -> None:
    order = heads(3, 12, rotary=True)
    layout = VectorLayout(order=order, per_slice=features_per_slice(order), repeat=True)
    placed = layout.place(np.arange(1, 13, dtype=np.float32).astype(ml_dtypes.bfloat16)).reshape(-1)
    for position, feature in enumerate(order.feature_at()):
        assert float(placed[position]) == (feature % 12 + 1 if feature >= 0 else 0)


@pytest.mark.parametrize(
    "dtype", [ml_dtypes.bfloat16, np.float16, np.float32, ml_dtypes.float8_e8m0fnu]
)
@settings(max_examples=10, deadline=None)
@given(order=orders, rows=st.integers(1, 600), trailing=st.booleans())
def test_scales_stand_at_the_features_that_they_are_for(
    dtype: Any, order: FeatureOrder, rows: int, trailing: bool
) -> None:
    count = -(-order.features // rows)
    scales = np.exp2(np.arange(count) % 20 - 10.0).astype(dtype)
    shape = (count, 1) if trailing else (count,)
    per_slice = features_per_slice(order)
    layout = ScaleLayout(order=order, per_slice=per_slice, shape=shape, rows=rows)
    placed = layout.place(scales.reshape(shape))
    assert placed.dtype == np.float32
    assert placed.nbytes == layout.bytes
    found, features = placed.reshape(-1), order.feature_at()
    expected = np.where(features < 0, 0.0, scales.astype(np.float64)[features // rows])
    assert (found[: len(features)] == expected).all()
    assert not found[len(features) :].any()


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_number_stands_in_every_slice(shape: tuple[int, ...]) -> None:
    placed = one_number(shape).place(np.full(shape, 0.375, np.float16))
    assert placed.shape == (64, NUMBER_STRIDE_BYTES // 4)
    assert (placed == 0.375).all()


def test_scales_are_as_many_as_groups_of_rows() -> None:
    with pytest.raises(ValidationError, match="one number"):
        ScaleLayout(order=plain(64), per_slice=16, shape=(32,), rows=3)


def test_codes_take_half_of_the_bytes() -> None:
    wide = RowsLayout(out=plain(64), into=plain(64), per_slice=16, k_padded=64)
    layout = wide.model_copy(update={"dtype": "f8e4m3"})
    codes = (
        (np.arange(64 * 64) % 120).astype(np.uint8).view(ml_dtypes.float8_e4m3fn).reshape(64, 64)
    )
    placed = layout.place(codes)
    assert placed.dtype == codes.dtype
    assert 2 * placed.nbytes == 2 * layout.bytes == wide.bytes
    assert (placed.astype(np.float32) == wide.place(codes.astype(np.float32))).all()


def test_table_rows_are_padded_to_all_slices() -> None:
    order = plain(72)
    table = np.ones((5, 72), ml_dtypes.bfloat16)
    placed = RowTableLayout(order=order, per_slice=16, rows=5).place(table)
    assert placed.shape == (5, 1024)
    assert placed[:, :72].all()
    assert not placed[:, 72:].any()


def test_the_rope_table_turns_as_rotate_half_does() -> None:
    head_dim, rows = 12, 7
    inv_freq = tuple(float(np.float32(10000.0 ** (-2 * i / head_dim))) for i in range(6))
    order = heads(2, head_dim, rotary=True)
    per_slice = features_per_slice(order)
    table = RopeTable(rows=rows, order=order, per_slice=per_slice, inv_freq=inv_freq, scaling=0.5)
    assert table.derive().nbytes == table.bytes
    flat = np.moveaxis(table.derive(), -2, -1).reshape(rows, -1, 2)
    cos, sin = rope_factors(np.arange(rows), np.array(inv_freq), 0.5)
    for position, feature in enumerate(order.feature_at()):
        if feature < 0:
            assert (flat[:, position] == (1.0, 0.0)).all()
            continue
        pair, sign = feature % head_dim % 6, (-1 if feature % head_dim < 6 else 1)
        cos[:, pair].check(flat[:, position, 0])
        sin[:, pair].check(sign * flat[:, position, 1])


def test_key_indices_follow_the_splits() -> None:
    index = KeyIndex(splits=4, keys=16).derive()
    assert index[5].tolist() == [*range(8, 16), *range(40, 48)]
    assert index[7].tolist() == [*range(24, 32), *range(56, 64)]
    assert sorted(index[:4].flat) == list(range(64))
