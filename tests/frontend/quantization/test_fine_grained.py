"""Fine-grained FP8: partial blocks, weights without blocks, what stays unquantised."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_linears import MODULE, causes, describe, linear, ones, only
from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight
from transformers.quantizers.quantizers_utils import should_convert_module

from furiosa_llm.errors import CompileError
from furiosa_llm.frontend.quantization.dequantize import dequantize
from furiosa_llm.frontend.quantization.fine_grained import compile_entries, is_kept
from furiosa_llm.models.quantization import DYNAMIC_TOKEN, STATIC_TENSOR, per_block

BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [4, 8]}


def test_partial_blocks_at_the_edges_have_their_own_scale(tmp_path: Path) -> None:
    tensors = linear(shape=(6, 20), weight_scale_inv=ones(2, 3))
    found = only(describe(tmp_path, BLOCKS, tensors))
    assert found.scale.grid == (2, 3)
    assert found.scheme.block_of(found.shape) == (4, 8)
    assert found.activation.group_size == 8


@pytest.mark.parametrize("alias", ["scale", "qscale_weight"])
def test_other_names_of_the_scale(tmp_path: Path, alias: str) -> None:
    tensors = {**linear(shape=(4, 8)), f"{MODULE}.{alias}": ones(1, 1)}
    found = only(describe(tmp_path, BLOCKS, tensors))
    assert found.scale.name == f"{MODULE}.{alias}"


def test_two_scales_of_one_weight_are_one_too_many(tmp_path: Path) -> None:
    tensors = linear(shape=(4, 8), scale=ones(1, 1), weight_scale_inv=ones(1, 1))
    with pytest.raises(CompileError) as caught:
        describe(tmp_path, BLOCKS, tensors)
    assert caught.value.code == "QNT003"
    assert causes(caught.value) == [f"`{MODULE}.scale` scales nothing that is quantised"]


@pytest.mark.parametrize(
    ("mode", "scales", "activation"),
    [
        ("dynamic", {}, DYNAMIC_TOKEN),
        ("static", {"activation_scale": ones()}, STATIC_TENSOR),
    ],
)
def test_a_weight_without_blocks_has_one_scale(
    tmp_path: Path, mode: str, scales: dict[str, Any], activation: object
) -> None:
    config = {**BLOCKS, "weight_block_size": None, "activation_scheme": mode}
    found = only(describe(tmp_path, config, linear(weight_scale_inv=ones(), **scales)))
    assert (found.scheme.granularity, found.activation) == ("tensor", activation)


def test_weights_with_partial_blocks_may_stay_as_they_are(tmp_path: Path) -> None:
    plain = {f"{MODULE}.weight": np.ones((6, 16), ml_dtypes.bfloat16)}
    quantized = linear("model.layers.0.mlp.up_proj", (4, 8), weight_scale_inv=ones(1, 1))
    assert only(describe(tmp_path, BLOCKS, {**plain, **quantized})).shape == (4, 8)


def test_the_output_head_stays_unless_a_list_says_else(tmp_path: Path) -> None:
    head = {"lm_head.weight": np.ones((8, 16), ml_dtypes.bfloat16)}
    tensors = {**head, **linear(shape=(4, 8), weight_scale_inv=ones(1, 1))}
    assert only(describe(tmp_path, BLOCKS, tensors)).module == MODULE
    with pytest.raises(CompileError) as caught:
        describe(tmp_path, {**BLOCKS, "ignored_layers": ["other"]}, tensors)
    assert caught.value.code == "QNT004"
    assert causes(caught.value) == ["`lm_head.weight` is BF16, the config quantises it"]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"weight_block_size": [4]}, "`weight_block_size` is [4], not two integers"),
        ({"weight_block_size": [4, 0]}, "at least one row and column"),
        ({"activation_scheme": "local"}, "`activation_scheme` is 'local'"),
        ({"activation_scheme": 3}, "`activation_scheme` is 3, not a text"),
        ({"modules_to_not_convert": "lm_head"}, "not a list of names"),
        ({"modules_to_not_convert": ["(lm_head"]}, "missing )"),
        ({"scale_fmt": "ue4m3"}, "`scale_fmt` is 'ue4m3', not float or ue8m0"),
        ({"fmt": "e5m2"}, "`fmt` is 'e5m2', not e4m3"),
        ({"quant_method": None}, "`quant_method` is None, not a text"),
    ],
)
def test_a_config_without_meaning(tmp_path: Path, fields: dict[str, Any], named: str) -> None:
    with pytest.raises(CompileError) as caught:
        describe(tmp_path, {**BLOCKS, **fields}, linear(shape=(4, 8), weight_scale_inv=ones(1, 1)))
    assert (caught.value.code, named in caught.value.cause) == ("QNT002", True)


def test_quantised_embeddings_are_refused_by_name(tmp_path: Path) -> None:
    config = {**BLOCKS, "modules_to_convert": ["embed_tokens"]}
    with pytest.raises(CompileError) as caught:
        describe(tmp_path, config, linear(shape=(4, 8), weight_scale_inv=ones(1, 1)))
    assert caught.value.code == "QNT001"
    assert causes(caught.value) == [
        "quantised embeddings (modules_to_convert): `model.embed_tokens.weight`"
    ]


@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    block=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    seed=st.integers(0, 99),
)
def test_partial_blocks_have_the_library_s_values(
    rows: int, columns: int, block: tuple[int, int], seed: int
) -> None:
    """Both products are exact in f64, and transformers rounds its own once to f32."""
    scheme = per_block(*block)
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 0x7F, (rows, columns), np.uint8) | rng.choice(
        [0, 0x80], (rows, columns)
    )
    scales = rng.uniform(1e-3, 2, scheme.grid_of((rows, columns))).astype(np.float32)
    theirs = _dequantize_fp8_weight(
        torch.from_numpy(codes.astype(np.uint8)).view(torch.float8_e4m3fn),
        torch.from_numpy(scales),
        list(block),
        torch.float32,
    )
    ours = dequantize(codes.astype(np.uint8).view(ml_dtypes.float8_e4m3fn), scheme, scales)
    np.testing.assert_array_equal(ours.astype(np.float32), theirs.numpy())


NAMES = st.lists(st.sampled_from(["model", "layers", "1", "11", "mlp", "gate", "gate_proj"]))
ENTRIES = st.sampled_from(
    [
        "gate",
        "gate_proj",
        "layers.1",
        "model.layers.1",
        "mlp.gate",
        ".*gate",
        "layers.*",
        "model|mlp",
    ]
)


@given(parts=NAMES, entries=st.lists(ENTRIES, max_size=3))
def test_exclusion_is_that_of_transformers(parts: list[str], entries: list[str]) -> None:
    name = ".".join(parts)
    assert is_kept(name, compile_entries(entries)) == (not should_convert_module(name, entries))


def test_an_entry_that_is_no_expression() -> None:
    with pytest.raises(re.error):
        compile_entries(["("])
