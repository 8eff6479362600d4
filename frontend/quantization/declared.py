"""What a quantised checkpoint would hold, told from the model and its config alone.

A build without weights needs every parameter's shape and type. Readers ask a checkpoint for its
tensors; this one has those that the model declares, and where a config says that a linear is
quantised, its codes and scales as the format's own library writes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from ... import errors
from ...models.quantization import FormatName, Granularity, ScaleDtype
from ..checkpoint import Array, TensorInfo
from ..parameters import ParameterSpec
from ..safetensors_checkpoint import STORED_NAMES
from .modules import SCALE_DTYPE

CODES = np.dtype(ml_dtypes.float8_e4m3fn)
SCALE_TYPES = {name: dtype for dtype, name in SCALE_DTYPE.items()}


@dataclass(frozen=True)
class DeclaredTensors:
    """A checkpoint that is not there: tensors without data, under the names that it would have."""

    path: str
    tensors: Mapping[str, TensorInfo]

    @staticmethod
    def of(path: str, declared: Iterable[ParameterSpec]) -> DeclaredTensors:
        """The parameters of an unquantised model."""
        return DeclaredTensors(
            path,
            {
                spec.name: TensorInfo(spec.name, spec.shape, spec.dtype, STORED_NAMES[spec.dtype])
                for spec in declared
            },
        )

    def read(self, name: str) -> Array:
        raise errors.no_weights(self.path)

    def read_rows(self, name: str, begin: int, end: int) -> Array:
        raise errors.no_weights(self.path)


def codes_like(info: TensorInfo) -> TensorInfo:
    """The same weight in e4m3."""
    return TensorInfo(info.name, info.shape, CODES, STORED_NAMES[CODES])


def scale_like(
    name: str,
    format: FormatName,
    granularity: Granularity,
    grid: tuple[int, int],
    dtype: ScaleDtype,
) -> TensorInfo:
    """A scale as the format's library writes it: compressed-tensors keeps a dimension more, and
    ModelOpt keeps those of a block, unless there is only one."""
    keeps = format == "compressed-tensors"
    shapes: dict[Granularity, tuple[int, ...]] = {
        "tensor": (1,) if keeps else (),
        "channel": grid if keeps else (grid[0],),
    }
    if format == "modelopt":
        shapes["block"] = () if grid == (1, 1) else (grid[0], 1, grid[1], 1)
    shape = shapes.get(granularity, grid)
    return TensorInfo(name, shape, SCALE_TYPES[dtype], STORED_NAMES[SCALE_TYPES[dtype]])
