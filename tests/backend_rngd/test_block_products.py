"""Matrix products whose weights have scales of blocks, through every tiling.

Bound: as in `test_products`, with one more rounding of every term for its scale, and one for the
number or the tokens' scales. Sums of cells are added in f32, like all terms of a sum.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from error_bounds import Approx
from hypothesis import given, settings
from hypothesis import strategies as st
from product_program import Multipliers, run_product

from furiosa_llm.backend_rngd.isa.dtypes import DType
from furiosa_llm.backend_rngd.isa.layout import heads, plain
from furiosa_llm.backend_rngd.tiling import MatmulTiling, Role
from furiosa_llm.backend_rngd.tiling_search import ProductKey, candidates

Array = np.ndarray[Any, Any]
WEIGHT = frozenset({"weight"})


@dataclass(frozen=True)
class Case:
    """A product with scales of blocks, and how it is cut."""

    key: ProductKey
    tiling: MatmulTiling
    seed: int = 0

    def check(self) -> None:
        key, rng = self.key, np.random.default_rng(self.seed)
        assert key.block is not None
        tokens, n, k = key.tokens, key.out.features, key.x.features
        x, w, bias, residual = (
            rng.standard_normal(shape).astype(ml_dtypes.bfloat16)
            for shape in ((tokens, k), (n, k), (n,), (tokens, n))
        )
        w = w.astype(key.weight_dtype.numpy)
        grid = np.exp2(rng.uniform(-6, 2, self.grid)).astype(np.float32)
        scales = Multipliers(
            grid,
            np.asarray(rng.uniform(0.5, 2.0), np.float16),
            rng.uniform(0.01, 3.0, tokens).astype(np.float32),
        )
        found = run_product(key, self.tiling, x, w, bias, residual, scales)
        expected = self.expected(Approx.exact(x), w.astype(np.float64), scales)
        addends = [bias] * key.bias + [residual] * key.residual
        expected = self._with(expected, [a.astype(np.float64) for a in addends])
        if key.dtype == DType.BF16:
            expected.check_bf16(found)
        else:
            expected.check(found)

    @property
    def grid(self) -> tuple[int, int]:
        assert self.key.block is not None
        rows, columns = self.key.block
        return -(-self.key.out.features // rows), -(-self.key.x.features // columns)

    def expected(self, x: Approx, codes: Array, scales: Multipliers) -> Approx:
        """The product of what codes and scales say, in one sum."""
        assert self.key.block is not None
        rows, columns = self.key.block
        each = scales.weight.astype(np.float64).repeat(rows, axis=0).repeat(columns, axis=1)
        w = codes * each[: codes.shape[0], : codes.shape[1]]
        others = {"number": scales.number, "tokens": scales.tokens[:, None]}
        used = [np.asarray(others[name], np.float64) for name in sorted(self.key.scales - WEIGHT)]
        return x.scaled_linear(w, [np.ones((1, 1)), *used], 1 + len(used))

    def _with(self, y: Approx, addends: list[Array]) -> Approx:
        for addend in addends:
            y = y + Approx.exact(addend)
        return y


CODES = DType.F8E4M3


def product(
    x: Any, out: Any, tokens: int, block: tuple[int, int], *others: str, **more: Any
) -> ProductKey:
    """One with codes and scales of blocks."""
    more = {"weight_dtype": CODES, **more}
    return ProductKey(x, out, tokens, scales=WEIGHT | {*others}, block=block, **more)


CASES = {
    "several slices, one token": product(plain(1024), plain(1100), 1, (128, 128)),
    "a partial block, eleven tokens": product(plain(1000), plain(200), 11, (128, 128), bias=True),
    "a part of a slice": product(plain(2100), plain(130), 3, (16, 16), "number"),
    "parts of two slices": product(plain(5100), plain(70), 5, (64, 128)),
    "groups of a row": product(plain(700), plain(330), 2, (1, 32), "tokens"),
    "groups of a row, many": product(plain(3100), plain(70), 1, (1, 64)),
    "rows that groups do not divide": product(plain(600), plain(200), 1, (24, 96)),
    "E5M2, logits": product(
        plain(700), plain(333), 4, (128, 64), dtype=DType.F32, weight_dtype=DType.F8E5M2
    ),
    "heads in copies": product(
        plain(1024), heads(3, 40, rotary=True), 5, (40, 128), bias=True, may_repeat=True
    ),
    "heads in copies, rows of two blocks": product(
        plain(1024), heads(2, 64, rotary=True), 40, (32, 128), may_repeat=True
    ),
    "heads of many tokens in copies": product(
        plain(1024), heads(3, 40, rotary=True), 130, (64, 64), may_repeat=True
    ),
    "from heads": product(heads(6, 48, rotary=False), plain(300), 20, (48, 48), residual=True),
    "K in several tiles": product(
        plain(4090), plain(1100), 21, (128, 128), "tokens", bias=True, residual=True
    ),
    "K in several tiles, groups of a row": product(plain(3100), plain(300), 20, (1, 32)),
}


@pytest.mark.parametrize("name", CASES)
def test_every_candidate_gives_the_product(name: str) -> None:
    key = CASES[name]
    tilings = [t for t in candidates(key.shape) if t.role == Role.TOKENS or not key.residual]
    assert tilings
    for tiling in tilings:
        Case(key, tiling).check()


@pytest.mark.parametrize(
    "change",
    [
        {"rows": 4, "load_rows": 4, "run_per_row": True},
        {"rows": 4, "load_rows": 16},
        {"rows": 8, "load_rows": 8, "tokens": 2},
    ],
)
@pytest.mark.parametrize("block", [(128, 128), (1, 64)])
def test_pinned_variants_of_the_weights_stream(
    block: tuple[int, int], change: dict[str, Any]
) -> None:
    key = product(plain(1500), plain(1600), 5, block, bias=True)
    tiling = MatmulTiling(Role.WEIGHTS, 5, 16, 16, key.shape.k_chunks, key.shape.k_chunks)
    Case(key, replace(tiling, **change)).check()


@pytest.mark.parametrize(("role", "block"), [(Role.WEIGHTS, (1, 32)), (Role.TOKENS, (64, 32))])
def test_a_product_of_very_many_tiles_is_a_loop(role: Role, block: tuple[int, int]) -> None:
    key = product(plain(64), plain(64 * 16 * 165), 3, block, dtype=DType.F32)
    tiling = next(t for t in candidates(key.shape) if t.role == role)
    Case(key, replace(tiling, rows=16, load_rows=16)).check()


@settings(max_examples=25, deadline=None)
@given(
    k=st.integers(1, 4000),
    n=st.integers(1, 1500),
    tokens=st.integers(1, 70),
    block=st.tuples(
        st.sampled_from([1, 7, 16, 32, 64, 128]), st.sampled_from([16, 32, 48, 64, 128])
    ),
    f32=st.booleans(),
    bias=st.booleans(),
    residual=st.booleans(),
    head_dim=st.none() | st.integers(1, 70),
    others=st.sets(st.sampled_from(["number", "tokens"])),
    data=st.data(),
)
def test_shapes_that_divide_nothing(
    k: int,
    n: int,
    tokens: int,
    block: tuple[int, int],
    f32: bool,
    bias: bool,
    residual: bool,
    head_dim: int | None,
    others: set[str],
    data: st.DataObject,
) -> None:
    out = plain(n)
    if head_dim is not None:
        out = heads(min(n, 20), 2 * head_dim, rotary=data.draw(st.booleans()))
    dtype = DType.F32 if f32 else DType.BF16
    repeats = head_dim is not None
    key = product(plain(k), out, tokens, block, *others, dtype=dtype, bias=bias, may_repeat=repeats)
    tiling = data.draw(st.sampled_from(list(candidates(key.shape))))
    if tiling.role == Role.TOKENS:
        key = replace(key, residual=residual)
    Case(key, tiling, k).check()
