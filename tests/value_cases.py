"""Functions with random values whose exact results are known, for tests of values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from error_bounds import Approx, attention
from one_function import OneFunction, Scope, to_bf16
from xdsl.ir import SSAValue

from furiosa_llm.ir import nn, paged, quant
from furiosa_llm.ir.quant_semantics import LARGEST_CODE
from furiosa_llm.ir.types import f8e4m3
from furiosa_llm.models.config_types import Bucket

Array = np.ndarray[Any, Any]


def rows_of(bucket: Bucket, lengths: tuple[int, ...]) -> int:
    return len(lengths) if bucket.is_decode else sum(lengths)


def normal(rng: np.random.Generator, *shape: int, scale: float = 1.0) -> Array:
    return to_bf16(rng.standard_normal(shape) * scale)


def positions_of(bucket: Bucket, lengths: tuple[int, ...]) -> Array:
    if bucket.is_decode:
        return np.array(lengths) - 1
    return np.concatenate([np.arange(length) for length in lengths])


def norm_case(
    where: tuple[Bucket, tuple[int, ...]], x: Array, weight: Array, eps: float
) -> OneFunction:
    def body(f: Scope) -> SSAValue:
        return f.add(nn.RmsNormOp(f.x[0], f.weights["weight"], eps=eps))

    return OneFunction(*where, [x], body, {"weight": weight})


@dataclass(frozen=True)
class Attention:
    """Random queries, keys and values of some sequences; G heads share each of `kv_heads`."""

    bucket: Bucket
    lengths: tuple[int, ...]
    group: int
    kv_heads: int
    head_dim: int
    scale: float
    seed: int = 0
    spread: float = 1.0
    """Of the queries: how far scores lie apart."""

    may_be_cut: bool = True
    """Whether its keys may be walked in several segments."""
    cache_scales: tuple[float, float] | None = None
    """Of keys and values, which are bf16 numbers, if they are codes."""

    @property
    def heads(self) -> int:
        return self.group * self.kv_heads

    def case(self) -> OneFunction:
        rng = np.random.default_rng(self.seed)
        d, q_width = self.head_dim, self.heads * self.head_dim
        kv_width = self.kv_heads * d
        rows = rows_of(self.bucket, self.lengths)
        x = normal(rng, rows, q_width + 2 * kv_width)
        x[:, :q_width] = to_bf16(x[:, :q_width] * self.spread)
        slots = 1 + sum(self.lengths)
        past = self._cached(normal(rng, slots, self.kv_heads, 2, d))
        past[0] = np.nan
        whole = np.eye(x.shape[1])
        weights = dict(zip("qkv", np.split(whole, [q_width, q_width + kv_width]), strict=True))
        if self.cache_scales is None:
            return OneFunction(self.bucket, self.lengths, [x], self._body, weights, past)
        names = zip(("k_scale", "v_scale"), self.cache_scales, strict=True)
        weights |= {name: np.array([scale]) for name, scale in names}
        dtype = f8e4m3
        return OneFunction(
            self.bucket, self.lengths, [x], self._body, weights, past, cache_dtype=dtype
        )

    def _cached(self, values: Array) -> Array:
        """What the cache holds of keys and values [..., K | V, d]."""
        if self.cache_scales is None:
            return values
        scales = np.array(self.cache_scales, np.float32)[:, None]
        quotient = np.clip(values.astype(np.float32) / scales, -LARGEST_CODE, LARGEST_CODE)
        codes: Array = quotient.astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
        return codes

    def _body(self, f: Scope) -> SSAValue:
        def project(name: str, heads: int) -> SSAValue:
            y = f.add(nn.LinearOp(f.x[0], f.weights[name]))
            return f.swapped(f.in_heads(y, heads))

        q, k, v = (project("q", self.heads), *(project(n, self.kv_heads) for n in "kv"))
        assert f.cache is not None
        scales = [f.weights[name] for name in ("k_scale", "v_scale") if name in f.weights]
        if scales:
            k, v = (
                f.add(quant.QuantizeOp(x, scale)) for x, scale in zip((k, v), scales, strict=True)
            )
        cache = f.add(paged.WriteOp(f.cache, k, v, f.slots))
        op = paged.AttentionOp(q, cache, f.table, f.lengths, f.positions, *scales, scale=self.scale)
        shape = (f.bucket.batch_size, f.bucket.input_ids_size, self.heads * self.head_dim)
        return f.add(nn.ReshapeOp(f.add(op), shape))

    def expected(self, case: OneFunction) -> Approx:
        """[tokens, heads · head_dim]."""
        assert case.past is not None
        inputs, x, d = case.inputs(), case.x[0], self.head_dim
        q_end, k_end = self.heads * d, (self.heads + self.kv_heads) * d
        found, first = [], 0
        for row, length in enumerate(self.lengths):
            count = 1 if self.bucket.is_decode else length
            mine = x[first : first + count]
            first += count
            cached = case.past[inputs["block_table"][row, :length]].copy()
            new = (
                mine[:, q_end:k_end].reshape(count, -1, d),
                mine[:, k_end:].reshape(count, -1, d),
            )
            cached[length - count :] = self._cached(np.stack(new, axis=2))
            visible = np.arange(length) <= np.arange(length - count, length)[:, None]
            for head in range(self.heads):
                kv = cached[:, head // self.group]
                q = mine[:, head * d : (head + 1) * d]
                found.append(
                    attention(
                        q,
                        kv[:, 0],
                        kv[:, 1],
                        self.scale,
                        visible,
                        segments=self.may_be_cut,
                        cache_scales=self.cache_scales,
                    )
                )
        return self._joined(found)

    def _joined(self, found: list[Approx]) -> Approx:
        """Heads of a sequence side by side, sequences one after another."""
        rows = [found[i : i + self.heads] for i in range(0, len(found), self.heads)]
        value = np.concatenate([np.concatenate([h.value for h in r], axis=1) for r in rows])
        error = np.concatenate([np.concatenate([h.error for h in r], axis=1) for r in rows])
        return Approx(value, error)

    def check(self) -> None:
        case = self.case()
        self.expected(case).check_bf16(case.run())
