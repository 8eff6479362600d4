"""What becomes of a checkpoint's tensors that do not stay as they are stored."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..frontend.checkpoint import Array
from ..frontend.parameters import BoundParameters, ParameterSpec
from ..frontend.safetensors_checkpoint import STORED_NAMES
from .ledger import Decision

CHUNK_BYTES = 1 << 24
"""How much of a tensor is compared at once."""


def losses(bound: BoundParameters) -> dict[str, Decision]:
    """Tensor -> what happens to it, of those that are converted or that the model has no use for.

    Values that are converted are looked at: they may all be numbers of both types.
    """
    decided = {}
    for name, spec in bound.specs.items():
        stored = bound.stored_name(name)
        if bound.checkpoint.tensors[stored].dtype != spec.dtype:
            decided[stored] = _conversion(bound, stored, spec)
    for name in bound.extra:
        decided[name] = Decision("", "dropped", "the model has no parameter of this name")
    return decided


def _conversion(bound: BoundParameters, stored: str, spec: ParameterSpec) -> Decision:
    name = STORED_NAMES[spec.dtype]
    if all(_is_exact(rows, spec.dtype) for rows in _rows(bound, stored)):
        return Decision(name, "exact", f"every value is a {name} number")
    return Decision(name, "requantized", f"rounded to {name}")


def _is_exact(values: Array, dtype: np.dtype[np.generic]) -> bool:
    return bool(np.array_equal(values, values.astype(dtype).astype(values.dtype), equal_nan=True))


def _rows(bound: BoundParameters, name: str) -> Iterator[Array]:
    info = bound.checkpoint.tensors[name]
    if not info.shape:
        yield bound.checkpoint.read(name)
        return
    step = max(1, CHUNK_BYTES * info.shape[0] // max(1, info.nbytes))
    for begin in range(0, info.shape[0], step):
        yield bound.checkpoint.read_rows(name, begin, min(begin + step, info.shape[0]))
