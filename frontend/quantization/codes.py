"""What only the codes themselves tell: whether all are numbers, and which range their writer used.

Two chips' e4m3 ends at 240: that of e4m3fnuz (AMD), whose bits mean something else, and the IEEE
form of Gaudi 2, whose bits mean the same. Both occur in files that say e4m3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from ... import errors
from ...models.quantization import Quantization, Storage
from ..checkpoint import Array, Checkpoint, TensorInfo

CHUNK_BYTES = 1 << 24
"""How many codes are looked at at once."""

SHORT_RANGE = 240.0
"""Largest code of quantisers for chips whose e4m3 ends there."""

REMARK = (
    f"no code is above {SHORT_RANGE:g}: written for a chip whose e4m3 ends there; codes and scales "
    "mean the same here, but inputs are clipped at 448"
)


class CodeFacts(NamedTuple):
    """What the codes of one weight have in common."""

    largest: float
    """Largest magnitude of a finite code."""
    no_numbers: int
    """Codes that are NaN or infinite."""


def facts_of(codes: Array) -> CodeFacts:
    """In magnitude all three types are ordered as their bits are, so one maximum tells nearly all;
    only where a code is no number they are counted."""
    bits = codes.view(np.uint8)
    values = np.arange(256, dtype=np.uint8).view(codes.dtype).astype(np.float64)
    top = int((bits & 0x7F).max(initial=0))
    negative_zero_is_nan = np.isnan(values[0x80])
    if np.isfinite(values[top]) and not (negative_zero_is_nan and (bits == 0x80).any()):
        return CodeFacts(float(values[top]), 0)
    counts = np.bincount(bits.reshape(-1), minlength=256)
    finite = np.isfinite(values)
    occurring = np.abs(values[(counts > 0) & finite])
    return CodeFacts(float(occurring.max(initial=0.0)), int(counts[~finite].sum()))


def check_codes(quantization: Quantization, checkpoint: Checkpoint) -> dict[str, str]:
    """Weight -> what is remarkable about its codes; empty if nothing is. Reads every weight once.

    Raises: QNT011 with all weights that hold codes which are no numbers.
    """
    stored = [linear for linear in quantization.linears if linear.codes_are_stored]
    facts = check_numbers(checkpoint, {linear.weight: linear.storage for linear in stored})
    e4m3 = [linear.weight for linear in stored if linear.storage == "e4m3"]
    if e4m3 and all(facts[weight].largest <= SHORT_RANGE for weight in e4m3):
        return dict.fromkeys(e4m3, REMARK)
    return {}


def check_numbers(checkpoint: Checkpoint, weights: Mapping[str, Storage]) -> dict[str, CodeFacts]:
    """What is known of each of these tensors' codes.

    Raises: QNT011 with all tensors that hold codes which are no numbers.
    """
    facts = {name: _facts_in(checkpoint, checkpoint.tensors[name]) for name in weights}
    problems = [
        f"`{name}` has {facts[name].no_numbers} codes that are no numbers{_explanation(storage)}"
        for name, storage in weights.items()
        if facts[name].no_numbers
    ]
    if problems:
        raise errors.codes_are_no_numbers(checkpoint.path, problems)
    return facts


def _facts_in(checkpoint: Checkpoint, info: TensorInfo) -> CodeFacts:
    """A few rows at a time, so that memory stays small."""
    step = max(1, CHUNK_BYTES // max(1, info.shape[1]))
    parts = [
        facts_of(checkpoint.read_rows(info.name, begin, min(begin + step, info.shape[0])))
        for begin in range(0, info.shape[0], step)
    ]
    return CodeFacts(
        max((part.largest for part in parts), default=0.0),
        sum(part.no_numbers for part in parts),
    )


def _explanation(storage: Storage) -> str:
    """What the codes would mean in the type that files mix up with this one."""
    if storage == "e4m3":
        return "; 0x7F and 0xFF are 240 in e4m3fnuz"
    return "; 0x80 is -0 in e4m3" if storage == "e4m3fnuz" else ""
