"""Schemes that are recognised and not imported, by the names and types of their tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from ..checkpoint import TensorInfo
from .modules import EMBEDDINGS, is_quantized

INTEGERS = frozenset(map(np.dtype, (np.int8, np.uint8, np.int32)))


def holds_integers(info: TensorInfo) -> bool:
    """Whether the tensor is a weight of integer codes."""
    return info.name.endswith(".weight") and info.dtype in INTEGERS


Tensors = Mapping[str, TensorInfo]
Mark = Callable[[TensorInfo, Tensors], bool]


def _ends(*suffixes: str) -> Mark:
    return lambda info, tensors: info.name.endswith(suffixes)


def _is_nvfp4(info: TensorInfo, tensors: Tensors) -> bool:
    """Blocks of 16 with scales in e4m3, and one scale for all of those."""
    of_all = ("weight_scale_2", "weight_global_scale", "input_global_scale")
    if _last(info) in of_all:
        return True
    is_part = _last(info) in ("weight", "weight_packed", "weight_scale")
    return is_part and any(_stored_beside(info, tensors, name) for name in of_all)


def _is_mxfp4(info: TensorInfo, tensors: Tensors) -> bool:
    """Blocks of 32 with scales that are bytes; two codes a byte."""
    if _last(info) == "weight_packed":
        return _stored_beside(info, tensors, "weight_scale") == "U8"
    is_scale = _last(info) == "weight_scale" and info.stored == "U8"
    packed = _stored_beside(info, tensors, "weight_packed") is not None
    return (is_scale and packed) or _last(info).endswith("_blocks")


def _is_mxfp8(info: TensorInfo, tensors: Tensors) -> bool:
    return _last(info) in ("weight_scale", "weight_scale_inv") and info.stored == "U8"


def _is_embedding(info: TensorInfo, tensors: Tensors) -> bool:
    """A table of codes; operators look up rows of floats alone."""
    module, _, last = info.name.rpartition(".")
    return last == "weight" and is_quantized(info) and module.rpartition(".")[2] in EMBEDDINGS


def _last(info: TensorInfo) -> str:
    return info.name.rpartition(".")[2]


def _stored_beside(info: TensorInfo, tensors: Tensors, last: str) -> str | None:
    """The type of another tensor of the same module; None if it has none."""
    sibling = tensors.get(f"{info.name.rpartition('.')[0]}.{last}")
    return sibling.stored if sibling else None


MARKS: Mapping[str, Mark] = {
    "mixture of experts": lambda info, tensors: ".experts." in info.name,
    "NVFP4": _is_nvfp4,
    "MXFP4": _is_mxfp4,
    "MXFP8": _is_mxfp8,
    "packed integers": _ends(".weight_packed"),
    "GPTQ or AWQ": _ends(".qweight", ".qzeros"),
    "bitsandbytes": _ends(".SCB", ".absmax", ".quant_map", ".nested_absmax"),
    "SmoothQuant": _ends(".pre_quant_scale"),
    "integer weights": lambda info, tensors: holds_integers(info),
    "quantised embeddings": _is_embedding,
    "e5m2fnuz": lambda info, tensors: info.stored == "F8_E5M2FNUZ",
}
"""Scheme -> whether a tensor of a quantised checkpoint belongs to it; the first one counts."""


def refused_schemes(tensors: Tensors) -> list[tuple[str, list[str]]]:
    """Scheme and the tensors concerned, of every scheme that is found."""
    found: dict[str, list[str]] = {}
    for info in tensors.values():
        scheme = next((name for name, mark in MARKS.items() if mark(info, tensors)), None)
        if scheme is not None:
            found.setdefault(scheme, []).append(info.name)
    return list(found.items())
