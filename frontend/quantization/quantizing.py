"""A checkpoint whose weights are quantised as they are read, by scales that stand beside it.

Furiosa's quantiser leaves the model's weights alone and writes the largest magnitudes that it
found. Codes and scales are made of both here, under the names that compressed-tensors gives them,
so that everything after the reader sees an ordinary quantised checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ...models.quantization import (
    E4M3_MAX,
    Quantization,
    QuantizedCache,
    QuantizedLinear,
    ScaleTensor,
)
from ..checkpoint import Array, Checkpoint, TensorInfo
from ..safetensors_checkpoint import STORED_NAMES
from .declared import CODES, codes_like
from .scales import ReadScale, multipliers

F32 = np.dtype(np.float32)

StoreScale = Callable[[str, ScaleTensor], ScaleTensor]
"""Keeps a scale under a name of this checkpoint."""


@dataclass(frozen=True)
class QuantizingCheckpoint:
    """`plain` with codes for some weights, and with the scales that they are made by."""

    plain: Checkpoint
    linears: Mapping[str, QuantizedLinear]
    """Weight -> how it is quantised; its scale is one of `scales`."""
    scales: Mapping[str, NDArray[np.float32]]

    @property
    def path(self) -> str:
        return self.plain.path

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        codes = {name: codes_like(self.plain.tensors[name]) for name in self.linears}
        scales = {
            name: TensorInfo(name, values.shape, F32, STORED_NAMES[F32])
            for name, values in self.scales.items()
        }
        return {**self.plain.tensors, **codes, **scales}

    def read(self, name: str) -> Array:
        if name in self.scales:
            return self.scales[name]
        values = self.plain.read(name)
        return self._codes(name, values, 0) if name in self.linears else values

    def read_rows(self, name: str, begin: int, end: int) -> Array:
        if name in self.scales:
            return self.scales[name][begin:end]
        values = self.plain.read_rows(name, begin, end)
        return self._codes(name, values, begin) if name in self.linears else values

    def _codes(self, name: str, values: Array, begin: int) -> Array:
        """Codes of some rows of a weight, the first of which has this number."""
        scale = self.scales[self.linears[name].scale.name]
        if scale.ndim:
            scale = scale[begin : begin + len(values), None]
        quotient = values.astype(np.float32) / scale
        return quotient.clip(-E4M3_MAX, E4M3_MAX).astype(CODES)


def quantizing(
    plain: Checkpoint, described: Quantization, read_scale: ReadScale
) -> tuple[Quantization, QuantizingCheckpoint]:
    """The description of what `QuantizingCheckpoint` holds, and that checkpoint.

    `described` has scales of weights per tensor or channel that are stored elsewhere.
    """
    scales: dict[str, NDArray[np.float32]] = {}

    def stored(name: str, scale: ScaleTensor) -> ScaleTensor:
        size = scale.grid[0] * scale.grid[1]
        values = multipliers(scale, read_scale).reshape(() if size == 1 else (size,))
        scales[name] = values
        return ScaleTensor(name, "f32", values.shape, scale.grid)

    linears = tuple(_linear(linear, stored) for linear in described.linears)
    caches = tuple(
        QuantizedCache(
            cache.module,
            stored(f"{cache.module}.k_scale", cache.key_scale),
            stored(f"{cache.module}.v_scale", cache.value_scale),
        )
        for cache in described.caches
    )
    checkpoint = QuantizingCheckpoint(plain, {linear.weight: linear for linear in linears}, scales)
    return replace(described, linears=linears, caches=caches), checkpoint


def _linear(linear: QuantizedLinear, stored: StoreScale) -> QuantizedLinear:
    input_scale = linear.input_scale
    if input_scale is not None:
        input_scale = stored(f"{linear.module}.input_scale", input_scale)
    return replace(
        linear,
        scale=stored(f"{linear.module}.weight_scale", linear.scale),
        input_scale=input_scale,
        codes_are_stored=True,
    )
