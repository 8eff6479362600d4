"""compressed-tensors: targets, ignored modules, several groups, and what is refused by name."""

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
from memory_checkpoint import MemoryCheckpoint
from quantized_zoo import FP8_CACHE, write_compressed_tensors
from safetensors.torch import load_file
from small_linears import ATTENTION, MODULE, causes, describe, linear, ones, only

from furiosa_llm.errors import CompileError
from furiosa_llm.frontend.quantization.reader import read_quantization
from furiosa_llm.frontend.safetensors_checkpoint import SafetensorsCheckpoint

FP8 = {"num_bits": 8, "type": "float", "strategy": "tensor"}
GROUP = {"targets": ["Linear"], "weights": FP8}
CONFIG = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "quantization_status": "compressed",
    "config_groups": {"group_0": GROUP},
}
TENSORS = linear(weight_scale=ones(1))


def with_group(**fields: Any) -> dict[str, Any]:
    return {**CONFIG, "config_groups": {"group_0": {**GROUP, **fields}}}


def test_each_module_follows_its_own_group(tmp_path: Path) -> None:
    """Written by the library: channels in attention, blocks in the MLP, two kinds of `ignore`."""
    attention = preset_name_to_scheme("FP8_DYNAMIC", ["re:.*self_attn[.][qkvo]_proj$"])
    weights = QuantizationArgs(num_bits=8, type="float", strategy="block", block_structure=[16, 32])
    mlp = QuantizationScheme(targets=["re:.*mlp.*", "model.layers.0.mlp.up_proj"], weights=weights)
    ignore = ("lm_head", "re:.*layers[.]1[.]mlp[.]gate.*")
    directory = write_compressed_tensors(
        tmp_path, {"group_0": attention, "group_1": mlp}, ignore=ignore
    )
    found = read_quantization(directory, SafetensorsCheckpoint(directory))
    assert found is not None
    granularity = {linear.module: linear.scheme.granularity for linear in found.linears}
    tensors = load_file(directory / "model.safetensors")
    quantized = {name for name, tensor in tensors.items() if tensor.element_size() == 1}
    assert {f"{module}.weight" for module in granularity} == quantized
    assert len(granularity) == 13
    for module, kind in granularity.items():
        assert kind == ("channel" if "self_attn" in module else "block")


def test_a_preset_is_a_group(tmp_path: Path) -> None:
    config = {**CONFIG, "config_groups": {"FP8_DYNAMIC": ["Linear"]}}
    found = only(describe(tmp_path, config, linear(weight_scale=ones(6, 1))))
    assert (found.scheme.granularity, found.activation.granularity) == ("channel", "token")


def test_missing_fields_have_the_library_s_defaults(tmp_path: Path) -> None:
    args = {"num_bits": 8, "type": "float"}
    config = with_group(weights=args, input_activations=args)
    found = only(describe(tmp_path, config, {**TENSORS, f"{MODULE}.input_scale": ones(1)}))
    assert (found.scheme.granularity, found.activation.mode) == ("tensor", "static")


def test_blocks_may_be_written_as_a_text(tmp_path: Path) -> None:
    config = with_group(weights={**FP8, "strategy": "block", "block_structure": "4x8"})
    found = only(describe(tmp_path, config, linear(weight_scale=ones(2, 2))))
    assert (found.scheme.rows, found.scheme.columns) == (4, 8)


@pytest.mark.parametrize("ignored", [MODULE, "re:.*k_proj", "Linear"])
def test_ignored_modules_are_plain(tmp_path: Path, ignored: str) -> None:
    plain = {f"{MODULE}.weight": np.ones((6, 16), ml_dtypes.bfloat16)}
    found = describe(tmp_path, {**CONFIG, "ignore": [ignored]}, plain)
    assert found is not None
    assert found.linears == ()


def test_dynamic_activations_may_have_one_scale(tmp_path: Path) -> None:
    config = with_group(input_activations={**FP8, "dynamic": True})
    activation = only(describe(tmp_path, config, TENSORS)).activation
    assert (activation.mode, activation.granularity) == ("dynamic", "tensor")


INT8 = {"num_bits": 8, "type": "int", "strategy": "channel"}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"weights": None}, "quantised activations of unquantised weights"),
        ({"weights": INT8}, "INT8 weights"),
        ({"weights": {**FP8, "symmetric": False}}, "asymmetric FP8 weights"),
        ({"weights": {**FP8, "dynamic": True}}, "FP8 weights"),
        ({"weights": {**INT8, "num_bits": 4}}, "INT4 weights"),
        (
            {"weights": {**FP8, "num_bits": 4, "strategy": "tensor_group", "group_size": 16}},
            "FP4 weights",
        ),
        (
            {"weights": {**FP8, "strategy": "tensor_group", "group_size": 16}},
            "weights with a scale per tensor_group",
        ),
        ({"input_activations": {**INT8, "strategy": "tensor"}}, "INT8 activations"),
        (
            {"input_activations": {**FP8, "strategy": "group", "group_size": 8}},
            "static activations with a scale per group",
        ),
        (
            {"input_activations": {**FP8, "strategy": "attn_head"}},
            "activations with a scale per attn_head",
        ),
        ({"output_activations": FP8}, "quantised outputs of linear layers"),
        ({"format": "mxfp8-quantized"}, "mxfp8-quantized"),
    ],
)
def test_other_groups_are_refused_by_name(
    tmp_path: Path, fields: dict[str, Any], named: str
) -> None:
    with pytest.raises(CompileError) as caught:
        describe(tmp_path, with_group(**fields), TENSORS)
    assert caught.value.code == "QNT001"
    assert causes(caught.value) == [f"{named}: `{MODULE}.weight`"]


@pytest.mark.parametrize("target", ["LlamaAttention", "re:.*self_attn$", ATTENTION])
def test_groups_of_attention_modules_are_refused_by_name(tmp_path: Path, target: str) -> None:
    queries = {"targets": [target], "input_activations": FP8}
    config = {**CONFIG, "config_groups": {"group_0": GROUP, "group_1": queries}}
    with pytest.raises(CompileError) as caught:
        describe(tmp_path, config, {**TENSORS, f"{ATTENTION}.q_scale": ones(1)})
    assert caught.value.code == "QNT001"
    assert causes(caught.value) == [
        f"quantised queries of attention (target `{target}`): `{ATTENTION}.q_scale`"
    ]


EMBEDDINGS = "model.embed_tokens"


@pytest.mark.parametrize("target", ["Embedding", "re:.*embed.*", EMBEDDINGS])
def test_embeddings_are_refused_by_name(tmp_path: Path, target: str) -> None:
    """Whether they are codes already, or there are no codes to see yet."""
    config = with_group(targets=["Linear", target])
    for dtype in (ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16):
        table = {f"{EMBEDDINGS}.weight": np.ones((4, 8), dtype)}
        with pytest.raises(CompileError) as caught:
            describe(tmp_path, config, {**TENSORS, **table})
        assert caught.value.code == "QNT001"
        assert causes(caught.value) == [f"quantised embeddings: `{EMBEDDINGS}.weight`"]
        ignoring = {**config, "ignore": [EMBEDDINGS]}
        if dtype == ml_dtypes.bfloat16:
            assert only(describe(tmp_path, ignoring, {**TENSORS, **table})).module == MODULE


@pytest.mark.parametrize("target", ["re:.*self_attn.*", "re:model.layers.*", MODULE])
def test_a_group_may_name_linears_by_the_module_that_they_are_in(
    tmp_path: Path, target: str
) -> None:
    config = with_group(targets=[target])
    assert only(describe(tmp_path, config, TENSORS)).module == MODULE


def test_caches_may_be_all_that_is_quantised(tmp_path: Path) -> None:
    """The library then calls the format dense."""
    directory = write_compressed_tensors(tmp_path, {}, kv_cache_scheme=FP8_CACHE)
    found = read_quantization(directory, SafetensorsCheckpoint(directory))
    assert found is not None
    assert (len(found.linears), len(found.caches)) == (0, 2)


def test_weights_in_a_dense_format_are_not_quantised(tmp_path: Path) -> None:
    with pytest.raises(CompileError) as caught:
        describe(tmp_path, {**CONFIG, "format": "dense"}, TENSORS)
    assert causes(caught.value) == ["compressed-tensors dense: the model as a whole"]


def test_the_older_names_of_a_cache_s_scales(tmp_path: Path) -> None:
    scales = {f"{MODULE}.output_scale": ones(1), f"{ATTENTION}.v_proj.output_scale": ones(1)}
    found = describe(tmp_path, {**CONFIG, "kv_cache_scheme": FP8}, {**TENSORS, **scales})
    assert found is not None
    (cache,) = found.caches
    assert (cache.key_scale.name, cache.value_scale.name) == tuple(scales)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"format": "pack-quantized"}, "compressed-tensors pack-quantized"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity sparse-24-bitmask"),
        ({"transform_config": {"config_groups": {}}}, "transforms of weights (transform_config)"),
    ],
)
def test_other_models_are_refused_by_name(
    tmp_path: Path, fields: dict[str, Any], named: str
) -> None:
    with pytest.raises(CompileError) as caught:
        describe(tmp_path, {**CONFIG, **fields}, TENSORS)
    assert caught.value.code == "QNT001"
    assert causes(caught.value) == [f"{named}: the model as a whole"]


@pytest.mark.parametrize(
    ("scheme", "named"),
    [
        ({**INT8, "strategy": "tensor"}, "INT8 KV cache, static, a scale per tensor"),
        ({**FP8, "dynamic": True}, "FP8 KV cache, dynamic, a scale per tensor"),
        ({**FP8, "strategy": "channel"}, "FP8 KV cache, static, a scale per channel"),
    ],
)
def test_other_caches_are_refused_by_name(
    tmp_path: Path, scheme: dict[str, Any], named: str
) -> None:
    with pytest.raises(CompileError) as caught:
        describe(tmp_path, {**CONFIG, "kv_cache_scheme": scheme}, TENSORS)
    assert caught.value.code == "QNT001"
    assert causes(caught.value) == [f"{named}: the model as a whole"]


@pytest.mark.parametrize(
    "fields",
    [
        {"config_groups": None},
        {"config_groups": {"no such preset": ["Linear"]}},
        {"config_groups": {"group_0": {**GROUP, "targets": ["re:("]}}},
        {"config_groups": {"group_0": {**GROUP, "weights": {"num_bits": "many"}}}},
        {"config_groups": {"group_0": {**GROUP, "weights": {**FP8, "strategy": "block"}}}},
        {"ignore": ["re:("]},
        {"sparsity_config": 3},
    ],
)
def test_a_config_that_the_library_cannot_read(tmp_path: Path, fields: dict[str, Any]) -> None:
    with pytest.raises(CompileError) as caught:
        describe(tmp_path, {**CONFIG, **fields}, TENSORS)
    assert caught.value.code == "QNT002"


def test_the_older_name_of_the_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"compression_config": {"quant_method": 1}}')
    with pytest.raises(CompileError) as caught:
        read_quantization(tmp_path, MemoryCheckpoint(TENSORS))
    assert caught.value.cause == "`quant_method` is 1, not a text"


def test_scales_of_a_cache_that_the_config_does_not_quantise(tmp_path: Path) -> None:
    scales = {f"{ATTENTION}.k_scale": ones(1), f"{ATTENTION}.v_scale": ones(1)}
    with pytest.raises(CompileError) as caught:
        describe(tmp_path, CONFIG, {**TENSORS, **scales})
    assert caught.value.code == "QNT003"
    assert causes(caught.value) == [f"`{name}` scales nothing that is quantised" for name in scales]
