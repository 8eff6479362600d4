"""Which of the described quantisations an artifact can hold: one table for the import pass, the
build and docs/quantization.md.

The readers describe more than is computed on the device. What is named here is refused before
anything is compiled; whatever is not named is computed exactly as described.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from .. import errors
from .quantization import (
    ActivationGranularity,
    ActivationMode,
    Granularity,
    Quantization,
    QuantizedLinear,
    Storage,
)

STORAGES: Mapping[Storage, str] = {
    "e5m2": "no format quantises to it, so nothing says how its inputs are quantised",
    "e4m3fnuz": "its bits are those of other numbers, and no e4m3 tensor has all of them",
}
"""Type of codes -> why it is refused."""

WEIGHTS: Mapping[Granularity, str] = {}
"""Granularity of weights -> why it is refused."""

ACTIVATIONS: Mapping[tuple[ActivationMode, ActivationGranularity | None], str] = {
    ("dynamic", "tensor"): "what a sequence gives would depend on the others in its batch",
    ("static", "channel"): "scales of columns cannot be taken out of a product of 8-bit codes",
}
"""How inputs are quantised -> why that is refused."""


def check_supported(quantization: Quantization, file: str) -> None:
    """`file` says how the checkpoint is quantised. Raises: QNT001 with every kind that is refused,
    and the weights concerned."""
    refused: dict[str, list[str]] = {}
    for linear in quantization.linears:
        for kind in _refused_kinds(linear):
            refused.setdefault(kind, []).append(linear.weight)
    if refused:
        raise errors.unsupported_quantization(file, list(refused.items()))


def _refused_kinds(linear: QuantizedLinear) -> Iterator[str]:
    """What is refused about a linear layer, with the reason."""
    weights, inputs = linear.scheme.granularity, linear.activation
    reason_of_inputs = ACTIVATIONS.get((inputs.mode, inputs.granularity))
    kinds = (
        (f"{linear.storage} weights", STORAGES.get(linear.storage)),
        (f"weights with a scale per {weights}", WEIGHTS.get(weights)),
        (f"inputs {inputs.mode} per {inputs.granularity}", reason_of_inputs),
    )
    return (f"{kind} ({reason})" for kind, reason in kinds if reason)
