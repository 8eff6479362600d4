"""What every checkpoint can do: list its tensors for free, read one tensor or some of its rows.

Names are those of the Hugging Face model, whatever the file format. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True)
class TensorInfo:
    """One tensor, known without reading its data."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    """Type that `Checkpoint.read` returns; bf16 and fp8 are ml_dtypes types."""
    stored: str
    """Type in the file by its own name, such as BF16 or Q4_1."""

    @property
    def nbytes(self) -> int:
        """Size of what `Checkpoint.read` returns."""
        return prod(self.shape) * self.dtype.itemsize


class Checkpoint(Protocol):
    """Tensors of one model, read one by one. Arrays may be read-only views of a mapped file."""

    @property
    def path(self) -> str:
        """The file or directory, for messages."""
        ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor by name, in the file's order."""
        ...

    def read(self, name: str) -> Array:
        """The whole tensor. Raises: CKP006 if there is none of that name."""
        ...

    def read_rows(self, name: str, begin: int, end: int) -> Array:
        """Rows [begin, end) of dim 0; reads no other rows. Raises: CKP006."""
        ...
