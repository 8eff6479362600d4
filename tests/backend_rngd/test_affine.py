"""Address lists as loop nests: every run is visited once, by legal loops."""

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from furiosa_llm.backend_rngd.affine import MAX_COUNT, Nest, factor
from furiosa_llm.backend_rngd.isa.instructions import MAX_LOOPS


def visited(nest: Nest, stream: int) -> np.ndarray:
    """Every address of one stream, in order."""
    address = np.full((1,) * max(1, len(nest.n)), nest.bases[stream], np.int64)
    for axis, (n, stride) in enumerate(zip(nest.n, nest.strides[stream], strict=True)):
        shape = [1] * len(nest.n)
        shape[axis] = n
        address = address + (np.arange(n) * stride).reshape(shape)
    return address.reshape(math.prod(nest.n))


def pairs(nests: list[Nest], count: int) -> list[tuple[int, ...]]:
    columns = [np.concatenate([visited(nest, i) for nest in nests]).tolist() for i in range(count)]
    return sorted(zip(*columns, strict=True))


@settings(max_examples=200, deadline=None)
@given(
    heads=st.integers(1, 12),
    parts=st.integers(1, 6),
    tokens=st.integers(1, 70),
    per_slice=st.sampled_from([16, 32, 48, 64, 80, 128]),
    run=st.sampled_from([16, 32]),
)
def test_every_run_of_a_regrouping_is_visited_once(
    heads: int, parts: int, tokens: int, per_slice: int, run: int
) -> None:
    head, part, token = np.ix_(np.arange(heads), np.arange(parts), np.arange(tokens))
    position = (head * parts + part) * run
    source = position // per_slice * (1 << 22) + position % per_slice * 2 + token * per_slice * 2
    destination = token % 64 * (1 << 22) + token // 64 * 4096 + position * 2
    nests = factor(source, destination)
    a, b = np.broadcast_arrays(source, destination)
    expected = sorted(zip(a.reshape(-1).tolist(), b.reshape(-1).tolist(), strict=True))
    assert pairs(nests, 2) == expected
    assert all(len(nest.n) <= MAX_LOOPS and max(nest.n, default=1) <= MAX_COUNT for nest in nests)


@settings(deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    strides=st.lists(st.integers(-4096, 4096), min_size=4, max_size=4),
)
def test_an_affine_list_is_one_nest(shape: list[int], strides: list[int]) -> None:
    axes = np.ix_(*(np.arange(n) for n in shape))
    address = sum((axis * s for axis, s in zip(axes, strides, strict=False)), np.zeros((), int))
    assert len(factor(np.asarray(address))) == 1


def test_an_axis_longer_than_a_counter_is_cut() -> None:
    nests = factor(np.arange(100_000) * 64)
    assert sum(int(np.prod(nest.n)) for nest in nests) == 100_000
    assert all(n <= MAX_COUNT for nest in nests for n in nest.n)


@given(addresses=st.lists(st.integers(0, 1000), min_size=1, max_size=20))
def test_a_list_without_any_order_still_works(addresses: list[int]) -> None:
    nests = factor(np.array(addresses))
    assert pairs(nests, 1) == sorted((a,) for a in addresses)
