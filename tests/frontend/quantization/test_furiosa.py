"""Furiosa directories: what they say, what is assumed, and what does not fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from furiosa_directory import COMMAND, quantizer, quantizers_of, write_furiosa_directory
from memory_checkpoint import MemoryCheckpoint
from model_zoo import make_model
from small_linears import causes

from furiosa_llm.errors import CompileError
from furiosa_llm.frontend.quantization.furiosa import FuriosaDirectory, describe
from furiosa_llm.frontend.quantization.scales import (
    check_scale_values,
    multipliers,
)
from furiosa_llm.frontend.safetensors_checkpoint import SafetensorsCheckpoint
from furiosa_llm.models.quantization import Quantization

UP = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SafetensorsCheckpoint:
    return SafetensorsCheckpoint(make_model("llama", tmp_path_factory.mktemp("model")))


def read(path: Path, model: SafetensorsCheckpoint) -> tuple[FuriosaDirectory, Quantization]:
    directory = FuriosaDirectory.open(path)
    return directory, describe(directory, model)


def refusal(path: Path, model: SafetensorsCheckpoint) -> CompileError:
    def attempt() -> None:
        directory, quantization = read(path, model)
        check_scale_values(quantization, str(path), directory.read)

    with pytest.raises(CompileError) as caught:
        attempt()
    return caught.value


def test_a_directory_describes_every_linear_and_cache(
    tmp_path: Path, model: SafetensorsCheckpoint
) -> None:
    write_furiosa_directory(tmp_path, quantizers_of(model, layers=2))
    directory, found = read(tmp_path, model)
    check_scale_values(found, str(tmp_path), directory.read)
    assert len(found.linears) == 14
    for linear in found.linears:
        assert (linear.scheme.granularity, linear.activation.mode) == ("channel", "static")
        assert not linear.codes_are_stored
        weight = model.read(linear.weight).astype(np.float32)
        scale = multipliers(linear.scale, directory.read)
        np.testing.assert_array_equal(scale[:, 0], np.abs(weight).max(1) / np.float32(448))
        assert linear.input_scale is not None
        assert multipliers(linear.input_scale, directory.read) == np.float32(5) / np.float32(448)
    ranges = [
        float(directory.read(scale.name)[0])
        for cache in found.caches
        for scale in (cache.key_scale, cache.value_scale)
    ]
    assert ranges == [1, 2, 3, 4]


def test_what_is_assumed_is_said(tmp_path: Path, model: SafetensorsCheckpoint) -> None:
    write_furiosa_directory(tmp_path, quantizers_of(model, layers=2))
    _, found = read(tmp_path, model)
    assert len(found.assumptions) == 5
    assert "4 quantizers belong to no known operand (matmul._input_0" in found.assumptions[-1]
    write_furiosa_directory(tmp_path, quantizers_of(model, layers=0), COMMAND.replace("--kv", "-"))
    _, without_cache = read(tmp_path, model)
    assert without_cache.assumptions == found.assumptions[:3]
    assert without_cache.caches == ()


def test_ranges_may_be_per_tensor_or_per_input_channel(
    tmp_path: Path, model: SafetensorsCheckpoint
) -> None:
    ranges = quantizers_of(model, layers=2)
    ranges[f"{UP}._weight_quantizer"] = quantizer(amax=np.array(3.0, np.float32))
    ranges[f"{UP}._input_quantizer"] = quantizer(amax=np.ones(64, np.float32))
    _, found = read(write_furiosa_directory(tmp_path, ranges), model)
    (linear,) = [linear for linear in found.linears if linear.module == UP]
    assert (linear.scheme.granularity, linear.activation.granularity) == ("tensor", "channel")


@pytest.mark.parametrize("file", ["qformat.yaml", "qparam.npy"])
def test_a_missing_file_is_named(tmp_path: Path, model: SafetensorsCheckpoint, file: str) -> None:
    write_furiosa_directory(tmp_path, quantizers_of(model, layers=2))
    (tmp_path / file).unlink()
    error = refusal(tmp_path, model)
    assert (error.code, file in error.message) == ("QNT006", True)


@pytest.mark.parametrize(
    ("command", "code", "named"),
    [
        ("\n", "QNT002", "no --weight_dtype and no --act_dtype"),
        ("# q --weight_dtype fp8-E4M3\n", "QNT002", "no --act_dtype"),
        ("# q --weight_dtype 'fp8\n", "QNT002", "No closing quotation"),
        ("# q --weight_dtype int8 --act_dtype=int8\n", "QNT001", "int8 weights"),
        ("# q --weight_dtype=fp8-E4M3 --act_dtype bf16\n", "QNT001", "bf16 activations"),
        (COMMAND.replace("--kv_dtype fp8-E4M3", "--kv_dtype int8"), "QNT001", "int8 KV caches"),
    ],
)
def test_types_that_are_missing_or_not_fp8(
    tmp_path: Path, model: SafetensorsCheckpoint, command: str, code: str, named: str
) -> None:
    write_furiosa_directory(tmp_path, quantizers_of(model, layers=2), command)
    error = refusal(tmp_path, model)
    assert (error.code, named in error.cause) == (code, True)


def test_a_first_line_that_is_no_text(tmp_path: Path, model: SafetensorsCheckpoint) -> None:
    write_furiosa_directory(tmp_path, quantizers_of(model, layers=2))
    (tmp_path / "qformat.yaml").write_bytes(b"\xff\n")
    assert refusal(tmp_path, model).code == "QNT002"


def test_a_checkpoint_that_is_quantised_already(
    tmp_path: Path, model: SafetensorsCheckpoint
) -> None:
    write_furiosa_directory(tmp_path, quantizers_of(model, layers=2))
    codes = np.ones((128, 64), ml_dtypes.float8_e4m3fn)
    quantized = MemoryCheckpoint.copy_of(model).changed(f"{UP}.weight", codes)
    with pytest.raises(CompileError) as caught:
        describe(FuriosaDirectory.open(tmp_path), quantized)
    assert caught.value.code == "QNT004"
    assert causes(caught.value) == [f"`{UP}.weight` is F8_E4M3 already"]


Change = Callable[[dict[str, dict[str, Any]]], object]
WEIGHT, INPUT = f"{UP}._weight_quantizer", f"{UP}._input_quantizer"


@pytest.mark.parametrize(
    ("change", "code", "cause"),
    [
        (lambda r: r.pop(WEIGHT), "QNT003", f"`{WEIGHT}` is missing"),
        (lambda r: r.pop(INPUT), "QNT003", f"`{INPUT}` is missing"),
        (
            lambda r: r.pop("matmul_3._input_1_quantizer"),
            "QNT003",
            "`matmul_3._input_1_quantizer` is missing",
        ),
        (
            lambda r: r.update({"a.b._weight_quantizer": quantizer()}),
            "QNT003",
            "`a.b._weight_quantizer` is of no linear layer of the checkpoint",
        ),
        (
            lambda r: r[WEIGHT].update(amax=np.ones(7, np.float32)),
            "QNT003",
            f"`{WEIGHT}` has an amax of float32 [7]",
        ),
        (
            lambda r: r[INPUT].update(amax=np.ones(1, np.int32)),
            "QNT003",
            f"`{INPUT}` has an amax of int32 [1]",
        ),
        (lambda r: r[INPUT].update(amax=None), "QNT001", f"asymmetric ranges: `{INPUT}`"),
        (
            lambda r: r[INPUT].update(amax=np.zeros(1, np.float32)),
            "QNT005",
            f"`{INPUT}` is zero, 1 of 1 are no scale",
        ),
        (
            lambda r: r[WEIGHT]["amax"].__setitem__(5, -448.0),
            "QNT005",
            f"`{WEIGHT}` is -1 at [5, 0], 1 of 128 are no scale",
        ),
    ],
)
def test_ranges_that_do_not_fit(
    tmp_path: Path, model: SafetensorsCheckpoint, change: Change, code: str, cause: str
) -> None:
    ranges = quantizers_of(model, layers=2)
    change(ranges)
    error = refusal(write_furiosa_directory(tmp_path, ranges), model)
    assert (error.code, causes(error)) == (code, [cause])
