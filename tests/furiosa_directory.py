"""Writes quantisation directories as Furiosa's quantiser is known to: types and ranges."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from furiosa_llm.frontend.checkpoint import Checkpoint

FIELDS = (
    "amax", "max", "min", "amax_outlier", "max_outlier", "min_outlier", "basis",
    "scale_per_channel", "scale_per_channel_outlier", "clipping_bound", "outlier_cin_idx", "ch",
)  # fmt: skip
COMMAND = "# quantize.py --weight_dtype fp8-E4M3 --act_dtype fp8-E4M3 --kv_dtype fp8-E4M3\n"


def quantizer(**filled: Any) -> dict[str, Any]:
    """The twelve fields, None but for those given."""
    return {**dict.fromkeys(FIELDS), **filled}


def quantizers_of(checkpoint: Checkpoint, layers: int) -> dict[str, dict[str, Any]]:
    """Ranges for every linear but the output head, and for both products of each attention."""
    made = {}
    for name, info in checkpoint.tensors.items():
        if len(info.shape) == 2 and "embed" not in name and "lm_head" not in name:
            module = name.removesuffix(".weight")
            weight = np.abs(checkpoint.read(name).astype(np.float32))
            made[f"{module}._weight_quantizer"] = quantizer(amax=weight.max(1))
            made[f"{module}._input_quantizer"] = quantizer(amax=np.array(5.0, np.float32))
    for number in range(2 * layers):
        product = f"matmul_{number}" if number else "matmul"
        for operand in (0, 1):
            amax = np.array([1.0 + number], np.float32)
            made[f"{product}._input_{operand}_quantizer"] = quantizer(amax=amax)
    return made


def write_furiosa_directory(
    directory: Path, quantizers: Mapping[str, Any], command: str = COMMAND
) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "qformat.yaml").write_text(command + "quantized op list: {}\n")
    np.save(directory / "qparam.npy", np.array(dict(quantizers), object), allow_pickle=True)
    return directory
