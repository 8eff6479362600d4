"""Running error analysis: the exact result in f64 beside a bound of what the machine may give.

docs/numerics.md derives the rules that are used here. An `Approx` is a value and how far the
machine's may be from it; operators on it are the machine's f32 operations, each of which rounds
once. The f64 work itself is off by 2**-53 where the machine is by 2**-24 or more: checks add 2**-20
of each bound for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from furiosa_llm.backend_rngd.isa.instructions import Op

Array = np.ndarray[Any, Any]

U_F32 = 2.0**-24
"""Unit roundoff of f32: half of the distance from 1 to the next number."""
U_BF16 = 2.0**-8
"""Unit roundoff of bf16, which has 8 significant bits."""
LEAST = 2.0**-126
"""Below it bf16 is flushed to zero, and f32 is less precise: an absolute error of each rounding."""

FUNCTION_UNITS: dict[Op, int] = {
    Op.SQRT: 1,
    Op.ERF: 1,
    Op.TANH: 2,
    Op.SIN: 2,
    Op.COS: 2,
    Op.SIGMOID: 4,
    Op.EXP: 4,
    Op.NEGEXP: 4,
    Op.LOG: 5,
}
"""Relative error of the vector engine's functions in units of U_F32 (docs/numerics.md)."""


def gamma(additions: int) -> float:
    """What a sum of f32 loses, relative to the sum of magnitudes, in any order of additions."""
    return additions * U_F32 / (1.0 - additions * U_F32)


@dataclass(frozen=True)
class Approx:
    """f64 arrays: the exact value, and a bound of the machine's distance from it."""

    value: Array
    error: Array

    @staticmethod
    def exact(value: Any) -> Approx:
        """What the machine has exactly: bf16 inputs, f32 constants."""
        array = np.asarray(value, np.float64)
        return Approx(array, np.zeros_like(array))

    @staticmethod
    def constant(value: float) -> Approx:
        """A number that is rounded to f32 when the program is made."""
        return Approx.exact(value).rounded()

    @property
    def size(self) -> Array:
        """A bound of the machine's magnitude."""
        size: Array = np.abs(self.value) + self.error
        return size

    def rounded(self, unit: float = U_F32) -> Approx:
        """The machine's value rounded once."""
        return Approx(self.value, self.error + unit * self.size + LEAST)

    def bf16(self) -> Approx:
        return self.rounded(U_BF16)

    def __add__(self, other: Approx) -> Approx:
        return Approx(self.value + other.value, self.error + other.error).rounded()

    def __sub__(self, other: Approx) -> Approx:
        return Approx(self.value - other.value, self.error + other.error).rounded()

    def times(self, other: Approx) -> Approx:
        """A product that f32 holds: of two bf16 numbers, which have 8 bits each."""
        error = self.error * other.size + np.abs(self.value) * other.error
        return Approx(self.value * other.value, error)

    def __mul__(self, other: Approx) -> Approx:
        return self.times(other).rounded()

    def __truediv__(self, other: Approx) -> Approx:
        value = self.value / other.value
        least = np.abs(other.value) - other.error
        assert (least > 0).all(), "the divisor may be zero"
        return Approx(value, (self.error + np.abs(value) * other.error) / least).rounded()

    def sum(self, axis: int, keepdims: bool = False) -> Approx:
        """Over one axis, in any order."""
        lost = gamma(self.value.shape[axis] - 1) * self.size.sum(axis, keepdims=keepdims)
        error = self.error.sum(axis, keepdims=keepdims) + lost
        return Approx(self.value.sum(axis, keepdims=keepdims), error)

    def linear(self, w: Array, *addends: Array) -> Approx:
        """x · wᵀ + addends of bf16 numbers, summed in f32 and not yet rounded: [..., K], [N, K]."""
        size = self.size @ np.abs(w).T + sum(np.abs(a) for a in addends)
        lost = gamma(w.shape[1] - 1 + len(addends)) * size
        return Approx(self.value @ w.T + sum(addends), self.error @ np.abs(w).T + lost)

    def scaled_linear(
        self, w: Array, scales: Sequence[Array], multiplications: int, *addends: Array
    ) -> Approx:
        """(x · wᵀ) · scales + addends, not yet rounded: x and w as in `linear`, scales [M, N].

        The sum may be multiplied in parts, and scales by each other before: every term is rounded
        by `multiplications` more.
        """
        scale = math.prod(scales)
        size = self.size @ np.abs(w).T * np.abs(scale) + sum(np.abs(a) for a in addends)
        lost = gamma(w.shape[1] - 1 + len(addends) + multiplications) * size
        error = self.error @ np.abs(w).T * np.abs(scale)
        return Approx(self.value @ w.T * scale + sum(addends), error + lost + LEAST)

    def apply(self, op: Op, function: Callable[[Array], Array]) -> Approx:
        """A monotone function of the vector engine."""
        value = function(self.value)
        ends = (function(self.value - self.error), function(self.value + self.error))
        error = np.maximum(*(np.abs(end - value) for end in ends))
        return Approx(value, error).rounded(FUNCTION_UNITS[op] * U_F32)

    def __getitem__(self, index: Any) -> Approx:
        return Approx(self.value[index], self.error[index])

    # --- holding what the machine gave to the bound, element by element ---

    @property
    def _allowed(self) -> Array:
        allowed: Array = self.error * (1.0 + 2.0**-20) + LEAST
        return allowed

    def check(self, found: Array) -> None:
        """f32 results."""
        assert found.shape == self.value.shape, (found.shape, self.value.shape)
        share = np.abs(found.astype(np.float64) - self.value) / self._allowed
        assert (share <= 1.0).all(), f"{share.max():.3f} times the bound"

    def check_bf16(self, found: Array) -> None:
        """Results rounded once more, to bf16: what was rounded was within the bound.

        Rounding is monotone, so they lie between the bound's ends as bf16 numbers.
        """
        assert found.shape == self.value.shape, (found.shape, self.value.shape)
        low, high = self.bf16_ends()
        inside = (low <= found) & (found <= high)
        where = np.argwhere(~inside)
        assert inside.all(), f"{len(where)} of {inside.size} outside, the first at {where[0]}"

    def bf16_ends(self) -> tuple[Array, Array]:
        """The least and the largest bf16 number that the machine's value may be rounded to."""
        return nearest_bf16(self.value - self._allowed), nearest_bf16(self.value + self._allowed)


def nearest_bf16(values: Array) -> Array:
    """f64 to bf16 by way of f32, for the ends of intervals of f32 numbers; it is monotone."""
    nearest: Array = values.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)
    return np.where(np.abs(nearest) < LEAST, 0.0, nearest)


def sigmoid(x: Array) -> Array:
    found: Array = 1.0 / (1.0 + np.exp(-x))
    return found


# --- the kernels, as docs/numerics.md writes them: results before they are rounded to bf16 ---


def rms_norm(x: Array, weight: Array, eps: float) -> Approx:
    """Over the last dim."""
    features = x.shape[-1]
    squares = Approx.exact(x).times(Approx.exact(x)).sum(-1, keepdims=True)
    mean = squares * Approx.constant(1.0 / features) + Approx.constant(eps)
    root = mean.apply(Op.SQRT, lambda v: np.sqrt(np.maximum(v, 0.0)))
    inverse = Approx.exact(1.0) / root
    return Approx.exact(x).times(Approx.exact(weight)) * inverse


def silu(x: Approx) -> Approx:
    return x * x.apply(Op.SIGMOID, sigmoid)


def rope_factors(positions: Array, inv_freq: Array, scaling: float) -> tuple[Approx, Approx]:
    """The loader's cos and sin, times the scaling: [T, head_dim / 2] each."""
    angle = Approx.exact(positions[:, None]) * Approx.exact(inv_freq).rounded()
    # At an angle that is off; neither function is steeper than one.
    cos, sin = (
        Approx(function(angle.value), angle.error).rounded(FUNCTION_UNITS[op] * U_F32)
        for function, op in ((np.cos, Op.COS), (np.sin, Op.SIN))
    )
    return cos * Approx.constant(scaling), sin * Approx.constant(scaling)


def rope(x: Approx, positions: Array, inv_freq: Array, scaling: float) -> Approx:
    """x [heads, T, head_dim], positions [T]: halves are partners."""
    cos, sin = rope_factors(positions, inv_freq, scaling)
    half = x.value.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    halves = (first * cos - second * sin, second * cos + first * sin)
    return Approx(*(np.concatenate(p, axis=-1) for p in zip(*map(_parts, halves), strict=True)))


def _parts(x: Approx) -> tuple[Array, Array]:
    return x.value, x.error


KEYS_OF_A_SEGMENT = 8
"""A segment of keys has at least so many in each slice."""


def attention(
    q: Array,
    k: Array,
    v: Array,
    scale: float,
    visible: Array,
    *,
    segments: bool = True,
    cache_scales: tuple[float, float] | None = None,
) -> Approx:
    """softmax(scale · q · kᵀ) · v over visible keys: [T, d], [C, d], [C, d], bool [T, C].

    Without `segments` all keys of a row are known to share one maximum. Then it is known how each
    probability is rounded, or between which two numbers where that is nearly a tie.
    With `cache_scales` k and v are codes, whose sums are times those f32 numbers.
    """
    scores = Approx.exact(q).linear(k)
    if cache_scales is not None:
        scores, v = scores * Approx.exact(cache_scales[0]), v * cache_scales[1]
    scores = scores * Approx.constant(scale)
    top = np.where(visible, scores.value, -np.inf).max(-1, keepdims=True)
    distance = np.where(visible, scores.value - top, 0.0)
    wide = np.where(visible, scores.error, 0.0).max(-1, keepdims=True)
    merges = -(-len(k) // KEYS_OF_A_SEGMENT) if segments else 0
    # How far the exponent may be off, then what exp, the merges' factors and bf16 add to it.
    exponent = scores.error + wide + U_F32 * (np.abs(distance) + scores.error + wide)
    per_merge = (FUNCTION_UNITS[Op.EXP] + 1) * U_F32
    off = np.exp(exponent + (1 + merges) * per_merge) - 1.0
    weight = np.where(visible, np.exp(distance), 0.0)
    weights = Approx(weight, np.where(visible, weight * off + 2 * (1 + merges) * LEAST, 0.0))
    if segments:
        moved = np.where(visible, weights.bf16().error, 0.0)
    else:
        moved = np.maximum(*(np.abs(end - weight) for end in weights.bf16_ends()))
    in_f32 = 4 if cache_scales is None else 5
    return _weighted_mean(weight, np.where(visible, moved, 0.0), v, in_f32 * (1 + merges))


def _weighted_mean(weight: Array, error: Array, v: Array, more: int) -> Approx:
    """Σ weight · v / Σ weight, [T, C] and [C, d], with weights that may be off.

    Both sums see the same weights, so only what v is away from the mean is moved by their errors.
    `more` operations in f32 join the sums' additions.
    """
    total = weight.sum(-1, keepdims=True)
    least = total - error.sum(-1, keepdims=True)
    exact = weight @ v / total
    moved = np.einsum("tc,tcd->td", error, np.abs(v[None] - exact[:, None])) / least
    magnitudes = (weight + error) @ np.abs(v) / least
    lost = gamma(weight.shape[-1] + more) * (magnitudes + np.abs(exact) + moved)
    return Approx(exact, moved + lost + LEAST)
