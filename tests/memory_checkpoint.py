"""A checkpoint in memory, for tests that change tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from furiosa_llm.frontend.checkpoint import TensorInfo
from furiosa_llm.frontend.safetensors_checkpoint import DTYPES, SafetensorsCheckpoint

STORED = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class MemoryCheckpoint:
    """Arrays by name."""

    arrays: Mapping[str, NDArray[Any]]
    path: str = "memory"

    @staticmethod
    def copy_of(checkpoint: SafetensorsCheckpoint) -> MemoryCheckpoint:
        return MemoryCheckpoint({name: checkpoint.read(name) for name in checkpoint.tensors})

    def changed(self, name: str, array: NDArray[Any] | None) -> MemoryCheckpoint:
        """The same with one tensor replaced, or without it."""
        rest = {key: value for key, value in self.arrays.items() if key != name}
        return MemoryCheckpoint(rest if array is None else {**rest, name: array})

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return {
            name: TensorInfo(name, array.shape, array.dtype, STORED[array.dtype])
            for name, array in self.arrays.items()
        }

    def read(self, name: str) -> NDArray[Any]:
        return self.arrays[name]

    def read_rows(self, name: str, begin: int, end: int) -> NDArray[Any]:
        return self.arrays[name][begin:end]
