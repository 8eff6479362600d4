"""Other schemes are recognised by their tensors and refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationScheme,
    preset_name_to_scheme,
)
from model_zoo import make_model
from quantized_zoo import write_compressed_tensors
from small_linears import ATTENTION, MODULE, causes, describe, linear, ones

from furiosa_llm.errors import CompileError
from furiosa_llm.frontend.quantization.reader import read_quantization
from furiosa_llm.frontend.quantization.refused import MARKS
from furiosa_llm.frontend.safetensors_checkpoint import SafetensorsCheckpoint

RECORDED = Path(__file__).parents[2] / "recorded" / "modelopt"

TENSOR_OF: dict[str, tuple[str, Any]] = {
    "mixture of experts": ("model.layers.0.mlp.experts.3.up_proj.weight", ml_dtypes.float8_e4m3fn),
    "MXFP4": ("model.layers.0.mlp.up_proj_blocks", np.uint8),
    "NVFP4": (f"{MODULE}.weight_scale_2", np.float32),
    "packed integers": (f"{MODULE}.weight_packed", np.int32),
    "GPTQ or AWQ": (f"{MODULE}.qweight", np.int32),
    "bitsandbytes": (f"{MODULE}.SCB", np.float32),
    "SmoothQuant": (f"{MODULE}.pre_quant_scale", ml_dtypes.bfloat16),
    "MXFP8": (f"{MODULE}.weight_scale_inv", np.uint8),
    "integer weights": (f"{MODULE}.weight", np.int8),
    "quantised embeddings": ("model.embed_tokens.weight", ml_dtypes.float8_e4m3fn),
    "e5m2fnuz": (f"{MODULE}.weight", ml_dtypes.float8_e5m2fnuz),
}
"""Scheme -> name and type of a tensor that gives it away."""


def test_every_scheme_has_a_case() -> None:
    assert set(TENSOR_OF) == set(MARKS)


@pytest.mark.parametrize("scheme", TENSOR_OF)
def test_a_scheme_is_named_with_its_tensors(tmp_path: Path, scheme: str) -> None:
    name, dtype = TENSOR_OF[scheme]
    tensors = {name: np.zeros((4, 4), dtype)}
    with pytest.raises(CompileError) as caught:
        describe(tmp_path, {"quant_method": "compressed-tensors"}, tensors)
    assert caught.value.code == "QNT001"
    assert causes(caught.value) == [f"{scheme}: `{name}`"]


def packed(bits: int) -> QuantizationScheme:
    """Integers of this size, each row in groups of 32."""
    weights = {"num_bits": bits, "type": "int", "strategy": "group", "group_size": 32}
    return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs.model_validate(weights))


WRITTEN: dict[str, tuple[QuantizationScheme, str, int]] = {
    "W8A8": (preset_name_to_scheme("W8A8", ["Linear"]), "integer weights", 1),
    "W4": (packed(4), "packed integers", 1),
    "W8": (packed(8), "packed integers", 1),
    "NVFP4": (preset_name_to_scheme("NVFP4", ["Linear"]), "NVFP4", 4),
    "NVFP4A16": (preset_name_to_scheme("NVFP4A16", ["Linear"]), "NVFP4", 3),
    "MXFP4": (preset_name_to_scheme("MXFP4", ["Linear"]), "MXFP4", 2),
    "MXFP4A16": (preset_name_to_scheme("MXFP4A16", ["Linear"]), "MXFP4", 2),
    "MXFP8": (preset_name_to_scheme("MXFP8", ["Linear"]), "MXFP8", 1),
}
"""Kind -> what compressed-tensors writes, the scheme's name, how many tensors of a linear show it
(seven linears in each of two layers)."""


@pytest.mark.parametrize("kind", WRITTEN)
def test_what_compressed_tensors_writes_otherwise_is_refused(tmp_path: Path, kind: str) -> None:
    scheme, named, tensors = WRITTEN[kind]
    write_compressed_tensors(tmp_path, {"group_0": scheme})
    with pytest.raises(CompileError) as caught:
        read_quantization(tmp_path, SafetensorsCheckpoint(tmp_path))
    assert caught.value.code == "QNT001"
    (line,) = causes(caught.value)
    assert line.startswith(f"{named}: `model.layers.0.")
    assert line.endswith(f" and {2 * 7 * tensors - 3} more")


def test_what_modelopt_writes_for_integers_is_refused() -> None:
    directory = RECORDED / "int8_smoothquant"
    with pytest.raises(CompileError) as caught:
        read_quantization(directory, SafetensorsCheckpoint(directory))
    assert caught.value.code == "QNT001"
    assert {line.partition(":")[0] for line in causes(caught.value)} == {
        "SmoothQuant",
        "integer weights",
    }
    assert "and 4 more" in caught.value.cause


@pytest.mark.parametrize("method", ["gptq", "fbgemm_fp8", "quark", "something new"])
def test_a_method_without_a_reader_is_refused(tmp_path: Path, method: str) -> None:
    with pytest.raises(CompileError) as caught:
        describe(tmp_path, {"quant_method": method}, linear(weight_scale=ones()))
    assert caught.value.code == "QNT001"
    assert causes(caught.value) == [f"{method}: `{MODULE}.weight`"]


def test_codes_without_a_config_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CompileError) as caught:
        describe(tmp_path, None, linear(weight_scale=ones()))
    assert caught.value.code == "QNT004"
    assert causes(caught.value) == [
        f"`{MODULE}.weight` is F8_E4M3, no config says how",
        f"`{MODULE}.weight_scale` is a scale, no config says of what",
    ]


def test_integers_without_a_config_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CompileError) as caught:
        describe(tmp_path, None, {f"{MODULE}.weight": np.ones((4, 4), np.int8)})
    assert (caught.value.code, f"`{MODULE}.weight` is I8" in caught.value.cause) == ("QNT004", True)


def test_scales_without_a_config_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CompileError) as caught:
        describe(tmp_path, None, {f"{ATTENTION}.k_scale": ones(), "logit_scale": ones()})
    assert caught.value.code == "QNT004"
    assert causes(caught.value) == [f"`{ATTENTION}.k_scale` is a scale, no config says of what"]


def test_a_plain_checkpoint_has_no_description(tmp_path: Path) -> None:
    directory = make_model("llama", tmp_path)
    assert read_quantization(directory, SafetensorsCheckpoint(directory)) is None


@pytest.mark.parametrize(
    ("dtype", "storage"),
    [(ml_dtypes.float8_e5m2, "e5m2"), (ml_dtypes.float8_e4m3fnuz, "e4m3fnuz")],
)
def test_other_types_of_codes_are_told_apart(tmp_path: Path, dtype: Any, storage: str) -> None:
    tensors = linear(weight_scale_inv=ones())
    tensors[f"{MODULE}.weight"] = tensors[f"{MODULE}.weight"].view(dtype)
    config = {"quant_method": "fp8", "weight_block_size": None}
    found = describe(tmp_path, config, tensors)
    assert found is not None
    assert [linear.storage for linear in found.linears] == [storage]
