"""Weights from another directory than the artifact, held to what a build demands of them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from .. import errors
from ..frontend.parameters import BoundParameters, ParameterSpec
from ..frontend.quantization.codes import check_numbers
from ..frontend.quantization.modules import SCALES_OF_QUANTIZERS, STORAGE, is_scale
from ..frontend.quantization.scales import check_multipliers
from .losses import losses


def check_other_weights(bound: BoundParameters) -> None:
    """Nothing of a quantised model is rounded or left out in silence; scales are multipliers.

    `bound` fits the artifact's parameters, in names and shapes.
    Raises: QNT003 with scales of which the artifact knows nothing; of quantised artifacts: CKP005
    with tensors that would be rounded, QNT005 for scales, QNT011 for codes.
    """
    path = bound.checkpoint.path
    unused = [name for name in bound.extra if name.endswith(SCALES_OF_QUANTIZERS)]
    if unused:
        problems = [f"`{name}` scales nothing that the artifact has quantised" for name in unused]
        raise errors.scales_do_not_fit(path, problems)
    if not any(_says_quantized(spec) for spec in bound.specs.values()):
        return
    rounded = list(_rounded(bound))
    if rounded:
        raise errors.parameters_do_not_fit(path, rounded)
    check_multipliers(path, _scales(bound))
    infos = {name: bound.checkpoint.tensors[bound.stored_name(name)] for name in bound.specs}
    codes = {info.name: STORAGE[info.dtype] for info in infos.values() if info.dtype in STORAGE}
    check_numbers(bound.checkpoint, codes)


def _says_quantized(spec: ParameterSpec) -> bool:
    """A plain model has neither codes nor such a scale; it may have another parameter `scale`."""
    return spec.dtype in STORAGE or spec.name.endswith(SCALES_OF_QUANTIZERS)


def _rounded(bound: BoundParameters) -> Iterator[str]:
    for name, decision in losses(bound).items():
        if decision.verdict == "requantized":
            stored = bound.checkpoint.tensors[name].stored
            values = f"not all of its values are {decision.scheme_out} numbers"
            yield f"`{name}` is stored as {stored}, and {values}"


def _scales(bound: BoundParameters) -> Iterator[tuple[str, NDArray[np.float32]]]:
    for name in filter(is_scale, bound.specs):
        yield bound.stored_name(name), bound.read(name).astype(np.float32)
