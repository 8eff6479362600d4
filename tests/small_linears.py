"""One attention layer's worth of tensors, quantised by hand, and the config beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from memory_checkpoint import MemoryCheckpoint
from numpy.typing import NDArray

from furiosa_llm.errors import CompileError
from furiosa_llm.frontend.quantization.reader import read_quantization
from furiosa_llm.models.quantization import Quantization

E4M3 = ml_dtypes.float8_e4m3fn
ATTENTION = "model.layers.0.self_attn"
MODULE = f"{ATTENTION}.k_proj"
Arrays = dict[str, NDArray[Any]]


def plain_tensors() -> Arrays:
    """What no format quantises."""
    return {
        "model.embed_tokens.weight": np.ones((8, 16), ml_dtypes.bfloat16),
        "model.norm.weight": np.ones(16, ml_dtypes.bfloat16),
    }


def linear(
    module: str = MODULE, shape: tuple[int, int] = (6, 16), **scales: NDArray[Any]
) -> Arrays:
    """A weight of e4m3 codes and its scales: `weight_scale=...`."""
    codes = (np.arange(shape[0] * shape[1]) % 120).astype(np.uint8).view(E4M3).reshape(shape)
    return {f"{module}.weight": codes, **{f"{module}.{key}": s for key, s in scales.items()}}


def ones(*shape: int) -> NDArray[Any]:
    return np.ones(shape, np.float32)


def describe(
    directory: Path,
    config: Mapping[str, Any] | None,
    tensors: Arrays,
    modelopt: Mapping[str, Any] | None = None,
) -> Quantization | None:
    """The description of these tensors under this `quantization_config` (and ModelOpt's file)."""
    fields = {} if config is None else {"quantization_config": config}
    (directory / "config.json").write_text(json.dumps(fields))
    if modelopt is not None:
        (directory / "hf_quant_config.json").write_text(json.dumps({"quantization": modelopt}))
    return read_quantization(directory, MemoryCheckpoint({**plain_tensors(), **tensors}))


def only(quantization: Quantization | None) -> Any:
    """The one linear that is described."""
    assert quantization is not None
    (found,) = quantization.linears
    return found


def causes(error: CompileError) -> list[str]:
    """The lines of an error's cause."""
    return [line.removeprefix("    - ") for line in error.cause.splitlines()[1:]]
