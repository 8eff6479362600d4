"""What holds for checkpoints of every format, as the original libraries write them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from memory_checkpoint import MemoryCheckpoint
from quantized_zoo import dequantize_by_library
from safetensors.torch import load_file

from furiosa_llm.errors import CompileError
from furiosa_llm.frontend.quantization.codes import facts_of
from furiosa_llm.frontend.quantization.dequantize import dequantize
from furiosa_llm.frontend.quantization.reader import read_quantization
from furiosa_llm.frontend.quantization.scales import (
    check_scale_values,
    described_scales,
    multipliers,
)
from furiosa_llm.frontend.safetensors_checkpoint import SafetensorsCheckpoint
from furiosa_llm.models.quantization import Quantization

Zoo = Callable[[str], Path]

EXPECTED: Mapping[str, tuple[str, str, str, str | None, bool]] = {
    "ct-tensor": ("compressed-tensors", "tensor", "static", "tensor", True),
    "ct-channel": ("compressed-tensors", "channel", "dynamic", "token", False),
    "ct-block": ("compressed-tensors", "block", "dynamic", "group", False),
    "ct-group": ("compressed-tensors", "group", "none", None, False),
    "ct-partial": ("compressed-tensors", "block", "none", None, False),
    "ct-fused": ("compressed-tensors", "channel", "dynamic", "token", True),
    "ct-tied": ("compressed-tensors", "tensor", "static", "tensor", False),
    "fine-grained": ("fine-grained-fp8", "block", "dynamic", "group", False),
    "fine-grained-e8m0": ("fine-grained-fp8", "block", "dynamic", "group", False),
    "autofp8": ("autofp8", "tensor", "static", "tensor", False),
    "autofp8-kv": ("autofp8", "tensor", "static", "tensor", True),
    "modelopt-fp8": ("modelopt", "tensor", "static", "tensor", False),
    "modelopt-fp8_kv": ("modelopt", "tensor", "static", "tensor", True),
    "modelopt-per_channel_per_token": ("modelopt", "channel", "dynamic", "token", False),
    "modelopt-block": ("modelopt", "block", "none", None, False),
}
"""Kind -> format, granularity of weights, activations: mode and granularity, quantised caches."""

every_kind = pytest.mark.parametrize("kind", EXPECTED)


def describe(directory: Path) -> Quantization:
    quantization = read_quantization(directory, SafetensorsCheckpoint(directory))
    assert quantization is not None
    return quantization


@every_kind
def test_the_description_says_what_the_library_did(quantized: Zoo, kind: str) -> None:
    found = describe(quantized(kind))
    layers = {linear.module.rpartition(".self_attn")[0] for linear in found.linears} - {""}
    assert len(found.linears) == (4 if kind == "ct-fused" else 7) * len(layers)
    for linear in found.linears:
        activation = linear.activation
        described = (
            found.format,
            linear.scheme.granularity,
            activation.mode,
            activation.granularity,
            bool(found.caches),
        )
        assert described == EXPECTED[kind]
        assert (linear.input_scale is not None) == (activation.mode == "static")
        assert linear.storage == "e4m3"
    assert len(found.caches) in (0, len(layers))
    assert not found.assumptions


@every_kind
def test_every_8_bit_tensor_and_every_scale_is_described(quantized: Zoo, kind: str) -> None:
    tensors = load_file(quantized(kind) / "model.safetensors")
    plain = {"embed_tokens", "lm_head", "norm", "input_layernorm", "post_attention_layernorm"}
    special = {
        name for name in tensors if name.split(".")[-2] not in plain and not name.endswith(".bias")
    }
    found = describe(quantized(kind))
    assert {linear.weight for linear in found.linears} | set(described_scales(found)) == special


@every_kind
def test_describing_reads_no_tensor(quantized: Zoo, kind: str) -> None:
    class Unreadable(MemoryCheckpoint):
        def read(self, name: str) -> Any:
            raise AssertionError(f"{name} was read")

    checkpoint = Unreadable(in_memory(quantized(kind)).arrays)
    assert read_quantization(quantized(kind), checkpoint) == describe(quantized(kind))


@every_kind
def test_values_are_exactly_codes_times_scales(quantized: Zoo, kind: str) -> None:
    """Against torch, which spreads the scales by repeating them."""
    checkpoint = SafetensorsCheckpoint(quantized(kind))
    tensors = load_file(quantized(kind) / "model.safetensors")
    quantization = describe(quantized(kind))
    check_scale_values(quantization, checkpoint.path, checkpoint.read)
    for linear in quantization.linears:
        scale = tensors[linear.scale.name].double().reshape(linear.scale.grid)
        rows, columns = linear.scheme.block_of(linear.shape)
        spread = scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
        expected = tensors[linear.weight].double() * spread[: linear.shape[0], : linear.shape[1]]
        codes = checkpoint.read(linear.weight)
        values = dequantize(codes, linear.scheme, multipliers(linear.scale, checkpoint.read))
        np.testing.assert_array_equal(values, expected.numpy())
        # Quantisers scale by the largest weight, so the largest code is there, give or take bf16.
        assert 416 <= facts_of(codes).largest <= 448 or linear.scale.dtype == "e8m0"


@pytest.mark.parametrize(
    "kind", [kind for kind in EXPECTED if kind.startswith(("ct-", "fine-grained"))]
)
def test_values_are_what_the_library_makes_of_them(quantized: Zoo, kind: str) -> None:
    """Both multiply exactly, or in f32, and round once to the type of their result."""
    expected = dequantize_by_library(quantized(kind))
    checkpoint = SafetensorsCheckpoint(quantized(kind))
    for linear in describe(quantized(kind)).linears:
        scale = multipliers(linear.scale, checkpoint.read)
        values = dequantize(checkpoint.read(linear.weight), linear.scheme, scale)
        theirs = expected[linear.weight]
        dtype = np.dtype(ml_dtypes.bfloat16 if theirs.dtype == torch.bfloat16 else np.float32)
        ours = values.astype(np.float32).astype(dtype).astype(np.float32)
        np.testing.assert_array_equal(ours, theirs.float().numpy())


# --- a scale that is missing, extra, misshapen, or no scale ---


def in_memory(directory: Path) -> MemoryCheckpoint:
    return MemoryCheckpoint.copy_of(SafetensorsCheckpoint(directory))


def refusal(directory: Path, checkpoint: MemoryCheckpoint) -> CompileError:
    """What describing a checkpoint and checking its scales raises."""

    def read() -> None:
        quantization = read_quantization(directory, checkpoint)
        assert quantization is not None
        check_scale_values(quantization, checkpoint.path, checkpoint.read)

    with pytest.raises(CompileError) as caught:
        read()
    return caught.value


def causes(error: CompileError) -> list[str]:
    """The lines of an error's cause."""
    return [line.removeprefix("    - ") for line in error.cause.splitlines()[1:]]


def one_scale_of_each_use(directory: Path) -> list[str]:
    """Names of scales that no two share their last part."""
    by_use = {name.rpartition(".")[2]: name for name in described_scales(describe(directory))}
    return list(by_use.values())


@every_kind
def test_a_missing_scale_is_named(quantized: Zoo, kind: str) -> None:
    whole = in_memory(quantized(kind))
    for name in one_scale_of_each_use(quantized(kind)):
        error = refusal(quantized(kind), whole.changed(name, None))
        if name.endswith("kv_scale"):  # its first name is that of keys
            name = name.replace("kv_scale", "k_scale")
        assert (error.code, f"`{name}` is missing" in error.cause) == ("QNT003", True)


@every_kind
def test_a_scale_that_scales_nothing_is_named(quantized: Zoo, kind: str) -> None:
    whole = in_memory(quantized(kind))
    extra = "model.layers.0.self_attn.q_proj.output_scale"
    error = refusal(quantized(kind), whole.changed(extra, np.ones(1, np.float32)))
    assert error.code == "QNT003"
    assert causes(error) == [f"`{extra}` scales nothing that is quantised"]


@every_kind
def test_a_renamed_scale_is_missing_and_extra(quantized: Zoo, kind: str) -> None:
    whole = in_memory(quantized(kind))
    name = describe(quantized(kind)).linears[3].scale.name
    renamed = whole.changed(name, None).changed(f"{name}.scale", whole.arrays[name])
    error = refusal(quantized(kind), renamed)
    assert error.code == "QNT003"
    assert f"`{name}` is missing" in error.cause
    assert f"`{name}.scale` scales nothing" in error.cause


@every_kind
def test_a_misshapen_scale_is_named(quantized: Zoo, kind: str) -> None:
    whole = in_memory(quantized(kind))
    for name in one_scale_of_each_use(quantized(kind)):
        longer = np.ones((*whole.arrays[name].shape, 3), whole.arrays[name].dtype)
        error = refusal(quantized(kind), whole.changed(name, longer))
        assert (error.code, f"`{name}` has the shape" in error.cause) == ("QNT003", True)


@every_kind
def test_a_scale_of_integers_is_named(quantized: Zoo, kind: str) -> None:
    name = describe(quantized(kind)).linears[0].scale.name
    integers = np.ones(in_memory(quantized(kind)).arrays[name].shape, np.int16)
    error = refusal(quantized(kind), in_memory(quantized(kind)).changed(name, integers))
    assert error.code == "QNT003"
    assert causes(error) == [f"`{name}` is I16, no type of a scale"]


@every_kind
@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf])
def test_a_number_that_is_no_scale_is_named(quantized: Zoo, kind: str, value: float) -> None:
    whole = in_memory(quantized(kind))
    for name in one_scale_of_each_use(quantized(kind)):
        array = whole.arrays[name].copy()
        if array.dtype == ml_dtypes.float8_e8m0fnu and not np.isnan(value):
            continue  # powers of two and NaN are all that it has
        array.reshape(-1)[-1] = value
        error = refusal(quantized(kind), whole.changed(name, array))
        assert (error.code, f"`{name}` is " in error.cause) == ("QNT005", True)


# --- config and tensors that contradict each other ---


@every_kind
def test_a_weight_that_is_not_quantised_after_all_is_named(quantized: Zoo, kind: str) -> None:
    whole = in_memory(quantized(kind))
    name = describe(quantized(kind)).linears[0].weight
    plain = whole.arrays[name].astype(np.float32).astype(ml_dtypes.bfloat16)
    error = refusal(quantized(kind), whole.changed(name, plain))
    assert (error.code, f"`{name}` is BF16" in error.cause) == ("QNT004", True)


@every_kind
def test_a_weight_that_the_config_leaves_out_is_named(quantized: Zoo, kind: str) -> None:
    whole = in_memory(quantized(kind))
    codes = np.ones((4, 4), ml_dtypes.float8_e4m3fn)
    error = refusal(quantized(kind), whole.changed("lm_head.weight", codes))
    assert error.code == "QNT004"
    assert causes(error) == ["`lm_head.weight` is F8_E4M3, the config leaves it out"]


@every_kind
def test_8_bit_codes_that_no_linear_owns_are_named(quantized: Zoo, kind: str) -> None:
    whole = in_memory(quantized(kind))
    name = "model.norm.weight"
    codes = whole.arrays[name].astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
    error = refusal(quantized(kind), whole.changed(name, codes))
    assert error.code == "QNT004"
    assert causes(error) == [f"`{name}` is F8_E4M3 and no linear layer's weight"]
