"""Kernels against float64, element by element, within bounds that docs/numerics.md derives.

Shapes divide nothing: not the 64 slices, the 16 positions of a chunk, the 8 lanes. The bounds are
computed from the inputs beside the reference (`tests/error_bounds.py`), so nothing here is a
tolerance that somebody chose.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from error_bounds import Approx, rms_norm, rope, sigmoid, silu
from hypothesis import given, settings
from hypothesis import strategies as st
from one_function import Body, OneFunction, Scope
from value_cases import Attention, norm_case, normal, positions_of, rows_of
from xdsl.ir import SSAValue

from furiosa_llm.backend_rngd.isa.instructions import Op
from furiosa_llm.backend_rngd.kernels import attention as attention_kernel
from furiosa_llm.backend_rngd.kernels import attention_rows, attention_tiling
from furiosa_llm.backend_rngd.kernels.attention_tiling import MAX_ROWS, SCORE_BYTES
from furiosa_llm.ir import nn
from furiosa_llm.models.config_types import Bucket

Array = np.ndarray[Any, Any]

widths = st.integers(1, 700)
seeds = st.integers(0, 1 << 30)


@st.composite
def tokens(draw: st.DrawFn, most: int = 40) -> tuple[Bucket, tuple[int, ...]]:
    """A prefill or decode bucket and lengths that do not fill it."""
    batch = draw(st.integers(1, 5))
    width = draw(st.integers(1, max(1, most // batch)))
    lengths = draw(st.lists(st.integers(1, width), min_size=1, max_size=batch))
    kind = draw(st.sampled_from([Bucket.prefill, Bucket.decode]))
    return kind(batch, width), tuple(lengths)


# --- each feature on its own ---

ELEMENTWISE: dict[str, tuple[int, Body, Callable[..., Approx]]] = {
    "add": (2, lambda f: f.add(nn.AddOp(*f.x)), lambda a, b: a + b),
    "sub": (2, lambda f: f.add(nn.SubOp(*f.x)), lambda a, b: a - b),
    "mul": (2, lambda f: f.add(nn.MulOp(*f.x)), lambda a, b: a.times(b)),
    "silu": (1, lambda f: f.add(nn.SiluOp(f.x[0])), silu),
    "sigmoid": (
        1,
        lambda f: f.add(nn.SigmoidOp(f.x[0])),
        lambda a: a.apply(Op.SIGMOID, sigmoid),
    ),
    "tanh": (1, lambda f: f.add(nn.TanhOp(f.x[0])), lambda a: a.apply(Op.TANH, np.tanh)),
    "scale": (
        1,
        lambda f: f.add(nn.ScaleOp(f.x[0], factor=0.3)),
        lambda a: a * Approx.constant(0.3),
    ),
    "div": (
        1,
        lambda f: f.add(nn.DivOp(f.x[0], f.add(nn.ConstantOp(_scalar(7.0))))),
        lambda a: a / Approx.exact(7.0),
    ),
}


def _scalar(value: float) -> Array:
    return np.array([value]).astype(ml_dtypes.bfloat16)


@pytest.mark.parametrize("name", ELEMENTWISE)
@settings(max_examples=4)
@given(where=tokens(), width=widths, seed=seeds)
def test_elementwise(
    name: str, where: tuple[Bucket, tuple[int, ...]], width: int, seed: int
) -> None:
    count, body, expected = ELEMENTWISE[name]
    rng = np.random.default_rng(seed)
    x = [normal(rng, rows_of(*where), width, scale=3.0) for _ in range(count)]
    expected(*map(Approx.exact, x)).check_bf16(OneFunction(*where, x, body).run())


# --- norms ---


@settings(max_examples=12)
@given(
    where=tokens(), width=widths, eps=st.sampled_from([1e-6, 1e-5, 0.1]), seed=seeds, data=st.data()
)
def test_rms_norm(
    where: tuple[Bucket, tuple[int, ...]], width: int, eps: float, seed: int, data: st.DataObject
) -> None:
    rng = np.random.default_rng(seed)
    scale = data.draw(st.sampled_from([1e-3, 1.0, 40.0]))
    x, weight = normal(rng, rows_of(*where), width, scale=scale), normal(rng, width)
    rms_norm(x, weight, eps).check_bf16(norm_case(where, x, weight, eps).run())


# --- heads: a norm for each, and rotary embedding ---


@settings(max_examples=12)
@given(
    where=tokens(),
    heads=st.integers(1, 9),
    half=st.integers(1, 40),
    scaling=st.sampled_from([1.0, 1.1386]),
    norm=st.booleans(),
    seed=seeds,
)
def test_rotary_embedding(
    where: tuple[Bucket, tuple[int, ...]],
    heads: int,
    half: int,
    scaling: float,
    norm: bool,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    width = heads * 2 * half
    x, weight = normal(rng, rows_of(*where), width), normal(rng, 2 * half)
    inv_freq = 10000.0 ** (-np.arange(half) / half)

    def body(f: Scope) -> SSAValue:
        y = f.in_heads(f.add(nn.LinearOp(f.x[0], f.weights["all"])), heads)
        if norm:
            y = f.add(nn.RmsNormOp(y, f.weights["norm"], eps=1e-6))
        op = nn.RopeOp(
            f.swapped(y), f.positions, inv_freq=inv_freq.tolist(), attention_scaling=scaling
        )
        return f.joined(f.swapped(f.add(op)))

    weights = {"all": np.eye(width)} | ({"norm": weight} if norm else {})
    case = OneFunction(*where, [x], body, weights)
    split = x.reshape(len(x), heads, 2 * half).swapaxes(0, 1)
    before = rms_norm(split, weight, 1e-6).bf16() if norm else Approx.exact(split)
    rotated = rope(before, positions_of(*where), inv_freq, scaling)
    found = case.run().reshape(len(x), heads, 2 * half).swapaxes(0, 1)
    rotated.check_bf16(found)


# --- gated products ---


@settings(max_examples=10)
@given(
    where=tokens(60),
    width=st.integers(1, 400),
    wide=st.integers(1, 500),
    down=st.booleans(),
    seed=seeds,
)
def test_gated_product(
    where: tuple[Bucket, tuple[int, ...]], width: int, wide: int, down: bool, seed: int
) -> None:
    """silu(x · gateᵀ) · (x · upᵀ), alone or with the product and the residual after it.

    Each operator rounds to bf16 once; where the backend fuses them it rounds less often.
    """
    rng = np.random.default_rng(seed)
    x = normal(rng, rows_of(*where), width)
    gate, up = (normal(rng, wide, width, scale=width**-0.5) for _ in range(2))
    back = normal(rng, width, wide, scale=wide**-0.5)

    def body(f: Scope) -> SSAValue:
        w = f.weights
        active = f.add(nn.SiluOp(f.add(nn.LinearOp(f.x[0], w["gate"]))))
        y = f.add(nn.MulOp(active, f.add(nn.LinearOp(f.x[0], w["up"]))))
        return f.add(nn.AddOp(f.x[0], f.add(nn.LinearOp(y, w["down"])))) if down else y

    weights = {"gate": gate, "up": up} | ({"down": back} if down else {})
    exact = Approx.exact(x)
    active = silu(exact.linear(gate).bf16()).bf16()
    y = active * exact.linear(up).bf16()
    if down:
        y = y.bf16().linear(back).bf16() + exact
    y.check_bf16(OneFunction(*where, [x], body, weights).run())


# --- attention ---


ONE_SEGMENT = SCORE_BYTES // (4 * MAX_ROWS)
"""So few keys are one segment, whatever the rows."""


@st.composite
def attentions(draw: st.DrawFn) -> Attention:
    batch = draw(st.integers(1, 7))
    width = draw(st.integers(1, 200 // batch))
    kind = draw(st.sampled_from([Bucket.prefill, Bucket.decode]))
    head_dim = 2 * draw(st.integers(1, 40))
    return Attention(
        kind(batch, width),
        tuple(draw(st.lists(st.integers(1, width), min_size=1, max_size=batch))),
        group=draw(st.integers(1, 6)),
        kv_heads=draw(st.integers(1, 4)),
        head_dim=head_dim,
        scale=draw(st.sampled_from([head_dim**-0.5, 0.11])),
        seed=draw(seeds),
        spread=draw(st.sampled_from([0.1, 1.0, 8.0])),
        may_be_cut=width > ONE_SEGMENT,
        cache_scales=draw(st.sampled_from([None, (2**-8, 5 * 2**-9), (0.5, 30.0)])),
    )


@settings(max_examples=20)
@given(attentions())
def test_attention(case: Attention) -> None:
    case.check()


SMALL = {
    "segments": {"SCORE_BYTES": 512},
    "segments, merged two at a time": {"SCORE_BYTES": 512, "PART_BYTES": 1024},
    "masks in pieces": {"MASK_KEYS": 8, "MASK_BYTES": 512},
}
"""Small limits make short contexts walk what only long ones need."""


@pytest.mark.parametrize("limits", SMALL)
@pytest.mark.parametrize(
    "case",
    [
        Attention(Bucket.decode(3, 120), (120, 1, 57), 3, 2, 14, 14**-0.5),
        Attention(Bucket.prefill(1, 192), (171,), 3, 2, 14, 14**-0.5, spread=4.0),
    ],
    ids=["decode", "prefill"],
)
def test_attention_in_segments(
    monkeypatch: pytest.MonkeyPatch, limits: str, case: Attention
) -> None:
    for name, value in SMALL[limits].items():
        for module in (attention_tiling, attention_kernel, attention_rows):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
    case.check()
