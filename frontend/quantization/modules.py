"""Which modules a checkpoint's tensors belong to, told from names, shapes and types alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import ml_dtypes
import numpy as np

from ...models.quantization import ScaleDtype, Storage
from ..checkpoint import TensorInfo

EMBEDDINGS = frozenset({"embed_tokens", "wte", "wpe", "word_embeddings", "tok_embeddings"})
"""Last part of a module that looks rows up; every other matrix is a linear's weight."""

OUTPUT_HEAD = "lm_head"

STORAGE: Mapping[np.dtype[np.generic], Storage] = {
    np.dtype(ml_dtypes.float8_e4m3fn): "e4m3",
    np.dtype(ml_dtypes.float8_e5m2): "e5m2",
    np.dtype(ml_dtypes.float8_e4m3fnuz): "e4m3fnuz",
}
"""Types that codes of weights are stored in."""

SCALE_DTYPE: Mapping[np.dtype[np.generic], ScaleDtype] = {
    np.dtype(np.float32): "f32",
    np.dtype(ml_dtypes.bfloat16): "bf16",
    np.dtype(np.float16): "f16",
    np.dtype(ml_dtypes.float8_e8m0fnu): "e8m0",
}

SCALE_SUFFIXES = ("scale", "scale_inv", "qscale_weight", "zero_point")
"""How names of tensors end that mean nothing without the weight that they scale."""

SCALES_OF_QUANTIZERS = (
    ".weight_scale",
    ".weight_scale_inv",
    ".input_scale",
    ".activation_scale",
    ".k_scale",
    ".v_scale",
    ".kv_scale",
)
"""How names of scales end that no unquantised model has; `logit_scale` is a plain parameter."""


@dataclass(frozen=True)
class Modules:
    """A checkpoint's tensors, grouped by module."""

    tensors: Mapping[str, TensorInfo]

    @cached_property
    def linears(self) -> Mapping[str, TensorInfo]:
        """Module -> its weight [O, I], of every linear layer, quantised or not."""
        return {
            name.removesuffix(".weight"): info
            for name, info in self.tensors.items()
            if name.endswith(".weight")
            and len(info.shape) == 2
            and name.split(".")[-2] not in EMBEDDINGS
        }

    @cached_property
    def embeddings(self) -> Mapping[str, TensorInfo]:
        """Module -> its table, of those that look rows up."""
        named = {name.removesuffix(".weight"): info for name, info in self.tensors.items()}
        return {
            module: info
            for module, info in named.items()
            if module != info.name and module.rpartition(".")[2] in EMBEDDINGS
        }

    @cached_property
    def attentions(self) -> tuple[str, ...]:
        """Modules that have keys, the parents of `k_proj` and `qkv_proj`, in the model's order."""
        parents = [module.rpartition(".") for module in self.linears]
        having = (parent for parent, _, name in parents if name in ("k_proj", "qkv_proj"))
        return tuple(sorted(having, key=_by_number))  # files put layer 10 before layer 2

    @cached_property
    def scales(self) -> frozenset[str]:
        """Names of all tensors that are scales by their name."""
        return frozenset(filter(is_scale, self.tensors))


def _by_number(module: str) -> list[tuple[int, str]]:
    """Sorts `layers.2` before `layers.10`."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in module.split(".")]


def is_scale(name: str) -> bool:
    """Whether a tensor of a quantised checkpoint is a scale, by its name."""
    return name.rpartition(".")[2].endswith(SCALE_SUFFIXES)


def is_quantized(info: TensorInfo) -> bool:
    """Whether the tensor holds 8-bit codes."""
    return info.dtype in STORAGE
