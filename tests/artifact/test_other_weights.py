"""What `--weights-from DIR` demands of the weights of a quantised model."""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import numpy as np
import pytest
from memory_checkpoint import MemoryCheckpoint

from furiosa_llm.artifact.other_weights import check_alike, check_other_weights
from furiosa_llm.errors import CompileError
from furiosa_llm.frontend.checkpoint import Array
from furiosa_llm.frontend.parameters import ParameterSpec, bind_parameters

BF16, F32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)
CODES = np.dtype(ml_dtypes.float8_e4m3fn)
WEIGHT, SCALE, NORM = "up_proj.weight", "up_proj.weight_scale", "norm.weight"
GIVEN: Mapping[str, Array] = {
    WEIGHT: np.full((2, 3), 1.5, CODES),
    SCALE: np.full((2, 1), 0.125, BF16),
    NORM: np.ones(3, BF16),
}
SPECS = [ParameterSpec(name, array.shape, array.dtype) for name, array in GIVEN.items()]


def check(changes: Mapping[str, Array], specs: list[ParameterSpec] = SPECS) -> list[str]:
    checkpoint = MemoryCheckpoint({**GIVEN, **changes})
    check_alike(specs, checkpoint)
    return check_other_weights(bind_parameters(specs, checkpoint))


def test_weights_of_the_build_fit() -> None:
    assert check({}) == []


def test_other_types_fit_where_every_value_is_the_same() -> None:
    assert check({SCALE: np.full((2, 1), 0.125, F32), NORM: np.full(3, 1.5, np.float16)}) == []


def test_tensors_that_nothing_uses_are_said() -> None:
    (line,) = check({"rotary_emb.inv_freq": np.ones(2, F32)})
    assert line.startswith("1 tensor is dropped (F32, such as rotary_emb.inv_freq)")


def test_plain_weights_may_be_rounded_and_that_is_said() -> None:
    """As in a build: everything is computed in bf16."""
    plain = [ParameterSpec(NORM, (3,), BF16)]
    checkpoint = MemoryCheckpoint({NORM: np.full(3, 0.1, F32)})
    (line,) = check_other_weights(bind_parameters(plain, checkpoint))
    assert line == "1 tensor is requantized (F32, such as norm.weight): rounded to BF16"


UNFIT: Mapping[str, tuple[Mapping[str, Array], str, str]] = {
    "a rounded scale": ({SCALE: np.full((2, 1), 0.1, F32)}, "CKP005", "`up_proj.weight_scale` is"),
    "a rounded weight": ({NORM: np.full(3, 0.1, F32)}, "CKP005", "`norm.weight` is stored as"),
    "zero": ({SCALE: np.zeros((2, 1), BF16)}, "QNT005", "`up_proj.weight_scale` is zero"),
    "NaN": ({SCALE: np.full((2, 1), np.nan, BF16)}, "QNT005", "`up_proj.weight_scale` is nan"),
    "a NaN among codes": ({WEIGHT: np.full((2, 3), np.nan, CODES)}, "QNT011", "has 6 codes"),
    "no codes": ({WEIGHT: np.ones((2, 3), BF16)}, "QNT023", "is BF16, the artifact takes F8_E4M3"),
    "a scale too many": ({"k_proj.k_scale": np.ones(1, F32)}, "QNT003", "`k_proj.k_scale` scales"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_a_build_would_refuse_is_refused_by_name(name: str) -> None:
    changes, code, said = UNFIT[name]
    with pytest.raises(CompileError) as caught:
        check(changes)
    assert caught.value.code == code
    assert said in caught.value.cause


def test_codes_are_refused_by_plain_artifacts() -> None:
    plain = [ParameterSpec(name, array.shape, BF16) for name, array in GIVEN.items()]
    with pytest.raises(CompileError, match=r"`up_proj\.weight` is F8_E4M3") as caught:
        check({}, plain)
    assert caught.value.code == "QNT023"


def test_scales_are_refused_by_plain_artifacts() -> None:
    """Its weights alone might be of the right shape and type."""
    plain = [spec for spec in SPECS if spec.name == NORM]
    with pytest.raises(CompileError, match=r"`up_proj\.weight_scale` scales nothing"):
        check({}, plain)


def test_plain_models_may_have_parameters_of_this_name() -> None:
    zero = {"gate.scale": np.zeros(3, F32)}
    spec = ParameterSpec("gate.scale", (3,), BF16)
    check_other_weights(bind_parameters([spec], MemoryCheckpoint(zero)))
