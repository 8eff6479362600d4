"""Quantised checkpoints that several tests read and none changes: each is made once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationScheme,
    preset_name_to_scheme,
)
from quantized_zoo import (
    FP8_CACHE,
    write_autofp8,
    write_compressed_tensors,
    write_fine_grained,
)

RECORDED = Path(__file__).parents[2] / "recorded" / "modelopt"


def fp8(**fields: object) -> QuantizationArgs:
    return QuantizationArgs.model_validate({"num_bits": 8, "type": "float", **fields})


BLOCKS = QuantizationScheme(
    targets=["Linear"],
    weights=fp8(strategy="block", block_structure=[16, 32]),
    input_activations=fp8(strategy="group", group_size=32, dynamic=True),
)
PARTIAL = QuantizationScheme(
    targets=["Linear"], weights=fp8(strategy="block", block_structure=[48, 40])
)
GROUPS = QuantizationScheme(targets=["Linear"], weights=fp8(strategy="group", group_size=32))

WRITERS: Mapping[str, Callable[[Path], Path]] = {
    "ct-tensor": lambda path: write_compressed_tensors(
        path, {"group_0": preset_name_to_scheme("FP8", ["Linear"])}, kv_cache_scheme=FP8_CACHE
    ),
    "ct-channel": lambda path: write_compressed_tensors(
        path, {"group_0": preset_name_to_scheme("FP8_DYNAMIC", ["Linear"])}
    ),
    "ct-block": lambda path: write_compressed_tensors(path, {"group_0": BLOCKS}),
    "ct-group": lambda path: write_compressed_tensors(path, {"group_0": GROUPS}),
    "ct-partial": lambda path: write_compressed_tensors(path, {"group_0": PARTIAL}),
    "ct-fused": lambda path: write_compressed_tensors(
        path,
        {"group_0": preset_name_to_scheme("FP8_DYNAMIC", ["Linear"])},
        kind="phi3",
        kv_cache_scheme=FP8_CACHE,
    ),
    "ct-tied": lambda path: write_compressed_tensors(
        path, {"group_0": preset_name_to_scheme("FP8", ["Linear"])}, kind="qwen2"
    ),
    "fine-grained": write_fine_grained,
    "fine-grained-e8m0": lambda path: write_fine_grained(path, scale_fmt="ue8m0"),
    "autofp8": write_autofp8,
    "autofp8-kv": lambda path: write_autofp8(path, cache=True),
    **{
        f"modelopt-{name}": lambda path, name=name: RECORDED / name  # type: ignore[misc]
        for name in ("fp8", "fp8_kv", "per_channel_per_token", "block")
    },
}
"""Kind -> writes that checkpoint, or says where it is recorded."""


@pytest.fixture(scope="session")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`quantized("ct-block")` is the directory of that checkpoint; do not write into it."""
    root = tmp_path_factory.mktemp("quantized")
    made: dict[str, Path] = {}

    def directory(kind: str) -> Path:
        if kind not in made:
            made[kind] = WRITERS[kind](root / kind)
        return made[kind]

    return directory
