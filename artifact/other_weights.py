"""Weights from another directory than the artifact, held to what a build demands of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from .. import errors
from ..frontend.checkpoint import Checkpoint
from ..frontend.parameters import BoundParameters, ParameterSpec
from ..frontend.quantization.codes import check_numbers
from ..frontend.quantization.modules import SCALES_OF_QUANTIZERS, STORAGE, is_scale
from ..frontend.quantization.scales import check_multipliers
from ..frontend.safetensors_checkpoint import STORED_NAMES
from .ledger import Decision, make_ledger, show_losses
from .losses import losses


def check_alike(declared: Iterable[ParameterSpec], checkpoint: Checkpoint) -> None:
    """Raises: QNT023 with weights of which only one side, artifact or checkpoint, has codes."""
    problems = []
    for spec in declared:
        found = checkpoint.tensors.get(spec.name)
        if found is not None and (found.dtype in STORAGE) != (spec.dtype in STORAGE):
            wanted = STORED_NAMES[spec.dtype]
            problems.append(f"`{spec.name}` is {found.stored}, the artifact takes {wanted}")
    if problems:
        raise errors.weights_quantized_otherwise(checkpoint.path, problems)


def check_other_weights(bound: BoundParameters) -> list[str]:
    """Nothing is rounded or left out in silence; scales are multipliers. Gives what to warn of.

    `bound` fits the artifact's parameters, in names and shapes.
    Raises: QNT003 with scales of which the artifact knows nothing; of quantised artifacts: CKP005
    with tensors that would be rounded, QNT005 for scales, QNT011 for codes.
    """
    _check_scales_used(bound)
    decided = losses(bound)
    if any(_says_quantized(spec) for spec in bound.specs.values()):
        _check_quantized(bound, decided)
    ledger = make_ledger(None, bound.checkpoint.tensors, decided)
    return show_losses([row for row in ledger.rows if row.verdict != "exact"])


def _check_scales_used(bound: BoundParameters) -> None:
    """Raises: QNT003."""
    unused = [name for name in bound.extra if name.endswith(SCALES_OF_QUANTIZERS)]
    if unused:
        problems = [f"`{name}` scales nothing that the artifact has quantised" for name in unused]
        raise errors.scales_do_not_fit(bound.checkpoint.path, problems)


def _check_quantized(bound: BoundParameters, decided: Mapping[str, Decision]) -> None:
    """Raises: CKP005, QNT005, QNT011."""
    path = bound.checkpoint.path
    rounded = list(_rounded(bound, decided))
    if rounded:
        raise errors.parameters_do_not_fit(path, rounded)
    check_multipliers(path, _scales(bound))
    infos = {name: bound.checkpoint.tensors[bound.stored_name(name)] for name in bound.specs}
    codes = {info.name: STORAGE[info.dtype] for info in infos.values() if info.dtype in STORAGE}
    check_numbers(bound.checkpoint, codes)


def _says_quantized(spec: ParameterSpec) -> bool:
    """A plain model has neither codes nor such a scale; it may have another parameter `scale`."""
    return spec.dtype in STORAGE or spec.name.endswith(SCALES_OF_QUANTIZERS)


def _rounded(bound: BoundParameters, decided: Mapping[str, Decision]) -> Iterator[str]:
    for name, decision in decided.items():
        if decision.verdict == "requantized":
            stored = bound.checkpoint.tensors[name].stored
            values = f"not all of its values are {decision.scheme_out} numbers"
            yield f"`{name}` is stored as {stored}, and {values}"


def _scales(bound: BoundParameters) -> Iterator[tuple[str, NDArray[np.float32]]]:
    for name in filter(is_scale, bound.specs):
        yield bound.stored_name(name), bound.read(name).astype(np.float32)
