"""A checkpoint that is known from its model and config alone is described as the real one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from furiosa_llm.errors import CompileError
from furiosa_llm.frontend.parameters import ParameterSpec
from furiosa_llm.frontend.quantization.declared import DeclaredTensors
from furiosa_llm.frontend.quantization.reader import read_quantization
from furiosa_llm.frontend.safetensors_checkpoint import DTYPES, SafetensorsCheckpoint

Zoo = Callable[[str], Path]

KINDS = (
    "ct-tensor",
    "ct-channel",
    "ct-block",
    "ct-group",
    "ct-partial",
    "ct-fused",
    "ct-tied",
    "fine-grained",
    "fine-grained-e8m0",
    "autofp8",
    "autofp8-kv",
    "modelopt-fp8",
    "modelopt-fp8_kv",
    "modelopt-per_channel_per_token",
)


def declared(checkpoint: SafetensorsCheckpoint) -> DeclaredTensors:
    """What the model of this checkpoint declares: its tensors but for scales, in bf16."""
    specs = [
        ParameterSpec(info.name, info.shape, DTYPES["BF16"])
        for info in checkpoint.tensors.values()
        if info.name.endswith(".weight")
    ]
    return DeclaredTensors.of("model", specs)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_expected_is_what_the_library_writes(quantized: Zoo, kind: str) -> None:
    checkpoint = SafetensorsCheckpoint(quantized(kind))
    real = read_quantization(quantized(kind), checkpoint)
    assert real is not None
    assert read_quantization(quantized(kind), declared(checkpoint)) == real


def test_blocks_of_modelopt_have_the_usual_size(tmp_path: Path) -> None:
    """No config says it; the shapes have the form that the library gave `modelopt-block`."""
    config = {"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    shapes = {"a.weight": (200, 300), "b.weight": (128, 128)}
    specs = [ParameterSpec(name, shape, DTYPES["BF16"]) for name, shape in shapes.items()]
    found = read_quantization(tmp_path, DeclaredTensors.of("model", specs))
    assert found is not None
    assert [linear.scale.shape for linear in found.linears] == [(2, 1, 3, 1), ()]


def test_a_model_that_is_not_quantised_has_no_description(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    spec = ParameterSpec("a.weight", (4, 4), DTYPES["BF16"])
    assert read_quantization(tmp_path, DeclaredTensors.of("model", [spec])) is None


def test_there_is_no_data() -> None:
    with pytest.raises(CompileError) as caught:
        DeclaredTensors.of("model", []).read("a.weight")
    assert caught.value.code == "CKP001"
