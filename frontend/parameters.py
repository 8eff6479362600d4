"""Bind the parameters that a module declares to the tensors of a checkpoint.

Torch-free, so that an artifact can be given other weights without a compiler.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from .. import errors
from .checkpoint import Array, Checkpoint, TensorInfo

PLAIN_FLOATS = frozenset(
    np.dtype(t) for t in (ml_dtypes.bfloat16, np.float16, np.float32, np.float64)
)
"""Types that may be converted into each other: a plain rounding, no scales involved."""


COMPARED_BYTES = 1 << 24
"""How much of two tensors is compared at once."""


@dataclass(frozen=True)
class ParameterSpec:
    """A parameter as the model declares it."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


@dataclass(frozen=True)
class BoundParameters:
    """A checkpoint that is known to fit; reads one tensor at a time, in the declared type."""

    checkpoint: Checkpoint
    specs: Mapping[str, ParameterSpec]
    stored: Mapping[str, str]
    """Parameter -> name of its tensor; they differ only for tied parameters."""
    extra: tuple[str, ...]
    """Tensors of the checkpoint that the model does not use."""

    def __call__(self, name: str) -> Array:
        return self.read(name)

    def read(self, name: str) -> Array:
        """The whole parameter; a view of the file where no conversion is needed. Raises: CKP006."""
        whole = self.checkpoint.read(self.stored_name(name))
        return whole.astype(self.specs[name].dtype, copy=False)

    def read_rows(self, name: str, begin: int, end: int) -> Array:
        """Rows [begin, end) of dim 0, so that a large tensor can be streamed."""
        rows = self.checkpoint.read_rows(self.stored_name(name), begin, end)
        return rows.astype(self.specs[name].dtype, copy=False)

    def stored_name(self, name: str) -> str:
        """What the checkpoint calls a parameter. Raises: CKP006 if the model has none such."""
        if name not in self.stored:
            raise errors.unknown_tensor(self.checkpoint.path, name)
        return self.stored[name]


def bind_parameters(
    declared: Iterable[ParameterSpec],
    checkpoint: Checkpoint,
    tied: Mapping[str, str] | None = None,
) -> BoundParameters:
    """Check that every declared parameter is there, in its shape and in a type that fits.

    `tied` maps the name that a tied tensor has elsewhere (`lm_head.weight`) to the parameter's
    (`ModelSource.tied`); a checkpoint may store it under either, or equal copies under both.
    No data is read but that of such copies.
    Raises: CKP005 with every missing tensor, wrong shape, wrong type and unequal copy.
    """
    specs = {spec.name: spec for spec in declared}
    aliases = {alias: name for alias, name in (tied or {}).items() if name in specs}
    stored = {name: name for name in specs}
    problems = []
    for alias, name in aliases.items():
        if alias in checkpoint.tensors and name not in checkpoint.tensors:
            stored[name] = alias
        elif alias in checkpoint.tensors and not _equal(checkpoint, alias, name):
            problems.append(f"`{alias}` and `{name}` differ, but the config says they are one")
    for name, spec in specs.items():
        if problem := _problem(spec, checkpoint.tensors.get(stored[name])):
            problems.append(problem)
    if problems:
        raise errors.parameters_do_not_fit(checkpoint.path, problems)
    used = {*stored.values(), *aliases}
    extra = tuple(name for name in checkpoint.tensors if name not in used)
    return BoundParameters(checkpoint, specs, stored, extra)


def _equal(checkpoint: Checkpoint, a: str, b: str) -> bool:
    """Whether two tensors hold the same bytes; reads a few rows at a time."""
    first, second = checkpoint.tensors[a], checkpoint.tensors[b]
    if (first.shape, first.dtype) != (second.shape, second.dtype):
        return False
    rows = first.shape[0] if first.shape else 1
    step = max(1, COMPARED_BYTES * rows // max(1, first.nbytes))
    chunks = [(begin, min(begin + step, rows)) for begin in range(0, rows, step)]
    return all(
        checkpoint.read_rows(a, *chunk).tobytes() == checkpoint.read_rows(b, *chunk).tobytes()
        for chunk in chunks
    )


def _problem(spec: ParameterSpec, found: TensorInfo | None) -> str | None:
    if found is None:
        return f"`{spec.name}` {list(spec.shape)} is missing"
    if found.shape != spec.shape:
        return f"`{spec.name}` has the shape {list(found.shape)}, the model has {list(spec.shape)}"
    if found.dtype != spec.dtype and not {found.dtype, spec.dtype} <= PLAIN_FLOATS:
        return f"`{spec.name}` is stored as {found.stored}, the model has {spec.dtype}"
    return None
