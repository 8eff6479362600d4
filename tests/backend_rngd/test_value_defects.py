"""What the bounds of tests of values would notice: each plausible defect breaks one.

Defects are put into the simulator's units or into the inputs that decide what is seen; the same
cases without them are within their bounds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from error_bounds import Approx, nearest_bf16, rms_norm
from product_program import run_product
from value_cases import Attention, norm_case, normal

from furiosa_llm.backend_rngd.isa.dtypes import DType
from furiosa_llm.backend_rngd.isa.instructions import Op
from furiosa_llm.backend_rngd.isa.layout import plain
from furiosa_llm.backend_rngd.isa.machine import load_machine
from furiosa_llm.backend_rngd.tiling_search import ProductKey, search
from furiosa_llm.models.config_types import Bucket
from furiosa_llm.runtime_sim import exec_values, vector
from furiosa_llm.runtime_sim.commit import Commit
from furiosa_llm.runtime_sim.contraction import Groups, Product, StreamOperand, product

Array = np.ndarray[Any, Any]

FEW_KEYS = Attention(Bucket.decode(29, 3), (3, 2) * 14, 3, 2, 22, 22**-0.5, may_be_cut=False)
"""Two or three keys: how each probability is rounded can be seen in the result."""
DECODE = Attention(Bucket.decode(5, 61), (61, 60, 7, 33), 3, 2, 22, 22**-0.5, may_be_cut=False)
PREFILL = Attention(Bucket.prefill(2, 61), (61, 33), 3, 2, 22, 22**-0.5, may_be_cut=False)
CODES = replace(DECODE, cache_scales=(2**-7, 5 * 2**-9))
OUTSIDE = "outside, the first at"


@pytest.mark.parametrize(
    "case", [FEW_KEYS, DECODE, PREFILL, CODES], ids=["few keys", "decode", "prefill", "codes"]
)
def test_without_a_defect(case: Attention) -> None:
    case.check()


def expect_broken(case: Attention) -> None:
    with pytest.raises(AssertionError, match=OUTSIDE):
        case.check()


# --- probabilities ---


def truncated(values: Array) -> Array:
    """f32 -> bf16 codes, towards zero."""
    codes: Array = (np.ascontiguousarray(values).view(np.uint32) >> 16).astype(np.uint16)
    return codes


def test_truncated_probabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    make = Commit.__init__

    def truncating(self: Commit, work: Any, *args: Any, **kwargs: Any) -> None:
        make(self, work, *args, **kwargs)
        c = work.plan.command
        if c.commit_port.dtype == DType.BF16 and any(op.op == Op.EXP for op in c.vector.ops):
            self._encode = truncated

    monkeypatch.setattr(Commit, "__init__", truncating)
    expect_broken(FEW_KEYS)


def test_an_exponential_of_twelve_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    def coarse(x: Array) -> Array:
        exact: Array = np.exp(x)
        return (exact.view(np.uint32) & np.uint32(0xFFFFF000)).view(np.float32)

    monkeypatch.setitem(vector._UNARY, Op.EXP, (coarse, vector.F32))
    expect_broken(FEW_KEYS)


# --- masks ---


@pytest.mark.parametrize("case", [DECODE, PREFILL], ids=["decode", "prefill"])
def test_a_token_dropped_from_the_mask(case: Attention) -> None:
    function = case.case()
    inputs = function.inputs()
    inputs["lengths"][0] -= 1
    with pytest.raises(AssertionError, match=OUTSIDE):
        case.expected(function).check_bf16(function.run(inputs))


def test_a_token_that_sees_the_one_after_it() -> None:
    function = PREFILL.case()
    inputs = function.inputs()
    inputs["position_ids"][0, 5] += 1
    with pytest.raises(AssertionError, match=OUTSIDE):
        PREFILL.expected(function).check_bf16(function.run(inputs))


# --- codes ---


@pytest.mark.parametrize("name", ["k_scale", "v_scale"])
def test_a_scale_of_codes_that_is_off_by_a_bf16_unit(name: str) -> None:
    """As if it had been rounded on the way: what is multiplied by it is."""
    function = CODES.case()
    expected = CODES.expected(function)
    function.weights = {**function.weights, name: function.weights[name] * (1 + 2**-7)}
    with pytest.raises(AssertionError, match=OUTSIDE):
        expected.check_bf16(function.run())


# --- sums ---


@pytest.mark.parametrize("width", [45, 701])
def test_a_term_missing_in_the_mean(width: int) -> None:
    where = (Bucket.prefill(3, 11), (11, 7, 2))
    rng = np.random.default_rng(0)
    x, weight = normal(rng, 20, width), normal(rng, width)
    rms_norm(x, weight, 1e-5).check_bf16(norm_case(where, x, weight, 1e-5).run())
    left_out = x.copy()
    left_out[:, -1] = 0.0
    found = norm_case(where, left_out, weight, 1e-5).run()
    others = rms_norm(x, weight, 1e-5)[:, :-1]
    with pytest.raises(AssertionError, match=OUTSIDE):
        others.check_bf16(found[:, :-1])


def in_bf16(groups: Groups, integer: bool) -> Product:
    """A product whose sum is rounded to bf16 once, half-way."""
    multiply = product(groups, integer)

    def apply(stream: StreamOperand, rows: Array) -> Array:
        first, second = stream.values.copy(), stream.values.copy()
        half = stream.values.shape[-1] // 2
        first[..., half:] = 0
        second[..., :half] = 0
        early = nearest_bf16(multiply(StreamOperand(first), rows)).astype(np.float32)
        return early + multiply(StreamOperand(second), rows)

    return apply


def accumulates_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exec_values, "product", in_bf16)


def nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    del monkeypatch


@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16])
@pytest.mark.parametrize("defect", [nothing, accumulates_in_bf16])
def test_sums_in_bf16(
    monkeypatch: pytest.MonkeyPatch, dtype: DType, defect: Callable[[pytest.MonkeyPatch], None]
) -> None:
    key = ProductKey(plain(1500), plain(90), 3, dtype)
    rng = np.random.default_rng(0)
    x, w = normal(rng, 3, 1500), normal(rng, 90, 1500)
    exact = Approx.exact(x).linear(w)
    defect(monkeypatch)
    x, w, bias, residual = (
        v.astype(ml_dtypes.bfloat16) for v in (x, w, np.zeros(90), np.zeros((3, 90)))
    )
    found = run_product(key, search(key, load_machine()), x, w, bias, residual)
    check = exact.check_bf16 if dtype == DType.BF16 else exact.check
    if defect is nothing:
        check(found)
        return
    with pytest.raises(AssertionError, match=r"outside|times the bound"):
        check(found)


def test_attention_with_sums_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    accumulates_in_bf16(monkeypatch)
    expect_broken(DECODE)
