"""What becomes of a checkpoint's tensors that do not stay as they are stored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ..frontend.checkpoint import Array
from ..frontend.parameters import PLAIN_FLOATS, BoundParameters, ParameterSpec
from ..frontend.safetensors_checkpoint import STORED_NAMES
from .ledger import Decision

CHUNK_BYTES = 1 << 24
"""How much of a tensor is compared at once."""


FREQUENCIES = "rotary_emb.inv_freq"
"""How names of buffers end that older versions of transformers wrote for each layer, and newer ones
ignore: they are computed from the config."""

FREQUENCY_ULPS = 2
"""How far a stored frequency may be from the computed one: powers are rounded differently."""


def losses(
    bound: BoundParameters, frequencies: Sequence[float] | None = None
) -> dict[str, Decision]:
    """Tensor -> what happens to it, of those that are converted or that the model has no use for.

    Values that are converted are looked at: they may all be numbers of both types. `frequencies`
    are those of the model's rotary embeddings, None if it has none or several kinds.
    """
    decided = {}
    for name, spec in bound.specs.items():
        stored = bound.stored_name(name)
        if bound.checkpoint.tensors[stored].dtype != spec.dtype:
            decided[stored] = _conversion(bound, stored, spec)
    for name in bound.extra:
        if frequencies is not None and name.endswith(FREQUENCIES):
            decided[name] = _recomputed(bound.checkpoint.read(name), frequencies)
        else:
            decided[name] = Decision("", "dropped", "the model has no parameter of this name")
    return decided


def _recomputed(stored: Array, frequencies: Sequence[float]) -> Decision:
    """Frequencies are constants in the binaries, as the config gives them, whatever is stored."""
    if _equal_when_rounded(stored, np.array(frequencies)):
        where = "constants in the binaries"
        return Decision(where, "exact", f"the config's, within {FREQUENCY_ULPS} units of rounding")
    return Decision("", "dropped", "these are not the frequencies that the config gives")


def _equal_when_rounded(stored: Array, expected: Array) -> bool:
    """Within `FREQUENCY_ULPS` of the stored type or f32, whichever is coarser.

    Positive floats are ordered as their bits are, so bits tell how many numbers lie in between.
    """
    if stored.shape != expected.shape or stored.dtype not in PLAIN_FLOATS:
        return False
    kind = min(stored.dtype, np.dtype(np.float32), key=lambda dtype: dtype.itemsize)
    found, wanted = (
        values.astype(kind).view(f"u{kind.itemsize}").astype(np.int64)
        for values in (stored, expected)
    )
    return bool((np.abs(found - wanted) <= FREQUENCY_ULPS).all())


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
