"""Weights that are quantised as they are read: the codes, the scales, and rows of both."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from furiosa_directory import quantizer, quantizers_of, write_furiosa_directory
from model_zoo import make_model
from safetensors.torch import load_file

from furiosa_llm.frontend.quantization.furiosa import FuriosaDirectory, describe
from furiosa_llm.frontend.quantization.quantizing import QuantizingCheckpoint, quantizing
from furiosa_llm.frontend.quantization.scales import check_scale_values, described_scales
from furiosa_llm.frontend.safetensors_checkpoint import SafetensorsCheckpoint
from furiosa_llm.ir.quant_semantics import quantize
from furiosa_llm.models.quantization import Quantization

UP = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SafetensorsCheckpoint:
    return SafetensorsCheckpoint(make_model("llama", tmp_path_factory.mktemp("model")))


def opened(
    path: Path, model: SafetensorsCheckpoint, **changed: object
) -> tuple[Quantization, QuantizingCheckpoint]:
    quantizers = quantizers_of(model, layers=2)
    for name, amax in changed.items():
        quantizers[f"{UP}.{name}"] = quantizer(amax=amax)
    directory = FuriosaDirectory.open(write_furiosa_directory(path, quantizers))
    return quantizing(model, describe(directory, model), directory.read)


def test_codes_are_those_of_the_weights(tmp_path: Path, model: SafetensorsCheckpoint) -> None:
    """Against `quant.quantize`, one row at a time."""
    quantization, checkpoint = opened(tmp_path, model)
    tensors = load_file(Path(model.path) / "model.safetensors")
    assert len(quantization.linears) == 14
    for linear in quantization.linears:
        scale = torch.from_numpy(checkpoint.read(linear.scale.name))
        expected = torch.stack(
            [quantize(*row) for row in zip(tensors[linear.weight], scale, strict=True)]
        )
        codes = checkpoint.read(linear.weight)
        assert codes.shape == linear.shape
        np.testing.assert_array_equal(codes.view(np.uint8), expected.view(torch.uint8).numpy())
        part = checkpoint.read_rows(linear.weight, 3, 7)
        np.testing.assert_array_equal(part.view(np.uint8), codes[3:7].view(np.uint8))


def test_it_is_an_ordinary_quantised_checkpoint(
    tmp_path: Path, model: SafetensorsCheckpoint
) -> None:
    quantization, checkpoint = opened(tmp_path, model)
    check_scale_values(quantization, checkpoint.path, checkpoint.read)
    assert all(linear.codes_are_stored for linear in quantization.linears)
    for name, scale in described_scales(quantization).items():
        info = checkpoint.tensors[name]
        assert (info.shape, scale.dtype, scale.divisor) == (scale.shape, "f32", 1)
        np.testing.assert_array_equal(checkpoint.read(name).shape, info.shape)
    for name, info in checkpoint.tensors.items():
        assert checkpoint.read(name).shape == info.shape
        assert checkpoint.read(name).dtype == info.dtype
    assert checkpoint.read("lm_head.weight") is not None
    assert quantization.assumptions


def test_scales_per_tensor_and_per_column(tmp_path: Path, model: SafetensorsCheckpoint) -> None:
    columns = np.linspace(1, 5, 64, dtype=np.float32)
    weight = np.array(0.25, np.float32)
    quantization, checkpoint = opened(
        tmp_path, model, _weight_quantizer=weight, _input_quantizer=columns
    )
    (linear,) = (found for found in quantization.linears if found.module == UP)
    assert linear.input_scale is not None
    assert checkpoint.read(linear.scale.name) == np.float32(0.25) / np.float32(448)
    inputs = checkpoint.read(linear.input_scale.name)
    np.testing.assert_array_equal(inputs, columns / np.float32(448))
    largest = np.abs(checkpoint.read(linear.weight).astype(np.float32)).max()
    assert largest == 448  # weights beyond the range stay at its end
