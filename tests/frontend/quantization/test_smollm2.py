"""SmolLM2-135M in three formats: nothing of a real model's checkpoint is lost (minutes)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from compressed_tensors.quantization import preset_name_to_scheme
from quantized_zoo import (
    FP8_CACHE,
    WEIGHTS_FILE,
    quantize_autofp8,
    quantize_by_library,
    quantize_fine_grained,
)
from safetensors import safe_open

from furiosa_llm.artifact.ledger import LEDGER_FILE, check_complete, check_losses, make_ledger
from furiosa_llm.frontend.quantization.codes import check_codes
from furiosa_llm.frontend.quantization.dequantize import dequantize
from furiosa_llm.frontend.quantization.reader import read_quantization
from furiosa_llm.frontend.quantization.scales import (
    check_scale_values,
    described_scales,
    multipliers,
)
from furiosa_llm.frontend.safetensors_checkpoint import SafetensorsCheckpoint
from furiosa_llm.frontend.source import open_model
from furiosa_llm.models.demo import demo_model_path

LINEARS, LAYERS = 210, 30


def smollm2() -> Any:
    """The demo model in bf16."""
    source = open_model(demo_model_path())
    tensors = source.checkpoint.tensors
    state = {
        name: torch.from_numpy(source.checkpoint.read(name).astype(np.float32)) for name in tensors
    }
    model: Any = transformers.LlamaForCausalLM(source.config)
    model.load_state_dict(state, strict=False)
    model.tie_weights()
    return model.to(torch.bfloat16).eval()


def by_compressed_tensors(directory: Path) -> Path:
    """W8A8KV8, all static, one scale each."""
    groups = {"group_0": preset_name_to_scheme("FP8", ["Linear"])}
    return quantize_by_library(smollm2(), directory, groups, kv_cache_scheme=FP8_CACHE)


def by_transformers(directory: Path) -> Path:
    """Blocks of 64, which divide all its weights."""
    smollm2().save_pretrained(directory)
    return quantize_fine_grained(directory, (64, 64))


def by_autofp8(directory: Path) -> Path:
    smollm2().save_pretrained(directory)
    return quantize_autofp8(directory, cache=True)


WRITERS: Mapping[str, tuple[Callable[[Path], Path], int]] = {
    "compressed-tensors": (by_compressed_tensors, 3 * LINEARS + 2 * LAYERS),
    "fine-grained-fp8": (by_transformers, 2 * LINEARS),
    "autofp8": (by_autofp8, 3 * LINEARS + LAYERS),
}
"""Format -> writes the checkpoint; how many of its tensors are codes and scales."""


@pytest.mark.long
@pytest.mark.parametrize("kind", WRITERS)
def test_every_row_is_exact_and_its_values_are_the_stored_ones(tmp_path: Path, kind: str) -> None:
    write, special = WRITERS[kind]
    checkpoint = SafetensorsCheckpoint(write(tmp_path))
    found = read_quantization(tmp_path, checkpoint)
    assert found is not None
    assert (found.format, len(found.linears)) == (kind, LINEARS)
    assert len(described_scales(found)) + LINEARS == special
    check_scale_values(found, checkpoint.path, checkpoint.read)
    made = make_ledger(found, checkpoint.tensors, {}, check_codes(found, checkpoint))
    assert check_losses(made, []) == ()

    codes_seen: set[int] = set()
    with safe_open(tmp_path / WEIGHTS_FILE, "pt") as file:
        check_complete(made, file.keys(), LEDGER_FILE)
        for linear in found.linears:
            codes = checkpoint.read(linear.weight)
            scale = file.get_tensor(linear.scale.name).double().reshape(linear.scale.grid)
            rows, columns = linear.scheme.block_of(linear.shape)
            spread = scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
            expected = file.get_tensor(linear.weight).double() * spread
            values = dequantize(codes, linear.scheme, multipliers(linear.scale, checkpoint.read))
            np.testing.assert_array_equal(values, expected.numpy())
            codes_seen.update(np.unique(codes.view(np.uint8)).tolist())
    numbers = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    # Small blocks have no negative weight so small that its code is -0.
    assert codes_seen | {0x80} == set(np.flatnonzero(np.isfinite(numbers)).tolist())
