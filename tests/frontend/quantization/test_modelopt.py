"""ModelOpt: two places for the config, globs, and blocks whose size nobody says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_linears import ATTENTION, MODULE, causes, describe, linear, ones, only

from furiosa_llm.errors import CompileError
from furiosa_llm.frontend.quantization.config_fields import excluded_by_globs
from furiosa_llm.frontend.quantization.modelopt import BLOCK_SIZES, Grid, block_size_of

FP8 = {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]}
EMBEDDED = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}
TENSORS = linear(weight_scale=ones(), input_scale=ones())


def test_either_place_says_the_same(tmp_path: Path) -> None:
    embedded = only(describe(tmp_path, EMBEDDED, TENSORS))
    assert only(describe(tmp_path, None, TENSORS, FP8)) == embedded
    assert only(describe(tmp_path, EMBEDDED, TENSORS, FP8)) == embedded


def test_the_order_of_modules_does_not_matter(tmp_path: Path) -> None:
    names = ["lm_head", "model.embed*"]
    file = {**FP8, "exclude_modules": names}
    embedded = {**EMBEDDED, "ignore": names[::-1]}
    assert only(describe(tmp_path, embedded, TENSORS, file)).module == MODULE


@pytest.mark.parametrize(
    ("file", "named"),
    [
        ({**FP8, "quant_algo": "fp8_pb_wo"}, "`quant_algo` is 'fp8_pb_wo' here and 'FP8' in"),
        ({**FP8, "kv_cache_quant_algo": "FP8"}, "`kv_cache_quant_algo` is 'FP8' here and None in"),
        ({**FP8, "exclude_modules": []}, "`exclude_modules` is [] here and ['lm_head'] in"),
        ({**FP8, "exclude_modules": 5}, "`exclude_modules` is 5 here"),
    ],
)
def test_two_places_that_disagree(tmp_path: Path, file: dict[str, Any], named: str) -> None:
    with pytest.raises(CompileError) as caught:
        describe(tmp_path, EMBEDDED, TENSORS, file)
    assert (caught.value.code, named in caught.value.cause) == ("QNT002", True)


def test_a_file_of_another_method(tmp_path: Path) -> None:
    with pytest.raises(CompileError) as caught:
        describe(tmp_path, {"quant_method": "fp8"}, TENSORS, FP8)
    assert (caught.value.code, "method `fp8`" in caught.value.cause) == ("QNT002", True)


def test_files_that_are_no_config(tmp_path: Path) -> None:
    file = tmp_path / "hf_quant_config.json"
    for text in ("{", "[]", "{}", '{"quantization": 1}', "[" * 100_000):
        file.write_text(text)
        with pytest.raises(CompileError) as caught:
            describe(tmp_path, None, TENSORS)
        assert (caught.value.code, caught.value.at) == ("QNT002", str(file))


@pytest.mark.parametrize(
    ("patterns", "excluded"),
    [
        (["lm_head"], False),
        ([MODULE], True),
        ([ATTENTION], True),
        ([f"{ATTENTION}*"], True),
        (["*k_proj"], True),
        (["model.layers.?.self_attn.k_proj"], True),
        (["model.layers.0.self"], False),
        (["*.K_proj"], False),
    ],
)
def test_patterns_name_modules_and_what_they_are_part_of(
    patterns: list[str], excluded: bool
) -> None:
    assert excluded_by_globs(MODULE, patterns) == excluded


def test_excluded_modules_are_plain(tmp_path: Path) -> None:
    plain = {f"{ATTENTION}.q_proj.weight": np.ones((6, 16), ml_dtypes.bfloat16)}
    config = {**FP8, "exclude_modules": ["*q_proj"]}
    assert only(describe(tmp_path, None, {**plain, **TENSORS}, config)).module == MODULE


@pytest.mark.parametrize(
    "algorithm", ["NVFP4", "W4A8_AWQ", "MIXED_PRECISION", "W8A8_SQ_PER_CHANNEL"]
)
def test_other_algorithms_are_refused_by_name(tmp_path: Path, algorithm: str) -> None:
    with pytest.raises(CompileError) as caught:
        describe(tmp_path, None, TENSORS, {**FP8, "quant_algo": algorithm})
    assert caught.value.code == "QNT001"
    assert causes(caught.value) == [f"modelopt {algorithm}: `{MODULE}.weight_scale`"]


def test_other_caches_are_refused_by_name(tmp_path: Path) -> None:
    integer = {**EMBEDDED, "kv_cache_scheme": {"num_bits": 8, "type": "int", "dynamic": False}}
    for config, file in ((None, {**FP8, "kv_cache_quant_algo": "NVFP4"}), (integer, None)):
        with pytest.raises(CompileError) as caught:
            describe(tmp_path, config, TENSORS, file)
        assert caught.value.code == "QNT001"
        assert "modelopt KV cache" in caught.value.message
        (tmp_path / "hf_quant_config.json").unlink(missing_ok=True)


@pytest.mark.parametrize("key", ["weights", "input_activations"])
def test_groups_that_are_not_what_the_algorithm_says(tmp_path: Path, key: str) -> None:
    args = {"num_bits": 8, "type": "float", "dynamic": False}
    group = {"weights": args, "input_activations": args, "targets": ["Linear"]}
    config = {**EMBEDDED, "config_groups": {"group_0": group}}
    assert only(describe(tmp_path, config, TENSORS)).module == MODULE
    group[key] = {**args, "num_bits": 4}
    with pytest.raises(CompileError) as caught:
        describe(tmp_path, config, TENSORS)
    assert caught.value.code == "QNT001"
    assert f"modelopt {key} {group[key]} (group_0)" in caught.value.cause


def test_a_cache_in_fp8_needs_its_scales(tmp_path: Path) -> None:
    config = {**EMBEDDED, "kv_cache_scheme": {"num_bits": 8, "type": "float", "dynamic": False}}
    with pytest.raises(CompileError) as caught:
        describe(tmp_path, config, TENSORS)
    assert causes(caught.value) == [
        f"`{ATTENTION}.k_scale` is missing: the scale of the keys of `{ATTENTION}`",
        f"`{ATTENTION}.v_scale` is missing: the scale of the values of `{ATTENTION}`",
    ]
    scales = {f"{MODULE}.k_scale": ones(), f"{ATTENTION}.v_proj.v_scale": ones()}
    found = describe(tmp_path, config, {**TENSORS, **scales})
    assert found is not None
    assert [cache.module for cache in found.caches] == [ATTENTION]


SIZES = st.sampled_from([8, 16, 32, 64, 128, 256])
SHAPES = st.lists(st.tuples(st.integers(1, 600), st.integers(1, 600)), min_size=1, max_size=4)


@given(size=SIZES, shapes=SHAPES)
def test_the_block_size_that_wrote_the_scales_is_found(
    size: int, shapes: list[tuple[int, int]]
) -> None:
    """Or none at all, where another size would have given the same shapes."""
    grids = {other: grids_of(shapes, other) for other in BLOCK_SIZES}
    same = [other for other in BLOCK_SIZES if grids[other] == grids[size]]
    found = block_size_of(list(zip(shapes, grids[size], strict=True)))
    if 128 in same:
        assert found == 128  # the usual size wins
    else:
        assert found == (size if same == [size] else None)


def grids_of(shapes: list[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    return [(-(-rows // size), -(-columns // size)) for rows, columns in shapes]


def test_the_usual_block_size_wins() -> None:
    assert block_size_of([((192, 64), (2, 1))]) == 128
    assert block_size_of([]) == 128


def test_one_misshapen_scale_does_not_hide_the_block_size() -> None:
    right: list[Grid] = [((64, 64), (4, 4)), ((32, 64), (2, 4))]
    assert block_size_of([*right, ((64, 32), (7, 1))]) == 16
    assert block_size_of([right[0], ((64, 32), (7, 1)), ((64, 32), (1, 7))]) is None


def test_a_block_size_that_nobody_can_tell(tmp_path: Path) -> None:
    config = {**FP8, "quant_algo": "fp8_pb_wo"}
    with pytest.raises(CompileError) as caught:
        describe(tmp_path, None, linear(shape=(6, 16), weight_scale=ones(4, 1, 1, 1)), config)
    assert (caught.value.code, "no block size" in caught.value.cause) == ("QNT002", True)
