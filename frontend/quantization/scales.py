"""Values of scales: as multipliers in f32, and the check that all of them are ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ... import errors
from ...models.quantization import Quantization, ScaleTensor
from ..checkpoint import Array

ReadScale = Callable[[str], Array]
"""Name of a scale -> what is stored: `Checkpoint.read`, or a Furiosa directory's parameters."""


def multipliers(scale: ScaleTensor, read: ReadScale) -> NDArray[np.float32]:
    """The grid's multipliers [rows, columns]; exact, as f32 holds every stored type.

    An amax is the one exception: it is divided by the largest code, and rounded once.
    """
    values = np.asarray(read(scale.name)).astype(np.float32).reshape(scale.grid)
    return values if scale.divisor == 1 else values / np.float32(scale.divisor)


def check_scale_values(quantization: Quantization, path: str, read: ReadScale) -> None:
    """Read every scale once. Raises: QNT005 with all that are not finite and positive."""
    scales = described_scales(quantization)
    check_multipliers(path, ((name, multipliers(scale, read)) for name, scale in scales.items()))


def check_multipliers(path: str, scales: Iterable[tuple[str, NDArray[np.float32]]]) -> None:
    """Raises: QNT005 with the names of all that hold a number which is not finite and positive."""
    problems = [f"`{name}` {problem}" for name, values in scales if (problem := _problem(values))]
    if problems:
        raise errors.bad_scale_values(path, problems)


def described_scales(quantization: Quantization) -> dict[str, ScaleTensor]:
    """Every scale by name; one that serves keys and values is there once."""
    linears, caches = quantization.linears, quantization.caches
    scales = [scale for linear in linears for scale in (linear.scale, linear.input_scale) if scale]
    scales += [scale for cache in caches for scale in (cache.key_scale, cache.value_scale)]
    return {scale.name: scale for scale in scales}


def _problem(values: NDArray[np.float32]) -> str | None:
    """What is wrong with the first bad multiplier, and where it is; None if all are good."""
    bad = ~(np.isfinite(values) & (values > 0))
    if not bad.any():
        return None
    place = tuple(int(index) for index in np.argwhere(bad)[0])
    at = "" if values.size == 1 else f" at {list(place)}"
    return f"is {_shown(values[place])}{at}, {int(bad.sum())} of {values.size} are no scale"


def _shown(value: Any) -> str:
    return "zero" if value == 0 else f"{float(value):g}"
