"""Schemes that are recognised and not imported, by the names and types of their tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from ..checkpoint import TensorInfo

INTEGERS = frozenset(map(np.dtype, (np.int8, np.uint8, np.int32)))


def holds_integers(info: TensorInfo) -> bool:
    """Whether the tensor is a weight of integer codes."""
    return info.name.endswith(".weight") and info.dtype in INTEGERS


def _ends(*suffixes: str) -> Callable[[TensorInfo], bool]:
    return lambda info: info.name.endswith(suffixes)


MARKS: Mapping[str, Callable[[TensorInfo], bool]] = {
    "mixture of experts": lambda info: ".experts." in info.name,
    "MXFP4": _ends("_blocks"),
    "NVFP4": _ends(".weight_scale_2", ".weight_global_scale"),
    "4-bit packed (compressed-tensors)": _ends(".weight_packed"),
    "GPTQ or AWQ": _ends(".qweight", ".qzeros"),
    "bitsandbytes": _ends(".SCB", ".absmax", ".quant_map", ".nested_absmax"),
    "SmoothQuant": _ends(".pre_quant_scale"),
    "MXFP8": lambda info: (
        info.name.endswith((".weight_scale", ".weight_scale_inv")) and info.stored == "U8"
    ),
    "integer weights": holds_integers,
    "e5m2fnuz": lambda info: info.stored == "F8_E5M2FNUZ",
}
"""Scheme -> whether a tensor of a quantised checkpoint belongs to it; the first one counts."""


def refused_schemes(tensors: Mapping[str, TensorInfo]) -> list[tuple[str, list[str]]]:
    """Scheme and the tensors concerned, of every scheme that is found."""
    found: dict[str, list[str]] = {}
    for info in tensors.values():
        scheme = next((name for name, mark in MARKS.items() if mark(info)), None)
        if scheme is not None:
            found.setdefault(scheme, []).append(info.name)
    return list(found.items())
