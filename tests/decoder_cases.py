"""Binaries of small decoders against the reference interpreter: inputs, caches, and the bound.

Each kernel is held to a bound of its own, element by element (`tests/backend_rngd/test_values.py`);
this is about how they are put together. The interpreter runs in f32 on the same bf16 weights, the
binary rounds each operator's result to bf16: at most 2**-8 of it, 2**-9.2 in the RMS (a unit of the
last place over sqrt(12), over significands from 1 to 2). A decoder of two layers has about 30
roundings on the way to a logit, which add up like independent errors: an RMS error of
2**-9.2 * sqrt(30) ~ 0.9 % of the RMS logit. What a residual stream cancels can double it. bf16
eager shows the same error.

Keys and values that become codes add to it. A value that is off by d becomes another code with
probability |d| / s, where s is the distance of codes, and is then off by s: d·s in the mean square.
Codes have 4 significant bits, so s is 2**-3 / m of a value of significand m, 2**-3 · ln 2 in the
mean; |d| is 0.8 of its RMS if it is normal. So a relative error of r becomes sqrt(0.07 r): of
0.7 %, half-way to the logits, 2.2 %, in each of two layers. With 2 % from the rest that is 3.7 %.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sequences import PADDING_ID, sequence_inputs
from small_decoder import Decoder

from furiosa_llm.backend_rngd.isa.layout import heads
from furiosa_llm.backend_rngd.isa.ordering import check_order
from furiosa_llm.backend_rngd.isa.program import Program
from furiosa_llm.ir.interpreter import TORCH_DTYPES, run
from furiosa_llm.ir.types import dtype_of
from furiosa_llm.runtime_sim.device import Device

Array = np.ndarray[Any, Any]
BOUND, CODES_BOUND = 0.02, 0.037
INPUTS_BOUND = 2 * (3 * 2) ** 0.5 * 2.0**-3 * 0.72 / 12**0.5
"""Inputs that differ by less than a step may get codes a step apart, so at worst the two programs
round each input independently. A step of e4m3 is 2**-3 of the power of two below, 0.72 of that of
the number in the RMS; rounding is off by a step over sqrt(12), two roundings by sqrt(2) of that. A
branch of the decoder has up to three inputs in codes one after the other (those of q, k and v,
of the probabilities' sums, of o), and what a residual stream cancels can double the error. The
programs with exactly known inputs in test_quantized.py have bounds of single operators."""
SLOTS = 400


@dataclass(frozen=True)
class Case:
    """Lengths of the sequences of a bucket, padding rows left out."""

    decoder: Decoder
    lengths: tuple[int, ...]
    seed: int = 0

    def inputs(self) -> dict[str, Array]:
        rng = np.random.default_rng(self.seed)
        found = sequence_inputs(self.decoder.bucket, self.lengths, rng, SLOTS)
        for row, length in enumerate(self.lengths):
            count = 1 if self.decoder.bucket.is_decode else length
            found["input_ids"][row, :count] = rng.integers(1, self.decoder.vocabulary, count)
        return found

    def past(self) -> list[torch.Tensor]:
        """Random KV caches, one per layer; slots that nobody owns are NaN."""
        d = self.decoder
        generator = torch.Generator().manual_seed(self.seed)
        shape = (SLOTS, d.kv_heads, 2, d.head_dim)
        owned = np.zeros(SLOTS, bool)
        inputs = self.inputs()
        for row, length in enumerate(self.lengths):
            owned[inputs["block_table"][row, :length]] = True
        caches = []
        for _ in range(d.layers):
            cache = torch.randn(shape, generator=generator)
            if d.cache_scales is not None:
                cache = cache / torch.tensor(d.cache_scales)[:, None]
            cache[~torch.from_numpy(owned)] = torch.nan
            caches.append(cache.to(TORCH_DTYPES[d.cache_dtype]))
        return caches


def parameters_of(decoder: Decoder) -> Callable[[str], torch.Tensor]:
    """Its weights as the interpreter takes them."""
    weights = decoder.weights()

    def parameter(name: str) -> torch.Tensor:
        wide = torch.from_numpy(weights[name].astype(np.float32))
        return wide.to(TORCH_DTYPES[dtype_of(decoder.type_of(name))])

    return parameter


def reference(case: Case) -> Array:
    """Logits of the valid rows in f32."""
    inputs = [torch.from_numpy(value) for value in case.inputs().values()]
    module, parameters = case.decoder.module(), parameters_of(case.decoder)
    outputs = run(module, "forward", [*inputs, *case.past()], parameters, precision="float32")
    return valid(case, outputs[0].float().numpy())


@functools.lru_cache(maxsize=64)
def ordered_program(decoder: Decoder, apart: bool) -> Program:
    """The decoder's program, its order checked; compiled once for all tests of a process."""
    program = decoder.program(apart=apart)
    check_order(program)
    return program


@functools.lru_cache(maxsize=64)
def simulated(case: Case, garbage: float = float("nan"), *, apart: bool = False) -> Array:
    """Logits of the valid rows; padding tokens and unused slots hold `garbage`."""
    return executed(ordered_program(case.decoder, apart), case, garbage)


def executed(program: Program, case: Case, garbage: float) -> Array:
    """As `simulated`, by any program of the case's decoder."""
    device = Device()
    weights = case.decoder.weights()
    weights["embed"][PADDING_ID] = garbage
    device.load(program, weights.__getitem__)
    device.allocate_caches(program, SLOTS)
    for layer, past in enumerate(case.past()):
        cache = past.float().nan_to_num(nan=garbage).to(past.dtype)
        bits = torch.int16 if past.dtype == torch.bfloat16 else torch.int8
        fill_cache(device.cache(layer), cache.view(bits).numpy())
    return valid(case, device.execute(program, case.inputs())["logits"])


def fill_cache(slots: Array, past: Array, *, rotary: bool = True) -> None:
    """Write [slot][kv head][K | V][head_dim] as the device keeps it; rotated keys in that order."""
    kv_heads, head_dim = past.shape[1], past.shape[3]
    order = heads(1, head_dim, rotary=rotary)
    stored = slots.view(past.dtype).reshape(len(past), kv_heads, 2, order.padded)
    feature = order.feature_at()
    stored[:, :, 0, feature >= 0] = past[:, :, 0, feature[feature >= 0]]
    stored[:, :, 0, feature < 0] = 0
    stored[:, :, 1, :head_dim] = past[:, :, 1]
    stored[:, :, 1, head_dim:] = 0


def valid(case: Case, logits: Array) -> Array:
    """The rows that belong to tokens, without the padding token's logit: [rows, V - 1]."""
    logits = logits[..., PADDING_ID + 1 :]
    if logits.shape[1] == 1:
        return logits[: len(case.lengths), 0]
    return np.concatenate([logits[row, :length] for row, length in enumerate(case.lengths)])


def relative_rms(found: Array, expected: Array) -> float:
    error = np.sqrt(np.mean((found - expected) ** 2))
    return float(error / np.sqrt(np.mean(expected**2)))


def check(case: Case, bound: float | None = None) -> None:
    found, expected = simulated(case), reference(case)
    assert found.shape == expected.shape
    assert np.isfinite(found).all()
    if bound is None:
        bound = BOUND if case.decoder.cache_scales is None else CODES_BOUND
    assert relative_rms(found, expected) < bound
