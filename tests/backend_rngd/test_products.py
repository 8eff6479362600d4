"""One matrix product through every tiling, against a float64 product of the same bf16 values.

Bound (docs/numerics.md): products of bf16 are exact in f32, a sum of n terms in any order is off by
at most gamma(n - 1) of the sum of magnitudes, and the result is rounded once to its type; f32 sums
are not rounded again. Biases and residuals are terms too.
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
from furiosa_llm.backend_rngd.isa.layout import FeatureOrder, heads, plain
from furiosa_llm.backend_rngd.isa.machine import load_machine
from furiosa_llm.backend_rngd.tiling import MatmulTiling, Role
from furiosa_llm.backend_rngd.tiling_search import ProductKey, candidates, search

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Case:
    """A product and how it is cut."""

    key: ProductKey
    tiling: MatmulTiling

    def check(self) -> None:
        key = self.key
        rng = np.random.default_rng(key.tokens)
        x, w, bias, residual = (
            rng.standard_normal(shape).astype(ml_dtypes.bfloat16)
            for shape in (
                (key.tokens * key.groups, key.x.features),
                (key.out.features, key.x.features),
                (key.out.features,),
                (key.tokens * key.groups, key.out.features),
            )
        )
        w = w.astype(key.weight_dtype.numpy)
        scales = Multipliers(
            rng.uniform(0.01, 0.2, key.out.features).astype(ml_dtypes.bfloat16),
            np.asarray(rng.uniform(0.5, 2.0), np.float16),
            rng.uniform(0.01, 3.0, len(x)).astype(np.float32),
        )
        found = run_product(key, self.tiling, x, w, bias, residual, scales if key.scales else None)
        addends = [v.astype(np.float64) for v in self._used(bias, residual)]
        exact = Approx.exact(x).scaled_linear(
            w.astype(np.float64), *self._scaling(scales), *addends
        )
        if key.dtype == DType.BF16:
            exact.check_bf16(found)
        else:
            exact.check(found)

    def _scaling(self, scales: Multipliers) -> tuple[list[Array], int]:
        """The multipliers [M, N] that the product has, and how many multiplications they are."""
        found = {
            "weight": scales.weight[None],
            "number": scales.number,
            "tokens": scales.tokens[:, None],
        }
        used = [np.asarray(found[name], np.float64) for name in sorted(self.key.scales)]
        return [np.ones((1, 1)), *used], len(used)

    def _used(self, bias: Array, residual: Array) -> list[Array]:
        return [bias] * self.key.bias + [residual] * self.key.residual


CODES = DType.F8E4M3
ALL_SCALES = frozenset({"weight", "number", "tokens"})
CASES = {
    "one token": ProductKey(plain(72), plain(200), 1),
    "one token, all slices": ProductKey(plain(1030), plain(1100), 1, bias=True),
    "eleven tokens": ProductKey(plain(500), plain(130), 11),
    "heads in copies": ProductKey(
        plain(1024), heads(3, 40, rotary=True), 5, bias=True, may_repeat=True
    ),
    "one head": ProductKey(plain(2048), heads(1, 64, rotary=False), 19, bias=True, may_repeat=True),
    "heads of many tokens in copies": ProductKey(
        plain(1024), heads(3, 40, rotary=True), 130, may_repeat=True
    ),
    "one head of many tokens": ProductKey(
        plain(1024), heads(1, 64, rotary=False), 128, bias=True, may_repeat=True
    ),
    "K in several tiles": ProductKey(plain(3100), plain(1100), 21, bias=True, residual=True),
    "groups": ProductKey(plain(2030), plain(1020), 20, bias=True, residual=True, groups=4),
    "groups whose units are chunks": ProductKey(
        plain(1790), plain(1020), 17, bias=True, residual=True, groups=4
    ),
    "a residual added at once": ProductKey(plain(500), plain(1020), 70, residual=True),
    "a residual added at once in groups": ProductKey(
        plain(1020), plain(1020), 70, residual=True, groups=4
    ),
    "results in chunks": ProductKey(plain(512), plain(1780), 24, bias=True, groups=4),
    "heads in groups": ProductKey(
        plain(2040), heads(4, 128, rotary=True), 16, may_repeat=True, groups=4
    ),
    "one head in groups": ProductKey(
        plain(4090), heads(1, 128, rotary=False), 16, may_repeat=True, groups=4
    ),
    "from heads in groups": ProductKey(heads(4, 128, rotary=False), plain(1024), 33, groups=4),
    "logits": ProductKey(plain(2100), plain(333), 9, DType.F32),
    "logits of codes": ProductKey(
        plain(2100), plain(333), 9, DType.F32, weight_dtype=CODES, scales=ALL_SCALES
    ),
    "codes, one token": ProductKey(
        plain(1030), plain(1100), 1, weight_dtype=CODES, scales=frozenset({"weight"})
    ),
    "codes of E5M2 with a bias": ProductKey(
        plain(500), plain(130), 11, bias=True, weight_dtype=DType.F8E5M2, scales=ALL_SCALES
    ),
    "codes of heads in copies": ProductKey(
        plain(1024),
        heads(3, 40, rotary=True),
        130,
        bias=True,
        weight_dtype=CODES,
        scales=ALL_SCALES,
        may_repeat=True,
    ),
    "codes, K in several tiles": ProductKey(
        plain(3100),
        plain(1100),
        21,
        residual=True,
        weight_dtype=CODES,
        scales=frozenset({"weight", "number"}),
    ),
    "codes in groups": ProductKey(
        plain(2030),
        plain(1020),
        20,
        bias=True,
        residual=True,
        weight_dtype=CODES,
        scales=ALL_SCALES,
        groups=4,
    ),
    "codes in groups whose units are chunks": ProductKey(
        plain(1790),
        plain(1020),
        17,
        weight_dtype=CODES,
        scales=frozenset({"weight"}),
        groups=4,
    ),
    "codes of heads in groups": ProductKey(
        plain(2040),
        heads(4, 128, rotary=True),
        16,
        weight_dtype=CODES,
        scales=frozenset({"weight", "tokens"}),
        may_repeat=True,
        groups=4,
    ),
    "logits of one tile": ProductKey(plain(700), plain(333), 9, DType.F32),
    "logits with a bias": ProductKey(plain(700), plain(333), 4, DType.F32, bias=True),
}


@pytest.mark.parametrize("name", CASES)
def test_every_candidate_gives_the_product(name: str) -> None:
    key = CASES[name]
    for tiling in candidates(key.shape):
        if tiling.role == Role.TOKENS or not key.residual:
            Case(key, tiling).check()


@pytest.mark.parametrize(
    "change",
    [
        {"rows": 4, "load_rows": 4, "run_per_row": True},
        {"rows": 4, "load_rows": 16},
        {"tokens": 2},
    ],
)
def test_pinned_variants_of_the_weights_stream(change: dict[str, Any]) -> None:
    key = ProductKey(plain(1500), plain(1600), 5, bias=True)
    found = search(key, load_machine())
    tiling = MatmulTiling(
        Role.WEIGHTS, 5, 16, 16, found.load_chunks, found.load_chunks, predicted=None
    )
    Case(key, replace(tiling, **change)).check()


def test_a_product_of_very_many_tiles_is_a_loop() -> None:
    key = ProductKey(plain(64), plain(64 * 16 * 165), 3, DType.F32)
    for role in Role:
        tiling = next(t for t in candidates(key.shape) if t.role == role)
        Case(key, replace(tiling, rows=16, load_rows=16)).check()


@settings(max_examples=25, deadline=None)
@given(
    k=st.integers(1, 4000),
    n=st.integers(1, 2500),
    tokens=st.integers(1, 70),
    f32=st.booleans(),
    bias=st.booleans(),
    residual=st.booleans(),
    head_dim=st.none() | st.integers(1, 70),
    weight_dtype=st.sampled_from([DType.BF16, DType.F8E4M3, DType.F8E5M2]),
    data=st.data(),
)
def test_shapes_that_divide_nothing(
    k: int,
    n: int,
    tokens: int,
    f32: bool,
    bias: bool,
    residual: bool,
    head_dim: int | None,
    weight_dtype: DType,
    data: st.DataObject,
) -> None:
    out: FeatureOrder = plain(n)
    if head_dim is not None:
        out = heads(min(n, 20), 2 * head_dim, rotary=data.draw(st.booleans()))
    dtype = DType.F32 if f32 else DType.BF16
    key = ProductKey(
        plain(k),
        out,
        tokens,
        dtype,
        bias,
        weight_dtype=weight_dtype,
        may_repeat=head_dim is not None,
    )
    if weight_dtype != DType.BF16:
        others = data.draw(st.sets(st.sampled_from(["number", "tokens"])))
        key = replace(key, scales=frozenset({"weight", *others}))
    options = list(candidates(key.shape))
    tiling = data.draw(st.sampled_from(options))
    if tiling.role == Role.TOKENS:
        key = replace(key, residual=residual)
    Case(key, tiling).check()
