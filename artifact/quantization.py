"""How the weights of a model are quantised: from its checkpoint, or from a directory beside it."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np

from .. import errors
from ..frontend.checkpoint import Checkpoint
from ..frontend.parameters import ParameterSpec
from ..frontend.quantization.declared import DeclaredTensors
from ..frontend.quantization.furiosa import FuriosaDirectory, describe
from ..frontend.quantization.reader import read_quantization
from ..frontend.source import ModelSource
from ..models.quantization import Quantization


def open_directory(path: str | Path) -> FuriosaDirectory:
    """What Furiosa's quantiser wrote. Raises: QNT012 if it is no directory, QNT006."""
    directory = Path(path).expanduser()
    if not directory.is_dir():
        raise errors.not_a_quantization_directory(str(path))
    return FuriosaDirectory.open(directory)


def open_quantization(source: ModelSource, beside: FuriosaDirectory | None) -> Quantization | None:
    """None if the model is not quantised. `beside` is a quantisation of its plain checkpoint.

    Without weights, the checkpoint's tensors are those that the config gives.
    Raises: QNT001 to QNT004, QNT007; FRO007 if the config does not make a model.
    """
    if source.kind == "gguf" and beside is None:
        return None
    checkpoint = source.checkpoint if source.has_weights else _declared(source)
    if beside is not None:
        return describe(beside, checkpoint)
    return read_quantization(source.path, checkpoint)


def _declared(source: ModelSource) -> Checkpoint:
    from ..frontend.torch_export import declared_shapes

    bf16 = np.dtype(ml_dtypes.bfloat16)
    shapes = declared_shapes(source.config)
    specs = [ParameterSpec(name, shape, bf16) for name, shape in shapes.items()]
    return DeclaredTensors.of(str(source.path), specs)
