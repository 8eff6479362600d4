"""Which of the described quantisations can be compiled: one table for the import pass and for
docs/quantization.md.

The readers describe more than there are operators for. What is named here is refused; whatever is
not named is computed as described.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from .quantization import (
    ActivationGranularity,
    ActivationMode,
    Granularity,
    Quantization,
    QuantizedLinear,
    Storage,
)

STORAGES: Mapping[Storage, str] = {
    "e4m3fnuz": "its bits mean other numbers, and no e4m3 tensor has all of them",
}
"""Type of codes -> why it is refused."""

WEIGHTS: Mapping[Granularity, str] = {}
"""Granularity of weights -> why it is refused."""

ACTIVATIONS: Mapping[tuple[ActivationMode, ActivationGranularity | None], str] = {
    ("dynamic", "tensor"): "what a sequence gives would depend on the others in its batch",
}
"""How inputs are quantised -> why that is refused."""


def unsupported(quantization: Quantization) -> list[str]:
    """Each tensor or module that cannot be compiled, with the reason."""
    return [problem for linear in quantization.linears for problem in _problems(linear)]


def _problems(linear: QuantizedLinear) -> Iterator[str]:
    weights, inputs = linear.scheme.granularity, linear.activation
    if reason := STORAGES.get(linear.storage):
        yield f"`{linear.weight}` holds {linear.storage} codes: {reason}"
    if reason := WEIGHTS.get(weights):
        yield f"`{linear.weight}` has a scale per {weights}: {reason}"
    if reason := ACTIVATIONS.get((inputs.mode, inputs.granularity)):
        kind = f"{inputs.mode} inputs with a scale per {inputs.granularity}"
        yield f"`{linear.module}` has {kind}: {reason}"
    if inputs.group_size is not None and linear.shape[1] % inputs.group_size:
        groups = f"groups of {inputs.group_size} inputs do not divide K = {linear.shape[1]}"
        yield f"`{linear.module}` is quantised in parts, and {groups}"
    if not linear.codes_are_stored:
        yield f"`{linear.weight}` is to be quantised by the build, and no codes are stored"
    if linear.scale.divisor != 1:
        yield f"`{linear.scale.name}` is {linear.scale.divisor:g} times a scale"
