"""AutoFP8: the static form, and how it is told from the other format called `fp8`."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from small_linears import ATTENTION, MODULE, causes, describe, linear, ones, only

from furiosa_llm.errors import CompileError

CONFIG = {"quant_method": "fp8", "activation_scheme": "static"}
TENSORS = linear(weight_scale=ones(), input_scale=ones(1))


def test_names_of_tensors_tell_the_formats_apart(tmp_path: Path) -> None:
    found = describe(tmp_path, CONFIG, TENSORS)
    assert found is not None
    assert found.format == "autofp8"
    other = linear(weight_scale_inv=ones(), activation_scale=ones())
    fine_grained = describe(tmp_path, CONFIG, other)
    assert fine_grained is not None
    assert fine_grained.format == "fine-grained-fp8"


def test_dynamic_activations_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CompileError) as caught:
        describe(tmp_path, {**CONFIG, "activation_scheme": "dynamic"}, TENSORS)
    assert caught.value.code == "QNT001"
    assert causes(caught.value) == [f"AutoFP8 with dynamic activations: `{MODULE}.weight_scale`"]


def test_the_output_head_stays_unless_a_list_says_else(tmp_path: Path) -> None:
    head = {"lm_head.weight": np.ones((8, 16), ml_dtypes.bfloat16)}
    assert only(describe(tmp_path, CONFIG, {**head, **TENSORS})).module == MODULE
    with pytest.raises(CompileError) as caught:
        describe(tmp_path, {**CONFIG, "ignored_layers": []}, {**head, **TENSORS})
    assert causes(caught.value) == ["`lm_head.weight` is BF16, the config quantises it"]


def test_one_scale_may_serve_keys_and_values(tmp_path: Path) -> None:
    found = describe(tmp_path, CONFIG, {**TENSORS, f"{ATTENTION}.kv_scale": ones()})
    assert found is not None
    (cache,) = found.caches
    assert cache.key_scale == cache.value_scale


def test_the_config_may_ask_for_scales_of_caches(tmp_path: Path) -> None:
    config = {**CONFIG, "kv_cache_scheme": "static"}
    found = describe(tmp_path, config, {**TENSORS, f"{ATTENTION}.kv_scale": ones()})
    assert found is not None
    assert len(found.caches) == 1
    with pytest.raises(CompileError) as caught:
        describe(tmp_path, config, TENSORS)
    assert (caught.value.code, f"`{ATTENTION}.k_scale` is missing" in caught.value.cause) == (
        "QNT003",
        True,
    )


def test_a_cache_that_is_not_static(tmp_path: Path) -> None:
    with pytest.raises(CompileError) as caught:
        describe(tmp_path, {**CONFIG, "kv_cache_scheme": "dynamic"}, TENSORS)
    assert caught.value.code == "QNT002"
    assert caught.value.cause == "`kv_cache_scheme` is 'dynamic', not static"


def test_keys_without_values(tmp_path: Path) -> None:
    with pytest.raises(CompileError) as caught:
        describe(tmp_path, CONFIG, {**TENSORS, f"{ATTENTION}.k_scale": ones()})
    assert caught.value.code == "QNT003"
    assert causes(caught.value) == [
        f"`{ATTENTION}.v_scale` is missing: the scale of the values of `{ATTENTION}`"
    ]
